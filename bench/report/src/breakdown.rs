//! Where the ticks go: a hit, taken apart.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::{Deserialize, Serialize};

use crate::Workload;
use crate::collection::order;
use crate::format::{grouped, monitor};

/// What was counted of each run. Its JSON is the file `ticks.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Breakdown {
    /// The runs, in canonical order.
    pub rows: Vec<BreakdownRow>,
}

/// What was counted of a run: means per hit, as the hits are not alike. (One in some hundred has a timer's interrupt in it.)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BreakdownRow {
    /// See [`Run::host`](crate::Run::host).
    pub host: String,
    /// See [`Run::backend`](crate::Run::backend).
    pub backend: String,
    /// See [`Run::mechanism`](crate::Run::mechanism).
    pub mechanism: String,
    /// See [`Run::workload`](crate::Run::workload).
    pub workload: Workload,
    /// How many hits were counted: executions of the breakpoint, or reads of its page.
    pub hits: u64,
    /// Ticks: the sum of all [`Instructions`].
    pub ticks: f64,
    /// Whose they were.
    pub instructions: Instructions,
    /// VM exits by reason, by the names of the Intel SDM's volume 3, appendix C, in capitals.
    pub exits: BTreeMap<String, f64>,
    /// Hypercalls of dom0's, by the names of Xen's `public/xen.h`.
    pub hypercalls: BTreeMap<String, f64>,
    /// System calls of programs in dom0, by Linux's names.
    pub syscalls: BTreeMap<String, f64>,
}

/// Whose the ticks were. In the emulator a tick is an instruction, unless the CPU is halted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Instructions {
    /// The guest's.
    pub guest: f64,
    /// Xen's.
    pub xen: f64,
    /// Those of dom0's kernel.
    pub dom0_kernel: f64,
    /// The monitor's: of the program in dom0 that had the most.
    pub monitor: f64,
    /// Those of other programs in dom0.
    pub others: f64,
    /// Nobody's: the CPU was halted.
    pub idle: f64,
}

impl BreakdownRow {
    fn order(&self) -> impl Ord {
        let Self { host, backend, mechanism, workload, .. } = self;
        order(host, mechanism, backend, *workload)
    }
}

impl Instructions {
    /// All of them.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.named().iter().map(|(_, ticks)| ticks).sum()
    }

    /// Each with its name for people.
    #[must_use]
    pub fn named(&self) -> [(&'static str, f64); 6] {
        let Self { guest, xen, dom0_kernel, monitor, others, idle } = *self;
        [
            ("guest", guest),
            ("Xen", xen),
            ("dom0's kernel", dom0_kernel),
            ("monitor", monitor),
            ("others", others),
            ("idle", idle),
        ]
    }
}

impl Breakdown {
    /// What was counted of these runs, which may come in any order.
    #[must_use]
    pub fn new(mut rows: Vec<BreakdownRow>) -> Self {
        rows.sort_by(|a, b| a.order().cmp(&b.order()));
        Self { rows }
    }

    /// Reads JSON.
    ///
    /// # Errors
    /// If it is something else.
    pub fn from_json(json: &str) -> Result<Self> {
        serde_json::from_str(json).context("this does not say where ticks go")
    }

    /// Writes JSON, indented, with a newline at its end.
    ///
    /// # Errors
    /// Never, for a value of this type; JSON just has a fallible writer.
    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// As a table for a terminal.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Disabled);
        let names = Instructions::default().named().map(|(name, _)| name);
        let head = ["monitor", "mechanism", "workload", "ticks"];
        table.set_header(head.iter().chain(&names).chain(&["VM exits, hypercalls and system calls"]));
        for column in table.column_iter_mut().skip(3).take(1 + names.len()) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let number = |number: f64| grouped(number.round() as u64);
        for row in &self.rows {
            let mut cells =
                vec![monitor(&row.host, &row.backend), row.mechanism.clone(), row.workload.name().to_owned()];
            cells.push(number(row.ticks));
            cells.extend(row.instructions.named().map(|(_, ticks)| number(ticks)));
            let counts = [&row.exits, &row.hypercalls, &row.syscalls].map(counts);
            cells.push(counts.into_iter().filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n"));
            table.add_row(cells);
        }
        format!("Where the ticks of a hit go, on average\n{}\n", table.trim_fmt())
    }
}

/// Those that most hits have, in one line: the rest is timers.
pub(crate) fn counts(counts: &BTreeMap<String, f64>) -> String {
    let mut counts: Vec<_> = counts.iter().filter(|(_, count)| **count >= 0.1).collect();
    counts.sort_by(|a, b| b.1.total_cmp(a.1));
    let text = |(name, count): (&String, &f64)| {
        let count = format!("{count:.1}");
        format!("{} {name}", count.trim_end_matches(".0"))
    };
    counts.into_iter().map(text).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::breakdown_row;

    fn breakdown() -> Breakdown {
        Breakdown { rows: vec![breakdown_row("emulate", Workload::ExecBp)] }
    }

    #[test]
    fn json_is_the_documented_format() {
        let json = concat!(
            r#"{"rows":[{"host":"runner","backend":"hyperbp","mechanism":"emulate","workload":"exec_bp","hits":1000,"#,
            r#""ticks":22610.25,"instructions":{"guest":10.0,"xen":15000.25,"dom0_kernel":7000.0,"monitor":600.0,"#,
            r#""others":0.0,"idle":0.0},"exits":{"EXCEPTION_NMI":1.0,"EXTERNAL_INTERRUPT":0.012},"#,
            r#""hypercalls":{"event_channel_op":3.0,"iret":2.5},"syscalls":{}}]}"#
        );
        assert_eq!(serde_json::to_string(&breakdown()).unwrap(), json);
        assert_eq!(Breakdown::from_json(json).unwrap(), breakdown());
    }

    #[test]
    fn the_table_has_what_most_hits_have() {
        let table = breakdown().table();
        for part in
            ["hyperbp", "emulate", "exec_bp", "22 610", "15 000", "1 EXCEPTION_NMI", "3 event_channel_op, 2.5 iret"]
        {
            assert!(table.contains(part), "{part}: {table}");
        }
        assert!(!table.contains("EXTERNAL_INTERRUPT"), "{table}");
    }
}
