//! An INT3 was executed that is no hit: the guest's own, or one that is met again.

use super::Engine;
use crate::breakpoint::Located;
use crate::insn::paging;
use crate::placement::INT3;
use crate::views::Views;
use crate::{Action, Event, Gpa, Hypervisor, Int3, PAGE_SIZE, Registers, Reply, conceal, step};

impl Engine {
    /// Answers an INT3 that is no hit.
    #[inline(never)]
    pub(super) fn on_other_int3<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        int3: &Int3,
    ) -> Result<Reply, H::Error> {
        let vcpu = &self.vcpus[index];
        if int3.length > 1 {
            self.on_prefixed_int3(hv, index, event, int3)
        } else if (vcpu.repeating.is_some_and(|repeating| repeating.at == int3.gpa)
            || (vcpu.stepping && vcpu.is_over(int3.gpa)))
            && self.locate_met(int3.gpa, event).is_some()
        {
            self.step_again(hv, index, int3.gpa, event)
        } else {
            self.on_foreign_int3(hv, index, event, int3.gpa)
        }
    }

    /// Where the breakpoint at an address is, if that is what the virtual CPU has executed there.
    pub(super) fn locate_met(&self, at: Gpa, event: &Event) -> Option<Located> {
        let found = self.registry.locate(at)?;
        let exec = |views: &Views| views.exec == event.view;
        (self.registry.located(found).0.shadow.is_none() || self.views.as_ref().is_some_and(exec)).then_some(found)
    }

    /// An INT3 with prefixes. The 0xCC is its last byte, and may be in the next page.
    #[cold]
    fn on_prefixed_int3<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        int3: &Int3,
    ) -> Result<Reply, H::Error> {
        let before = u64::from(int3.length) - 1;
        let at = match u64::from(int3.gpa.offset()) + before < PAGE_SIZE as u64 {
            true => Some(Gpa(int3.gpa.0 + before)),
            false => {
                let registers = &event.registers;
                let linear = registers.cs_base.wrapping_add(registers.rip).wrapping_add(before);
                paging::translate(hv, registers, linear)
            }
        };
        match at {
            // The guest jumped to a prefix before the breakpoint: that is another instruction, and no hit.
            Some(at) if self.locate_met(at, event).is_some() => self.run_prefixed(hv, index, event, at),
            Some(at) => self.on_foreign_int3(hv, index, event, at),
            None => Ok(self.reinjected()),
        }
    }

    /// Another virtual CPU has set the breakpoint again before this one was over it: still the same hit. Else its byte is not
    /// there any more, or not now.
    pub(super) fn step_again<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        at: Gpa,
        event: &Event,
    ) -> Result<Reply, H::Error> {
        let mut reply = Reply::default();
        if let Some(found) = self.registry.locate(at) {
            self.check_current(hv, found)?;
            if let Some(registers) = self.vcpus[index].changed {
                return self.step_with(hv, index, found, event, registers);
            }
            let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
            let (page, breakpoint) = self.registry.located(found);
            if breakpoint.displaced.byte() == INT3 {
                return Ok(self.reinjected());
            }
            if page.lifted == 0 {
                let registers = &event.registers;
                step::step(hv, views, vcpu, page.placement, (found, breakpoint), registers, &mut reply)?;
                self.set_resume_flag(index, registers, &mut reply);
            }
        }
        Ok(reply)
    }

    /// It was the guest's own INT3.
    #[cold]
    pub(super) fn reinjected(&mut self) -> Reply {
        self.counters.reinjected += 1;
        Reply { action: Action::Reinject, ..Reply::default() }
    }

    /// The same under a breakpoint that was hit. If Xen would be late with it, the virtual CPU meets it again, and it is
    /// known to be the same hit.
    #[cold]
    pub(super) fn reinjected_after_hit(&mut self, index: usize, at: Gpa, found: Located) -> Reply {
        if !self.is_late(index) {
            return self.reinjected();
        }
        self.vcpus[index].step_over(at, found)
    }

    /// The virtual CPU has met the breakpoint again at which its registers were [put off](Self::put_off).
    #[cold]
    fn step_with<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        found: Located,
        event: &Event,
        registers: Registers,
    ) -> Result<Reply, H::Error> {
        let late = self.is_late(index);
        let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
        let (page, breakpoint) = self.registry.located(found);
        let moved = registers.rip != event.registers.rip;
        let mut reply = Reply::default();
        if late || (page.lifted > 0 && !moved) {
            // Not yet.
            return Ok(reply);
        }
        vcpu.changed = None;
        if !moved {
            if breakpoint.displaced.byte() == INT3 {
                return Ok(self.reinjected());
            }
            let served = step::step(hv, views, vcpu, page.placement, (found, breakpoint), &registers, &mut reply)?;
            self.registry.located_mut(found).count(&registers, served);
        }
        reply.action = Action::SetRegisters(registers);
        if !moved {
            reply.set_registers(&registers).rflags |= Registers::RF;
        }
        Ok(reply)
    }

    /// Runs an instruction that ends in the breakpoint at `at`, on the guest's own bytes.
    fn run_prefixed<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        at: Gpa,
    ) -> Result<Reply, H::Error> {
        if self.registry.at(at).is_some_and(|(_, breakpoint)| breakpoint.displaced.byte() == INT3) {
            return Ok(self.reinjected());
        }
        let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
        let mut reply = match self.registry.page_mut(at.gfn()) {
            Some(page) => conceal::on_own_bytes(hv, views, vcpu, page, &event.registers, false)?,
            None => Reply::default(),
        };
        self.set_resume_flag(index, &event.registers, &mut reply);
        Ok(reply)
    }

    /// An INT3 that is no breakpoint's: the guest's own, or one of ours that was removed while the event was queued.
    #[inline(never)]
    fn on_foreign_int3<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        at: Gpa,
    ) -> Result<Reply, H::Error> {
        let mut byte = [0];
        if hv.read(at, &mut byte).is_ok() && byte[0] != INT3 {
            self.counters.unexplained += 1;
            let mut reply = Reply::default();
            self.set_resume_flag(index, &event.registers, &mut reply);
            return Ok(reply);
        }
        Ok(self.reinjected())
    }
}
