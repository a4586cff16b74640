//! The guest's own data breakpoints.
//!
//! The CPU compares each memory access of an instruction with the debug registers. An instruction that is interpreted or
//! emulated makes its accesses without the CPU: with a data breakpoint on, the guest would miss a #DB.
//!
//! The DR7 of an event does not tell. It is what Xen saved when it last switched the virtual CPU out (`vm_event_fill_regs`
//! takes `arch.dr7`). The first MOV to a debug register after that exits to Xen, which lets all further ones run without an
//! exit (`vmx_dr_access`), and saves DR7 at the next switch (`vmx_save_dr`). No event reports any of them. So it cannot be
//! known either that a guest has never used them.
//!
//! There are two ways to be exact: to step, so that the CPU makes the access; or to ask the hypervisor for the current DR7. In
//! Xen that is a hypercall which switches to the virtual CPU's VMCS and back for every segment register: in the lab, it takes
//! about 12,000 ticks, and a fast step 2,100 more than interpreting. So [`StepOver::Auto`](crate::StepOver::Auto) steps where a
//! fast step is possible, and everything else asks.

use crate::{Hypervisor, Registers, VcpuId};

/// How to learn whether data breakpoints are on in a virtual CPU that waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dr7 {
    pub(crate) vcpu: VcpuId,
    /// The DR7 of the event is taken for the current one.
    pub(crate) trust_event: bool,
    /// The hypervisor is asked. If not, a step is cheaper.
    pub(crate) ask: bool,
}

impl Dr7 {
    /// Whether it is certain that none of the guest's breakpoints is on data or a port. Asks the hypervisor only if the event
    /// shows none.
    #[inline]
    pub(crate) fn watches_nothing<H: Hypervisor>(self, hv: &mut H, registers: &Registers) -> bool {
        if watches_data(registers.dr7) {
            return false;
        }
        self.trust_event || (self.ask && matches!(hv.debug_control(self.vcpu), Ok(Some(dr7)) if !watches_data(dr7)))
    }

    /// Whether [`watches_nothing`](Self::watches_nothing) can be true at all.
    pub(crate) const fn can_tell(self) -> bool {
        self.trust_event || self.ask
    }
}

/// The local and global enable bits of the four breakpoints (Intel SDM volume 3, section 18.2.4).
const ENABLED: u64 = 0xff;

/// Whether one of these breakpoints is on that is not on instructions (R/W other than 00).
const fn watches_data(dr7: u64) -> bool {
    if dr7 & ENABLED == 0 {
        return false;
    }
    let mut number = 0;
    while number < 4 {
        if dr7 >> (2 * number) & 3 != 0 && dr7 >> (16 + 4 * number) & 3 != 0 {
            return true;
        }
        number += 1;
    }
    false
}

/// Whether one of the guest's breakpoints is on, of whatever kind.
pub(crate) const fn is_on(dr7: u64) -> bool {
    dr7 & ENABLED != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breakpoints_on_instructions_watch_no_data() {
        for (dr7, data, on) in [
            (0x400, false, false),
            (0xf000_0400, false, false), // Of the fourth, but it is off.
            (0x401, false, true),
            (0x4aa, false, true),
            (0x1_0401, true, true),
            (0x3_0402, true, true),
            (0x2_0401, true, true),
            (0x10_0401, false, true), // The second is on data, and off.
            (0x10_0408, true, true),
            (0xd000_0480, true, true),
        ] {
            assert_eq!((watches_data(dr7), is_on(dr7)), (data, on), "{dr7:#x}");
        }
    }
}
