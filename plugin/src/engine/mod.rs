//! Routes events to breakpoints, and knows what each virtual CPU is in the middle of.

mod access;
mod failure;
mod int3;
mod observed;
mod presence;
mod setting;
mod stepped;
mod watching;

use hdrhistogram::Histogram;
use iced_x86::InstructionInfoFactory;

pub use self::observed::{Hit, Observed, Verdict};
use crate::breakpoint::{BreakpointId, Located, Page, Registry};
use crate::stats::HandlingTime;
use crate::step::Vcpu;
use crate::views::Views;
use crate::{Action, Counters, Error, Event, Figures, Gfn, Gpa, Hypervisor, Reason, Registers, Reply, Step, VcpuId};

/// How many pages without breakpoints are left as they are while nothing else gives an occasion.
const VACANT: usize = 16;

/// The breakpoints of one domain.
///
/// The engine owns no connection: each call is given it. All calls must be given the same.
///
/// An event is answered in two halves: [`begin`](Self::begin) says what it is, and once the host has told whom it concerns,
/// [`end`](Self::end) says what to do. Between them the host may call what it likes. [`handle`](Self::handle) is both, with a
/// closure between them.
///
/// - A breakpoint is at a guest-physical address, and stays there: if the guest writes a new instruction to it, it is set
///   on that one ([`Figures::rewritten`] counts), and if the guest frees the page and uses it for something else, it is a
///   breakpoint in that. If it gives the page back to the hypervisor (ballooning), the breakpoint is gone without notice.
/// - Several may subscribe to the same instruction. Each is told of every hit, in the order they came.
/// - An instruction that faults and is run again by the guest (a page fault, say) is a hit each time.
///
/// To leave a domain: [`leave`](Self::leave), go on handling the events that are still queued until
/// [`is_idle`](Self::is_idle), then [`finish`](Self::finish).
#[derive(Debug)]
pub struct Engine {
    registry: Registry,
    vcpus: Vec<Vcpu>,
    /// Made with the first shadow.
    views: Option<Views>,
    /// Pages whose last breakpoint is gone, but that the hypervisor has refused to make the guest's own again.
    unclosed: Vec<Page>,
    /// Pages whose last breakpoint was gone, between the two halves of an event, and that are to be made so after it.
    vacant: Vec<Gfn>,
    /// Between the two halves of an event.
    telling: bool,
    factory: InstructionInfoFactory,
    counters: Counters,
    handling: HandlingTime,
    /// When the last hit began, and where its breakpoint was then.
    hit_at: u64,
    hit: Option<(Gpa, Located)>,
    leaving: bool,
}

impl Engine {
    /// An engine without breakpoints. Nothing is done to the domain.
    pub fn new<H: Hypervisor>(hv: &H) -> Self {
        Self {
            registry: Registry::default(),
            vcpus: vec![Vcpu::at_home(true); usize::from(hv.vcpus())],
            views: None,
            unclosed: Vec::new(),
            vacant: Vec::new(),
            telling: false,
            factory: InstructionInfoFactory::new(),
            counters: Counters::default(),
            handling: HandlingTime::new(),
            hit_at: 0,
            hit: None,
            leaving: false,
        }
    }

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
    pub fn answer<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        event: &Event,
        on_hit: &mut impl FnMut(&mut Self, &mut H, &Hit<'_>) -> Verdict,
        reply: &mut Reply,
    ) {
        let observed = self.begin(hv, event, reply);
        self.tell(hv, event, &observed, on_hit);
        self.end(hv, event, &observed, None, reply);
    }

    /// Looks what an event is. If nobody needs to be told, `reply` is the answer. Else [`end`](Self::end) must follow, before
    /// another event begins.
    ///
    /// Nothing the guest does makes this fail or panic; where the hypervisor refuses something, it is counted, logged
    /// once, and the guest goes on.
    pub fn begin<H: Hypervisor>(&mut self, hv: &mut H, event: &Event, reply: &mut Reply) -> Observed {
        *reply = Reply::default();
        let Some(index) = self.slot(hv, event) else { return Observed::Answered };
        let observed = match &event.reason {
            Reason::Int3(int3) => {
                if self.is_hit(hv, index, event, int3) {
                    self.telling = true;
                    return Observed::Hit(int3.gpa);
                }
                reply.answered(self.on_other_int3(hv, index, event, int3))
            }
            Reason::Step => Ok(self.on_step(hv, index, reply)),
            Reason::Access(access) => self.on_access(hv, index, event, access, reply),
            Reason::EmulationFailed => reply.answered(self.on_emulation_failed(hv, index, event)),
        };
        let observed = observed.unwrap_or_else(|error| {
            *reply = self.give_way(event, &error);
            Observed::Answered
        });
        match observed {
            Observed::Answered => self.conclude(hv, index, reply),
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
        let subscribers = self.locate(at).and_then(|at| self.registry.located(at).1.first_and_last());
        let Some((mut breakpoint, last)) = subscribers else { return };
        loop {
            let verdict = on_hit(self, hv, &Hit { breakpoint, vcpu: event.vcpu, registers: &event.registers });
            if verdict == Verdict::Remove
                && let Err(error @ Error::Hypervisor { .. }) = self.remove(hv, breakpoint)
            {
                log::warn!("a breakpoint at {at} could not be removed: {error}");
                self.counters.failures += 1;
            }
            if breakpoint == last {
                return;
            }
            // Anything may have been inserted and removed.
            match self.locate(at).and_then(|at| self.registry.located(at).1.next(breakpoint, last)) {
                Some(next) => breakpoint = next,
                None => return,
            }
        }
    }

    /// Answers an event, after those it concerns have been told. `observed` is what [`begin`](Self::begin) said; `changed`
    /// are the registers, if those who were told have changed any. If it is RIP, what was to happen at the old one does not. (At an INT3 of the guest's own, under a breakpoint, its registers are left alone.)
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
        self.telling = false;
        *reply = Reply::default();
        let registers = changed.unwrap_or(&event.registers);
        let moved = registers.rip != event.registers.rip;
        let done = match observed {
            Observed::Answered => Ok(()),
            Observed::Hit(_) | Observed::Access { .. } if moved => Ok(()),
            Observed::Hit(at) => match &event.reason {
                Reason::Access(access) => self.permit(hv, index, event, access, true, changed).map(|to| *reply = to),
                _ => self.step_over(hv, index, *at, registers, changed.is_some(), reply),
            },
            Observed::Access { access, breakpoint } => {
                self.permit(hv, index, event, access, breakpoint.is_some(), changed).map(|to| *reply = to)
            }
            Observed::Accessed(_) => {
                self.back_home(index, reply);
                Ok(())
            }
        };
        if let Err(error) = done {
            *reply = self.give_way(event, &error);
        }
        if let (Some(registers), Action::Resume) = (changed, &reply.action) {
            reply.action = Action::SetRegisters(*registers);
        }
        if matches!(observed, Observed::Hit(_)) {
            self.handling.record(hv.now().saturating_sub(self.hit_at));
        }
        self.conclude(hv, index, reply);
    }

