//! An event is answered: at once, or in two halves.

use super::{Engine, Hit, Observed, Verdict};
use crate::{Action, Event, Hypervisor, Reason, Registers, Reply, Step, VcpuId};

impl Engine {
    /// Answers an event: [`begin`](Self::begin) and [`end`](Self::end). `on_hit` is called for every hit, once for each
    /// subscriber, before the instruction runs. It is given the engine and the connection, and may insert and remove what
    /// it likes.
    pub fn handle<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        event: &Event,
        on_hit: &mut impl FnMut(&mut Self, &mut H, &Hit<'_>) -> Verdict,
    ) -> Reply {
        let mut reply = Reply::default();
        self.answer(hv, event, on_hit, &mut reply);
        reply
    }

    /// The same, with the reply where it is to be: it is large.
    #[inline]
    pub fn answer<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        event: &Event,
        on_hit: &mut impl FnMut(&mut Self, &mut H, &Hit<'_>) -> Verdict,
        reply: &mut Reply,
    ) {
        if !(matches!(event.reason, Reason::Step) && self.stepped(hv, event.vcpu, reply)) {
            self.answer_whole(hv, event, on_hit, reply);
        }
    }

    #[inline(never)]
    fn answer_whole<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        event: &Event,
        on_hit: &mut impl FnMut(&mut Self, &mut H, &Hit<'_>) -> Verdict,
        reply: &mut Reply,
    ) {
        *reply = Reply::default();
        let Some((index, in_the_middle)) = self.slot(hv, event) else { return };
        if let Reason::Int3(int3) = &event.reason
            && let Some(met) = self.meet(hv, index, in_the_middle, event, int3)
        {
            self.telling = true;
            self.tell_of(hv, event, &met, on_hit);
            let found = self.find_again(met.at, met.found);
            return self.end_hit(hv, index, event, found, None, reply);
        }
        self.answer_other(hv, index, event, on_hit, reply);
    }

    /// Answers an event that is no hit of an INT3.
    #[inline(never)]
    fn answer_other<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        on_hit: &mut impl FnMut(&mut Self, &mut H, &Hit<'_>) -> Verdict,
        reply: &mut Reply,
    ) {
        let observed = self.observe(hv, index, event, reply);
        if !matches!(observed, Observed::Answered) {
            self.tell(hv, event, &observed, on_hit);
            self.end(hv, event, &observed, None, reply);
        }
    }

    /// Looks what an event is. If nobody needs to be told, `reply` is the answer. Else [`end`](Self::end) must follow, before
    /// another event begins.
    ///
    /// Nothing the guest does makes this fail or panic; where the hypervisor refuses something, it is counted, logged
    /// once, and the guest goes on.
    #[must_use = "Engine::end must follow, unless it is Answered"]
    pub fn begin<H: Hypervisor>(&mut self, hv: &mut H, event: &Event, reply: &mut Reply) -> Observed {
        *reply = Reply::default();
        let Some((index, in_the_middle)) = self.slot(hv, event) else { return Observed::Answered };
        if let Reason::Int3(int3) = &event.reason
            && let Some(met) = self.meet(hv, index, in_the_middle, event, int3)
        {
            self.telling = true;
            self.met = Some(met);
            return Observed::Hit(int3.gpa);
        }
        self.observe(hv, index, event, reply)
    }

    /// Looks what an event is that is no hit of an INT3.
    #[inline]
    fn observe<H: Hypervisor>(&mut self, hv: &mut H, index: usize, event: &Event, reply: &mut Reply) -> Observed {
        let observed = match &event.reason {
            Reason::Int3(int3) => reply.answered(self.on_other_int3(hv, index, event, int3)),
            Reason::Step if self.vcpus[index].repeating.is_some() => self.on_iteration(hv, index, event, reply),
            Reason::Step => Ok(self.on_step(hv, index, reply)),
            Reason::Access(access) => self.on_access(hv, index, event, access, reply),
            Reason::EmulationFailed => reply.answered(self.on_emulation_failed(hv, index, event)),
        };
        let observed = observed.unwrap_or_else(|error| {
            *reply = self.give_way(event, &error);
            Observed::Answered
        });
        match observed {
            Observed::Answered => self.conclude(hv, index, event.registers.rip, reply),
            _ => self.telling = true,
        }
        observed
    }

