//! What came of tracing functions of a guest's kernel.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::format::{self, grouped};
use crate::{Handling, Served};

/// A trace of one domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Name or number of the domain, as it was asked for.
    pub domain: String,
    /// Virtual CPUs it has.
    pub vcpus: u32,
    /// The mechanism's name.
    pub mechanism: String,
    /// How long it took, in milliseconds of dom0's clock.
    pub milliseconds: u64,
    /// Each function, in the order they were asked for.
    pub functions: Vec<TracedFunction>,
    /// How often the guest read from a page with breakpoints.
    pub reads: u64,
    /// How often it wrote to one.
    pub writes: u64,
    /// How often Xen refused something in the middle of a hit.
    pub failures: u64,
    /// How long the monitor took for a hit, in ticks of its time-stamp counter.
    pub handling: Handling,
}

/// What a trace has counted of one function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedFunction {
    /// Its name, or its address as it was asked for.
    pub name: String,
    /// Guest-physical address of its first instruction.
    pub gpa: u64,
    /// How often it was called.
    pub hits: u64,
    /// Which step-over served the hits.
    pub served: Served,
    /// Hits that the chosen step-over could not serve.
    pub fallbacks: u64,
    /// How often the guest has changed its first instruction.
    pub rewritten: u64,
}

impl Trace {
    /// As JSON.
    ///
    /// # Errors
    /// Never, for values of this type; JSON just has a fallible writer.
    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Reads what [`to_json`](Self::to_json) has written.
    ///
    /// # Errors
    /// If it is something else.
    pub fn from_json(json: &str) -> Result<Self> {
        serde_json::from_str(json).context("this is no result of a trace")
    }

    /// Calls of all functions.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.functions.iter().map(|function| function.hits).sum()
    }

    /// A table, a row for each function, and a line below it.
    #[must_use]
    pub fn table(&self) -> String {
        // Repair serves only breakpoints in place, which serve in no other way than these, too.
        let steps = ["interpret", "emulate", "view-fast-step", "view-step", "repair"];
        let mut table = format::table([&["function", "hits"], &steps[..], &["fallbacks", "rewritten"]].concat(), 1);
        for function in &self.functions {
            let Served { repair, view_step, view_fast_step, emulate, interpret } = function.served;
            let numbers = [function.hits, interpret, emulate, view_fast_step, view_step, repair];
            let mut cells = vec![function.name.clone()];
            cells.extend(numbers.into_iter().chain([function.fallbacks, function.rewritten]).map(grouped));
            table.add_row(cells);
        }
        let Handling { median, p99, max } = self.handling;
        format!(
            "{}\n{} hits of {} in {}.{:03} s; handling one took {median} ticks in the median, {p99} in the 99th percentile, \
             {max} at most; {} reads and {} writes of the pages, {} failures\n",
            table.trim_fmt(),
            grouped(self.hits()),
            self.domain,
            self.milliseconds / 1000,
            self.milliseconds % 1000,
            self.reads,
            self.writes,
            self.failures,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_round_trips_and_the_table_tells_who_served() {
        let function = TracedFunction {
            name: "vfs_read".to_owned(),
            gpa: 0x12_3450,
            hits: 1234,
            served: Served { interpret: 1230, view_fast_step: 4, ..Served::default() },
            fallbacks: 4,
            rewritten: 0,
        };
        let trace = Trace {
            domain: "linux".to_owned(),
            vcpus: 2,
            mechanism: "auto".to_owned(),
            milliseconds: 60_007,
            functions: vec![function.clone(), TracedFunction { name: "0x5000".to_owned(), hits: 1, ..function }],
            reads: 0,
            writes: 0,
            failures: 0,
            handling: Handling { median: 900, p99: 1100, max: 5000 },
        };
        assert_eq!(Trace::from_json(&trace.to_json().unwrap()).unwrap(), trace);
        let table = trace.table();
        assert!(table.contains("vfs_read") && table.contains(" 1 230 ") && table.contains("1 235 hits"), "{table}");
        assert!(table.contains("60.007 s"), "{table}");
    }
}
