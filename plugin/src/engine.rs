//! Routes events to breakpoints, and knows what each virtual CPU is in the middle of.

use hdrhistogram::Histogram;
use iced_x86::InstructionInfoFactory;

use crate::breakpoint::{BreakpointId, Located, Page, Registry};
use crate::error::Doing;
use crate::insn::{Displaced, paging};
use crate::placement::{self, INT3};
use crate::stats::HandlingTime;
use crate::step::{self, Emulating, Pages, Vcpu};
use crate::views::Views;
use crate::watch::{self, Watch};
use crate::{
    Access, Accesses, Action, Counters, Error, Event, Figures, Gfn, Gpa, Hypervisor, Int3, Mechanism, PAGE_SIZE,
    Placement, Reason, Registers, Reply, Rights, Step, StepOver, VcpuId, ViewId, conceal,
};

/// A breakpoint was hit; its instruction has not run yet.
#[derive(Clone, Copy, Debug)]
pub struct Hit<'a> {
    /// Which breakpoint.
    pub breakpoint: BreakpointId,
    /// Which virtual CPU.
    pub vcpu: VcpuId,
    /// The registers before the instruction.
    pub registers: &'a Registers,
}

/// What an event is, before it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    /// Nobody needs to be told: the reply is the answer.
    Answered,
    /// The breakpoint at this address was hit; its instruction has not run yet. Tell its subscribers.
    Hit(Gpa),
    /// A watched page is about to be accessed. Tell whoever watches it.
    Access {
        /// How.
        access: Access,
        /// It is made to fetch the instruction at this breakpoint: tell its subscribers, too. There will be no
        /// [`Hit`](Self::Hit).
        breakpoint: Option<Gpa>,
    },
    /// A watched page has been accessed.
    Accessed(Access),
}

/// What becomes of a breakpoint that was hit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// It stays.
    #[default]
    Keep,
    /// It is removed before its instruction runs.
    Remove,
}

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

