//! How the displaced instruction runs after a hit.

mod emulate;
mod interpret;
mod repair;
mod view_fast_step;
mod view_step;

pub(crate) use view_fast_step::begin as fast_step_in_own_view;
pub(crate) use view_step::{begin as step_on_own_pages, view_of};

use crate::breakpoint::{Breakpoint, Claims, Located, Page};
use crate::dr7::Dr7;
use crate::insn::{MemoryUse, Walks};
use crate::views::Views;
use crate::{Access, Gfn, Gpa, Hypervisor, Placement, Registers, Reply, Step, StepOver};

/// The pages that are to be settled after a step: as many as one instruction can access. An operand and a destination that
/// both cross a page, twice over for the walks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pages {
    gfns: [Gfn; 8],
    count: usize,
}

impl Pages {
    pub(crate) fn as_slice(&self) -> &[Gfn] {
        &self.gfns[..self.count]
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// False if there is no room left.
    fn add(&mut self, gfn: Gfn) -> bool {
        let Some(free) = self.gfns.get_mut(self.count) else { return false };
        *free = gfn;
        self.count += 1;
        true
    }

    fn remove(&mut self, gfn: Gfn) {
        if let Some(at) = self.as_slice().iter().position(|other| *other == gfn) {
            self.count -= 1;
            self.gfns[at] = self.gfns[self.count];
        }
    }
}

/// What a virtual CPU is in the middle of, and what is to be done when it is through.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vcpu {
    /// A monitored single step is on.
    pub(crate) stepping: bool,
    /// A fast single-step of the instruction at this address has begun. Nobody says when it is over.
    pub(crate) fast: Option<u64>,
    /// What the hypervisor was last asked to emulate. Nobody says when it has.
    pub(crate) emulating: Option<Emulating>,
    /// Owed after the step: switch back to the view it is at home in.
    pub(crate) home: bool,
    /// The breakpoint it is stepped over. Owed after the step, if it is in place: set it again.
    pub(crate) over: Option<Over>,
    /// Owed after the step: [`settle`](crate::placement::settle) these pages.
    pub(crate) pages: Pages,
    /// Owed after the step: tell whoever watches the page that it has been accessed.
    pub(crate) accessing: Option<Access>,
    /// It is at home in the execute view; else in the own view.
    pub(crate) monitored: bool,
    /// How often views had let go of pages when it was last answered: see [`Engine::is_late`](crate::Engine).
    pub(crate) unmappings: u64,
    /// Where it was when it was last answered, if the answer has something to be done when it goes on: RIP is another one
    /// as soon as that is done. None if that is known to be.
    pub(crate) answered: Option<u64>,
    /// It is among those that may still have to go on with what they were answered.
    pub(crate) pending: bool,
    /// With [`answered`](Self::answered): an INT3 was to be delivered.
    pub(crate) injected: bool,
    /// Where it is at an access that the CPU may have made to deliver an INT3: it is where that was to be delivered. Xen does
    /// not deliver it again (`hvm_event_needs_reinjection`, xen/arch/x86/hvm/hvm.c): the CPU executes the INT3 once more.
    pub(crate) interrupted: Option<u64>,
    /// The registers that it is to have when it meets the breakpoint again that it is [over](Self::over): Xen would have been
    /// late with them.
    pub(crate) changed: Option<Registers>,
    /// The repeated instruction (REP) that it is in the middle of.
    pub(crate) repeating: Option<Repeating>,
    /// How it gets to memory.
    pub(crate) walks: Walks,
}

/// A repeated instruction under a breakpoint, which is stepped through: each step is an iteration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Repeating {
    pub(crate) at: Gpa,
    rip: u64,
    /// RCX, RSI, RDI and CR3 before the next iteration.
    state: [u64; 4],
    /// Iterations until the single-step ends, and interrupts are let in. 0: it has ended, or something else has interrupted the
    /// instruction. The breakpoint is met once more when it goes on, and that is the same hit.
    left: u16,
}

impl Repeating {
    /// Xen lets no interrupt in while a vCPU is single-stepped. This many iterations take some ten milliseconds.
    const STEPS: u16 = 1000;

