//! An INT3 was executed: a hit, or the guest's own.

use super::{Engine, Observed, VACANT};
use crate::breakpoint::{Located, Page};
use crate::insn::paging;
use crate::placement::INT3;
use crate::{Action, Event, Gpa, Hypervisor, Int3, PAGE_SIZE, Placement, Registers, Reply, StepOver, conceal, step};

impl Engine {
    pub(super) fn on_int3<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        int3: &Int3,
        reply: &mut Reply,
    ) -> Result<Observed, H::Error> {
        // With prefixes, the 0xCC is the last byte, and may be in the next page.
        let before = u64::from(int3.length.max(1)) - 1;
        let at = match u64::from(int3.gpa.offset()) + before < PAGE_SIZE as u64 {
            true => Some(Gpa(int3.gpa.0 + before)),
            false => {
                let registers = &event.registers;
                let linear = registers.cs_base.wrapping_add(registers.rip).wrapping_add(before);
                paging::translate(hv, registers, linear)
            }
        };
        let Some(at) = at else {
            self.counters.reinjected += 1;
            *reply = reinject();
            return Ok(Observed::Answered);
        };
        let exec = self.views.as_ref().map(|views| views.exec);
        let met = |page: &Page| page.shadow.is_none() || Some(event.view) == exec;
        let Some(breakpoint) = self.locate(at).filter(|at| met(self.registry.located(*at).0)) else {
            return reply.answered(self.on_foreign_int3(hv, at));
        };
        let vcpu = &mut self.vcpus[index];
        if at != int3.gpa {
            // The guest jumped to a prefix before the breakpoint: that is another instruction, and no hit.
            return reply.answered(self.run_prefixed(hv, index, event, at));
        }
        if vcpu.stepping && vcpu.over == Some(at) {
            // Another virtual CPU has set the breakpoint again before this one was over it: still the same hit.
            // Else its byte is not there any more, or not now.
            if let Some(found) = self.registry.at(at).filter(|(page, _)| page.lifted == 0) {
                step::step(hv, self.views.as_ref(), vcpu, found, event.registers.rip, reply)?;
            }
            return Ok(Observed::Answered);
        }
        if vcpu.stepping
            && let Some(before) = vcpu.over.take()
        {
            // The step went on to the next breakpoint: an instruction that exits to the hypervisor ends without one.
            self.arm_again(hv, before);
        }
        self.hit_at = hv.now();
        self.hit = Some((at, breakpoint));
        self.count_hit(breakpoint);
        Ok(Observed::Hit(at))
    }

    /// Where a breakpoint is. Most often it is the one that was hit last.
    pub(super) fn locate(&self, at: Gpa) -> Option<Located> {
        match self.hit {
            Some((hit, before)) if hit == at => self.registry.locate_again(at, before),
            _ => self.registry.locate(at),
        }
    }

    #[inline]
    pub(super) fn count_hit(&mut self, at: Located) {
        self.counters.hits += 1;
        self.registry.located_mut(at).figures.hits += 1;
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
        let (page, breakpoint) = self.registry.located(located);
        if breakpoint.displaced.byte() == INT3 {
            self.counters.reinjected += 1;
            *reply = reinject();
            return Ok(());
        }
        let lifted = page.placement == Placement::InPlace && page.lifted > 0;
        let at_once = match steps {
            true => None,
            false => step::at_once(hv, views, vcpu, &self.registry, (page, breakpoint), registers, reply),
        };
        // A response has room for new registers or for what to emulate, but not for both.
        let fits = !changed || matches!(reply.action, Action::SetRegisters(_));
        let served = match at_once.filter(|_| fits) {
            Some(served) => served,
            None if lifted => {
                // Its byte is not there now, and nobody may execute the page: this virtual CPU joins the one that
                // the page is lifted for.
                vcpu.over = Some(at);
                let Some(page) = self.registry.page_mut(at.gfn()) else { return Ok(()) };
                *reply = conceal::on_own_bytes(hv, views, vcpu, page, registers, false)?;
                StepOver::Repair
            }
            None => step::step(hv, views, vcpu, (page, breakpoint), registers.rip, reply)?,
        };
        let breakpoint = self.registry.located_mut(located);
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
            self.counters.reinjected += 1;
            return Ok(reinject());
        }
        let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
        match self.registry.page_mut(at.gfn()) {
            Some(page) => conceal::on_own_bytes(hv, views, vcpu, page, &event.registers, false),
            None => Ok(Reply::default()),
        }
    }

    /// An INT3 that is no breakpoint's: the guest's own, or one of ours that was removed while the event was queued.
    fn on_foreign_int3<H: Hypervisor>(&mut self, hv: &mut H, at: Gpa) -> Result<Reply, H::Error> {
        let mut byte = [0];
        if hv.read(at, &mut byte).is_ok() && byte[0] != INT3 {
            self.counters.unexplained += 1;
            return Ok(Reply::default());
        }
        self.counters.reinjected += 1;
        Ok(reinject())
    }
}

fn reinject() -> Reply {
    Reply { action: Action::Reinject, ..Reply::default() }
}
