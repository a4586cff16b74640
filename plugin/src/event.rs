//! What a hypervisor reports.

use std::fmt;

use crate::{Accesses, Gpa, Registers};

/// Number of a virtual CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(pub u16);

impl fmt::Display for VcpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}", self.0)
    }
}

/// Number of a view: a second-level address translation (altp2m, EPTP) that virtual CPUs can be switched to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ViewId(pub u16);

impl ViewId {
    /// The translation a domain has from the start, with the guest's own pages: Xen's host p2m.
    pub const HOST: Self = Self(0);
}

impl fmt::Display for ViewId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "view {}", self.0)
    }
}

/// Something that happened in the guest. The virtual CPU waits for the [`Reply`](crate::Reply).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Event {
    /// Where.
    pub vcpu: VcpuId,
    /// The view that virtual CPU runs in.
    pub view: ViewId,
    /// Its registers. RIP is that of the instruction that caused the event, or, after a step, of the next one.
    pub registers: Registers,
    /// What.
    pub reason: Reason,
}

impl Event {
    /// An event of `vcpu`, which runs in `view`.
    #[inline]
    #[must_use]
    pub const fn new(vcpu: VcpuId, view: ViewId, registers: Registers, reason: Reason) -> Self {
        Self { vcpu, view, registers, reason }
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// An INT3 was executed, and not delivered to the guest.
    Int3(Int3),
    /// A monitored single step is over.
    Step,
    /// An access that the view does not permit; it has not happened yet.
    Access(Access),
    /// The hypervisor was told to emulate an instruction and cannot. It has not run; RIP is still there.
    EmulationFailed,
}

/// An INT3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Int3 {
    /// Guest-physical address of the instruction, prefixes included.
    pub gpa: Gpa,
    /// Bytes of the instruction: 1, or more with prefixes.
    pub length: u8,
}

impl Int3 {
    /// An INT3 of `length` bytes at `gpa`.
    #[inline]
    #[must_use]
    pub const fn new(gpa: Gpa, length: u8) -> Self {
        Self { gpa, length }
    }
}

/// A denied memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Access {
    /// The first byte of the access that is in the page that denied it.
    pub gpa: Gpa,
    /// It reads.
    pub read: bool,
    /// It writes.
    pub write: bool,
    /// It fetches an instruction.
    pub execute: bool,
    /// It is not made by the instruction itself but by the walk of the guest's page tables for it.
    pub page_walk: bool,
}

impl Access {
    /// An access of these kinds at `gpa`, made by the instruction itself.
    #[inline]
    #[must_use]
    pub const fn new(gpa: Gpa, accesses: Accesses) -> Self {
        let Accesses { read, write, execute } = accesses;
        Self { gpa, read, write, execute, page_walk: false }
    }

    /// The same access, made by the walk of the guest's page tables or not.
    #[inline]
    #[must_use]
    pub const fn with_page_walk(mut self, page_walk: bool) -> Self {
        self.page_walk = page_walk;
        self
    }
}
