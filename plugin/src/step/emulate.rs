//! The hypervisor emulates the instruction: one event and no step.

use crate::breakpoint::Breakpoint;
use crate::{Action, Reply};

pub(super) fn begin(breakpoint: &Breakpoint) -> Reply {
    let action = breakpoint.instruction.map_or(Action::Resume, Action::EmulateInstruction);
    Reply { action, ..Reply::default() }
}
