//! Whether virtual CPUs have gone on with what they were answered.

use super::Engine;
use crate::{Hypervisor, VcpuId};

impl Engine {
    /// Whether nothing is still to be done of an answer: registers, an emulation, an INT3 of the guest's own. Xen does these
    /// only when the virtual CPU goes on, and where many share a CPU that takes milliseconds. If a page is taken out of a
    /// view meanwhile, it does them too late (`hvm_do_resume`, xen/arch/x86/hvm/hvm.c).
    ///
    /// A virtual CPU has gone on if it is not at the instruction any more that it was answered for, or has raised an event.
    /// One whose instruction jumps to itself does neither, once its breakpoint is gone: a relative jump is therefore
    /// stepped. (By way of a register a guest can still keep us waiting.) Nor does one whose next event, at the same
    /// instruction, has not been handled.
    pub fn is_settled<H: Hypervisor>(&mut self, hv: &mut H) -> bool {
        while let Some(vcpu) = self.pending.last().copied() {
            if let Some(slot) = self.vcpus.get_mut(usize::from(vcpu.0)) {
                slot.answered = slot.answered.filter(|at| hv.rip(vcpu).is_ok_and(|rip| rip == *at));
                if slot.answered.is_some() {
                    return false;
                }
                slot.pending = false;
            }
            self.pending.pop();
        }
        true
    }

    /// A virtual CPU has something to do with its answer when it goes on.
    #[cold]
    pub(super) fn note_pending(&mut self, index: usize) {
        if let Ok(vcpu) = u16::try_from(index) {
            self.vcpus[index].pending = true;
            self.pending.push(VcpuId(vcpu));
        }
    }

    /// Whether a view has let go of a page since a virtual CPU was last answered: then Xen would be
    /// [late](crate::views::Views::unmappings) with its next answer.
    #[inline(always)]
    pub(super) fn is_late(&self, index: usize) -> bool {
        self.vcpus[index].is_late(self.unmappings_noted)
    }

    /// A virtual CPU has raised an event that the engine is not asked about: it has gone on with what it was answered.
    pub fn has_gone_on(&mut self, vcpu: VcpuId) {
        if let Some(slot) = self.vcpus.get_mut(usize::from(vcpu.0)) {
            slot.answered = None;
        }
    }
}
