//! What came of a storm: every virtual CPU in the same page at once, executing, hashing and writing it.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::format::{self, NOTHING, grouped, monitor};

/// The backend that is not ours.
const ORIGINAL: &str = "original";

/// One storm under one mechanism.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Storm {
    /// Always `storm`.
    pub workload: String,
    /// The program that owned the event ring, as in [`Run::host`](crate::Run::host).
    pub host: String,
    /// What answered the events, as in [`Run::backend`](crate::Run::backend).
    pub backend: String,
    /// The mechanism's name.
    pub mechanism: String,
    /// Why the host has ended in the middle of it, if it has: then nothing is known of what follows but the executions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
    /// Whether it is one that counts every hit on any number of virtual CPUs.
    pub counts_on_several_vcpus: bool,
    /// Virtual CPUs of the guest.
    pub vcpus: u32,
    /// CPUs of the machine.
    pub cpus: u32,
    /// How often the guest executed an instruction with a breakpoint.
    pub executions: u64,
    /// How often the monitor was told.
    pub hits: u64,
    /// Executions the monitor was not told of, over all breakpoints.
    pub lost: u64,
    /// Hits without an execution, over all breakpoints.
    pub doubled: u64,
    /// How often the guest hashed the page.
    pub hashes: u64,
    /// How many of the hashes were wrong.
    pub hash_mismatches: u64,
    /// How often the guest wrote to the page.
    pub rewrites: u64,
    /// How often it did not read what it wrote.
    pub rewrite_mismatches: u64,
    /// Which step-over served the hits. (Nothing, and so are the next three, where the host is not the runner.)
    pub served: Served,
    /// Hits that the chosen step-over could not serve.
    pub fallbacks: u64,
    /// How often Xen refused something in the middle of a hit.
    pub failures: u64,
    /// How long the monitor took for a hit, in ticks of its time-stamp counter.
    pub handling: Handling,
}

/// Which step-over served how many hits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // They are what they are called.
pub struct Served {
    pub repair: u64,
    pub view_step: u64,
    pub view_fast_step: u64,
    pub emulate: u64,
    pub interpret: u64,
}

/// Percentiles of the time a hit took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handling {
    /// Half of the hits took no longer.
    pub median: u64,
    /// Nor did 99 of 100.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

impl Storm {
    /// Whether everything is as it must be. With a mechanism that does not count every hit on several virtual CPUs, hits may
    /// be lost, but nothing else. What a host does with breakpoints of its own is told, and not judged.
    #[must_use]
    pub fn is_right(&self) -> bool {
        if self.backend == ORIGINAL {
            return true;
        }
        let may_lose = !self.counts_on_several_vcpus && self.vcpus > 1;
        let wrong = self.doubled + self.hash_mismatches + self.rewrite_mismatches + self.failures;
        (self.lost == 0 || may_lose) && wrong == 0
    }
}

impl Storm {
    fn is_elsewhere(&self) -> bool {
        monitor(&self.host, &self.backend) != self.backend
    }

    fn verdict(&self) -> &'static str {
        match self.is_right() {
            _ if self.ended.is_some() => "ENDED",
            true if self.backend == ORIGINAL => "",
            true => "ok",
            false => "WRONG",
        }
    }
}

/// The storms as JSON.
///
/// # Errors
/// Never, for values of this type; JSON just has a fallible writer.
pub fn storms_to_json(storms: &[Storm]) -> Result<String> {
    Ok(serde_json::to_string_pretty(storms)? + "\n")
}

/// Reads what [`storms_to_json`] has written.
///
/// # Errors
/// If it is something else.
pub fn storms_from_json(json: &str) -> Result<Vec<Storm>> {
    serde_json::from_str(json).context("these are no results of storms")
}

