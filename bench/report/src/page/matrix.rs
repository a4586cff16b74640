//! Medians and ratios, host by mechanism, and what was counted.

use maud::{Markup, html};

use super::monitor::{Monitor, host_title};
use super::scroll;
use crate::format::{Row, grouped};
use crate::schema::mechanism_rank;
use crate::{About, Run, Workload};

/// The hosts there are, in the order of the table.
const HOSTS: [&str; 5] = ["floor", "runner", "drakvuf", "smartvmi", "vmi-rs"];

/// A table for a workload: a row for each monitor, a column for each mechanism.
pub(super) fn matrix(rows: &[Row<'_>], about: Option<&About>, workload: Workload) -> Markup {
    let mut mechanisms: Vec<&str> = Vec::new();
    for row in rows.iter().filter(|row| !row.is_bare()) {
        if !mechanisms.contains(&row.mechanism) {
            mechanisms.push(row.mechanism);
        }
    }
    mechanisms.sort_by_key(|mechanism| mechanism_rank(mechanism));
    let cheapest = rows.iter().filter(|row| !row.is_bare()).filter_map(|row| honest(row, workload)).min();
    let what = match workload {
        Workload::Timer => "What the measurement itself costs",
        Workload::ExecBp => "The guest calls the breakpointed instruction",
        Workload::ExecPage => "The guest runs a whole page, with the breakpoint at its end",
        Workload::ReadBp => "The guest reads eight bytes at the breakpoint",
        Workload::ReadPage => "The guest reads the whole page, 512 times eight bytes",
    };
    let label = format!("{} by monitor and mechanism", workload.name());
    scroll(
        &label,
        html! { table {
            caption { (what) ". Median ticks; below, how many times the cheapest of this table (★) that is." }
            thead { tr { th scope="col" { "monitor" } @for mechanism in &mechanisms { th.num scope="col" { (mechanism) } } } }
            tbody {
                @for monitor in Monitor::all(rows) { tr {
                    th scope="row" { (monitor.title()) }
                    @for mechanism in &mechanisms { (cell(rows, monitor, mechanism, workload, cheapest)) }
                } }
                @for (host, why) in absent(rows, about) { tr {
                    th scope="row" { (host) }
                    td.why colspan=(mechanisms.len()) { "not in this run: " (why) }
                } }
            }
        } },
    )
}

/// The median, unless it is only cheap because the guest could see the breakpoint.
fn honest(row: &Row<'_>, workload: Workload) -> Option<u64> {
    row.run(workload).filter(|run| !run.guest_saw_breakpoint).map(|run| run.ticks.median)
}

fn cell(rows: &[Row<'_>], monitor: Monitor<'_>, mechanism: &str, workload: Workload, cheapest: Option<u64>) -> Markup {
    let row = rows.iter().find(|row| Monitor::of(row) == monitor && row.mechanism == mechanism);
    let Some(run) = row.and_then(|row| row.run(workload)) else {
        return html! { td.why { (why(monitor, mechanism, workload)) } };
    };
    let ratio = run.ticks.median as f64 / cheapest.unwrap_or(1).max(1) as f64;
    let shade = match ratio {
        _ if workload == Workload::Timer => "h0",
        ..1.15 => "h1",
        ..1.6 => "h2",
        ..2.4 => "h3",
        _ => "h4",
    };
    let best = if Some(run.ticks.median) == cheapest && workload != Workload::Timer { " best" } else { "" };
    html! { td class={ "num " (shade) (best) } {
        b { (grouped(run.ticks.median)) }
        small { (format!("{ratio:.2}×")) }
        @if run.guest_saw_breakpoint { small.bad { "guest saw it" } }
    } }
}

/// Why there is no such cell.
fn why(monitor: Monitor<'_>, mechanism: &str, workload: Workload) -> String {
    let reads = matches!(workload, Workload::ReadBp | Workload::ReadPage);
    match monitor.lacks(mechanism) {
        Some(why) => why,
        None if mechanism == "skip" && reads => "skip conceals nothing".to_owned(),
        None => "left out of this run".to_owned(),
    }
}

/// The hosts that are not there, and why.
fn absent<'a>(rows: &[Row<'_>], about: Option<&'a About>) -> Vec<(String, &'a str)> {
    let missing = |host: &str| about.and_then(|about| about.missing.get(host)).map(String::as_str);
    let mut absent: Vec<_> = HOSTS
        .iter()
        .filter(|host| !rows.iter().any(|row| row.host == **host))
        .map(|host| (host_title(host).to_owned(), missing(host).unwrap_or("it was not selected")))
        .collect();
    // A host that is there without hyperbp in it.
    for (host, why) in about.into_iter().flat_map(|about| &about.missing) {
        if rows.iter().any(|row| row.host == *host) {
            absent.push((format!("hyperbp in {}", host_title(host)), why));
        }
    }
    absent
}

