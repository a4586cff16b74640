//! Where the ticks of a hit go.

use maud::{Markup, html};

use super::drawing::{Axis, drawing};
use super::monitor::Monitor;
use super::scroll;
use crate::format::grouped;
use crate::{Breakdown, BreakdownRow, Instructions, Workload};

const LEFT: f64 = 260.0;
const RIGHT: f64 = 690.0;
const PITCH: f64 = 22.0;
/// Colours of the parts, in their order: neighbours differ in lightness, too.
const COLOURS: [&str; 6] = ["c6", "c0", "c2", "c3", "c5", "c1"];

pub(super) fn title(row: &BreakdownRow) -> String {
    let monitor = Monitor { host: &row.host, backend: &row.backend };
    format!("{}, {}", monitor.title(), row.mechanism)
}

/// A bar of parts for each row of a workload. `None` if there is none.
pub(super) fn picture(breakdown: &Breakdown, workload: Workload) -> Option<(Markup, String)> {
    let rows: Vec<_> = breakdown.rows.iter().filter(|row| row.workload == workload).collect();
    let longest = rows.iter().map(|row| row.ticks).fold(0.0, f64::max);
    let axis = Axis::new(LEFT, RIGHT, longest.ceil() as u64);
    let names = rows.first()?.instructions.named().map(|(name, _)| name);
    let words =
        format!("Stacked bars of {}: {}. The numbers are in the table below.", workload.name(), names.join(", "));
    let bottom = 56.0 + PITCH * rows.len() as f64;
    let bars = rows.iter().enumerate().map(|(n, row)| (56.0 + PITCH * n as f64, row));
    let body = html! {
        @for (n, (name, colour)) in names.iter().zip(COLOURS).enumerate() {
            rect class=(colour) x=(120.0 * n as f64) y="28" width="12" height="12" {}
            text x=(120.0 * n as f64 + 18.0) y="39" { (name) }
        }
        (axis.grid(50.0, bottom))
        @for (y, row) in bars {
            text x="0" y=(y + 14.0) { (title(row)) }
            @for (from, to, colour) in parts(row) {
                @let (left, right) = (axis.at(from), axis.at(to));
                rect class={ (colour) " part" } x=(left) y=(y) width=((right - left).max(0.0)) height="18" {}
            }
            text.value x="778" y=(y + 14.0) text-anchor="end" { (grouped(row.ticks.round() as u64)) }
        }
    };
    let title = format!("{}: whose the ticks of a hit are", workload.name());
    Some((drawing(&title, &words, 780.0, bottom + 22.0, body), words))
}

/// From where to where a part goes, and its colour.
fn parts(row: &BreakdownRow) -> Vec<(u64, u64, &'static str)> {
    let mut from = 0.0;
    let part = |((_, ticks), colour): ((&str, f64), &'static str)| {
        let start: f64 = from;
        from += ticks;
        (start.round() as u64, from.round() as u64, colour)
    };
    row.instructions.named().into_iter().zip(COLOURS).map(part).collect()
}

/// The heads of the columns with the parts.
pub(super) fn heads() -> Markup {
    html! { @for (name, _) in Instructions::default().named() { th.num scope="col" { (name) } } }
}

/// The parts of a row, below these heads.
pub(super) fn cells(row: &BreakdownRow) -> Markup {
    html! { @for (_, ticks) in row.instructions.named() { td.num { (grouped(ticks.round() as u64)) } } }
}

/// The numbers.
pub(super) fn numbers(breakdown: &Breakdown) -> Markup {
    scroll(
        "where the ticks of a hit go",
        html! { table {
            caption { "Means per hit: timers and Xen's scheduler are in them, so they are a little more than the medians above. Of VM exits, hypercalls and system calls those that at least every tenth hit has." }
            thead { tr {
                th scope="col" { "monitor and mechanism" } th scope="col" { "workload" }
                (heads())
                th scope="col" { "VM exits" } th scope="col" { "hypercalls" } th scope="col" { "system calls" }
            } }
            tbody { @for row in &breakdown.rows { tr {
                th scope="row" { (title(row)) } td { (row.workload.name()) }
                (cells(row))
                @for counts in [&row.exits, &row.hypercalls, &row.syscalls] { td.why { (crate::breakdown::counts(counts)) } }
            } } }
        } },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::breakdown_row;

    #[test]
    fn parts_follow_each_other_and_make_up_the_bar() {
        let row = breakdown_row("<b>", Workload::ExecBp);
        let parts = parts(&row);
        assert!(parts.windows(2).all(|pair| pair[0].1 == pair[1].0), "{parts:?}");
        assert_eq!(parts.last().map(|part| part.1), Some(22_610));
        let breakdown = Breakdown { rows: vec![row] };
        let (picture, words) = picture(&breakdown, Workload::ExecBp).unwrap();
        assert!(words.contains("guest") && picture.into_string().contains("hyperbp, &lt;b&gt;"));
        let table = numbers(&breakdown).into_string();
        assert!(table.contains("15 000") && table.contains("1 EXCEPTION_NMI"), "{table}");
        assert!(super::picture(&breakdown, Workload::ReadBp).is_none());
    }
}
