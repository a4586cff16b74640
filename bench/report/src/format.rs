//! How names and numbers are written for people, and how runs are grouped.

use comfy_table::{CellAlignment, ContentArrangement, Table, TableComponent, presets};

use crate::{Run, TicksAre, Workload};

/// What stands where nothing was measured, or nothing is to be told.
pub(crate) const NOTHING: &str = "–";

/// A table for a terminal, without rows yet: with this head, and numbers in all columns but the first `texts`. There are lines
/// around it and below its head, and none between rows.
pub(crate) fn table<'a>(head: impl IntoIterator<Item = &'a str>, texts: usize) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Disabled);
    table.remove_style(TableComponent::HorizontalLines).remove_style(TableComponent::MiddleIntersections);
    table.set_header(head);
    for column in table.column_iter_mut().skip(texts) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// The runs of one host, backend and mechanism.
#[derive(Debug)]
pub(crate) struct Row<'a> {
    pub(crate) host: &'a str,
    pub(crate) backend: &'a str,
    pub(crate) mechanism: &'a str,
    pub(crate) runs: Vec<&'a Run>,
}

impl<'a> Row<'a> {
    /// The rows, in the order in which their first runs come.
    pub(crate) fn all(runs: &'a [Run]) -> Vec<Self> {
        let mut rows: Vec<Self> = Vec::new();
        for run in runs {
            let (host, backend, mechanism) = (&*run.host, &*run.backend, &*run.mechanism);
            match rows.iter_mut().find(|row| (row.host, row.backend, row.mechanism) == (host, backend, mechanism)) {
                Some(row) => row.runs.push(run),
                None => rows.push(Self { host, backend, mechanism, runs: vec![run] }),
            }
        }
        rows
    }

    /// The run of a workload, if it was measured.
    pub(crate) fn run(&self, workload: Workload) -> Option<&'a Run> {
        self.runs.iter().copied().find(|run| run.workload == workload)
    }

    /// The median of a workload, if it was measured.
    pub(crate) fn median(&self, workload: Workload) -> Option<u64> {
        self.run(workload).map(|run| run.ticks.median)
    }

    /// Whether this is the guest with no breakpoint in it.
    pub(crate) fn is_bare(&self) -> bool {
        self.mechanism == "none"
    }

    /// Whether its host is another than this repository's own programs.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.monitor() != self.backend
    }

    /// Who answered the events, in one word where one will do: the runner is what is usual, and not named.
    pub(crate) fn monitor(&self) -> String {
        monitor(self.host, self.backend)
    }
}

/// See [`Row::monitor`].
pub(crate) fn monitor(host: &str, backend: &str) -> String {
    if host == "runner" || host == backend { backend.to_owned() } else { format!("{host}_{backend}") }
}

/// A number with its thousands set apart.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// What a tick is, in the plural.
pub(crate) fn unit(ticks_are: TicksAre) -> &'static str {
    match ticks_are {
        TicksAre::Instructions => "instructions of the emulated machine",
        TicksAre::Tsc => "TSC cycles",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        let cases = [(0, "0"), (999, "999"), (1000, "1 000"), (27_984, "27 984"), (18_850_000, "18 850 000")];
        for (number, text) in cases {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn a_monitor_is_named_once() {
        assert_eq!(monitor("runner", "hyperbp"), "hyperbp");
        assert_eq!(monitor("floor", "floor"), "floor");
        assert_eq!(monitor("drakvuf", "hyperbp"), "drakvuf_hyperbp");
    }
}
