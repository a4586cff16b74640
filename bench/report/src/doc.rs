//! Tables of figures in Markdown files, made from results.
//!
//! A file marks where a table stands, which one, and the directory with its results:
//!
//! ```text
//! <!-- table: medians bench/results -->
//! | host | …
//! <!-- end of table -->
//! ```
//!
//! What stands between the two lines is generated. [`fill`] generates it again.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::format::{NOTHING, Row, grouped};
use crate::{Breakdown, Results, Workload};

const BEGIN: &str = "<!-- table: ";
const BEGIN_END: &str = " -->";
const END: &str = "<!-- end of table -->";

/// Hosts whose own breakpoints are compared with hyperbp in the same host: the host, its name for people, the mechanism of
/// its own, and what to add to the name.
const ORIGINALS: [(&str, &str, &str, &str); 4] = [
    ("drakvuf", "DRAKVUF", "view-step", ""),
    ("drakvuf", "DRAKVUF", "view-fast-step", ", `--fast-singlestep`"),
    ("smartvmi", "SmartVMI", "repair", ""),
    ("vmi-rs", "vmi-rs", "view-fast-step", ""),
];

/// Generates every table of a Markdown file again. The directories that `text` names are relative to `repo`.
///
/// # Errors
/// If a table is not known or not ended, or if its results cannot be read. The message names the line.
pub fn fill(text: &str, repo: &Path) -> Result<String> {
    let mut filled = String::with_capacity(text.len());
    let mut lines = (1..).zip(text.lines());
    while let Some((number, line)) = lines.next() {
        filled += line;
        filled.push('\n');
        let mark = line.strip_prefix(BEGIN).and_then(|rest| rest.strip_suffix(BEGIN_END));
        let Some((name, directory)) = mark.and_then(|mark| mark.split_once(' ')) else { continue };
        filled += &table(name, &repo.join(directory)).with_context(|| format!("the table of line {number}"))?;
        if !lines.any(|(_, line)| line == END) {
            bail!("the table of line {number} has no end: write the line {END} below it");
        }
        filled += END;
        filled.push('\n');
    }
    Ok(filled)
}

fn table(name: &str, directory: &Path) -> Result<String> {
    let read = |file: &str| {
        let path = directory.join(file);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let results = || Results::from_json(&read("results.json")?);
    match name {
        "medians" => Ok(medians(&results()?)),
        "hosts" => Ok(hosts(&results()?)),
        "ticks" => Ok(ticks(&Breakdown::from_json(&read("ticks.json")?)?)),
        _ => bail!("there is no table {name}: medians, hosts or ticks"),
    }
}

/// All medians, a row for each host, backend and mechanism.
fn medians(results: &Results) -> String {
    let workloads =
        Workload::ALL.into_iter().filter(|workload| results.runs.iter().any(|run| run.workload == *workload));
    let workloads: Vec<_> = workloads.collect();
    let mut table = head(["host", "backend", "mechanism"], workloads.iter().map(|workload| workload.name()));
    for row in Row::all(&results.runs) {
        let medians = workloads.iter().map(|workload| median(row.median(*workload)));
        add(&mut table, [row.host, row.backend, row.mechanism].map(str::to_owned), medians);
    }
    table
}

/// What a hit and a read take with the breakpoints of other hosts, and with hyperbp's `auto` in the same host, or in the
/// runner where hyperbp cannot be loaded.
fn hosts(results: &Results) -> String {
    const WORKLOADS: [Workload; 2] = [Workload::ExecBp, Workload::ReadBp];
    let head_of = |workload| match workload {
        Workload::ReadBp => ["a read of its page", "hyperbp", "ratio"],
        _ => ["a hit", "hyperbp", "ratio"],
    };
    let mut table = head(["the host's own breakpoints"], WORKLOADS.into_iter().flat_map(head_of));
    for (host, name, mechanism, option) in ORIGINALS {
        if results.run(host, "original", mechanism, Workload::ExecBp).is_none() {
            continue;
        }
        let ours =
            if results.runs.iter().any(|run| run.host == host && run.backend == "hyperbp") { host } else { "runner" };
        let cells = WORKLOADS.into_iter().flat_map(|workload| {
            let ticks = |host, backend, mechanism| Some(results.run(host, backend, mechanism, workload)?.ticks.median);
            let (theirs, ours) = (ticks(host, "original", mechanism), ticks(ours, "hyperbp", "auto"));
            let ratio = theirs.zip(ours).map(|(theirs, ours)| format!("{:.2}", ours as f64 / theirs.max(1) as f64));
            [median(theirs), median(ours), ratio.unwrap_or_else(|| NOTHING.to_owned())]
        });
        add(&mut table, [format!("{name}{option}")], cells);
    }
    table
}

/// Where the ticks of a hit go.
fn ticks(breakdown: &Breakdown) -> String {
    let columns = ["Xen", "dom0's kernel", "monitor", "hypercalls", "system calls"];
    let mut table = head(["host", "backend", "mechanism"], columns);
    for row in breakdown.rows.iter().filter(|row| row.workload == Workload::ExecBp && row.mechanism != "none") {
        let ticks = [row.instructions.xen, row.instructions.dom0_kernel, row.instructions.monitor];
        let calls = [&row.hypercalls, &row.syscalls]
            .map(|calls| format!("{:.1}", calls.values().fold(0.0, |sum, count| sum + count)));
        let cells = ticks.map(|ticks| grouped(ticks.round() as u64)).into_iter().chain(calls);
        add(&mut table, [&row.host, &row.backend, &row.mechanism].map(|name| name.clone()), cells);
    }
    table
}

fn median(ticks: Option<u64>) -> String {
    ticks.map_or_else(|| NOTHING.to_owned(), grouped)
}

/// The head of a Markdown table: columns of text, then columns of numbers.
fn head<'a, const TEXTS: usize>(texts: [&str; TEXTS], numbers: impl IntoIterator<Item = &'a str>) -> String {
    let numbers: Vec<_> = numbers.into_iter().collect();
    let names = texts.iter().chain(&numbers).map(|name| format!(" {name} |"));
    let lines = texts.map(|_| "---|").into_iter().chain(numbers.iter().map(|_| "--:|"));
    format!("|{}\n|{}\n", names.collect::<String>(), lines.collect::<String>())
}

