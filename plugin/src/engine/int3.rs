//! An INT3 was executed: a hit, or the guest's own.

use super::{Engine, VACANT};
use crate::breakpoint::Located;
use crate::insn::paging;
use crate::placement::INT3;
use crate::views::Views;
use crate::{Action, Event, Gpa, Hypervisor, Int3, PAGE_SIZE, Registers, Reply, StepOver, conceal, step};

impl Engine {
    /// Whether an INT3 is a hit, which is counted then.
    #[inline]
    pub(super) fn is_hit<H: Hypervisor>(&mut self, hv: &mut H, index: usize, event: &Event, int3: &Int3) -> bool {
        let at = int3.gpa;
        if int3.length > 1 || (self.vcpus[index].stepping && self.is_same_hit(hv, index, event, at)) {
            return false;
        }
        let exec = self.views.as_ref().map(|views| views.exec);
        let Some(found) = self.registry.hit(at, |page| page.shadow.is_none() || Some(event.view) == exec) else {
            return false;
        };
        self.counters.hits += 1;
        self.hit_at = hv.now();
        self.hit = Some((at, found));
        true
    }

    /// Whether a virtual CPU that is stepped has met the breakpoint again that it is stepped over. If it has met another one,
    /// that step is over.
    #[cold]
    fn is_same_hit<H: Hypervisor>(&mut self, hv: &mut H, index: usize, event: &Event, at: Gpa) -> bool {
        if self.locate_met(at, event).is_none() {
            return false;
        }
        let over = &mut self.vcpus[index].over;
        if *over == Some(at) {
            return true;
        }
        // An instruction that exits to the hypervisor ends without an event.
        if let Some(before) = over.take() {
            self.arm_again(hv, before);
        }
        false
    }

    /// An INT3 that is no hit.
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
        } else if vcpu.stepping && vcpu.over == Some(int3.gpa) && self.locate_met(int3.gpa, event).is_some() {
            self.step_again(hv, index, int3.gpa, event)
        } else {
            self.on_foreign_int3(hv, int3.gpa)
        }
    }

    /// Where the breakpoint at an address is, if that is what the virtual CPU has executed there.
    fn locate_met(&self, at: Gpa, event: &Event) -> Option<Located> {
        let found = self.registry.locate(at)?;
        let exec = |views: &Views| views.exec == event.view;
        (self.registry.located(found).0.shadow.is_none() || self.views.as_ref().is_some_and(exec)).then_some(found)
    }

    /// Where a breakpoint is that was hit, if it still is a breakpoint. Most often nothing has been inserted or removed since.
    #[inline]
    pub(super) fn locate(&self, at: Gpa) -> Option<Located> {
        match self.hit {
            Some((hit, found)) if hit == at && self.registry.is_there(found) => Some(found),
            _ => self.locate_again(at),
        }
    }

    #[cold]
    fn locate_again(&self, at: Gpa) -> Option<Located> {
        self.registry.locate(at)
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
            Some(at) => self.on_foreign_int3(hv, at),
            None => Ok(self.reinjected()),
        }
    }

    /// Another virtual CPU has set the breakpoint again before this one was over it: still the same hit. Else its byte is not
    /// there any more, or not now.
    fn step_again<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        at: Gpa,
        event: &Event,
    ) -> Result<Reply, H::Error> {
        let mut reply = Reply::default();
        if let Some((page, breakpoint)) = self.registry.at(at).filter(|(page, _)| page.lifted == 0) {
            let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
            step::step(hv, views, vcpu, (page.placement, breakpoint), event.registers.rip, &mut reply)?;
        }
        Ok(reply)
    }

    /// It was the guest's own INT3.
    #[cold]
    fn reinjected(&mut self) -> Reply {
        self.counters.reinjected += 1;
        Reply { action: Action::Reinject, ..Reply::default() }
    }

    /// Lets the instruction under the breakpoint at `at` run, if there still is one.
    pub(super) fn step_over<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        at: Gpa,
        registers: &Registers,
        changed: bool,
        reply: &mut Reply,
    ) -> Result<(), H::Error> {
        let Some(located) = self.locate(at) else { return Ok(()) };
        // If many pages wait to be given back, that is done now: after an answer that Xen is not late with.
        let steps = self.is_late(index) || (self.vacant.len() >= VACANT && !changed);
        let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
        let (page, spot, claims) = self.registry.parts(located);
        let breakpoint = &page.breakpoints[spot];
        if breakpoint.displaced.byte() == INT3 {
            *reply = self.reinjected();
            return Ok(());
        }
        let at_once = match steps {
            true => None,
            false => step::at_once(hv, views, vcpu, claims, (page.placement, breakpoint), registers, reply),
        };
        // A response has room for new registers or for what to emulate, but not for both.
        let fits = !changed || matches!(reply.action, Action::SetRegisters(_));
        let served = match at_once.filter(|_| fits) {
            Some(served) => served,
            None if page.lifted > 0 => {
                // Its byte is not there now, and nobody may execute the page: this virtual CPU joins the one that
                // the page is lifted for.
                vcpu.over = Some(at);
                *reply = conceal::on_own_bytes(hv, views, vcpu, page, registers, false)?;
                StepOver::Repair
            }
            None => step::step(hv, views, vcpu, (page.placement, breakpoint), registers.rip, reply)?,
        };
        let breakpoint = &mut page.breakpoints[spot];
        let fallback = step::is_fallback(breakpoint, registers, served);
        breakpoint.figures.served.count(served);
        breakpoint.figures.fallbacks += u64::from(fallback);
        Ok(())
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
        match self.registry.page_mut(at.gfn()) {
            Some(page) => conceal::on_own_bytes(hv, views, vcpu, page, &event.registers, false),
            None => Ok(Reply::default()),
        }
    }

    /// An INT3 that is no breakpoint's: the guest's own, or one of ours that was removed while the event was queued.
    #[inline(never)]
    fn on_foreign_int3<H: Hypervisor>(&mut self, hv: &mut H, at: Gpa) -> Result<Reply, H::Error> {
        let mut byte = [0];
        if hv.read(at, &mut byte).is_ok() && byte[0] != INT3 {
            self.counters.unexplained += 1;
            return Ok(Reply::default());
        }
        Ok(self.reinjected())
    }
}
