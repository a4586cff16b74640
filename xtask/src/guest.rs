//! The tests of `bench/guest/program`: it is built, and runs without a breakpoint, under Linux and (in Wine) Windows.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use hyperbp::Mechanism;
use hyperbp_lab::plan::Selection;
use hyperbp_lab::{Bench, Host, Lab, Log, Program, Progress, program, tools};
use hyperbp_report::{Collection, Workload};

use crate::steps::Steps;

/// Debian's compiler for Windows, and what it is called.
const MINGW: (&str, &str) = ("gcc-mingw-w64-x86-64-win32", "x86_64-w64-mingw32-gcc");
/// What runs what it makes.
const WINE: (&[&str], &str) = (&["wine", "wine64"], "wine");

const SAMPLES: usize = 500;
const PAGE_SAMPLES: usize = 20;

/// Runs them. Those for Windows only where there are its tools already, or after these are installed because `windows` are asked
/// for.
pub(crate) fn run(windows: bool, steps: &Steps) -> Result<()> {
    let dir = crate::target().join("guest-program");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    steps.time("the guest's program", || {
        make("linux", &dir)?;
        baseline("hyperbp-guest", &dir, |program| Command::new(dir.join(program)))
    })?;

    let host = Host::this();
    if windows {
        let packages = [&[MINGW.0], WINE.0].concat();
        tools::install(&host, &packages, &Progress::new(), &Log::create(&dir.join("tools.log"), "tools")?)?;
    }
    if host.find(MINGW.1).is_none() {
        steps.skip(format!("the program for Windows (`cargo xtask test --windows` installs {}, and Wine)", MINGW.0));
        return Ok(());
    }
    steps.time("the program for Windows", || make("windows", &dir))?;
    if host.find(WINE.1).is_none() {
        steps.skip("to run the program for Windows (`cargo xtask test --windows` installs Wine)");
        return Ok(());
    }
    let in_wine = |program: &str| {
        let mut command = Command::new(WINE.1);
        // It says a lot of no interest, and its files are to be here.
        command.arg(program).env("WINEDEBUG", "-all").env("WINEPREFIX", dir.join("wine"));
        command
    };
    steps.time("the program for Windows, in Wine", || baseline("hyperbp-guest.exe", &dir, in_wine))
}

fn make(what: &str, dir: &Path) -> Result<()> {
    eprintln!("== the guest's program: make {what}");
    let mut command = Command::new("make");
    command.current_dir(crate::repo()).args(["-C", program::SOURCES, what, "CFLAGS=-O2 -Wall -Wextra -Werror"]);
    let output = command.arg(format!("BUILD={}", dir.display())).output().context("cannot run make")?;
    ensure!(output.status.success(), "make {what} failed:\n{}", said(&output));
    Ok(())
}

/// Measures without a breakpoint, and looks at what comes of it; and at what is said to arguments that make no sense.
fn baseline(name: &str, dir: &Path, program: impl Fn(&str) -> Command) -> Result<()> {
    eprintln!("== the guest's program: {name} --baseline");
    let results = format!("{name}-baseline");
    let out = dir.join(&results);
    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    }
    let run = |arguments: &[&str]| {
        let mut command = program(name);
        // From there, so that Windows need not know our paths.
        command.current_dir(dir).stdin(Stdio::null()).args(arguments);
        command.output().with_context(|| format!("cannot run {name}"))
    };
    let (samples, page_samples) = (SAMPLES.to_string(), PAGE_SAMPLES.to_string());
    let measured = ["--baseline", "--samples", &samples, "--page-samples", &page_samples, "--out", &results];
    let output = run(&measured)?;
    ensure!(output.status.success(), "{name} failed ({}):\n{}", output.status, said(&output));

    let read = |file: &str| {
        let file = out.join(file);
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    };
    let summary = read("summary.csv")?;
    for workload in Workload::ALL {
        let (name, file) = (workload.name(), format!("{}.csv", workload.file_name()));
        let count = if workload == Workload::ReadPage { PAGE_SAMPLES } else { SAMPLES };
        let executions = if matches!(workload, Workload::ExecBp | Workload::ExecPage) { count } else { 0 };
        let line = summary.lines().find(|line| line.split(',').next() == Some(name));
        let line = line.with_context(|| format!("summary.csv has no {name}:\n{summary}"))?;
        let right = line.starts_with(&format!("{name},{count},")) && line.ends_with(&format!(",{executions},0"));
        ensure!(right, "{name}: {count} samples, {executions} executions and no mismatch were to be: {line}");
        let samples = read(&file)?;
        let numbers = samples.lines().filter(|line| line.parse::<u64>().is_ok()).count();
        ensure!(numbers == count && samples.lines().count() == count, "{file} has {numbers} numbers, not {count}");
    }
    let wrong: [&[&str]; 4] = [&["--none"], &["--samples", "0", "--baseline"], &["--workload"], &["--out", "x"]];
    for arguments in wrong {
        let output = run(arguments)?;
        let helps = said(&output).contains("error: ") && output.status.code() == Some(2);
        ensure!(helps, "{name} {}: {} and\n{}", arguments.join(" "), output.status, said(&output));
    }
    Ok(())
}

/// Measures each mechanism in the program in the lab's Linux guest, and returns what was checked, and whether it holds.
///
/// # Errors
/// If there are no results.
pub(crate) fn in_linux(lab: &Lab, bench: &Bench<'_>) -> Result<Vec<(String, bool)>> {
    let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
    let few = Selection {
        hosts: vec!["runner".to_owned()],
        samples: Some(20),
        page_samples: Some(1),
        ..Selection::default()
    };
    let job = bench.bench_in_linux("test-linux", &runner, &lab.program()?, &[few], 1);
    let image = bench.image(&job)?;
    let dir = crate::target().join("test-linux");
    bench.run(&[(job, image)], 1)?.remove(0).unpack(&dir)?;
    let collection = Collection::read(&dir.join("0"))?;
    let runs = &collection.results().runs;
    let mut checks = Vec::new();
    for (mechanism, _) in Mechanism::NAMED {
        let of_it: Vec<_> = runs.iter().filter(|run| run.mechanism == mechanism).collect();
        let exact = of_it.iter().all(|run| run.guest_hits == run.monitor_hits && !run.guest_saw_breakpoint);
        let what = format!("{mechanism} counts every execution in a process of Linux, and hides");
        checks.push((what, exact && of_it.len() == Workload::ALL.len()));
    }
    Ok(checks)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&*output.stdout, &*output.stderr].concat()).into_owned()
}
