//! Hyper-breakpoints: breakpoints set from outside a virtual machine, that the guest cannot see.
//!
//! A breakpoint is three independent choices, a [`Mechanism`]: where its 0xCC lies ([`Placement`]), how the displaced
//! instruction runs after a hit ([`StepOver`]), and what a read of the page gets ([`Conceal`]).
//!
//! The [`Engine`] is sans-I/O. Whoever owns the connection to the hypervisor (DRAKVUF, SmartVMI, the benchmark's runner)
//! turns what it receives into an [`Event`], calls [`Engine::handle`], and turns the [`Reply`] back. What the engine must
//! do to the domain besides, it does through the narrow [`Hypervisor`] trait. It never waits.

mod addr;
mod breakpoint;
mod conceal;
mod dr7;
mod engine;
mod error;
mod event;
#[cfg(fuzzing)]
pub mod fuzzing;
mod hypervisor;
mod insn;
pub mod ledger;
mod mechanism;
mod placement;
mod registers;
mod reply;
mod stats;
mod step;
mod views;
mod waiting;
mod watch;

/// A forked child holds the locks of its parent's files. Tests that fork, and tests that lock, run one after another.
#[cfg(test)]
static FORKING: std::sync::Mutex<()> = std::sync::Mutex::new(());

pub use addr::{Gfn, Gpa, PAGE_SIZE};
pub use breakpoint::BreakpointId;
pub use engine::{Engine, Hit, Observed, Verdict};
pub use error::Error;
pub use event::{Access, Event, Int3, Reason, VcpuId, ViewId};
pub use hypervisor::{Hypervisor, Rights};
pub use mechanism::{Conceal, Mechanism, Placement, StepOver};
pub use registers::{CodeMode, Registers};
pub use reply::{Action, INSTRUCTION_BYTES, READ_BYTES, ReadData, Reply, Step};
pub use stats::{Counters, Figures, HandlingTime, LatencySummary, Served};
pub use waiting::{Wait, Waiting, Waits};
pub use watch::Accesses;