    /// Between [`begin`](Self::begin) and [`end`](Self::end): tells the subscribers of a breakpoint, if one was hit.
    pub fn tell<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        event: &Event,
        observed: &Observed,
        on_hit: &mut impl FnMut(&mut Self, &mut H, &Hit<'_>) -> Verdict,
    ) {
        let at = match observed {
            Observed::Hit(at) => *at,
            Observed::Access { breakpoint: Some(at), .. } => *at,
            Observed::Answered | Observed::Access { .. } | Observed::Accessed(_) => return,
        };
        if let Some(met) = self.met_at(at) {
            self.tell_of(hv, event, &met, on_hit);
        }
    }

    /// Answers an event, after those it concerns have been told. `observed` is what [`begin`](Self::begin) said; `changed`
    /// are the registers, if those who were told have changed any. If it is RIP, what was to happen at the old one does not.
    /// (At an INT3 of the guest's own, under a breakpoint, its registers are left alone.)
    pub fn end<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        event: &Event,
        observed: &Observed,
        changed: Option<&Registers>,
        reply: &mut Reply,
    ) {
        let index = usize::from(event.vcpu.0);
        if index >= self.vcpus.len() || matches!(observed, Observed::Answered) {
            return;
        }
        *reply = Reply::default();
        if let (Observed::Hit(at), Reason::Int3(_)) = (observed, &event.reason) {
            let found = self.met_at(*at).map(|met| met.found);
            return self.end_hit(hv, index, event, found, changed, reply);
        }
        // There is no breakpoint to meet again: better none than at some later time.
        let changed = changed.filter(|_| !self.is_late(index));
        let moved = changed.is_some_and(|registers| registers.rip != event.registers.rip);
        let done = match (observed, &event.reason) {
            (Observed::Accessed(_), _) => {
                self.back_home(index, reply);
                Ok(())
            }
            _ if moved => Ok(()),
            (Observed::Hit(at), Reason::Access(access)) => {
                self.permit(hv, index, event, access, Some(*at), changed).map(|to| *reply = to)
            }
            (Observed::Access { access, breakpoint }, _) => {
                self.permit(hv, index, event, access, *breakpoint, changed).map(|to| *reply = to)
            }
            (Observed::Hit(_) | Observed::Answered, _) => Ok(()),
        };
        self.end_told(hv, index, event, done, changed, reply);
        if matches!(observed, Observed::Hit(_)) {
            self.handling.record(hv.now().saturating_sub(self.hit_at));
        }
    }

    /// The last of an answer after somebody was told.
    #[inline(always)]
    pub(super) fn end_told<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        done: Result<(), H::Error>,
        changed: Option<&Registers>,
        reply: &mut Reply,
    ) {
        self.telling = false;
        if let Err(error) = done {
            *reply = self.give_way(event, &error);
        }
        if let (Some(registers), Action::Resume) = (changed, &reply.action)
            && !self.is_late(index)
        {
            reply.action = Action::SetRegisters(*registers);
        }
        self.conclude(hv, index, event.registers.rip, reply);
    }

    /// The whole of the end of a single-step, without the rest of its event, of which it needs nothing. False if somebody is
    /// to be told of it, if it may be an iteration of a repeated instruction, or if there is no such virtual CPU: then nothing
    /// has been done, and the event is to be begun.
    #[inline]
    pub fn stepped<H: Hypervisor>(&mut self, hv: &mut H, vcpu: VcpuId, reply: &mut Reply) -> bool {
        let index = usize::from(vcpu.0);
        let quiet = self.vcpus.get(index).is_some_and(|vcpu| vcpu.accessing.is_none() && vcpu.repeating.is_none());
        if quiet {
            self.end_step(hv, index, reply);
        }
        quiet
    }

    #[inline(never)]
    fn end_step<H: Hypervisor>(&mut self, hv: &mut H, index: usize, reply: &mut Reply) {
        let vcpu = &mut self.vcpus[index];
        (vcpu.emulating, vcpu.fast, vcpu.answered, vcpu.interrupted) = (None, None, None, None);
        *reply = Reply::default();
        self.on_step(hv, index, reply);
        self.conclude(hv, index, 0, reply);
    }

    /// The slot of the event's vCPU, and whether that is in the middle of an instruction under a breakpoint: it is being
    /// stepped, or interrupts are let in between iterations. A fast step that is over is forgotten.
    #[inline]
    fn slot<H: Hypervisor>(&mut self, hv: &mut H, event: &Event) -> Option<(usize, bool)> {
        let index = usize::from(event.vcpu.0);
        let Some(vcpu) = self.vcpus.get_mut(index) else {
            self.counters.unexplained += 1;
            return None;
        };
        // Xen may have dropped an emulation; then a later failure, elsewhere or of another's, is not that of ours.
        let (answered, rip) = (vcpu.answered.take(), Some(event.registers.rip));
        match &event.reason {
            Reason::EmulationFailed if answered == rip => {}
            Reason::Access(access) => {
                vcpu.emulating = None;
                let delivering = (answered == rip && vcpu.injected) || vcpu.interrupted == rip;
                vcpu.interrupted = rip.filter(|_| delivering && !access.execute);
            }
            _ => vcpu.emulating = None,
        }
        let in_the_middle = vcpu.stepping || vcpu.repeating.is_some();
        // Still at the instruction, it may not be through.
        if vcpu.fast.take() == Some(event.registers.rip) {
            self.interrupted(hv, index, event);
        }
        Some((index, in_the_middle))
    }

    /// If a virtual CPU is still at an instruction that it steps fast, and still on the guest's own pages, the instruction
    /// itself raised this event before it was through. From here on it is a monitored step.
    fn interrupted<H: Hypervisor>(&mut self, hv: &mut H, index: usize, event: &Event) {
        let own = self.views.as_ref().is_some_and(|views| event.view == views.own);
        if own && !matches!(event.reason, Reason::Step) {
            if let Err(error) = hv.stop_step(event.vcpu) {
                log::warn!("cannot stop the fast step of virtual CPU {index}: {error}");
                self.counters.failures += 1;
            }
            self.vcpus[index].home = true;
        }
    }

    /// The last of an answer to a virtual CPU that is at `rip`.
    #[inline(always)]
    fn conclude<H: Hypervisor>(&mut self, hv: &mut H, index: usize, rip: u64, reply: &mut Reply) {
        let vcpu = &mut self.vcpus[index];
        let away = vcpu.home && !vcpu.stepping;
        if vcpu.is_late(self.unmappings_noted) {
            vcpu.unmappings = self.unmappings_noted;
            if !matches!(reply.action, Action::Resume | Action::SetRegisters(_)) {
                // It tries again, and then it is not too late any more.
                self.counters.reinjected -= u64::from(matches!(reply.action, Action::Reinject));
                reply.action = Action::Resume;
                // If Xen cannot emulate something now, it is nothing of ours.
                vcpu.emulating = None;
            }
        }
        if !matches!(reply.action, Action::Resume) {
            vcpu.answered = Some(rip);
            vcpu.injected = matches!(reply.action, Action::Reinject);
            if matches!(reply.action, Action::SetRegisters(_) | Action::Reinject) {
                // What was to be emulated is not.
                vcpu.emulating = None;
            }
            if !vcpu.pending {
                self.note_pending(index);
            }
        }
        if away {
            self.bring_home(index, reply);
        }
        if self.chores != 0 && matches!(reply.action, Action::Resume) {
            self.do_chores(hv, index);
        }
    }

    /// Gives pages back, and sets them up again, with an answer that Xen is not late with, if it is not late with the others'
    /// either.
    #[cold]
    fn do_chores<H: Hypervisor>(&mut self, hv: &mut H, index: usize) {
        if !self.is_settled(hv) {
            return;
        }
        if let Err(error) = self.vacate_all(hv) {
            log::warn!("a page could not be given back: {error}");
            self.counters.failures += 1;
        }
        if self.resync_pending
            && let Err(error) = self.resync_now(hv)
        {
            log::warn!("not everything could be set up again: {}", error.with_causes());
            self.counters.failures += 1;
        }
        self.vcpus[index].unmappings = self.unmappings_noted;
    }

    /// A virtual CPU whose fast step was stopped is in the own view, and is not to stay there: unless it is stepped now, it
    /// goes home at once if its instruction is through with this reply, and after a step if it tries again.
    #[cold]
    fn bring_home(&mut self, index: usize, reply: &mut Reply) {
        let vcpu = &mut self.vcpus[index];
        match (reply.step, &reply.action) {
            (Step::Keep, Action::Resume | Action::Emulate | Action::EmulateRead(_)) => reply.step = vcpu.step(),
            (Step::Keep, Action::EmulateInstruction(_) | Action::SetRegisters(_) | Action::Reinject) => {
                vcpu.home = false;
                reply.view = self.views.as_ref().map(|views| views.home(vcpu.monitored));
            }
            // A fast step goes home by itself.
            _ => vcpu.home = false,
        }
    }
}

impl Reply {
    /// Becomes the answer to an event, unless there is none.
    pub(super) fn answered<E>(&mut self, answer: Result<Self, E>) -> Result<Observed, E> {
        *self = answer?;
        Ok(Observed::Answered)
    }
}
