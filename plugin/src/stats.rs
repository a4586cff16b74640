//! Figures of what the engine has done.

/// How often what happened, since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Breakpoints were hit.
    pub hits: u64,
    /// Reads of a page with breakpoints were answered.
    pub reads: u64,
    /// The guest wrote to a page with breakpoints.
    pub writes: u64,
    /// The guest's own INT3s were delivered to it.
    pub reinjected: u64,
    /// Events arrived that no breakpoint explains (any more); the guest went on.
    pub unexplained: u64,
    /// The hypervisor refused something in the middle of a hit; the guest went on.
    pub failures: u64,
}
