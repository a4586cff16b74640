//! A monitored single-step is over: what was owed is done.

use super::{Engine, Observed};
use crate::step::{Over, Pages, Repeating};
use crate::{Event, Gpa, Hypervisor, Registers, Reply, Step, placement};

impl Engine {
    #[inline(always)]
    pub(super) fn on_step<H: Hypervisor>(&mut self, hv: &mut H, index: usize, reply: &mut Reply) -> Observed {
        let vcpu = &mut self.vcpus[index];
        if !std::mem::take(&mut vcpu.stepping) {
            self.counters.unexplained += 1;
        }
        let home = std::mem::take(&mut vcpu.home);
        if !vcpu.pages.is_empty() || vcpu.over.is_some() {
            self.settle_up(hv, index);
        }
        if let Some(access) = self.vcpus[index].accessing.take() {
            return Observed::Accessed(access);
        }
        reply.step = Step::Off;
        if home {
            self.back_home(index, reply);
        }
        Observed::Answered
    }

    /// The end of a single-step that may be an iteration of a repeated instruction (REP). Then the next one follows, and the
    /// breakpoint stays out of its way.
    #[cold]
    pub(super) fn on_iteration<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        reply: &mut Reply,
    ) -> Result<Observed, H::Error> {
        let Some(Repeating { at, .. }) = self.vcpus[index].repeating else { return Ok(self.on_step(hv, index, reply)) };
        // It may have been removed, or the guest may have written to it.
        let length = self.repeated_at(at, &event.registers);
        if length.is_none() {
            self.vcpus[index].repeating = None;
        }
        let goes_on = length.is_some_and(|length| self.vcpus[index].has_next_iteration(&event.registers, length));
        if !goes_on || self.leaving {
            return Ok(self.on_step(hv, index, reply));
        }
        if !self.vcpus[index].pages.is_empty() {
            let pages = std::mem::take(&mut self.vcpus[index].pages);
            self.settle(hv, &pages);
        }
        reply.answered(self.step_again(hv, index, at, event))
    }

    /// The length of the repeated instruction that is under a breakpoint there, if it is one.
    pub(super) fn repeated_at(&self, at: Gpa, registers: &Registers) -> Option<u8> {
        let displaced = &self.registry.at(at)?.1.displaced;
        displaced.form(registers.mode).repeats.then_some(displaced.length())
    }

    /// Does what is owed to pages and breakpoints after a step.
    #[inline(never)]
    fn settle_up<H: Hypervisor>(&mut self, hv: &mut H, index: usize) {
        let vcpu = &mut self.vcpus[index];
        let over = vcpu.over.take();
        vcpu.changed = None;
        if !vcpu.pages.is_empty() {
            let pages = std::mem::take(&mut vcpu.pages);
            self.settle(hv, &pages);
        }
        if let Some(over) = over {
            self.arm_again(hv, over);
        }
    }

    /// Puts the breakpoints on what is now in pages that an instruction may have written to.
    #[cold]
    fn settle<H: Hypervisor>(&mut self, hv: &mut H, pages: &Pages) {
        for &gfn in pages.as_slice() {
            let settled = match (self.registry.page_mut(gfn), &self.views) {
                (Some(page), views) => placement::settle(hv, views.as_ref(), page),
                (None, Some(views)) if views.hides(gfn) => views.seal(hv, gfn),
                (None, _) => Ok(()),
            };
            if let Err(error) = settled {
                log::warn!("the breakpoints of {gfn} could not be set again: {error}");
                self.counters.failures += 1;
            }
        }
        self.follow_others(hv);
    }

    /// A step is over: the virtual CPU goes back to the view it is at home in.
    pub(super) fn back_home(&self, index: usize, reply: &mut Reply) {
        reply.view = self.views.as_ref().map(|views| views.home(self.vcpus[index].monitored));
        reply.step = Step::Off;
    }

    /// A virtual CPU that was in the write view may have written to the pages that others are there for, too.
    fn follow_others<H: Hypervisor>(&mut self, hv: &mut H) {
        for &gfn in self.vcpus.iter().flat_map(|vcpu| vcpu.pages.as_slice()) {
            if let Some(page) = self.registry.page_mut(gfn)
                && let Err(error) = placement::follow(hv, page)
            {
                // The others' steps will end, too.
                log::warn!("the shadow of {gfn} could not follow: {error}");
                self.counters.failures += 1;
            }
        }
    }

    /// Sets a breakpoint again that a virtual CPU has been stepped over.
    #[inline(always)]
    pub(super) fn arm_again<H: Hypervisor>(&mut self, hv: &mut H, over: Over) {
        let Some(found) = self.find_again(over.at, over.found) else { return };
        let (page, breakpoint) = self.registry.located(found);
        if page.lifted > 0 {
            return;
        }
        // While it was out, a device may have written there.
        let armed = match page.shadow.is_some() || placement::is_current(hv, page.placement, breakpoint) {
            true => placement::arm(hv, page, over.at, breakpoint.displaced.byte()),
            false => self.resync_found(hv, found),
        };
        if let Err(error) = armed {
            log::warn!("the breakpoint at {} could not be set again: {error}", over.at);
            self.counters.failures += 1;
        }
    }
}