/// Executions that were not reported, and what reads showed.
pub(super) fn counted(rows: &[Row<'_>]) -> Markup {
    let rows: Vec<_> = rows.iter().filter(|row| !row.is_bare()).collect();
    let sum = |row: &Row<'_>, of: fn(&Run) -> u64| row.runs.iter().map(|run| of(run)).sum::<u64>();
    let executed = |row: &Row<'_>| sum(row, |run| run.guest_hits);
    let lost = |row: &Row<'_>| sum(row, |run| run.guest_hits.saturating_sub(run.monitor_hits));
    let surplus = |row: &Row<'_>| sum(row, |run| run.monitor_hits.saturating_sub(run.guest_hits));
    let saw = |row: &Row<'_>| row.runs.iter().any(|run| run.guest_saw_breakpoint);
    let read = |row: &Row<'_>| row.run(Workload::ReadBp).or(row.run(Workload::ReadPage)).is_some();
    let exact = rows.iter().all(|row| lost(row) == 0 && surplus(row) == 0);
    let total: u64 = rows.iter().map(|row| executed(row)).sum();
    let count = |number: u64| html! { td class=(if number > 0 { "num bad" } else { "num" }) { (grouped(number)) } };
    html! {
        p {
            @if exact { "Each of " (grouped(total)) " executions was reported, once. " }
            @else { strong.bad { "Some executions were lost, or reported more often than they happened. " } }
            @if rows.iter().any(|row| saw(row)) { strong.bad { "Some reads showed the guest the breakpoint." } }
            @else if rows.iter().any(|row| read(row)) { "Every read showed the guest its own bytes." }
        }
        (scroll("hits lost, and what the guest saw", html! { table {
            caption { "Over all workloads. The guest counts its executions, the monitor its events." }
            thead { tr {
                th scope="col" { "monitor" } th scope="col" { "mechanism" } th.num scope="col" { "executed" }
                th.num scope="col" { "lost" } th.num scope="col" { "in excess" } th scope="col" { "the guest read" }
            } }
            tbody { @for row in &rows { tr {
                th scope="row" { (Monitor::of(row).title()) } td { (row.mechanism) }
                td.num { (grouped(executed(row))) }
                (count(lost(row))) (count(surplus(row)))
                @if saw(row) { td.bad { "the breakpoint" } }
                @else if read(row) { td { "its own bytes" } }
                @else { td.faint { "nothing (no reads measured)" } }
            } } }
        } }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{bochs, collection, measurement};
    use crate::{Collection, Measurement};

    #[test]
    fn a_cell_has_its_median_its_ratio_or_a_reason() {
        let collection = collection();
        let about = About { missing: [("drakvuf".to_owned(), "no <tree>".to_owned())].into(), ..About::default() };
        let table = matrix(&Row::all(&collection.results().runs), Some(&about), Workload::ExecBp).into_string();
        assert!(table.contains("<b>60 001</b><small>2.00×</small>") && table.contains("best\"><b>30 001<"), "{table}");
        assert!(table.contains("left out of this run"), "{table}");
        assert!(table.contains("DRAKVUF") && table.contains("no &lt;tree&gt;"), "{table}");
        assert!(table.contains("SmartVMI") && table.contains("it was not selected"), "{table}");
    }

    #[test]
    fn what_was_lost_or_seen_stands_out() {
        let mut collection = Collection::new(bochs());
        let bad = measurement("hyperbp", "repair", Workload::ReadBp);
        collection.push(Measurement { monitor_hits: 1, guest_saw_breakpoint: true, ..bad }, vec![1]).unwrap();
        let rows = Row::all(&collection.results().runs);
        let text = counted(&rows).into_string();
        assert!(text.contains("<td class=\"num bad\">2</td>") && text.contains("the breakpoint</td>"), "{text}");
        let good = counted(&Row::all(&super::super::tests::good().results().runs)).into_string();
        assert!(good.contains("was reported, once") && !good.contains("bad\">"), "{good}");
    }
}
