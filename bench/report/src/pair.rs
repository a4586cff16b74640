//! What came of two processes that share a page of code and are at work in turns, with a breakpoint in one of them.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::Ticks;
use crate::format::{self, NOTHING, grouped, monitor};

/// All that was measured in one boot of one guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// Always `pair`.
    pub workload: String,
    /// In the order they were.
    pub passes: Vec<Pass>,
}

/// The same work, once under each monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    /// `before`, `after`: without a monitor; or what sets the breakpoint.
    pub name: String,
    /// The program that owned the event ring, as in [`Run::host`](crate::Run::host), if any did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The mechanism's name, or `none`.
    pub mechanism: String,
    /// Switches from one process to the other that were measured, without a call of the function.
    pub switches: u64,
    /// Ticks for one of them: a sample for each round of the work.
    pub ticks_per_switch: Ticks,
    /// How often the process with the breakpoint has run through it, by its own count.
    pub calls: u64,
    /// How often the other one has run through the same instruction, by its own count.
    pub calls_of_the_other: u64,
    /// Calls that the breakpoint's owner was told of, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported: Option<u64>,
    /// Ticks for a call in the process with the breakpoint.
    pub ticks_per_call: Ticks,
    /// Ticks for one in the other process.
    pub ticks_per_call_of_the_other: Ticks,
}

impl Pair {
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
        serde_json::from_str(json).context("these are no results of a pair of processes")
    }

    /// The pass with this name.
    #[must_use]
    pub fn pass(&self, name: &str) -> Option<&Pass> {
        self.passes.iter().find(|pass| pass.name == name)
    }

    /// What the monitor of this pass adds to a switch, in the median: ticks over those of the first pass without a monitor.
    #[must_use]
    pub fn cost_of_a_switch(&self, name: &str) -> Option<u64> {
        let without = self.passes.iter().find(|pass| pass.host.is_none())?;
        Some(self.pass(name)?.ticks_per_switch.median.saturating_sub(without.ticks_per_switch.median))
    }

    /// A table, a row for each pass.
    #[must_use]
    pub fn table(&self) -> String {
        let head = [
            "monitor",
            "mechanism",
            "switches",
            "ticks a switch",
            "for the monitor",
            "calls",
            "reported",
            "ticks a call",
            "other's calls",
            "ticks a call",
        ];
        let mut table = format::table(head, 2);
        for pass in &self.passes {
            let host = pass.host.as_deref();
            let or_nothing = |number: Option<u64>| number.map_or_else(|| NOTHING.to_owned(), grouped);
            table.add_row([
                host.map_or_else(|| format!("none, {}", pass.name), |host| monitor(host, &pass.name)),
                pass.mechanism.clone(),
                grouped(pass.switches),
                grouped(pass.ticks_per_switch.median),
                or_nothing(host.and_then(|_| self.cost_of_a_switch(&pass.name))),
                grouped(pass.calls),
                or_nothing(pass.reported),
                grouped(pass.ticks_per_call.median),
                grouped(pass.calls_of_the_other),
                grouped(pass.ticks_per_call_of_the_other.median),
            ]);
        }
        table.trim_fmt() + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(name: &str, host: Option<&str>, ticks: u64) -> Pass {
        let ticks_of = |ticks| Ticks::of(&mut [ticks]).unwrap();
        Pass {
            name: name.to_owned(),
            host: host.map(str::to_owned),
            mechanism: "none".to_owned(),
            switches: 2000,
            ticks_per_switch: ticks_of(ticks),
            calls: 500,
            calls_of_the_other: 600,
            reported: host.map(|_| 500),
            ticks_per_call: ticks_of(77_000),
            ticks_per_call_of_the_other: ticks_of(7),
        }
    }

    #[test]
    fn what_a_monitor_costs_is_over_the_first_pass_without_one() {
        let passes = vec![
            pass("before", None, 3000),
            pass("original", Some("smartvmi"), 45_000),
            pass("hyperbp", Some("smartvmi"), 2990),
            pass("after", None, 3050),
        ];
        let pair = Pair { workload: "pair".to_owned(), passes };
        assert_eq!(pair.cost_of_a_switch("original"), Some(42_000));
        assert_eq!(pair.cost_of_a_switch("hyperbp"), Some(0));
        assert_eq!(pair.cost_of_a_switch("other"), None);
        assert_eq!(Pair::from_json(&pair.to_json().unwrap()).unwrap(), pair);
        let table = pair.table();
        assert!(table.contains("smartvmi_original") && table.contains("42 000"), "{table}");
        assert!(table.contains("none, before") && table.contains("none, after"), "{table}");
    }
}