/// How many pages without breakpoints are left as they are while nothing else gives an occasion.
const VACANT: usize = 16;

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

    /// Sets a breakpoint on the instruction at a guest-physical address, or subscribes to the one that is there.
    ///
    /// # Errors
    /// If its page, or the breakpoint there, is used in another way, or if the hypervisor refuses: then there is no
    /// breakpoint. (What the hypervisor refuses to undo is undone at the next attempt, or by [`finish`](Self::finish).)
    pub fn insert<H: Hypervisor>(&mut self, hv: &mut H, gpa: Gpa, mechanism: Mechanism) -> Result<BreakpointId, Error> {
        if self.leaving {
            return Err(Error::Leaving);
        }
        self.catch_up(hv, gpa.gfn()).doing("settle the page")?;
        let other = |p: &Page| p.placement != mechanism.placement() || p.conceal != mechanism.conceal();
        if self.registry.page(gpa.gfn()).is_some_and(|page| page.breakpoints.is_empty() && other(page)) {
            self.vacate(hv, gpa.gfn()).doing("prepare the page")?;
        }
        let page = self.registry.page(gpa.gfn());
        if page.is_some_and(other) {
            return Err(Error::PageConflict(gpa));
        }
        if let Some(breakpoint) = page.and_then(|page| page.at(gpa.offset())) {
            if breakpoint.step_over != mechanism.step_over() {
                return Err(Error::StepOverConflict(gpa));
            }
            let displaced = breakpoint.displaced;
            return self.registry.subscribe(gpa, mechanism.step_over(), displaced).ok_or(Error::NoSuchBreakpoint);
        }
        let new = page.is_none();
        if new {
            self.open(hv, gpa.gfn(), mechanism)?;
        }
        let armed = self.arm(hv, gpa, mechanism.step_over());
        if armed.is_err()
            && new
            && let Some(page) = self.registry.remove_page(gpa.gfn())
        {
            // What failed is what the caller is to hear about, not that undoing it failed too.
            let _ = self.close(hv, page);
        }
        armed
    }

    /// Settles a page, if that was refused when it was to be done.
    fn catch_up<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        match self.registry.page_mut(gfn) {
            Some(page) => placement::catch_up(hv, self.views.as_ref(), page),
            None => Ok(()),
        }
    }

    /// Makes a page whose last breakpoint is gone the guest's own again, or remembers that it is not yet.
    fn close<H: Hypervisor>(&mut self, hv: &mut H, page: Page) -> Result<(), H::Error> {
        let closed = placement::close(hv, self.views.as_mut(), &page).and_then(|()| self.restrict(hv, page.gfn));
        if closed.is_err() {
            self.unclosed.push(page);
        }
        closed
    }

    /// The same with those of which that was refused before.
    fn close_again<H: Hypervisor>(&mut self, hv: &mut H, which: impl Fn(&Page) -> bool) -> Result<(), H::Error> {
        let mut result = Ok(());
        let pages: Vec<_> = self.unclosed.extract_if(.., |page| which(page)).collect();
        for page in pages {
            result = result.and(self.close(hv, page));
        }
        result
    }

    /// Prepares a page for breakpoints.
    fn open<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn, mechanism: Mechanism) -> Result<(), Error> {
        let placement = mechanism.placement();
        let watch = self.registry.watches.get(gfn);
        if placement == Placement::InPlace && watch.is_some_and(|watch| watch.accesses.execute) {
            return Err(Error::WatchConflict(gfn));
        }
        self.close_again(hv, |page| page.gfn == gfn).doing("prepare the page")?;
        // Nobody is to write to the page while we look at it, nor to run between two of the steps.
        let shadow = paused(hv, |hv| {
            if placement == Placement::Shadow {
                self.ensure_views(hv)?;
            }
            // It may be one since a moment ago.
            if self.views.as_ref().is_some_and(|views| views.hides(gfn)) {
                return Err(Error::NoMemory(gfn.at(0)));
            }
            placement::open(hv, self.views.as_mut(), gfn, placement).doing("prepare the page")
        })?;
        let conceal = mechanism.conceal();
        self.registry.add_page(Page {
            gfn,
            placement,
            conceal,
            shadow,
            breakpoints: Vec::new(),
            lifted: 0,
            unsettled: false,
        });
        if let Err(error) = self.restrict(hv, gfn)
            && let Some(page) = self.registry.remove_page(gfn)
        {
            // What failed is what the caller is to hear about, not that undoing it failed too.
            let _ = self.close(hv, page);
            return Err(error).doing("watch the page");
        }
        Ok(())
    }

    /// Lets the execute view permit on a page what its breakpoints and whoever watches it leave.
    fn restrict<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        let rights = match self.registry.page(gfn) {
            None => Rights::All,
            Some(page) if page.shadow.is_some() => Rights::Execute,
            // With breakpoints in place it is guarded in all views, against all that may be watched there.
            Some(_) => return Ok(()),
        };
        match (self.registry.watches.get(gfn), &self.views) {
            (Some(Watch { accesses, .. }), Some(views)) => watch::apply(hv, views, gfn, accesses, rights),
            _ => Ok(()),
        }
    }

    /// Watches a page: these kinds of accesses are reported before they are made and, if `after`, when they have been made,
    /// too (which costs a second event). Replaces the watch that is there; [`Accesses::NONE`] ends it.
    ///
    /// An instruction is reported for the first watched page that it accesses. One that is stepped over a breakpoint is not
    /// reported, and one that has not read but written may be, to those who watch reads (EPT knows no right to write alone).
    ///
    /// # Errors
    /// If the page has breakpoints in place and what is executed there is to be watched, or if the hypervisor refuses: then
    /// the watch is as it was.
    pub fn watch<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn, accesses: Accesses, after: bool) -> Result<(), Error> {
        let before = self.registry.watches.get(gfn);
        let result = match accesses {
            // Its rights are to be set once more.
            Accesses::NONE if before.is_none() => return Ok(()),
            Accesses::NONE => {
                self.registry.watches.set(gfn, Watch { accesses, after });
                self.restrict(hv, gfn)
            }
            _ => {
                if self.leaving {
                    return Err(Error::Leaving);
                }
                if accesses.execute && self.registry.page(gfn).is_some_and(|page| page.shadow.is_none()) {
                    return Err(Error::WatchConflict(gfn));
                }
                self.enter_if_needed(hv)?;
                if self.views.as_ref().is_some_and(|views| views.hides(gfn)) {
                    return Err(Error::NoMemory(gfn.at(0)));
                }
                self.registry.watches.set(gfn, Watch { accesses, after });
                self.restrict(hv, gfn)
            }
        };
        match (&result, before) {
            (Ok(()), _) if accesses == Accesses::NONE => drop(self.registry.watches.remove(gfn)),
            (Ok(()), _) => {}
            (Err(_), Some(before)) => self.registry.watches.set(gfn, before),
            (Err(_), None) => drop(self.registry.watches.remove(gfn)),
        }
        result.doing("watch the page")
    }

    /// Makes the views, which are otherwise made with the first shadow or watch, and lets all virtual CPUs run in the execute
    /// view. Returns that.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    pub fn enter<H: Hypervisor>(&mut self, hv: &mut H) -> Result<ViewId, Error> {
        paused(hv, |hv| self.ensure_views(hv))?;
        Ok(self.views.as_ref().map_or(ViewId::HOST, |views| views.exec))
    }

    /// Whether a virtual CPU is to meet breakpoints in shadows, and watches: for a host that is interested in some of what
    /// it runs only. If not, it runs on the guest's own pages; what it writes to a page that has a shadow goes there, too.
    ///
    /// It is the caller who lets it enter the view that is returned: with the response to the event at hand.
    ///
    /// # Errors
    /// If there is no such virtual CPU, or the views have to be made and the hypervisor refuses.
    pub fn monitor<H: Hypervisor>(&mut self, hv: &mut H, vcpu: VcpuId, monitored: bool) -> Result<ViewId, Error> {
        self.enter_if_needed(hv)?;
        let slot = self.vcpus.get_mut(usize::from(vcpu.0)).ok_or(Error::NoSuchVcpu(vcpu.0))?;
        if slot.monitored != monitored && slot.fast.take().is_some() {
            // It may not be over, and would take it back to where it was at home.
            hv.stop_step(vcpu).doing("end a single-step")?;
        }
        slot.monitored = monitored;
        let view = |views: &Views| if slot.stepping { step::view_of(slot, views) } else { views.home(monitored) };
        Ok(self.views.as_ref().map_or(ViewId::HOST, view))
    }

    /// The same for all virtual CPUs at once, which are switched here.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    pub fn monitor_all<H: Hypervisor>(&mut self, hv: &mut H, monitored: bool) -> Result<(), Error> {
        self.enter_if_needed(hv)?;
        let Some(views) = &self.views else { return Ok(()) };
        paused(hv, |hv| {
            for (vcpu, slot) in (0..).map(VcpuId).zip(&mut self.vcpus) {
                // A fast step would take it back to where it was at home.
                if slot.fast.take().is_some() {
                    hv.stop_step(vcpu).doing("end a single-step")?;
                }
                slot.monitored = monitored;
            }
            hv.switch_view(views.home(monitored)).doing("enter the view")
        })
    }

    fn enter_if_needed<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        if self.views.is_none() { self.enter(hv).map(drop) } else { Ok(()) }
    }

    fn ensure_views<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        if self.views.is_some() {
            return Ok(());
        }
        let mut views = Views::create(hv).doing("create the views")?;
        let mut in_place = self.registry.pages().filter(|page| page.placement == Placement::InPlace);
        let entered = in_place
            .try_for_each(|page| {
                views.all().into_iter().try_for_each(|view| hv.set_rights(view, page.gfn, Rights::Execute))
            })
            .and_then(|()| hv.switch_view(views.exec));
        if let Err(error) = entered {
            let _ = views.destroy(hv);
            return Err(error).doing("enter the view");
        }
        self.views = Some(views);
        Ok(())
    }

    /// Sets a breakpoint in a page that is prepared.
    fn arm<H: Hypervisor>(&mut self, hv: &mut H, gpa: Gpa, step_over: StepOver) -> Result<BreakpointId, Error> {
        let displaced = self.displaced(hv, gpa)?;
        let id = self.registry.subscribe(gpa, step_over, displaced).ok_or(Error::NoSuchBreakpoint)?;
        // While the page is lifted for a virtual CPU, its settling will arm this breakpoint too.
        if let Some(page) = self.registry.page(gpa.gfn()).filter(|page| page.lifted == 0)
            && let Err(error) = placement::arm(hv, page, gpa, displaced.byte())
        {
            if page.breakpoints.len() > 1 {
                self.registry.unsubscribe(id);
            }
            return Err(error).doing("write the breakpoint");
        }
        Ok(id)
    }

    /// The guest's own instruction at an address, without the breakpoints around it.
    fn displaced<H: Hypervisor>(&self, hv: &mut H, gpa: Gpa) -> Result<Displaced, Error> {
        let mut bytes = [0; PAGE_SIZE];
        hv.read(gpa.gfn().at(0), &mut bytes).doing("read the page")?;
        if let Some(page) = self.registry.page(gpa.gfn()).filter(|p| p.placement == Placement::InPlace && p.lifted == 0)
        {
            for breakpoint in &page.breakpoints {
                bytes[usize::from(breakpoint.offset())] = breakpoint.displaced.byte();
            }
        }
        Ok(Displaced::of(&bytes, gpa.offset()))
    }

    /// Removes a breakpoint. If nobody else has subscribed to it, the guest's own byte is back when this returns.
    ///
    /// # Errors
    /// If there is no such breakpoint, or if the hypervisor refuses.
    pub fn remove<H: Hypervisor>(&mut self, hv: &mut H, id: BreakpointId) -> Result<(), Error> {
        self.catch_up(hv, id.gpa().gfn()).doing("settle the page")?;
        let (page, breakpoint) = self.registry.get(id)?;
        if page.lifted == 0 && self.registry.is_last(id) {
            let disarmed = placement::disarm(hv, page, breakpoint.gpa, breakpoint.displaced.byte());
            disarmed.doing("write the original byte back")?;
        }
        let Some(page) = self.registry.unsubscribe(id) else { return Ok(()) };
        let gfn = page.gfn;
        if self.telling && page.shadow.is_some() {
            self.vacant.push(gfn);
            return Ok(());
        }
        self.vacate(hv, gfn).doing("give the page back")
    }

    /// Makes a page without breakpoints the guest's own again.
    fn vacate<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        let Some(page) = self.registry.remove_page(gfn) else { return Ok(()) };
        // If there are breakpoints in it again before a step is over, that is another page.
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.forget(gfn));
        self.close(hv, page)
    }

    /// The same with all that have none after an event.
    #[cold]
    fn vacate_all<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), H::Error> {
        let mut result = Ok(());
        for gfn in std::mem::take(&mut self.vacant) {
            if self.registry.page(gfn).is_some_and(|page| page.breakpoints.is_empty()) {
                result = result.and(self.vacate(hv, gfn));
            }
        }
        result
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
    pub fn handling_time(&self) -> &Histogram<u64> {
        self.handling.histogram()
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
            Reason::Int3(int3) => self.on_int3(hv, index, event, int3, reply),
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

    /// Whether Xen would be late with the registers or the emulation of a virtual CPU's next response
    /// ([`Views::unmappings`]).
    fn is_late(&self, index: usize) -> bool {
        self.views.as_ref().is_some_and(|views| views.unmappings != self.vcpus[index].unmappings)
    }

    /// The last of an answer.
    #[inline(always)]
    fn conclude<H: Hypervisor>(&mut self, hv: &mut H, index: usize, reply: &mut Reply) {
        if self.is_late(index)
            && matches!(reply.action, Action::Emulate | Action::EmulateRead(_) | Action::EmulateInstruction(_))
        {
            // It tries again, and then it is not too late any more.
            reply.action = Action::Resume;
        }
        self.bring_home(index, reply);
        if !self.vacant.is_empty()
            && reply.action == Action::Resume
            && let Err(error) = self.vacate_all(hv)
        {
            log::warn!("a page could not be given back: {error}");
            self.counters.failures += 1;
        }
        self.vcpus[index].unmappings = self.views.as_ref().map_or(0, |views| views.unmappings);
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
        self.vcpus[index].unmappings = self.views.as_ref().map_or(0, |views| views.unmappings);
        true
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
        if index >= self.vcpus.len() || *observed == Observed::Answered {
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
        let observed = self.begin(hv, event, &mut reply);
        self.tell(hv, event, &observed, on_hit);
        self.end(hv, event, &observed, None, &mut reply);
        reply
    }

    /// A virtual CPU whose fast step was stopped is in the own view, and is not to stay there: unless it is stepped now, it
    /// goes home at once if its instruction is through with this reply, and after a step if it tries again.
    fn bring_home(&mut self, index: usize, reply: &mut Reply) {
        let vcpu = &mut self.vcpus[index];
        if !vcpu.home || vcpu.stepping {
            return;
        }
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

    /// The slot of the event's virtual CPU, with a fast step that is over forgotten.
    fn slot<H: Hypervisor>(&mut self, hv: &mut H, event: &Event) -> Option<usize> {
        let index = usize::from(event.vcpu.0);
        let Some(vcpu) = self.vcpus.get_mut(index) else {
            self.counters.unexplained += 1;
            return None;
        };
        if event.reason != Reason::EmulationFailed {
            vcpu.emulating = None;
        }
        if let Some(rip) = vcpu.fast.take()
            && let Some(views) = &self.views
        {
            // Still at the instruction, still on the guest's own pages: the instruction itself raised this event before it
            // was through. From here on it is a monitored step.
            if rip == event.registers.rip && event.view == views.own && event.reason != Reason::Step {
                if let Err(error) = hv.stop_step(event.vcpu) {
                    log::warn!("cannot stop the fast step of virtual CPU {index}: {error}");
                    self.counters.failures += 1;
                }
                vcpu.home = true;
            }
        }
        Some(index)
    }

    fn on_int3<H: Hypervisor>(
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
    fn locate(&self, at: Gpa) -> Option<Located> {
        match self.hit {
            Some((hit, before)) if hit == at => self.registry.locate_again(at, before),
            _ => self.registry.locate(at),
        }
    }

    #[inline]
    fn count_hit(&mut self, at: Located) {
        self.counters.hits += 1;
        self.registry.located_mut(at).figures.hits += 1;
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
        let (mut last, until) = (None, self.registry.now());
        while let Some(breakpoint) = self.registry.next_subscriber(at, last, until) {
            let verdict = on_hit(self, hv, &Hit { breakpoint, vcpu: event.vcpu, registers: &event.registers });
            if verdict == Verdict::Remove
                && let Err(error @ Error::Hypervisor { .. }) = self.remove(hv, breakpoint)
            {
                log::warn!("a breakpoint at {at} could not be removed: {error}");
                self.counters.failures += 1;
            }
            last = Some(breakpoint);
        }
    }

    /// Lets the instruction under the breakpoint at `at` run, if there still is one.
    fn step_over<H: Hypervisor>(
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

    #[inline(always)]
    fn on_step<H: Hypervisor>(&mut self, hv: &mut H, index: usize, reply: &mut Reply) -> Observed {
        let vcpu = &mut self.vcpus[index];
        if !std::mem::take(&mut vcpu.stepping) {
            self.counters.unexplained += 1;
        }
        let (home, over, accessing) = (std::mem::take(&mut vcpu.home), vcpu.over.take(), vcpu.accessing.take());
        if !vcpu.pages.is_empty() {
            let pages = std::mem::take(&mut vcpu.pages);
            self.settle(hv, &pages);
        }
        if let Some(gpa) = over {
            self.arm_again(hv, gpa);
        }
        if let Some(access) = accessing {
            return Observed::Accessed(access);
        }
        reply.step = Step::Off;
        if home {
            self.back_home(index, reply);
        }
        Observed::Answered
    }

    /// Puts the breakpoints on what is now in pages that an instruction may have written to.
    #[inline(never)]
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
    fn back_home(&self, index: usize, reply: &mut Reply) {
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
    #[inline(never)]
    fn arm_again<H: Hypervisor>(&mut self, hv: &mut H, gpa: Gpa) {
        if let Some((page, breakpoint)) = self.registry.at(gpa)
            && page.lifted == 0
            && let Err(error) = placement::arm(hv, page, gpa, breakpoint.displaced.byte())
        {
            log::warn!("the breakpoint at {gpa} could not be set again: {error}");
            self.counters.failures += 1;
        }
    }

    fn on_access<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        access: &Access,
        reply: &mut Reply,
    ) -> Result<Observed, H::Error> {
        let gfn = access.gpa.gfn();
        let exec = self.views.as_ref().map(|views| views.exec);
        if Some(event.view) != exec {
            return reply.answered(self.on_guarded(hv, index, event, access));
        }
        let watched = self.registry.watches.get(gfn).is_some_and(|watch| watch.accesses.include(access));
        let stepped = self.registry.is_watched(gfn) || self.registry.page(gfn).is_some();
        let breakpoint = if stepped { self.fetched(hv, event, access) } else { None };
        if let Some(at) = breakpoint.and_then(|at| self.registry.locate(at)) {
            self.count_hit(at);
        }
        match (watched, breakpoint) {
            (true, breakpoint) => Ok(Observed::Access { access: *access, breakpoint }),
            (false, Some(at)) => Ok(Observed::Hit(at)),
            // Denied with what is watched: a write, where nobody wants to hear but of reads.
            (false, None) if self.registry.is_watched(gfn) && self.registry.page(gfn).is_none() => {
                reply.answered(self.step_in_own_view(index, &event.registers))
            }
            (false, None) => reply.answered(self.on_guarded(hv, index, event, access)),
        }
    }

    /// The breakpoint whose instruction an access is to fetch. That instruction is stepped in another view now, and so its
    /// breakpoint, in a shadow, will not be met.
    fn fetched<H: Hypervisor>(&self, hv: &mut H, event: &Event, access: &Access) -> Option<Gpa> {
        let lifts = self.registry.page(access.gpa.gfn()).is_some_and(|page| page.shadow.is_none());
        if lifts || !(access.execute || access.page_walk) {
            return None;
        }
        let registers = &event.registers;
        let at = paging::translate(hv, registers, registers.cs_base.wrapping_add(registers.rip))?;
        self.registry.at(at).filter(|(page, _)| page.shadow.is_some()).map(|_| at)
    }

    /// Lets an access that was reported, or whose instruction was a `hit`, be made: by the guest itself, for Xen emulates
    /// only what is still denied.
    fn permit<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        access: &Access,
        hit: bool,
        changed: Option<&Registers>,
    ) -> Result<Reply, H::Error> {
        let registers = changed.unwrap_or(&event.registers);
        let gfn = access.gpa.gfn();
        let watch = self.registry.watches.get(gfn).filter(|watch| watch.accesses.include(access));
        let after = watch.is_some_and(|watch| watch.after);
        self.vcpus[index].accessing = after.then_some(*access);
        let monitored = after || self.vcpus[index].stepping;
        let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
        match (self.registry.page_mut(gfn), views) {
            (Some(page), views) if monitored || changed.is_some() => {
                placement::catch_up(hv, views, page)?;
                conceal::on_own_bytes(hv, views, vcpu, page, registers, access.write)
            }
            (Some(page), Some(views)) if page.shadow.is_some() && !access.read && !access.write => {
                Ok(step::fast_step_in_own_view(vcpu, views, registers.rip))
            }
            (Some(_), _) => self.on_guarded(hv, index, event, access),
            // It is not watched any more. But what would try again is not to be hit again.
            (None, _) if watch.is_none() && !hit => Ok(Reply::default()),
            (None, Some(views)) if after => Ok(step::step_on_own_pages(vcpu, views)),
            (None, _) => self.step_in_own_view(index, registers),
        }
    }

    /// Lets the instruction at RIP run on the guest's own pages.
    fn step_in_own_view<E>(&mut self, index: usize, registers: &Registers) -> Result<Reply, E> {
        let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
        Ok(match views {
            Some(views) if vcpu.stepping => step::step_on_own_pages(vcpu, views),
            Some(views) => step::fast_step_in_own_view(vcpu, views, registers.rip),
            None => Reply::default(),
        })
    }

    /// Answers an access that nobody wants to hear of.
    fn on_guarded<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        access: &Access,
    ) -> Result<Reply, H::Error> {
        let (vcpu, views, gfn) = (&mut self.vcpus[index], self.views.as_ref(), access.gpa.gfn());
        let guarded = |page: &&mut Page| {
            let shadowed =
                |views: &Views| event.view == views.exec || (views.all().contains(&event.view) && access.write);
            page.shadow.is_none() || views.is_some_and(shadowed)
        };
        let Some(page) = self.registry.page_mut(gfn).filter(guarded) else {
            if let Some(views) = views.filter(|views| access.write && views.hides(gfn))
                && vcpu.owe(gfn)
            {
                self.counters.discarded += 1;
                views.permit_write(hv, gfn)?;
                return Ok(step::step_on_own_pages(vcpu, views));
            }
            self.counters.unexplained += 1;
            if views.is_some_and(|views| !views.all().contains(&event.view)) {
                // It was queued when the virtual CPU was in another view.
                return Ok(Reply::default());
            }
            // Not ours, or not any more. Xen emulates only if the access is still denied, so the guest goes on.
            return Ok(Reply { action: Action::Emulate, ..Reply::default() });
        };
        placement::catch_up(hv, views, page)?;
        if access.execute && !access.write && !access.read {
            // The page is lifted, or was a moment ago. Whoever it is not lifted for tries again until it is over.
            match vcpu.owes(gfn) && page.lifted > 0 {
                true => placement::uncover(hv, views, gfn)?,
                false => self.counters.held += 1,
            }
            return Ok(Reply::default());
        }
        match access.write {
            true => self.counters.writes += 1,
            false => self.counters.reads += 1,
        }
        conceal::begin(hv, views, vcpu, &mut self.factory, page, event)
    }

    /// Nothing has happened yet; it is done in another way, and the emulator is not asked again.
    fn on_emulation_failed<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
    ) -> Result<Reply, H::Error> {
        let emulating = self.vcpus[index].emulating.take();
        self.counters.emulation_failures += u64::from(emulating.is_some());
        match emulating {
            Some(Emulating::Displaced(gpa)) => {
                if let Some(breakpoint) = self.registry.at_mut(gpa) {
                    if breakpoint.displaced.byte() == INT3 {
                        // Another virtual CPU has just written it: it will be met again.
                        return Ok(Reply::default());
                    }
                    log::info!("Xen cannot emulate the instruction at {gpa}: it is stepped from now on");
                    // The hit counts again, as what serves it now.
                    let fallback = step::is_fallback(breakpoint, &event.registers, StepOver::Emulate);
                    breakpoint.not_emulable = true;
                    let Figures { served, fallbacks, .. } = &mut breakpoint.figures;
                    served.emulate = served.emulate.saturating_sub(1);
                    *fallbacks = fallbacks.saturating_sub(u64::from(fallback));
                }
                let mut reply = Reply::default();
                self.step_over(hv, index, gpa, &event.registers, false, &mut reply)?;
                Ok(reply)
            }
            Some(Emulating::Access(gfn)) => {
                let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
                match self.registry.page_mut(gfn) {
                    Some(page) => conceal::on_own_bytes(hv, views, vcpu, page, &event.registers, false),
                    None => Ok(Reply::default()),
                }
            }
            None => {
                self.counters.unexplained += 1;
                Ok(Reply::default())
            }
        }
    }

    /// The hypervisor refused something in the middle of a hit: the guest goes on without it.
    #[cold]
    fn give_way(&mut self, event: &Event, error: &dyn std::error::Error) -> Reply {
        if self.counters.failures == 0 {
            log::error!("virtual CPU {} goes on without its breakpoint: {error}", event.vcpu.0);
        }
        self.counters.failures += 1;
        let instruction = match &event.reason {
            Reason::Int3(int3) => self.registry.at(int3.gpa).map(|(_, breakpoint)| breakpoint.displaced.bytes()),
            Reason::Step | Reason::Access(_) | Reason::EmulationFailed => None,
        };
        Reply { action: instruction.map_or(Action::Emulate, Action::EmulateInstruction), ..Reply::default() }
    }

    /// Removes every breakpoint. Events may still be queued, and virtual CPUs stay in our views until
    /// [`finish`](Self::finish): in the host view they could see the shadows' frames.
    ///
    /// # Errors
    /// If the hypervisor refuses; the rest has been undone nevertheless, and it may be called again.
    pub fn leave<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        self.leaving = true;
        let mut result = Ok(());
        for gfn in self.registry.watches.gfns() {
            result = result.and(self.watch(hv, gfn, Accesses::NONE, false));
        }
        for id in self.registry.ids() {
            result = result.and(self.remove(hv, id));
        }
        result = result.and(self.vacate_all(hv).doing("give a page back"));
        result.and(self.close_again(hv, |_| true).doing("give a page back"))
    }

    /// No virtual CPU is in the middle of a monitored step.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.vcpus.iter().all(|vcpu| !vcpu.stepping)
    }

    /// After [`leave`](Self::leave), when the engine [is idle](Self::is_idle) and no event is queued: ends fast steps,
    /// drops the views and gives the shadows' memory back. Nothing of the engine is left in the domain.
    ///
    /// # Errors
    /// If the hypervisor refuses; it may be called again.
    pub fn finish<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        let Some(views) = &mut self.views else { return Ok(()) };
        paused(hv, |hv| {
            for vcpu in 0..hv.vcpus() {
                hv.stop_step(VcpuId(vcpu)).doing("end the single-steps")?;
            }
            hv.switch_view(ViewId::HOST).doing("leave the view")?;
            views.destroy(hv).doing("drop the views")
        })?;
        self.views = None;
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.unmappings = 0);
        Ok(())
    }
}

/// Does something while the domain is paused.
fn paused<H: Hypervisor, T>(hv: &mut H, work: impl FnOnce(&mut H) -> Result<T, Error>) -> Result<T, Error> {
    hv.pause().doing("pause the domain")?;
    let done = work(hv);
    hv.resume().doing("resume the domain")?;
    done
}

impl Reply {
    /// Becomes the answer to an event, unless there is none.
    fn answered<E>(&mut self, answer: Result<Self, E>) -> Result<Observed, E> {
        *self = answer?;
        Ok(Observed::Answered)
    }
}

fn reinject() -> Reply {
    Reply { action: Action::Reinject, ..Reply::default() }
}
