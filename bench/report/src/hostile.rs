//! What came of a hostile guest: everything it tries, under each mechanism.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::format::{self, grouped};

/// All that was tried under one mechanism.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hostile {
    /// The mechanism's name.
    pub mechanism: String,
    /// Whether it is one that counts every hit on any number of vCPUs.
    pub counts_on_several_vcpus: bool,
    /// vCPUs of the guest.
    pub vcpus: u32,
    /// CPUs of the machine.
    pub cpus: u32,
    /// What was tried, in this order.
    pub probes: Vec<Probe>,
    /// How often Xen refused something in the middle of a hit.
    pub failures: u64,
    /// Events that nothing explains.
    pub unexplained: u64,
}

/// One thing that was tried.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Its name.
    pub name: String,
    /// How often the guest executed an instruction with a breakpoint.
    pub executions: u64,
    /// How often the monitor was told.
    pub hits: u64,
    /// Executions the monitor was not told of, over all breakpoints.
    pub lost: u64,
    /// Hits without an execution, over all breakpoints.
    pub doubled: u64,
    /// How much the guest saw that is otherwise without breakpoints.
    pub seen: u64,
    /// How long it took with breakpoints, in milliseconds of the machine that it ran on.
    #[serde(default)]
    pub milliseconds: u64,
    /// Some of what is wrong, for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differences: Vec<String>,
    /// Why it has not come to its end, if it has not. Nothing else is known then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
}

impl Hostile {
    /// Whether the guest has found nothing. A mechanism that does not count every hit on several vCPUs may lose hits there, and
    /// nothing else.
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.failures + self.unexplained == 0 && self.wrong().next().is_none()
    }

    /// What is not as it must be.
    pub fn wrong(&self) -> impl Iterator<Item = &Probe> {
        self.probes.iter().filter(|probe| !self.is_fine(probe))
    }

    fn is_fine(&self, probe: &Probe) -> bool {
        let may_lose = !self.counts_on_several_vcpus && self.vcpus > 1;
        probe.ended.is_none() && probe.seen + probe.doubled == 0 && (probe.lost == 0 || may_lose)
    }

    fn verdict(&self, probe: &Probe) -> &'static str {
        match probe {
            _ if probe.ended.is_some() => "DIED",
            _ if probe.seen > 0 => "SEEN",
            _ if probe.doubled > 0 => "DOUBLED",
            _ if self.is_fine(probe) => "ok",
            _ => "LOST",
        }
    }
}

/// As JSON.
///
/// # Errors
/// Never, for values of this type; JSON just has a fallible writer.
pub fn hostile_to_json(results: &[Hostile]) -> Result<String> {
    Ok(serde_json::to_string_pretty(results)? + "\n")
}

/// Reads what [`hostile_to_json`] has written.
///
/// # Errors
/// If it is something else.
pub fn hostile_from_json(json: &str) -> Result<Vec<Hostile>> {
    serde_json::from_str(json).context("these are no results of a hostile guest")
}

/// A table for each mechanism, a row for each probe; and below it what is wrong.
#[must_use]
pub fn hostile_table(results: &[Hostile]) -> String {
    let mut text = String::new();
    for result in results {
        let head = ["probe", "executions", "hits", "lost", "doubled", "seen", ""];
        let mut table = format::table(head, 1);
        for probe in &result.probes {
            let counts = [probe.executions, probe.hits, probe.lost, probe.doubled, probe.seen].map(grouped);
            let cells = [probe.name.clone()].into_iter().chain(counts).chain([result.verdict(probe).to_owned()]);
            table.add_row(cells);
        }
        // Writing to a String cannot fail.
        let _ =
            writeln!(text, "{} ({} vCPUs, {} CPUs)\n{}", result.mechanism, result.vcpus, result.cpus, table.trim_fmt());
        text += &details(result);
        text.push('\n');
    }
    text
}

/// What is wrong, a line each; nothing if nothing is.
#[must_use]
pub fn hostile_details(results: &[Hostile]) -> String {
    results.iter().map(details).collect()
}

fn details(result: &Hostile) -> String {
    let mut text = String::new();
    for probe in result.wrong() {
        let verdict = result.verdict(probe);
        let why = probe.ended.clone().unwrap_or_else(|| probe.differences.join("; "));
        let _ = writeln!(text, "{} {} {verdict}: {why}", result.mechanism, probe.name);
    }
    if result.failures + result.unexplained > 0 {
        let Hostile { mechanism, failures, unexplained, .. } = result;
        let _ = writeln!(text, "{mechanism}: {failures} failures, {unexplained} events that nothing explains");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result() -> Hostile {
        let probe = Probe { name: "plain-ring3".to_owned(), executions: 1700, hits: 1700, ..Probe::default() };
        Hostile { mechanism: "repair".to_owned(), vcpus: 1, cpus: 1, probes: vec![probe], ..Hostile::default() }
    }

    fn with(change: impl FnOnce(&mut Hostile)) -> Hostile {
        let mut result = result();
        change(&mut result);
        result
    }

    #[test]
    fn whatever_the_guest_finds_is_wrong() {
        assert!(result().is_right());
        assert!(!with(|result| result.probes[0].seen = 1).is_right());
        assert!(!with(|result| result.probes[0].doubled = 1).is_right());
        assert!(!with(|result| result.probes[0].lost = 1).is_right());
        assert!(!with(|result| result.probes[0].ended = Some("the guest has crashed".to_owned())).is_right());
        assert!(!with(|result| result.failures = 1).is_right());
        assert!(!with(|result| result.unexplained = 1).is_right());
    }

    #[test]
    fn only_a_mechanism_that_cannot_count_may_lose_hits() {
        let lost = |vcpus, counts| {
            with(|result| {
                (result.vcpus, result.counts_on_several_vcpus, result.probes[0].lost) = (vcpus, counts, 3);
            })
        };
        assert!(lost(2, false).is_right());
        assert!(!lost(2, true).is_right());
        assert!(!lost(1, false).is_right());
    }

    #[test]
    fn json_round_trips_and_the_table_says_what_is_wrong() {
        let results = vec![with(|result| {
            result.probes[0].seen = 1;
            result.probes[0].differences = vec!["rax is 0x2, not 0x1".to_owned()];
        })];
        assert_eq!(hostile_from_json(&hostile_to_json(&results).unwrap()).unwrap(), results);
        let table = hostile_table(&results);
        assert!(table.contains("1 700") && table.contains("SEEN"), "{table}");
        assert!(table.contains("repair plain-ring3 SEEN: rax is 0x2, not 0x1"), "{table}");
    }
}