fn add<const TEXTS: usize>(table: &mut String, texts: [String; TEXTS], numbers: impl IntoIterator<Item = String>) {
    table.push('|');
    for cell in texts.into_iter().chain(numbers) {
        *table += &format!(" {cell} |");
    }
    table.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{breakdown_row, collection, measurement};

    fn directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let mut results = collection().results().clone();
        results.runs.push(measurement("original", "view-step", Workload::ExecBp).summarised(&[120_000]).unwrap());
        results.runs.last_mut().unwrap().host = "drakvuf".to_owned();
        results.runs.push(measurement("hyperbp", "auto", Workload::ExecBp).summarised(&[30_000]).unwrap());
        results.runs.last_mut().unwrap().host = "drakvuf".to_owned();
        let breakdown = Breakdown { rows: vec![breakdown_row("emulate", Workload::ExecBp)] };
        std::fs::create_dir(directory.path().join("results")).unwrap();
        std::fs::write(directory.path().join("results/results.json"), results.to_json().unwrap()).unwrap();
        std::fs::write(directory.path().join("results/ticks.json"), breakdown.to_json().unwrap()).unwrap();
        directory
    }

    fn filled(name: &str) -> String {
        let text = format!("above\n<!-- table: {name} results -->\nold\n<!-- end of table -->\nbelow\n");
        fill(&text, directory().path()).unwrap()
    }

    #[test]
    fn what_stands_between_the_marks_is_generated_and_nothing_else() {
        let text = filled("medians");
        let (above, rest) = text.split_once("<!-- table: medians results -->\n").unwrap();
        let (table, below) = rest.split_once("<!-- end of table -->\n").unwrap();
        assert_eq!((above, below), ("above\n", "below\n"));
        assert!(table.starts_with("| host | backend | mechanism | timer | exec_bp |"), "{table}");
        assert!(
            table.contains("| floor | floor | view-step |") || table.contains("| runner | floor | view-step |"),
            "{table}"
        );
        assert!(!table.contains("old"), "{table}");
    }

    #[test]
    fn a_host_is_compared_with_hyperbp_in_it() {
        let text = filled("hosts");
        assert!(text.contains("| DRAKVUF | 120 000 | 30 000 | 0.25 | – | – | – |"), "{text}");
        assert!(!text.contains("SmartVMI"), "{text}");
    }

    #[test]
    fn the_ticks_of_a_hit_are_rounded() {
        let text = filled("ticks");
        assert!(text.contains("| runner | hyperbp | emulate | 15 000 | 7 000 | 600 | 5.5 | 0.0 |"), "{text}");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        let error = |text: &str| format!("{:#}", fill(text, directory().path()).unwrap_err());
        assert!(
            error("\n<!-- table: other results -->\n<!-- end of table -->\n")
                .contains("line 2: there is no table other")
        );
        assert!(error("<!-- table: medians results -->\n").contains("line 1 has no end"));
        assert!(error("<!-- table: medians nowhere -->\n<!-- end of table -->\n").contains("cannot read"));
        assert_eq!(fill("no table\n", Path::new("/")).unwrap(), "no table\n");
    }
}