    /// The whole of the end of a single-step, without the rest of its event, of which it needs nothing. False if somebody is
    /// to be told of it, or there is no such virtual CPU: then nothing has been done, and the event is to be begun.
    pub fn stepped<H: Hypervisor>(&mut self, hv: &mut H, vcpu: VcpuId, reply: &mut Reply) -> bool {
        let index = usize::from(vcpu.0);
        match self.vcpus.get_mut(index) {
            Some(vcpu) if vcpu.accessing.is_none() => (vcpu.emulating, vcpu.fast) = (None, None),
            _ => return false,
        }
        *reply = Reply::default();
        self.on_step(hv, index, reply);
        self.vcpus[index].unmappings = self.unmappings();
        true
    }

    /// The slot of the event's virtual CPU, with a fast step that is over forgotten.
    fn slot<H: Hypervisor>(&mut self, hv: &mut H, event: &Event) -> Option<usize> {
        let index = usize::from(event.vcpu.0);
        let Some(vcpu) = self.vcpus.get_mut(index) else {
            self.counters.unexplained += 1;
            return None;
        };
        if !matches!(event.reason, Reason::EmulationFailed) {
            vcpu.emulating = None;
        }
        if let Some(rip) = vcpu.fast.take()
            && let Some(views) = &self.views
        {
            // Still at the instruction, still on the guest's own pages: the instruction itself raised this event before it
            // was through. From here on it is a monitored step.
            if rip == event.registers.rip && event.view == views.own && !matches!(event.reason, Reason::Step) {
                if let Err(error) = hv.stop_step(event.vcpu) {
                    log::warn!("cannot stop the fast step of virtual CPU {index}: {error}");
                    self.counters.failures += 1;
                }
                vcpu.home = true;
            }
        }
        Some(index)
    }

    /// Whether Xen would be late with the registers or the emulation of a virtual CPU's next response
    /// ([`Views::unmappings`]).
    fn is_late(&self, index: usize) -> bool {
        self.vcpus[index].unmappings != self.unmappings()
    }

    fn unmappings(&self) -> u64 {
        self.views.as_ref().map_or(0, |views| views.unmappings)
    }

    /// The last of an answer.
    #[inline(always)]
    fn conclude<H: Hypervisor>(&mut self, hv: &mut H, index: usize, reply: &mut Reply) {
        let unmappings = self.unmappings();
        let vcpu = &mut self.vcpus[index];
        if vcpu.unmappings != unmappings {
            vcpu.unmappings = unmappings;
            if matches!(reply.action, Action::Emulate | Action::EmulateRead(_) | Action::EmulateInstruction(_)) {
                // It tries again, and then it is not too late any more.
                reply.action = Action::Resume;
            }
        }
        if vcpu.home && !vcpu.stepping {
            self.bring_home(index, reply);
        }
        if !self.vacant.is_empty() && matches!(reply.action, Action::Resume) {
            if let Err(error) = self.vacate_all(hv) {
                log::warn!("a page could not be given back: {error}");
                self.counters.failures += 1;
            }
            self.vcpus[index].unmappings = self.unmappings();
        }
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

    /// All breakpoints, by address.
    #[must_use]
    pub fn breakpoints(&self) -> Vec<BreakpointId> {
        self.registry.ids()
    }

    /// What a breakpoint has done. Those who share it share its figures.
    ///
    /// # Errors
    /// If there is no such breakpoint.
    pub fn figures(&self, id: BreakpointId) -> Result<Figures, Error> {
        Ok(self.registry.get(id)?.1.figures)
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// How long handling a hit took so far, `on_hit` included, in units of [`Hypervisor::now`].
    #[must_use]
    pub fn handling_time(&self) -> Histogram<u64> {
        self.handling.histogram()
    }
}

impl Reply {
    /// Becomes the answer to an event, unless there is none.
    fn answered<E>(&mut self, answer: Result<Self, E>) -> Result<Observed, E> {
        *self = answer?;
        Ok(Observed::Answered)
    }
}
