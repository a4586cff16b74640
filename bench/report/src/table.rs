//! The summary in a terminal.

use std::fmt::Write;

use crate::format::{self, NOTHING, Row, grouped, unit};
use crate::{Kind, Results, Workload};

/// Columns of the longest bar.
const BAR_WIDTH: u64 = 40;

/// The results as a table of medians, a row for each host, backend and mechanism, and a bar chart of `exec_bp` below. The host
/// has a column of its own when there is another than the runner.
///
/// `vs best` compares `exec_bp` with the cheapest monitor's. `hits reported` sets the events the monitor counted
/// against the executions the guest counted, over all workloads. `page read as` says whether the guest saw the
/// breakpoint.
#[must_use]
pub fn table(results: &Results) -> String {
    let machine = &results.machine;
    let kind = match machine.kind {
        Kind::Bochs => "emulated by Bochs",
        Kind::Xen => "hardware",
    };
    let plural = if machine.cpus == 1 { "" } else { "s" };
    let mut text = format!(
        "{} ({kind}), {} CPU{plural}, Xen {}\nMedian ticks, that is {}\n",
        machine.cpu,
        machine.cpus,
        machine.xen,
        unit(machine.ticks_are)
    );
    let rows = Row::all(&results.runs);
    text += &medians(&rows);
    text += &bars(&rows);
    text
}

