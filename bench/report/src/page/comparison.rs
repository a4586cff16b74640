//! The section with the published figures.

use std::collections::BTreeMap;

use maud::{Markup, html};

use super::explanations::{explanation, text};
use super::published::{BASE, Compared, Ours, PUBLISHED, Published};
use super::{scroll, stack};
use crate::format::grouped;
use crate::{Breakdown, BreakdownRow, Results};

pub(super) fn section(results: &Results, breakdown: Option<&Breakdown>) -> Markup {
    let explain = |ours, published: &Published, compared: &Compared| {
        explanation(results.machine.ticks_are, ours, published, compared.difference)
    };
    let beyond: Vec<_> = Ours::ALL
        .into_iter()
        .flat_map(|ours| PUBLISHED.iter().map(move |published| (ours, published)))
        .filter_map(|(ours, published)| Some((ours, published, Compared::of(results, ours, published)?)))
        .filter(|(_, _, compared)| compared.is_beyond())
        .map(|(ours, published, compared)| (ours, published, explain(ours, published, &compared)))
        .collect();
    let mut numbers: Vec<usize> = beyond.iter().filter_map(|(_, _, number)| *number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    // Counted anew, so that what is not needed leaves no gap.
    let mark = |number: usize| numbers.iter().position(|other| *other == number).map_or(0, |n| n + 1);
    html! {
        p { "Measured on 20 Intel CPUs, in microseconds: L. Beierlieb et al., "
            cite { "Electronics" } " 14(3) 534 and " cite { "Eng" } " 6(10) 278, 2025. Repair and emulate are SmartVMI's there, view-step and \
            view-fast-step DRAKVUF's; six CPUs have no usable samples of SmartVMI's, as in the study's own scripts. Ratios are to "
            (BASE) ": on each CPU to its own, and of these the median. Differences over 25\u{a0}% are bold, with the number of their explanation below." }
        (scroll("published figures and ours", html! { table {
            caption { "Ratios to " (BASE) ", published and here. Below a ratio of ours: its difference from the published one, and our median." }
            thead {
                tr { th scope="col" { "workload" } th scope="col" { "mechanism" } th.num scope="col" { "published, µs" }
                    th.num scope="col" { "published ratio" }
                    @for ours in Ours::ALL { th.num scope="col" { (ours.title()) } } }
            }
            tbody { @for published in &PUBLISHED { tr {
                th scope="row" { (published.workload.name()) } td { (published.mechanism) }
                td.num { (microseconds(published.microseconds)) small { (published.cpus) " CPUs" } }
                td.num { (format!("{:.2}", published.ratio)) }
                @for ours in Ours::ALL { @match Compared::of(results, ours, published) {
                    None => td.why { (ours.lacks(published.mechanism)) },
                    Some(compared) => td class=(if compared.is_beyond() { "num beyond" } else { "num" }) {
                        (format!("{:.2}", compared.ratio))
                        @if compared.is_beyond() { @match explain(ours, published, &compared) {
                            Some(number) => sup { a href={ "#why-" (mark(number)) } { (mark(number)) } },
                            None => sup.bad { "?" },
                        } }
                        small { @if published.mechanism != BASE { (format!("{:+.0}\u{a0}%", compared.difference * 100.0)) ", " } (grouped(compared.median)) }
                    }
                } }
            } } }
        } }))
        h3 { "Why they differ" }
        @if beyond.is_empty() { p { "No ratio that could be compared differs by more than 25 %." } }
        @else { ol { @for number in &numbers { li id={ "why-" (mark(*number)) } {
            strong { (subjects(&beyond, *number)) } " " (text(*number))
            @if let Some(breakdown) = breakdown { (counted(breakdown, &beyond, *number)) }
        } } } }
        @if beyond.iter().any(|(_, _, number)| number.is_none()) {
            p.bad { "Not explained: " (names(beyond.iter().filter(|(_, _, number)| number.is_none()))) "." }
        }
    }
}

type Beyond = (Ours, &'static Published, Option<usize>);

/// What an explanation is about: it is the same mechanism everywhere.
fn subjects(beyond: &[Beyond], number: usize) -> String {
    let about = || beyond.iter().filter(move |(_, _, other)| *other == Some(number));
    let once = |names: Vec<&'static str>| {
        let mut once: Vec<&str> = Vec::new();
        names.into_iter().for_each(|name| {
            if !once.contains(&name) {
                once.push(name)
            }
        });
        once.join(", ")
    };
    let mechanism = once(about().map(|(_, published, _)| published.mechanism).collect());
    let workloads = once(about().map(|(_, published, _)| published.workload.name()).collect());
    let ours = once(about().map(|(ours, _, _)| ours.title()).collect());
    format!("{mechanism}, {workloads} ({ours}).")
}

/// What an explanation can be checked with: where the ticks of both sides of its ratios go, in the first of its workloads.
fn counted(breakdown: &Breakdown, beyond: &[Beyond], number: usize) -> Markup {
    let about = || beyond.iter().filter(|(_, _, other)| *other == Some(number));
    let Some(workload) = about().map(|(_, published, _)| published.workload).next() else { return html! {} };
    let mut rows: Vec<&BreakdownRow> = Vec::new();
    for (ours, published, _) in about() {
        for mechanism in [published.mechanism, BASE] {
            let (host, backend) = ours.monitor(mechanism);
            let is = |row: &&BreakdownRow| {
                (&*row.host, &*row.backend, &*row.mechanism, row.workload) == (host, backend, mechanism, workload)
            };
            let row = breakdown.rows.iter().find(is);
            rows.extend(row.filter(|row| !rows.contains(row)));
        }
    }
    if rows.is_empty() {
        return html! {};
    }
    let sum = |counts: &BTreeMap<String, f64>| format!("{:.1}", counts.values().sum::<f64>());
    scroll(
        &format!("what was counted of {}", workload.name()),
        html! { table {
            caption { "Counted in " (workload.name()) ", per hit" }
            thead { tr {
                th scope="col" { "monitor and mechanism" }
                (stack::heads())
                @for name in ["VM exits", "hypercalls", "system calls"] { th.num scope="col" { (name) } }
            } }
            tbody { @for row in rows { tr {
                th scope="row" { (stack::title(row)) }
                (stack::cells(row))
                @for counts in [&row.exits, &row.hypercalls, &row.syscalls] { td.num { (sum(counts)) } }
            } } }
        } },
    )
}

fn names<'a>(beyond: impl Iterator<Item = &'a Beyond>) -> String {
    let name = |(ours, published, _): &Beyond| {
        format!("{}, {} ({})", published.mechanism, published.workload.name(), ours.title())
    };
    beyond.map(name).collect::<Vec<_>>().join("; ")
}

