//! What the host is told of, and what it says to that.

use crate::{Access, BreakpointId, Gpa, Registers, VcpuId};

/// A breakpoint was hit; its instruction has not run yet.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Hit<'a> {
    /// Which breakpoint.
    pub breakpoint: BreakpointId,
    /// Which virtual CPU.
    pub vcpu: VcpuId,
    /// The registers before the instruction.
    pub registers: &'a Registers,
}

/// What an event is, before it is answered.
///
/// This enum is exhaustive: a host must know whom to tell.
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
#[non_exhaustive]
pub enum Verdict {
    /// It stays.
    #[default]
    Keep,
    /// It is removed before its instruction runs.
    Remove,
}