/// The cheapest monitor's `exec_bp`.
fn cheapest(rows: &[Row<'_>]) -> Option<u64> {
    rows.iter().filter(|row| !row.is_bare()).filter_map(|row| row.median(Workload::ExecBp)).min()
}

fn medians(rows: &[Row<'_>]) -> String {
    // The runner is what is usual: that it is the host need not be said of every row.
    let hosts = rows.iter().any(Row::is_elsewhere);
    let names: &[&str] = if hosts { &["host", "backend", "mechanism"] } else { &["monitor", "mechanism"] };
    let workloads = Workload::ALL.map(Workload::name);
    let head = names.iter().chain(&workloads).chain(&["vs best", "hits reported", "page read as"]);
    let mut table = format::table(head.copied(), names.len());

    let cheapest = cheapest(rows);
    let mut host = "";
    for row in rows {
        let ratio = row.median(Workload::ExecBp).filter(|_| !row.is_bare()).zip(cheapest);
        let mut cells = match hosts {
            // Named once, above its rows.
            true => vec![if row.host == host { "" } else { row.host }.to_owned(), row.backend.to_owned()],
            false => vec![row.monitor()],
        };
        host = row.host;
        cells.push(row.mechanism.to_owned());
        cells.extend(Workload::ALL.map(|workload| row.median(workload).map_or_else(|| NOTHING.to_owned(), grouped)));
        cells.push(ratio.map_or_else(
            || NOTHING.to_owned(),
            |(median, cheapest)| format!("{:.2}×", median as f64 / cheapest.max(1) as f64),
        ));
        cells.push(hits(row));
        cells.push(concealment(row).to_owned());
        table.add_row(cells);
    }
    table.trim_fmt() + "\n"
}

/// Hits over all workloads; a lost or doubled one makes the cell look different from all others.
fn hits(row: &Row<'_>) -> String {
    let guest: u64 = row.runs.iter().map(|run| run.guest_hits).sum();
    let monitor: u64 = row.runs.iter().map(|run| run.monitor_hits).sum();
    match (row.is_bare(), guest == monitor) {
        (true, _) => NOTHING.to_owned(),
        (false, true) => format!("all {}", grouped(guest)),
        (false, false) => format!("{} OF {}", grouped(monitor), grouped(guest)),
    }
}

fn concealment(row: &Row<'_>) -> &'static str {
    if row.runs.iter().any(|run| run.guest_saw_breakpoint) {
        "BREAKPOINT"
    } else if row.runs.iter().any(|run| matches!(run.workload, Workload::ReadBp | Workload::ReadPage)) {
        "original"
    } else {
        NOTHING
    }
}

fn bars(rows: &[Row<'_>]) -> String {
    let bars: Vec<_> = rows
        .iter()
        .filter(|row| !row.is_bare())
        .filter_map(|row| Some((format!("{} {}", row.monitor(), row.mechanism), row.median(Workload::ExecBp)?)))
        .collect();
    let Some(longest) = bars.iter().map(|(_, median)| *median).max() else { return String::new() };
    let width = bars.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);

    let mut text = "\nexec_bp, median ticks\n".to_owned();
    for (label, median) in bars {
        let (bar, median) = (bar(median, longest), grouped(median));
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{label:<width$} {bar} {median}");
    }
    text
}

/// A bar of up to [`BAR_WIDTH`] columns, to an eighth of a column.
fn bar(value: u64, longest: u64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = u128::from(value) * u128::from(BAR_WIDTH) * 8 / u128::from(longest.max(1));
    let (full, part) = ((eighths / 8) as usize, (eighths % 8) as usize);
    "█".repeat(full) + EIGHTHS[part]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{bochs, collection, measurement};
    use crate::{Collection, Measurement};

    /// The cells of the row that begins with these words.
    fn cells(text: &str, row: &[&str]) -> Vec<String> {
        let cells =
            |line: &str| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect();
        let mut rows = text.lines().map(cells);
        rows.find(|cells: &Vec<String>| cells.iter().zip(row).filter(|(cell, name)| cell == name).count() == row.len())
            .unwrap_or_default()
    }

    #[test]
    fn every_row_has_its_figures() {
        let text = table(collection().results());
        assert_eq!(
            cells(&text, &["floor", "view-step"]).join("|"),
            "floor|view-step|4|55 001|55 001|55 001|55 001|1.83×|all 15|original"
        );
        assert_eq!(cells(&text, &["none", "none"]).join("|"), "none|none|4|11|11|11|11|–|–|original");
    }

    #[test]
    fn hosts_have_a_column_when_there_are_several() {
        let mut collection = collection();
        for backend in ["hyperbp", "original"] {
            let there = measurement(backend, "view-step", Workload::ExecBp);
            collection.push(Measurement { host: "drakvuf".to_owned(), ..there }, vec![70_000]).unwrap();
        }
        let text = table(collection.results());
        assert_eq!(
            cells(&text, &["drakvuf", "hyperbp", "view-step"]).join("|"),
            "drakvuf|hyperbp|view-step|–|70 000|–|–|–|2.33×|all 3|–"
        );
        // The same host is not named again.
        assert_eq!(cells(&text, &["original", "view-step"]).len(), 10);
        assert_eq!(cells(&text, &["runner", "none"]).len(), 11);
        assert!(text.contains("drakvuf_original view-step"), "{text}");
    }

    #[test]
    fn lost_hits_and_a_visible_breakpoint_stand_out() {
        let mut collection = Collection::new(bochs());
        let bad = measurement("hyperbp", "repair", Workload::ReadBp);
        collection.push(Measurement { monitor_hits: 2, guest_saw_breakpoint: true, ..bad }, vec![1]).unwrap();
        let text = table(collection.results());
        assert_eq!(cells(&text, &["hyperbp", "repair"]).join("|"), "hyperbp|repair|–|–|–|1|–|–|2 OF 3|BREAKPOINT");
    }

    #[test]
    fn nothing_measured_is_an_empty_table_and_no_chart() {
        let text = table(Collection::new(bochs()).results());
        assert!(text.contains("mechanism") && !text.contains('█'), "{text}");
    }

    #[test]
    fn bars_are_in_proportion() {
        assert_eq!(bar(10, 10).chars().count() as u64, BAR_WIDTH);
        assert_eq!(bar(5, 10), "█".repeat(20));
        assert_eq!(bar(0, 10), "");
        assert_eq!(bar(0, 0), "");
        assert_eq!(bar(1, 40 * 8), "▏");
        assert_eq!(bar(u64::MAX, u64::MAX), "█".repeat(40));
    }
}