/// The storms as a table, a row for each. The monitor has a column of its own when it is another than the runner's.
#[must_use]
pub fn storm_table(storms: &[Storm]) -> String {
    let elsewhere = storms.iter().any(Storm::is_elsewhere);
    let texts: &[&str] = if elsewhere { &["monitor", "mechanism"] } else { &["mechanism"] };
    let head = [
        "vCPUs",
        "executions",
        "hits",
        "lost",
        "doubled",
        "hashes",
        "wrong",
        "writes",
        "wrong",
        "served by",
        "fallbacks",
        "ticks p50",
        "p99",
        "",
    ];
    let mut table = format::table(texts.iter().chain(&head).copied(), texts.len());
    for storm in storms {
        let counts = [
            storm.hits,
            storm.lost,
            storm.doubled,
            storm.hashes,
            storm.hash_mismatches,
            storm.rewrites,
            storm.rewrite_mismatches,
        ];
        let monitor = elsewhere.then(|| monitor(&storm.host, &storm.backend));
        let mut cells: Vec<String> = monitor.into_iter().chain([storm.mechanism.clone()]).collect();
        cells.extend([u64::from(storm.vcpus), storm.executions].map(grouped));
        match storm.ended {
            None => cells.extend(counts.map(grouped)),
            Some(_) => cells.extend(counts.map(|_| NOTHING.to_owned())),
        }
        if storm.is_elsewhere() {
            cells.extend([NOTHING; 4].map(str::to_owned));
        } else {
            cells.push(storm.served.shares());
            cells.extend([storm.fallbacks, storm.handling.median, storm.handling.p99].map(grouped));
        }
        cells.push(storm.verdict().to_owned());
        table.add_row(cells);
    }
    let mut text = table.trim_fmt() + "\n";
    for storm in storms {
        if let Some(why) = &storm.ended {
            text += &format!("{} {}: {why}\n", monitor(&storm.host, &storm.backend), storm.mechanism);
        }
    }
    text
}

impl Served {
    /// `interpret 61 %, emulate 39 %`, the larger ones first.
    fn shares(self) -> String {
        let mut parts = [
            ("repair", self.repair),
            ("view-step", self.view_step),
            ("view-fast-step", self.view_fast_step),
            ("emulate", self.emulate),
            ("interpret", self.interpret),
        ];
        parts.sort_by_key(|(_, hits)| std::cmp::Reverse(*hits));
        let all: u64 = parts.iter().map(|(_, hits)| hits).sum();
        let share = |(name, hits): &(&str, u64)| format!("{name} {} %", (hits * 100).div_ceil(all.max(1)));
        let some: Vec<_> = parts.iter().filter(|(_, hits)| *hits > 0).map(share).collect();
        some.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storm() -> Storm {
        Storm {
            workload: "storm".to_owned(),
            host: "runner".to_owned(),
            backend: "hyperbp".to_owned(),
            mechanism: "repair".to_owned(),
            ended: None,
            counts_on_several_vcpus: false,
            vcpus: 2,
            cpus: 2,
            executions: 3000,
            hits: 2900,
            lost: 100,
            doubled: 0,
            hashes: 3,
            hash_mismatches: 0,
            rewrites: 50,
            rewrite_mismatches: 0,
            served: Served { repair: 2800, emulate: 100, ..Served::default() },
            fallbacks: 7,
            failures: 0,
            handling: Handling { median: 900, p99: 1100, max: 5000 },
        }
    }

    #[test]
    fn only_a_mechanism_that_cannot_count_may_lose_hits() {
        assert!(storm().is_right());
        assert!(!Storm { counts_on_several_vcpus: true, ..storm() }.is_right());
        assert!(!Storm { vcpus: 1, ..storm() }.is_right());
        assert!(!Storm { doubled: 1, ..storm() }.is_right());
        assert!(!Storm { failures: 1, ..storm() }.is_right());
        assert!(!Storm { hash_mismatches: 1, ..storm() }.is_right());
        assert!(!Storm { rewrite_mismatches: 1, ..storm() }.is_right());
    }

    #[test]
    fn a_host_s_own_breakpoints_are_not_judged() {
        let own = |backend: &str| Storm {
            host: "smartvmi".to_owned(),
            backend: backend.to_owned(),
            rewrite_mismatches: 2,
            ..storm()
        };
        assert!(own("original").is_right() && !own("hyperbp").is_right());
        let table = storm_table(&[own("original"), own("hyperbp")]);
        assert!(table.contains("smartvmi_original") && table.contains("smartvmi_hyperbp"), "{table}");
        assert!(!table.contains("emulate 4 %") && !table.contains("ok"), "{table}");
        assert!(!storm_table(&[storm()]).contains("monitor"));
        let ended = Storm { ended: Some("SmartVMI has ended".to_owned()), ..own("original") };
        let table = storm_table(std::slice::from_ref(&ended));
        assert!(table.contains("ENDED") && table.contains("3 000") && !table.contains("2 900"), "{table}");
        assert!(table.ends_with("smartvmi_original repair: SmartVMI has ended\n"), "{table}");
        assert_eq!(storms_from_json(&storms_to_json(std::slice::from_ref(&ended)).unwrap()).unwrap(), [ended]);
    }

    #[test]
    fn json_round_trips_and_the_table_tells_the_losses() {
        let storms = vec![storm()];
        assert_eq!(storms_from_json(&storms_to_json(&storms).unwrap()).unwrap(), storms);
        let table = storm_table(&storms);
        assert!(table.contains("repair 97 %, emulate 4 %") && table.contains(" 100 "), "{table}");
    }
}
