//! How the displaced instruction runs after a hit.

mod emulate;
mod repair;
mod view_fast_step;
mod view_step;

pub(crate) use view_fast_step::begin as fast_step_in_host_view;
pub(crate) use view_step::begin as step_in_host_view;

use crate::breakpoint::{Breakpoint, BreakpointId};
use crate::{Gfn, Hypervisor, Placement, Reply, Step, StepOver, ViewId};

/// Pages one instruction can access: an operand and a destination that both cross a page, twice over for the walks.
const PAGES: usize = 8;

/// What a virtual CPU is in the middle of, and what is to be done when it is through.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Vcpu {
    /// A monitored single step is on.
    pub(crate) stepping: bool,
    /// A fast single-step of the instruction at this address has begun. Nobody says when it is over.
    pub(crate) fast: Option<u64>,
    /// Owed after the step: switch back to the execute view.
    pub(crate) home: bool,
    /// Owed after the step: write 0xCC again.
    pub(crate) rearm: Option<BreakpointId>,
    /// Owed after the step: [`settle`](crate::placement::settle) these pages.
    pub(crate) pages: [Option<Gfn>; PAGES],
}

impl Vcpu {
    /// Turns single-stepping on, if it is off.
    pub(crate) fn step(&mut self) -> Step {
        match std::mem::replace(&mut self.stepping, true) {
            true => Step::Keep,
            false => Step::On,
        }
    }

    /// Remembers that a page is to be settled. False if it is on the list already; `None` if the list is full.
    pub(crate) fn owe(&mut self, gfn: Gfn) -> Option<bool> {
        if self.pages.contains(&Some(gfn)) {
            return Some(false);
        }
        *self.pages.iter_mut().find(|slot| slot.is_none())? = Some(gfn);
        Some(true)
    }
}

/// Lets the instruction under a breakpoint run.
pub(crate) fn begin<H: Hypervisor>(
    hv: &mut H,
    exec: Option<ViewId>,
    vcpu: &mut Vcpu,
    placement: Placement,
    breakpoint: &Breakpoint,
    rip: u64,
) -> Result<Reply, H::Error> {
    // A virtual CPU that is being stepped can only be stepped further: after an emulation the step would fall on the
    // next instruction.
    let only_step = vcpu.stepping || (breakpoint.step_over == StepOver::Emulate && breakpoint.instruction.is_none());
    match (breakpoint.step_over, placement, exec) {
        (StepOver::Emulate, _, _) if !only_step => Ok(emulate::begin(breakpoint)),
        (StepOver::ViewFastStep, Placement::Shadow, Some(exec)) if !only_step => {
            Ok(view_fast_step::begin(vcpu, exec, rip))
        }
        (_, Placement::Shadow, _) => Ok(view_step::begin(vcpu)),
        (_, Placement::InPlace, _) => repair::begin(hv, vcpu, breakpoint),
    }
}