    fn state(registers: &Registers) -> [u64; 4] {
        [registers.gpr[1], registers.gpr[6], registers.gpr[7], registers.cr3]
    }

    /// Whether a vCPU with these registers is where it was interrupted.
    fn is_at(&self, registers: &Registers) -> bool {
        self.rip == registers.rip && self.state == Self::state(registers)
    }
}

/// A breakpoint that a virtual CPU is stepped over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Over {
    pub(crate) at: Gpa,
    /// Where it was then.
    pub(crate) found: Located,
}

/// What the hypervisor was asked to emulate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Emulating {
    /// The instruction under a breakpoint.
    Displaced(Gpa),
    /// An instruction that accesses a page with breakpoints.
    Access(Gfn),
}

impl Vcpu {
    /// In the middle of nothing.
    pub(crate) const fn at_home(monitored: bool) -> Self {
        Self {
            stepping: false,
            fast: None,
            emulating: None,
            home: false,
            over: None,
            pages: Pages { gfns: [Gfn(0); 8], count: 0 },
            accessing: None,
            monitored,
            unmappings: 0,
            answered: None,
            pending: false,
            injected: false,
            interrupted: None,
            changed: None,
            repeating: None,
            walks: Walks::NONE,
        }
    }

    /// Whether it is stepped over the breakpoint at this address.
    pub(crate) fn is_over(&self, at: Gpa) -> bool {
        self.over.is_some_and(|over| over.at == at)
    }

    /// Whether its hit of the breakpoint at this address may have been told already: then it is still the same one.
    pub(crate) fn has_hit(&self, at: Gpa) -> bool {
        self.is_over(at) || self.interrupted.is_some()
    }

    /// Whether a view has let go of a page since it was last answered, `noted` being how often any has.
    #[inline(always)]
    pub(crate) const fn is_late(&self, noted: u64) -> bool {
        self.unmappings != noted
    }

    /// Turns single-stepping on, if it is off.
    pub(crate) fn step(&mut self) -> Step {
        match std::mem::replace(&mut self.stepping, true) {
            true => Step::Keep,
            false => Step::On,
        }
    }

    /// Steps over a breakpoint that it may meet again before the step is over: then that is the same hit.
    #[inline]
    pub(crate) fn step_over(&mut self, at: Gpa, found: Located) -> Reply {
        self.over = Some(Over { at, found });
        Reply { step: self.step(), ..Reply::default() }
    }

    /// A step is over. If it was an iteration of a repeated instruction of this length, whether another is to come at once.
    #[cold]
    pub(crate) fn has_next_iteration(&mut self, registers: &Registers, length: u8) -> bool {
        let Some(repeating) = self.repeating.as_mut().filter(|repeating| repeating.left > 0) else { return false };
        if registers.rip == repeating.rip.wrapping_add(length.into()) {
            self.repeating = None;
            return false;
        }
        // Elsewhere it is in the handler of an exception, which returns to the instruction.
        let interrupted = registers.rip != repeating.rip || self.accessing.is_some();
        repeating.left = if interrupted { 0 } else { repeating.left - 1 };
        repeating.state = Repeating::state(registers);
        repeating.left > 0
    }

    /// Whether it has met a breakpoint again in the middle of a repeated instruction.
    pub(crate) fn is_repeating(&mut self, at: Gpa, registers: &Registers) -> bool {
        let Some(repeating) = self.repeating.filter(|repeating| repeating.at == at) else { return false };
        let same = repeating.is_at(registers);
        if !same {
            self.repeating = None;
        }
        same
    }

    /// It is to be stepped through a repeated instruction under a breakpoint.
    #[cold]
    pub(crate) fn repeat(&mut self, at: Gpa, registers: &Registers) {
        let goes_on =
            |repeating: &Repeating| repeating.at == at && repeating.rip == registers.rip && repeating.left > 0;
        let left = self.repeating.filter(goes_on).map_or(Repeating::STEPS, |repeating| repeating.left);
        self.repeating = Some(Repeating { at, rip: registers.rip, state: Repeating::state(registers), left });
    }

