//! The hypervisor emulates the instruction: one event and no step.
//!
//! Its emulator works on the guest's own pages, whatever a view shows or denies, and tells nobody. So the instruction must
//! not write to a page with breakpoints, for a shadow would not follow, nor read one with breakpoints in place. Nor does it
//! look at the guest's own breakpoints on [data and ports](crate::dr7).

use super::interpret::Guest;
use super::{Emulating, Vcpu};
use crate::breakpoint::Breakpoint;
use crate::insn::{Form, MemoryUse};
use crate::{Action, Hypervisor, Reply};

/// Whether the emulator can be let loose: what the instruction accesses is [plain](Guest), or most certainly is.
#[inline(never)]
pub(super) fn is_right<H: Hypervisor>(guest: &mut Guest<'_, H>, form: &Form) -> bool {
    match form.memory {
        MemoryUse::None => true,
        MemoryUse::Port => guest.is_unwatched(),
        MemoryUse::Reads | MemoryUse::Writes => match &form.op {
            Some(op) => op
                .operands(guest.registers)
                .is_some_and(|all| all.into_iter().flatten().all(|operand| guest.is_accessible(operand))),
            // Then it reads the stack, the code, or what is a thread's.
            None => form.certain && !guest.claims.has_in_place() && guest.is_unwatched(),
        },
    }
}

pub(super) fn begin(vcpu: &mut Vcpu, breakpoint: &Breakpoint, reply: &mut Reply) {
    vcpu.emulating = Some(Emulating::Displaced(breakpoint.gpa));
    reply.action = Action::EmulateInstruction(breakpoint.displaced.bytes());
}