/// With a digit behind the point where that tells something.
fn microseconds(number: f64) -> String {
    if number < 1000.0 { format!("{number:.1}") } else { grouped(number.round() as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{bochs, breakdown_row, measurement};
    use crate::{Collection, TicksAre, Workload};

    fn with(ticks_are: TicksAre, repair: u64) -> String {
        let mut collection = Collection::new(crate::Machine { ticks_are, ..bochs() });
        for (mechanism, ticks) in [("repair", repair), ("view-step", 100)] {
            collection.push(measurement("hyperbp", mechanism, Workload::ExecBp), vec![ticks]).unwrap();
        }
        let row = |mechanism| breakdown_row(mechanism, Workload::ExecBp);
        let breakdown = Breakdown { rows: [BASE, "emulate", "repair"].map(row).into() };
        section(collection.results(), Some(&breakdown)).into_string()
    }

    #[test]
    fn what_differs_much_is_explained_or_said_not_to_be() {
        let explained = with(TicksAre::Instructions, 95);
        assert!(explained.contains("href=\"#why-1\"") && explained.contains("id=\"why-1\""), "{explained}");
        assert!(
            explained.contains("repair, exec_bp (hyperbp).") && !explained.contains("Not explained"),
            "{explained}"
        );
        let counted = explained.split_once("Counted in exec_bp, per hit").unwrap().1;
        assert!(counted.contains(", repair</th>") && counted.contains(", view-step</th>"), "{counted}");
        assert!(counted.contains("15 000") && counted.contains("5.5") && !counted.contains("emulate"), "{counted}");
        let open = with(TicksAre::Tsc, 95);
        assert!(open.contains("Not explained: repair, exec_bp (hyperbp)."), "{open}");
        assert!(with(TicksAre::Tsc, 130).contains("No ratio that could be compared"));
    }
}