    /// Whether a page is to be settled.
    pub(crate) fn owes(&self, gfn: Gfn) -> bool {
        self.pages.as_slice().contains(&gfn)
    }

    /// Remembers that a page is to be settled. False if there is no room left to.
    pub(crate) fn owe(&mut self, gfn: Gfn) -> bool {
        self.owes(gfn) || self.pages.add(gfn)
    }

    /// The same of a page with breakpoints, which counts for how many virtual CPUs it is so.
    pub(crate) fn owe_page(&mut self, page: &mut Page) -> bool {
        if !self.owes(page.gfn) {
            if !self.pages.add(page.gfn) {
                return false;
            }
            page.owed = page.owed.saturating_add(1);
        }
        true
    }

    /// A page is not to be settled any more.
    pub(crate) fn forget(&mut self, gfn: Gfn) {
        self.pages.remove(gfn);
    }

    /// The same of a page with breakpoints.
    pub(crate) fn forget_page(&mut self, page: &mut Page) {
        if self.owes(page.gfn) {
            self.pages.remove(page.gfn);
            page.owed = page.owed.saturating_sub(1);
        }
    }
}

/// The ways to let the instruction under a breakpoint run that need no step, if one of them is chosen and right.
#[inline(always)]
pub(crate) fn at_once<H: Hypervisor>(
    hv: &mut H,
    views: Option<&Views>,
    vcpu: &mut Vcpu,
    claims: &Claims,
    (placement, breakpoint): (Placement, &Breakpoint),
    (registers, dr7): (&Registers, Dr7),
    reply: &mut Reply,
) -> Option<StepOver> {
    // A virtual CPU that is being stepped can only be stepped further: after anything else the step would fall on the
    // next instruction.
    if vcpu.stepping {
        return None;
    }
    let form = breakpoint.displaced.form(registers.mode);
    if form.memory != MemoryUse::None && !dr7.can_tell() {
        return None;
    }
    let (interpret, emulate) = match (breakpoint.step_over, placement) {
        (StepOver::Interpret, Placement::Shadow) => (true, false),
        // In place there is no good step to fall back to.
        (StepOver::Interpret | StepOver::Auto, Placement::InPlace) => (true, form.emulable),
        (StepOver::Auto, Placement::Shadow) => (true, form.certain),
        _ => (false, form.emulable),
    };
    let walks = &mut vcpu.walks;
    let mut guest = interpret::Guest { hv, claims, views, registers, walks, dr7, unwatched: false };
    if interpret
        && let Some(op) = breakpoint.displaced.op(registers.mode)
        && (!breakpoint.displaced.begins_page() || guest.is_out_of_shadow())
        && interpret::begin(&mut guest, op, reply).is_some()
    {
        return Some(StepOver::Interpret);
    }
    if emulate && !breakpoint.not_emulable && emulate::is_right(&mut guest, form) {
        emulate::begin(vcpu, breakpoint, reply);
        return Some(StepOver::Emulate);
    }
    None
}

/// Steps over the instruction under a breakpoint.
#[inline(always)]
pub(crate) fn step<H: Hypervisor>(
    hv: &mut H,
    views: Option<&Views>,
    vcpu: &mut Vcpu,
    placement: Placement,
    (found, breakpoint): (Located, &Breakpoint),
    registers: &Registers,
    reply: &mut Reply,
) -> Result<StepOver, H::Error> {
    let repeats = breakpoint.displaced.form(registers.mode).repeats;
    if repeats {
        vcpu.repeat(breakpoint.gpa, registers);
    }
    let fast = !(vcpu.stepping || repeats || breakpoint.step_over == StepOver::ViewStep);
    match (placement, views) {
        (Placement::Shadow, Some(views)) if fast => {
            *reply = view_fast_step::begin(vcpu, views, registers.rip);
            Ok(StepOver::ViewFastStep)
        }
        (Placement::Shadow, Some(views)) => {
            *reply = view_step::begin(vcpu, views);
            Ok(StepOver::ViewStep)
        }
        _ => {
            *reply = repair::begin(hv, vcpu, found, breakpoint)?;
            Ok(StepOver::Repair)
        }
    }
}
