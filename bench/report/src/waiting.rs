//! What it costs a machine that a monitor waits, with more hits and with fewer.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::format::{self, grouped};

/// How often the breakpoint is hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Load {
    /// Never.
    Idle,
    /// Once a second.
    Rare,
    /// One time after another.
    Busy,
}

/// How the monitor waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Manner {
    /// There is none.
    None,
    /// Asleep, as everyone does.
    Sleep,
    /// As hyperbp does if nothing else is asked for.
    Adaptive,
}

/// A manner to wait under a load, and what it took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waited {
    /// The manner.
    pub manner: Manner,
    /// The load.
    pub load: Load,
    /// How long it went on, in nanoseconds.
    pub elapsed_ns: u64,
    /// CPU time that Xen has given dom0 meanwhile, in nanoseconds: its kernel and everything that runs there.
    pub dom0_ns: u64,
    /// CPU time that Xen has given the guest meanwhile, in nanoseconds. It takes what it gets.
    pub guest_ns: u64,
    /// How often the breakpoint was hit.
    pub hits: u64,
    /// How often the monitor has watched, and there was an event.
    pub watched: u64,
    /// How often it has watched for nothing.
    pub watched_in_vain: u64,
    /// How often it has had Xen wait, and an event has ended that.
    pub halted: u64,
    /// How often something else has.
    pub halted_in_vain: u64,
    /// How often it has slept.
    pub slept: u64,
}

impl Waited {
    /// How much of a CPU dom0 had, in millionths.
    fn dom0_share(&self) -> u64 {
        share(self.dom0_ns, self.elapsed_ns)
    }
}

fn share(of: u64, all: u64) -> u64 {
    of.saturating_mul(1_000_000) / all.max(1)
}

/// Of a CPU, in millionths: what a monitor may take more than another one before that is told apart from chance.
const SLACK: u64 = 100;
/// The same: what a monitor without hits may take.
const IDLE: u64 = 10_000;

/// What is not as it should be: a line each.
#[must_use]
pub fn waiting_problems(rows: &[Waited]) -> Vec<String> {
    let row = |manner, load| rows.iter().find(|row| row.manner == manner && row.load == load);
    let mut problems = Vec::new();
    let adaptive = |load| row(Manner::Adaptive, load);
    if let (Some(without), Some(with)) = (row(Manner::None, Load::Idle), adaptive(Load::Idle))
        && with.dom0_share() > without.dom0_share() + IDLE
    {
        problems.push("a monitor without hits takes more than 1 % of a CPU".to_owned());
    }
    if let (Some(sleeping), Some(with)) = (row(Manner::Sleep, Load::Rare), adaptive(Load::Rare))
        && with.dom0_share() > sleeping.dom0_share() + SLACK
    {
        problems.push("with a hit a second, it takes more of a CPU than one that sleeps".to_owned());
    }
    if let (Some(sleeping), Some(with)) = (row(Manner::Sleep, Load::Busy), adaptive(Load::Busy)) {
        let rate = |row: &Waited| share(row.hits, row.elapsed_ns / 1_000);
        if rate(with) < rate(sleeping) {
            problems.push("a busy guest gets less done than with one that sleeps".to_owned());
        }
    }
    problems
}

/// A row for each.
#[must_use]
pub fn waiting_table(rows: &[Waited]) -> String {
    let head = [
        "hits",
        "monitor",
        "seconds",
        "hits/s",
        "dom0 CPU",
        "guest CPU",
        "watched",
        "in vain",
        "halted",
        "in vain",
        "slept",
    ];
    let mut table = format::table(head, 2);
    for row in rows {
        let load = match row.load {
            Load::Idle => "none",
            Load::Rare => "one a second",
            Load::Busy => "without pause",
        };
        let manner = match row.manner {
            Manner::None => "none",
            Manner::Sleep => "sleeps",
            Manner::Adaptive => "adapts",
        };
        let thousandths = |n: u64| format!("{}.{:03}", n / 1_000, n % 1_000);
        let percent = |ns| format!("{} %", thousandths(share(ns, row.elapsed_ns) / 10));
        let seconds = thousandths(row.elapsed_ns / 1_000_000);
        // To the nearest: three hits in a little over three seconds are one a second.
        let rate = grouped((share(row.hits, row.elapsed_ns / 1_000_000) + 500) / 1_000);
        let times = [row.watched, row.watched_in_vain, row.halted, row.halted_in_vain, row.slept].map(grouped);
        let cells = [load.to_owned(), manner.to_owned(), seconds, rate, percent(row.dom0_ns), percent(row.guest_ns)];
        table.add_row(cells.into_iter().chain(times));
    }
    table.trim_fmt() + "\n"
}

/// The rows as JSON.
///
/// # Errors
/// Never, for values of this type; JSON just has a fallible writer.
pub fn waiting_to_json(rows: &[Waited]) -> Result<String> {
    Ok(serde_json::to_string_pretty(rows)? + "\n")
}

/// Reads what [`waiting_to_json`] has written.
///
/// # Errors
/// If it is something else.
pub fn waiting_from_json(json: &str) -> Result<Vec<Waited>> {
    serde_json::from_str(json).context("this does not tell of waiting")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(manner: Manner, load: Load, dom0_ns: u64, hits: u64) -> Waited {
        Waited {
            manner,
            load,
            elapsed_ns: 1_000_000_000,
            dom0_ns,
            guest_ns: 500_000_000,
            hits,
            watched: 0,
            watched_in_vain: 0,
            halted: 0,
            halted_in_vain: 0,
            slept: 0,
        }
    }

    #[test]
    fn what_is_worse_than_sleeping_is_a_problem() {
        let rows = |idle, rare, hits| {
            [
                row(Manner::None, Load::Idle, 1_000_000, 0),
                row(Manner::Adaptive, Load::Idle, idle, 0),
                row(Manner::Sleep, Load::Rare, 10_000_000, 1),
                row(Manner::Adaptive, Load::Rare, rare, 1),
                row(Manner::Sleep, Load::Busy, 500_000_000, 5_000),
                row(Manner::Adaptive, Load::Busy, 900_000_000, hits),
            ]
        };
        assert_eq!(waiting_problems(&rows(10_000_000, 10_000_000, 5_000)), Vec::<String>::new());
        assert_eq!(waiting_problems(&rows(12_000_000, 10_000_000, 5_000)).len(), 1);
        assert_eq!(waiting_problems(&rows(10_000_000, 12_000_000, 5_000)).len(), 1);
        assert_eq!(waiting_problems(&rows(10_000_000, 10_000_000, 4_000)).len(), 1);
    }

    #[test]
    fn a_row_is_read_at_a_glance() {
        let table = waiting_table(&[row(Manner::Adaptive, Load::Busy, 123_456_789, 5_000)]);
        let last = table.lines().rev().nth(1).unwrap();
        assert!(last.contains("without pause") && last.contains("adapts"), "{table}");
        assert!(last.contains("12.345 %") && last.contains("5 000"), "{table}");
    }

    #[test]
    fn what_is_written_is_read_again() {
        let rows = vec![row(Manner::None, Load::Idle, 1, 2)];
        assert_eq!(waiting_from_json(&waiting_to_json(&rows).unwrap()).unwrap(), rows);
    }
}
