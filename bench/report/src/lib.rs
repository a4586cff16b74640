//! What a benchmark run of hyperbp leaves behind, and how people get to see it.
//!
//! - [`Results`] is the summary, one [`Run`] for each host, backend, mechanism and workload; its JSON is the format.
//! - [`Collection`] is the summary with every sample behind it, as a directory.
//! - [`Storm`] is what was counted while several virtual CPUs were in the page at once.
//! - [`Hostile`] is what a hostile guest has found.
//! - [`Pair`] is what was measured of two processes that share a page of code.
//! - [`Trace`] is what was counted of the functions of a guest's kernel.
//! - [`Waited`] is what it takes of the machine that a monitor waits.
//! - [`Breakdown`] is where the ticks of a hit go.
//! - [`table`] and [`svg`] show the summary in a terminal and on a page.
//! - [`fill`] generates the tables of figures in the documentation.
//! - [`Report`] is all of it as one page, with its pictures; [`About`] is what it says of how the results were made.
//! - [`write_bpbench`] writes the samples as bpbench's measurement study keeps them, so that its scripts can plot them.

mod about;
mod bpbench;
mod breakdown;
mod collection;
mod doc;
mod format;
mod hostile;
mod page;
mod pair;
mod picture;
mod schema;
mod storm;
mod table;
mod ticks;
mod trace;
mod waiting;

pub use about::About;
pub use bpbench::write_bpbench;
pub use breakdown::{Breakdown, BreakdownRow, Instructions};
pub use collection::{Collection, Key};
pub use doc::fill;
pub use hostile::{Hostile, Probe, hostile_details, hostile_from_json, hostile_table, hostile_to_json};
pub use page::Report;
pub use pair::{Pair, Pass};
pub use picture::svg;
pub use schema::{Kind, Machine, Measurement, Results, Run, SCHEMA, TicksAre, Workload};
pub use storm::{Handling, Served, Storm, storm_table, storms_from_json, storms_to_json};
pub use table::table;
pub use ticks::Ticks;
pub use trace::{Trace, TracedFunction};
pub use waiting::{Load, Manner, Waited, waiting_from_json, waiting_problems, waiting_table, waiting_to_json};

#[cfg(test)]
mod samples;
