//! A breakpoint was hit: its subscribers are told, and it is stepped over.

use super::{Engine, Hit, VACANT, Verdict};
use crate::breakpoint::Located;
use crate::dr7::{self, Dr7};
use crate::placement::{self, INT3};
use crate::step::{self, Over, Vcpu};
use crate::{
    Action, BreakpointId, Error, Event, Gpa, Hypervisor, Int3, Placement, Registers, Reply, StepOver, conceal,
};

/// A breakpoint that was met.
#[derive(Clone, Copy, Debug)]
pub(super) struct Met {
    pub(super) at: Gpa,
    pub(super) found: Located,
    /// The subscriber that came first, and the one that came last. Those who come meanwhile are not told.
    first: BreakpointId,
    last: BreakpointId,
}

impl Engine {
    /// The breakpoint that an INT3 has hit, if it has hit one. It is counted.
    #[inline]
    pub(super) fn meet<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        in_the_middle: bool,
        event: &Event,
        int3: &Int3,
    ) -> Option<Met> {
        let at = int3.gpa;
        if int3.length > 1 || (in_the_middle && self.is_same_hit(hv, index, event, at)) {
            return None;
        }
        let views = self.views.as_ref();
        let exec = || views.is_some_and(|views| views.exec == event.view);
        let (found, breakpoint) = self.registry.met(at, |page| page.shadow.is_none() || exec())?;
        breakpoint.figures.hits += 1;
        let (first, last) = breakpoint.first_and_last();
        self.counters.hits += 1;
        self.hit_at = hv.now();
        Some(Met { at, found, first, last })
    }

    /// Whether a vCPU that is in the middle of an instruction has met the breakpoint again that this is under.
    #[cold]
    fn is_same_hit<H: Hypervisor>(&mut self, hv: &mut H, index: usize, event: &Event, at: Gpa) -> bool {
        (self.vcpus[index].stepping && self.is_same_step(hv, index, event, at))
            || self.vcpus[index].is_repeating(at, &event.registers)
    }

    /// Whether a vCPU that is stepped has met the breakpoint again that it is stepped over. If it has met another one, that
    /// step is over.
    fn is_same_step<H: Hypervisor>(&mut self, hv: &mut H, index: usize, event: &Event, at: Gpa) -> bool {
        let Some(found) = self.locate_met(at, event) else { return false };
        let Vcpu { over, interrupted, .. } = &mut self.vcpus[index];
        if over.is_some_and(|over| over.at == at) {
            return true;
        }
        if over.is_none() && *interrupted == Some(event.registers.rip) {
            // It was told of, and its delivery was interrupted.
            *over = Some(Over { at, found });
            return true;
        }
        // An instruction that exits to the hypervisor ends without an event.
        if let Some(before) = over.take() {
            self.vcpus[index].changed = None;
            self.arm_again(hv, before);
        }
        false
    }

    /// The breakpoint at an address that was hit there, if it still is one. Most often nothing has been inserted or removed
    /// since.
    pub(super) fn met_at(&self, at: Gpa) -> Option<Met> {
        let met = self.met.filter(|met| met.at == at && self.registry.is_there(met.found));
        met.or_else(|| {
            let found = self.registry.locate(at)?;
            let (first, last) = self.registry.located(found).1.first_and_last();
            Some(Met { at, found, first, last })
        })
    }

    /// Where a breakpoint is now that was found there, if it still is one. Most often nothing has been inserted or removed since.
    #[inline]
    pub(super) fn find_again(&self, at: Gpa, found: Located) -> Option<Located> {
        if self.registry.is_there(found) { Some(found) } else { self.locate_again(at) }
    }

    #[cold]
    fn locate_again(&self, at: Gpa) -> Option<Located> {
        self.registry.locate(at)
    }

    /// Tells the subscribers of a breakpoint.
    #[inline]
    pub(super) fn tell_of<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        event: &Event,
        met: &Met,
        on_hit: &mut impl FnMut(&mut Self, &mut H, &Hit<'_>) -> Verdict,
    ) {
        let mut breakpoint = met.first;
        loop {
            let verdict = on_hit(self, hv, &Hit { breakpoint, vcpu: event.vcpu, registers: &event.registers });
            if verdict == Verdict::Remove {
                self.remove_told(hv, breakpoint);
            }
            if breakpoint == met.last {
                return;
            }
            match self.next_told(breakpoint, met.last) {
                Some(next) => breakpoint = next,
                None => return,
            }
        }
    }

    /// Who is to be told next. Anything may have been inserted and removed.
    #[cold]
    fn next_told(&self, told: BreakpointId, last: BreakpointId) -> Option<BreakpointId> {
        self.registry.at(told.gpa())?.1.next(told, last)
    }

    /// Removes a breakpoint because the subscriber that was told of a hit says so.
    #[cold]
    fn remove_told<H: Hypervisor>(&mut self, hv: &mut H, breakpoint: BreakpointId) {
        if let Err(error @ Error::Hypervisor { .. }) = self.remove(hv, breakpoint) {
            log::warn!("a breakpoint at {} could not be removed: {}", breakpoint.gpa(), error.with_causes());
            self.counters.failures += 1;
        }
    }

    /// Answers a hit, after those it concerns have been told, if there still is a breakpoint.
    #[inline(always)]
    pub(super) fn end_hit<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        found: Option<Located>,
        changed: Option<&Registers>,
        reply: &mut Reply,
    ) {
        if let (Some(found), Some(changed)) = (found, changed)
            && self.is_late(index)
        {
            return self.put_off(hv, index, event, found, changed, reply);
        }
        let moved = changed.is_some_and(|registers| registers.rip != event.registers.rip);
        let done = match found {
            Some(found) if !moved => self.step_over::<_, true>(hv, index, found, event, changed, reply),
            _ => Ok(()),
        };
        self.handling.record(hv.now().saturating_sub(self.hit_at));
        self.end_told(hv, index, event, done, changed, reply);
    }

    /// Xen would be late with registers that were changed at a hit: the virtual CPU meets the breakpoint again, which is known
    /// to be the same hit, and gets them then.
    #[cold]
    fn put_off<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        found: Located,
        changed: &Registers,
        reply: &mut Reply,
    ) {
        if let Err(error) = self.check_current(hv, found) {
            return self.end_told(hv, index, event, Err(error), None, reply);
        }
        let breakpoint = self.registry.located(found).1;
        let moved = changed.rip != event.registers.rip;
        let own = breakpoint.displaced.byte() == INT3;
        let at = breakpoint.gpa;
        let vcpu = &mut self.vcpus[index];
        vcpu.changed = (moved || !own).then_some(*changed);
        *reply = vcpu.step_over(at, found);
        self.handling.record(hv.now().saturating_sub(self.hit_at));
        self.end_told(hv, index, event, Ok(()), None, reply);
    }

    /// Lets the instruction under a breakpoint run, which is compared with memory if `COMPARE`.
    #[inline(always)]
    pub(super) fn step_over<H: Hypervisor, const COMPARE: bool>(
        &mut self,
        hv: &mut H,
        index: usize,
        found: Located,
        event: &Event,
        changed: Option<&Registers>,
        reply: &mut Reply,
    ) -> Result<(), H::Error> {
        let (page, spot, claims) = self.registry.parts(found);
        let (placement, lifted) = (page.placement, page.lifted > 0);
        let breakpoint = &mut page.breakpoints[spot];
        if COMPARE && !placement::is_current(hv, placement, breakpoint) {
            return self.step_over_another(hv, index, found, event, changed, reply);
        }
        let registers = changed.unwrap_or(&event.registers);
        let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
        if breakpoint.displaced.byte() == INT3 {
            let at = breakpoint.gpa;
            *reply = self.reinjected_after_hit(index, at, found);
            return Ok(());
        }
        // With new registers, and with what to emulate, Xen may be late. If many pages wait to be given back, that is done
        // now: after an answer that it is not late with.
        let crowded = self.chores >= VACANT && changed.is_none();
        let steps = breakpoint.step_over.steps() || crowded;
        if !steps && !vcpu.is_late(self.unmappings_noted) {
            let ask = placement == Placement::InPlace || breakpoint.step_over != StepOver::Auto;
            let dr7 = Dr7 { vcpu: event.vcpu, trust_event: self.trust_event_dr7, ask };
            let served = step::at_once(hv, views, vcpu, claims, (placement, breakpoint), (registers, dr7), reply);
            // A response has room for new registers or for what to emulate, but not for both.
            let fits = changed.is_none() || matches!(reply.action, Action::SetRegisters(_));
            if let Some(served) = served.filter(|_| fits) {
                breakpoint.count(registers, served);
                return Ok(());
            }
        }
        if lifted {
            return self.step_while_lifted(hv, index, found, registers, reply);
        }
        let served = step::step(hv, views, vcpu, placement, (found, breakpoint), registers, reply)?;
        breakpoint.count(registers, served);
        // Always setting it would cost the step-overs that always step more than it is worth: only if the event shows a
        // breakpoint of the guest's. With other registers nobody could tell that a jump to itself has resumed.
        let waits = || breakpoint.displaced.form(registers.mode).jumps_to_itself;
        if dr7::is_on(registers.dr7) || !(steps || waits()) {
            self.set_resume_flag(index, registers, reply);
        }
        Ok(())
    }

    /// The same, after something that is no event has written another instruction there.
    #[cold]
    fn step_over_another<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        found: Located,
        event: &Event,
        changed: Option<&Registers>,
        reply: &mut Reply,
    ) -> Result<(), H::Error> {
        self.resync_found(hv, found)?;
        self.step_over::<_, false>(hv, index, found, event, changed, reply)
    }

    /// The byte of a breakpoint that was hit is not there now, and nobody may execute the page: this vCPU joins the one that
    /// the page is lifted for.
    #[cold]
    fn step_while_lifted<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        found: Located,
        registers: &Registers,
        reply: &mut Reply,
    ) -> Result<(), H::Error> {
        let (page, spot, _) = self.registry.parts(found);
        let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
        vcpu.over = Some(Over { at: page.breakpoints[spot].gpa, found });
        *reply = conceal::on_own_bytes(hv, views, vcpu, page, registers, false)?;
        page.breakpoints[spot].count(registers, StepOver::Repair);
        self.set_resume_flag(index, registers, reply);
        Ok(())
    }

    /// The CPU fetches the instruction at RIP again, where it has executed an INT3 of ours. It must not compare its address
    /// with the guest's own breakpoints again: it has done so before the INT3, which has cleared RF (Intel SDM volume 3,
    /// sections 18.3.1.1 and 28.3.3). With one of the guest's there, its handler would be called twice, or without end.
    #[inline(always)]
    pub(super) fn set_resume_flag(&self, index: usize, registers: &Registers, reply: &mut Reply) {
        // What Xen would be late with, nobody can set.
        if !self.is_late(index)
            && matches!(reply.action, Action::Resume)
            && (!self.trust_event_dr7 || dr7::is_on(registers.dr7))
        {
            reply.set_registers(registers).rflags |= Registers::RF;
        }
    }
}
