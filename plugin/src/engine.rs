//! Routes events to breakpoints, and knows what each virtual CPU is in the middle of.

use iced_x86::InstructionInfoFactory;

use crate::breakpoint::{Breakpoint, BreakpointId, Page, Registry};
use crate::error::Doing;
use crate::placement::{self, INT3};
use crate::step::{self, Vcpu};
use crate::{
    Access, Action, Counters, Error, Event, Gpa, Hypervisor, INSTRUCTION_BYTES, Int3, Mechanism, PAGE_SIZE, Placement,
    Reason, Registers, Reply, Rights, Step, StepOver, VcpuId, ViewId, conceal,
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
/// To leave a domain: [`leave`](Self::leave), go on handling the events that are still queued until
/// [`is_idle`](Self::is_idle), then [`finish`](Self::finish).
#[derive(Debug)]
pub struct Engine {
    registry: Registry,
    vcpus: Vec<Vcpu>,
    /// The view that shows the shadows. Made with the first of them.
    exec: Option<ViewId>,
    factory: InstructionInfoFactory,
    counters: Counters,
    leaving: bool,
}

impl Engine {
    /// An engine without breakpoints. Nothing is done to the domain.
    pub fn new<H: Hypervisor>(hv: &H) -> Self {
        Self {
            registry: Registry::default(),
            vcpus: vec![Vcpu::default(); usize::from(hv.vcpus())],
            exec: None,
            factory: InstructionInfoFactory::new(),
            counters: Counters::default(),
            leaving: false,
        }
    }

    /// Sets a breakpoint on the instruction at a guest-physical address.
    ///
    /// # Errors
    /// If there is one already, if its page is used in another way, if the mechanism cannot do this instruction, or if the
    /// hypervisor refuses: then nothing has changed in the guest.
    pub fn insert<H: Hypervisor>(&mut self, hv: &mut H, gpa: Gpa, mechanism: Mechanism) -> Result<BreakpointId, Error> {
        if self.leaving {
            return Err(Error::Leaving);
        }
        if let Some(page) = self.registry.page(gpa.gfn()) {
            if page.placement != mechanism.placement() || page.conceal != mechanism.conceal() {
                return Err(Error::PageConflict(gpa));
            }
            if page.index(gpa.offset()).is_ok() {
                return Err(Error::Occupied(gpa));
            }
        }
        let (original, instruction) = self.displaced(hv, gpa)?;
        if mechanism.step_over() == StepOver::Emulate && instruction.is_none() {
            return Err(Error::CrossesPage(gpa));
        }
        if mechanism.placement() == Placement::Shadow {
            self.ensure_view(hv)?;
        }
        let new = self.registry.page(gpa.gfn()).is_none();
        if new {
            let shadow = placement::open(hv, self.exec, gpa.gfn(), mechanism.placement()).doing("prepare the page")?;
            self.registry.add_page(Page {
                gfn: gpa.gfn(),
                placement: mechanism.placement(),
                conceal: mechanism.conceal(),
                shadow,
                breakpoints: Vec::new(),
                lifted: 0,
            });
        }
        let id = self.registry.next_id(gpa);
        let breakpoint = Breakpoint { id, step_over: mechanism.step_over(), original, instruction, hits: 0 };
        if let Some(page) = self.registry.page_mut(gpa.gfn()) {
            // While the page is lifted for another virtual CPU, its settling will arm this breakpoint too.
            let armed = if page.lifted == 0 { placement::put(hv, page, gpa.offset(), INT3) } else { Ok(()) };
            let at = page.index(gpa.offset()).unwrap_or_else(|at| at);
            page.breakpoints.insert(at, breakpoint);
            if let Err(error) = armed {
                self.remove(hv, id)?;
                return Err(error).doing("write the breakpoint");
            }
        }
        Ok(id)
    }

    /// The guest's own byte and instruction at an address, without the breakpoints around it.
    fn displaced<H: Hypervisor>(&self, hv: &mut H, gpa: Gpa) -> Result<(u8, Option<[u8; INSTRUCTION_BYTES]>), Error> {
        let mut bytes = [0; PAGE_SIZE];
        hv.read(gpa.gfn().at(0), &mut bytes).doing("read the page")?;
        if let Some(page) = self.registry.page(gpa.gfn()).filter(|p| p.placement == Placement::InPlace && p.lifted == 0)
        {
            for breakpoint in &page.breakpoints {
                bytes[usize::from(breakpoint.offset())] = breakpoint.original;
            }
        }
        Ok(placement::displaced(&bytes, gpa.offset()))
    }

    fn ensure_view<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        if self.exec.is_some() {
            return Ok(());
        }
        let view = hv.create_view().doing("create a view")?;
        let entered = (|| {
            for id in self.registry.ids() {
                hv.set_rights(view, id.gpa().gfn(), Rights::Execute)?;
            }
            hv.switch_view(view)
        })();
        if let Err(error) = entered {
            // What failed is what the caller is to hear about, not that undoing it failed too.
            let _ = hv.drop_view(view);
            return Err(error).doing("enter the view");
        }
        self.exec = Some(view);
        Ok(())
    }

    /// Removes a breakpoint. The guest's own byte is back when this returns.
    ///
    /// # Errors
    /// If there is no such breakpoint, or if the hypervisor refuses.
    pub fn remove<H: Hypervisor>(&mut self, hv: &mut H, id: BreakpointId) -> Result<(), Error> {
        let breakpoint = self.registry.get(id)?;
        let (original, offset) = (breakpoint.original, breakpoint.offset());
        if let Some(page) = self.registry.page(id.gpa().gfn()).filter(|page| page.lifted == 0) {
            placement::put(hv, page, offset, original).doing("write the original byte back")?;
        }
        let (_, closed) = self.registry.remove(id)?;
        if let Some(page) = closed {
            placement::close(hv, self.exec, &page).doing("give the page back")?;
        }
        Ok(())
    }

    /// How often a breakpoint was hit.
    ///
    /// # Errors
    /// If there is no such breakpoint.
    pub fn hits(&self, id: BreakpointId) -> Result<u64, Error> {
        Ok(self.registry.get(id)?.hits)
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Answers an event. `on_hit` is called for every hit, before the instruction runs.
    ///
    /// Nothing the guest does makes this fail or panic; where the hypervisor refuses something, it is counted, logged
    /// once, and the guest goes on.
    pub fn handle<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        event: &Event,
        on_hit: &mut impl FnMut(&Hit<'_>) -> Verdict,
    ) -> Reply {
        let Some(index) = self.begin(hv, event) else { return Reply::default() };
        let reply = match &event.reason {
            Reason::Int3(int3) => self.on_int3(hv, index, event, int3, on_hit),
            Reason::Step => Ok(self.on_step(hv, index)),
            Reason::Access(access) => self.on_access(hv, index, event, access),
        };
        reply.unwrap_or_else(|error| self.give_way(event, &error))
    }

    /// The slot of the event's virtual CPU, with a fast step that is over forgotten.
    fn begin<H: Hypervisor>(&mut self, hv: &mut H, event: &Event) -> Option<usize> {
        let index = usize::from(event.vcpu.0);
        let Some(vcpu) = self.vcpus.get_mut(index) else {
            self.counters.unexplained += 1;
            return None;
        };
        if let Some(rip) = vcpu.fast.take() {
            // Still at the instruction, still in the host view: the instruction itself raised this event before it was
            // through. From here on it is a monitored step.
            if rip == event.registers.rip && event.view == ViewId::HOST && event.reason != Reason::Step {
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
        on_hit: &mut impl FnMut(&Hit<'_>) -> Verdict,
    ) -> Result<Reply, H::Error> {
        // With prefixes, the 0xCC is the last byte. It cannot be in the next page and ours: that would have been found by
        // nobody, for the frame there is not known here.
        let offset = int3.gpa.offset().saturating_add(u16::from(int3.length.max(1)) - 1);
        if usize::from(offset) >= PAGE_SIZE {
            self.counters.reinjected += 1;
            return Ok(reinject());
        }
        let at = int3.gpa.gfn().at(offset);
        let ours = self.registry.at(at).is_some_and(|(page, _)| page.shadow.is_none() || Some(event.view) == self.exec);
        if !ours {
            return self.on_foreign_int3(hv, at);
        }
        if offset == int3.gpa.offset()
            && let Some(breakpoint) = self.registry.hit(at)
        {
            self.counters.hits += 1;
            let verdict = on_hit(&Hit { breakpoint, vcpu: event.vcpu, registers: &event.registers });
            if verdict == Verdict::Remove {
                if let Err(error) = self.remove(hv, breakpoint) {
                    log::warn!("a breakpoint at {at} could not be removed: {error}");
                    self.counters.failures += 1;
                } else {
                    return Ok(Reply::default());
                }
            }
        }
        let (vcpu, exec) = (&mut self.vcpus[index], self.exec);
        match self.registry.at(at) {
            None => Ok(Reply::default()),
            Some((_, breakpoint)) if breakpoint.original == INT3 => {
                self.counters.reinjected += 1;
                Ok(reinject())
            }
            Some((page, breakpoint)) if offset == int3.gpa.offset() => {
                step::begin(hv, exec, vcpu, page.placement, breakpoint, event.registers.rip)
            }
            // The guest jumped to a prefix before the breakpoint: that is another instruction, and no hit.
            Some(_) => match self.registry.page_mut(at.gfn()) {
                Some(page) => conceal::on_own_bytes(hv, exec, vcpu, page, false),
                None => Ok(Reply::default()),
            },
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

    fn on_step<H: Hypervisor>(&mut self, hv: &mut H, index: usize) -> Reply {
        let vcpu = std::mem::take(&mut self.vcpus[index]);
        if !vcpu.stepping {
            self.counters.unexplained += 1;
        }
        for gfn in vcpu.pages.into_iter().flatten() {
            if let Some(page) = self.registry.page_mut(gfn)
                && let Err(error) = placement::settle(hv, self.exec, page)
            {
                log::warn!("the breakpoints of {gfn} could not be set again: {error}");
                self.counters.failures += 1;
            }
        }
        if let Some(id) = vcpu.rearm
            && self.registry.get(id).is_ok()
            && let Some(page) = self.registry.page(id.gpa().gfn()).filter(|page| page.lifted == 0)
            && let Err(error) = placement::put(hv, page, id.gpa().offset(), INT3)
        {
            log::warn!("the breakpoint at {} could not be set again: {error}", id.gpa());
            self.counters.failures += 1;
        }
        let view = if vcpu.home && !self.leaving { self.exec } else { None };
        Reply { view, step: Step::Off, action: Action::Resume }
    }

    fn on_access<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        access: &Access,
    ) -> Result<Reply, H::Error> {
        let guarded = |page: &&mut Page| page.shadow.is_none() || Some(event.view) == self.exec;
        let Some(page) = self.registry.page_mut(access.gpa.gfn()).filter(guarded) else {
            // Not ours, or not any more. Xen emulates only if the access is still denied, so the guest goes on.
            self.counters.unexplained += 1;
            return Ok(Reply { action: Action::Emulate, ..Reply::default() });
        };
        match access.write {
            true => self.counters.writes += 1,
            false => self.counters.reads += 1,
        }
        conceal::begin(hv, self.exec, &mut self.vcpus[index], &mut self.factory, page, event, access)
    }

    /// The hypervisor refused something in the middle of a hit: the guest goes on without it.
    fn give_way(&mut self, event: &Event, error: &dyn std::error::Error) -> Reply {
        if self.counters.failures == 0 {
            log::error!("virtual CPU {} goes on without its breakpoint: {error}", event.vcpu.0);
        }
        self.counters.failures += 1;
        let instruction = match &event.reason {
            Reason::Int3(int3) => self.registry.at(int3.gpa).and_then(|(_, breakpoint)| breakpoint.instruction),
            Reason::Step | Reason::Access(_) => None,
        };
        Reply { action: instruction.map_or(Action::Emulate, Action::EmulateInstruction), ..Reply::default() }
    }

    /// Removes every breakpoint, and takes all virtual CPUs out of the execute view. Events may still be queued.
    ///
    /// # Errors
    /// If the hypervisor refuses; the rest has been undone nevertheless, and it may be called again.
    pub fn leave<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        self.leaving = true;
        let mut result = Ok(());
        for id in self.registry.ids() {
            result = result.and(self.remove(hv, id));
        }
        match self.exec {
            Some(_) => result.and(hv.switch_view(ViewId::HOST).doing("leave the view")),
            None => result,
        }
    }

    /// No virtual CPU is in the middle of a monitored step.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.vcpus.iter().all(|vcpu| !vcpu.stepping)
    }

    /// After [`leave`](Self::leave), when the engine [is idle](Self::is_idle) and no event is queued: ends fast steps and
    /// drops the view. Nothing of the engine is left in the domain.
    ///
    /// # Errors
    /// If the hypervisor refuses; it may be called again.
    pub fn finish<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        let Some(exec) = self.exec else { return Ok(()) };
        hv.pause().doing("pause the domain")?;
        let finished = (|| {
            for vcpu in 0..hv.vcpus() {
                hv.stop_step(VcpuId(vcpu))?;
            }
            // A fast step that has ended since `leave` went back to the execute view.
            hv.switch_view(ViewId::HOST)?;
            hv.drop_view(exec)
        })();
        hv.resume().doing("resume the domain")?;
        finished.doing("drop the view")?;
        self.exec = None;
        Ok(())
    }
}

fn reinject() -> Reply {
    Reply { action: Action::Reinject, ..Reply::default() }
}
