//! What `cargo bench` and the budgets measure of the core alone: a [`Scene`] is a machine of memory with breakpoints in it, and
//! [`callgrind`] counts the core's instructions there.
//!
//! `docs/benchmarks.md` is for users.

pub mod callgrind;
mod case;
mod machine;
mod scene;

pub use case::{BREAKPOINTS, Case, What, scenes};
pub use scene::Scene;
