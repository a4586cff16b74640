//! `cargo xtask test`

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use hyperbp_lab::plan::{self, Selection};
use hyperbp_lab::{Bench, Elsewhere, Host, Lab, Outcome, Program, Progress, Xen};
use hyperbp_report::{Collection, Results, Run, Workload};

use crate::budgets::Table;
use crate::elsewhere::Skipped;
use crate::fuzz::Fuzz;
use crate::trace::Trace;
use crate::{budgets, cpp, deny, elsewhere, guest, tools};

/// Run all tests: formatting, lints, unit and property tests, those of the C++ side, documentation, dependencies, a little
/// fuzzing, and checks on a real Xen in the lab
#[derive(Debug, Args)]
pub(crate) struct Test {
    /// Only what needs no emulator
    #[arg(long, conflicts_with_all = ["only_lab", "drakvuf", "smartvmi"])]
    no_lab: bool,

    /// Only what is about ffi/ and cpp-shim/
    #[arg(long, conflicts_with_all = ["no_lab", "only_lab"])]
    only_cpp: bool,

    /// Only what runs in the emulator
    #[arg(long)]
    only_lab: bool,

    /// Xen's version in the emulator: 4.17, or 4.20. (Its libraries may be too new for what runs outside.)
    #[arg(long, value_name = "VERSION", default_value_t, requires = "only_lab")]
    xen: Xen,

    /// Install what the benchmark's program for Windows needs (mingw-w64 and Wine, a gigabyte), and test that, too
    #[arg(long, conflicts_with_all = ["only_cpp", "only_lab"])]
    windows: bool,

    /// Measure in a program in a Linux guest, too: one more machine, for some minutes
    #[arg(long, conflicts_with_all = ["no_lab", "only_cpp"])]
    linux_guest: bool,

    #[command(flatten)]
    elsewhere: elsewhere::Trees,
}

/// A name, and cargo's arguments.
type Step<'a> = (&'a str, &'a [&'a str]);

/// What builds on any machine.
const ANYWHERE: &[Step<'_>] = &[
    ("format", &["fmt", "--all", "--check"]),
    ("format of the guest", &["fmt", "--manifest-path", "bench/guest/Cargo.toml", "--check"]),
    ("format of the program on vmi-rs", &["fmt", "--manifest-path", "bench/vmi-rs/Cargo.toml", "--check"]),
    ("format of the fuzz targets", &["fmt", "--manifest-path", "plugin/fuzz/Cargo.toml", "--check"]),
    ("lint", &["clippy", "--all-targets", "--", "-D", "warnings"]),
    (
        "lint of the fuzz targets",
        &[
            "clippy",
            "--manifest-path",
            "plugin/fuzz/Cargo.toml",
            "--all-targets",
            "--target-dir",
            "target/fuzz",
            // As cargo-fuzz does.
            "--config",
            "build.rustflags=['--cfg', 'fuzzing']",
            "--",
            "-D",
            "warnings",
        ],
    ),
    ("test", &["test"]),
    ("documentation", &["doc", "--no-deps"]),
];

/// What needs Xen's headers, or the lab's tools.
const WITH_XEN: &[Step<'_>] = &[
    (
        "lint of the runner",
        &["clippy", "-p", "hyperbp-bench", "-p", "hyperbp-xen-sys", "--all-targets", "--", "-D", "warnings"],
    ),
    ("test of the runner", &["test", "-p", "hyperbp-bench"]),
    (
        "lint of the guest",
        &["clippy", "--release", "--all-targets", "--manifest-path", "bench/guest/Cargo.toml", "--", "-D", "warnings"],
    ),
    ("test of the guest", &["test", "--release", "--manifest-path", "bench/guest/Cargo.toml"]),
];

/// How long each fuzz target runs.
const FUZZ_SECONDS: u64 = 20;

/// The mechanisms of the core, dearest first: the order that was published (Electronics 14(3) 534).
const PUBLISHED_ORDER: [&str; 4] = ["repair", "view-step", "view-fast-step", "emulate"];

/// The storms, small ones: virtual CPUs, and calls each of them makes.
const STORM_VCPUS: [u32; 2] = [2, 4];
const STORM_CALLS: u32 = 20;
/// How often the runner is killed, and how often it attaches and detaches.
const KILLS: u32 = 10;
const ATTACHES: u32 = 24;

/// How long a Linux guest is traced.
const TRACED_SECONDS: u32 = 3;

/// What the core may cost, in hundredths of what the bare loop costs.
const FLOOR_PERCENT: u64 = 110;

/// What the core may cost in DRAKVUF, in hundredths of what the same costs there without it.
const OWN_PERCENT: u64 = 102;

/// What `auto` may cost in SmartVMI, in hundredths of what its own breakpoint costs.
const OF_SMARTVMI: [(Workload, u64); 2] = [(Workload::ExecBp, 25), (Workload::ReadBp, 85)];

impl Test {
    pub(crate) fn run(self) -> Result<()> {
        if self.only_cpp {
            return cpp::run();
        }
        if !self.only_lab {
            steps(ANYWHERE, None)?;
            cpp::run()?;
            guest::run(self.windows)?;
            deny::run()?;
            Fuzz::all(FUZZ_SECONDS).run()?;
        }
        if self.no_lab {
            println!("skipped: everything that needs the lab");
            return Ok(());
        }
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(self.xen, false)?;
        if !self.only_lab {
            steps(WITH_XEN, Some(&bench.sysroot))?;
        }
        let mut programs = self.elsewhere.build(&lab)?;
        programs.add_vmi_rs(&lab, Some(&bench.sysroot));
        let mut checks = Checks::default();
        in_the_lab(&lab, &bench, &programs.all, &mut checks)?;
        if self.linux_guest {
            println!("A program in a Linux guest:");
            for (what, holds) in guest::in_linux(&lab, &bench)? {
                checks.check(&what, holds);
            }
        } else {
            println!("skipped: a program in a Linux guest (to measure in it, `--linux-guest`)");
        }
        for skipped in plan::ELSEWHERE.iter().filter_map(|host| programs.skipped(host)) {
            let (Skipped::Host(what) | Skipped::Hyperbp(what)) = skipped;
            println!("skipped: {what}");
        }
        println!("{} passed, {} failed", checks.passed, checks.failed);
        ensure!(checks.failed == 0, "checks in the lab failed: they are named above");
        Ok(())
    }
}

fn steps(steps: &[Step<'_>], sysroot: Option<&Path>) -> Result<()> {
    for (name, arguments) in steps {
        eprintln!("== {name}: cargo {}", arguments.join(" "));
        let mut command = tools::cargo();
        command.args(*arguments).env("RUSTDOCFLAGS", "-D warnings");
        if let Some(sysroot) = sysroot {
            // The programs of the tests run here, with the sysroot's libraries.
            let lib = sysroot.join("usr/lib/x86_64-linux-gnu");
            command.env("HYPERBP_XEN_SYSROOT", sysroot).env("LD_LIBRARY_PATH", lib);
        }
        if !command.status().context("cannot run cargo")?.success() {
            bail!("the step `{name}` failed");
        }
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Checks {
    passed: u32,
    failed: u32,
}

impl Checks {
    fn check(&mut self, what: &str, holds: bool) {
        let (count, word) = if holds { (&mut self.passed, "ok") } else { (&mut self.failed, "FAILED") };
        *count += 1;
        println!("{word}: {what}");
    }

    /// Counts the lines a job has left.
    fn add(&mut self, lines: &str) {
        for line in lines.lines() {
            match line.split_once(": ") {
                Some(("ok", what)) => self.check(what, true),
                _ => self.check(line.trim_start_matches("FAILED: "), false),
            }
        }
    }
}

fn in_the_lab(lab: &Lab, bench: &Bench<'_>, programs: &[Elsewhere], checks: &mut Checks) -> Result<()> {
    let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
    let quick = Selection {
        elsewhere: Elsewhere::named(programs, Elsewhere::in_dom0),
        stock: Elsewhere::stock(programs),
        ..budgets::selection()
    };
    // The same image twice, at the same time, and then the checks with one CPU and with two.
    let mut measure = bench.bench("test", &runner, std::slice::from_ref(&quick), 1);
    for program in programs {
        program.put_into(&mut measure);
    }
    let again = hyperbp_lab::Job { name: "test-again".to_owned(), ..measure.clone() };
    let image = bench.image(&measure)?;
    let mut jobs = vec![(measure, image.clone()), (again, image)];
    for cpus in [1, 2] {
        let mut job = bench.checks(&runner, cpus);
        for program in programs {
            program.put_into(&mut job);
        }
        let image = bench.image(&job)?;
        jobs.push((job, image));
    }
    let storm = bench.storm(&runner, 2, &STORM_VCPUS, STORM_CALLS, &[]);
    let recover = bench.recover(&runner, 2, KILLS, ATTACHES);
    let trace = Trace::short(TRACED_SECONDS);
    let mut others = vec![storm, recover, trace.job(bench, &runner)];
    for program in programs.iter().filter(|program| program.host == plan::SMARTVMI) {
        let mut job = bench.storm(&runner, 2, &STORM_VCPUS, STORM_CALLS, &[]);
        job.name += &format!("-{}", program.host);
        program.put_into(&mut job);
        others.push(job);
    }
    for job in others {
        let image = bench.image(&job)?;
        jobs.push((job, image));
    }
    let outcomes = bench.run(&jobs, 2)?;
    let dir = crate::target().join("test");
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    let unpack = |n: usize, outcome: &Outcome| -> Result<PathBuf> {
        let dir = dir.join(n.to_string());
        outcome.unpack(&dir)?;
        Ok(dir)
    };
    let dirs: Vec<_> = outcomes.iter().enumerate().map(|(n, o)| unpack(n, o)).collect::<Result<_>>()?;
    let first = Collection::read(&dirs[0].join("0"))?;
    let second = Collection::read(&dirs[1].join("0"))?;
    checks.check("two runs of the same image give the same results and samples", first == second);
    results(first.results(), checks);
    match programs.is_empty() {
        true => within_budget(&Table::measured(lab, bench, first.results())?, checks)?,
        false => println!("skipped: the budgets, which are for a guest that no other host has measured in"),
    }
    report(&dirs[0].join("0"), checks)?;
    for program in programs {
        match program.host {
            plan::SMARTVMI => in_smartvmi(first.results(), program, checks),
            plan::VMI_RS => in_vmi_rs(first.results(), checks),
            _ => in_drakvuf(first.results(), program, checks),
        }
    }
    for (dir, cpus) in dirs[2..].iter().zip([1, 2]) {
        println!("With {cpus} CPUs:");
        checks.add(&fs::read_to_string(dir.join("checks")).context("the checks left nothing")?);
    }
    storms(&dirs[4], checks)?;
    println!("Killed and recovered, attached and detached:");
    checks.add(&fs::read_to_string(dirs[5].join("checks")).context("the kills left nothing")?);
    println!("A Linux guest's kernel:");
    checks.add(&trace.results(&dirs[6])?.1);
    for dir in &dirs[7..] {
        println!("In SmartVMI:");
        storms(dir, checks)?;
    }
    Ok(())
}

/// What costs more than it may is a failure; what costs less is told.
fn within_budget(measured: &Table, checks: &mut Checks) -> Result<()> {
    let compared = Table::read()?.compare(measured);
    compared.print_notes();
    let what = format!("{} figures are within the budgets of bench/budgets.toml", compared.figures);
    checks.check(&what, compared.more.is_empty());
    compared.more.iter().for_each(|more| checks.check(more, false));
    Ok(())
}

/// The report of what was measured, in a browser.
fn report(dir: &Path, checks: &mut Checks) -> Result<()> {
    crate::report::write(dir)?;
    let looked = crate::browser::check(dir);
    if let Err(why) = &looked {
        println!("{why:#}");
    }
    checks.check(
        "the report is right in a browser, in light and dark, on a desk, on a phone and printed",
        looked.is_ok(),
    );
    Ok(())
}

/// Several virtual CPUs in one page. What repair loses there is told, and is no failure.
fn storms(dir: &Path, checks: &mut Checks) -> Result<()> {
    for vcpus in STORM_VCPUS {
        println!("A storm of {vcpus} virtual CPUs:");
        for storm in crate::storm::storms(dir, vcpus)? {
            if let Some(why) = &storm.ended {
                println!("{} {}: {} executions, and then: {why}", storm.backend, storm.mechanism, storm.executions);
                continue;
            }
            let what = format!(
                "{} {}: {} executions, {} lost, {} doubled, {} of {} hashes and {} of {} writes wrong",
                storm.backend,
                storm.mechanism,
                storm.executions,
                storm.lost,
                storm.doubled,
                storm.hash_mismatches,
                storm.hashes,
                storm.rewrite_mismatches,
                storm.rewrites
            );
            checks.check(&what, storm.is_right());
        }
    }
    Ok(())
}

/// The run of a workload under a mechanism.
fn find<'a>(results: &'a Results, host: &str, backend: &str, mechanism: &str, workload: Workload) -> Option<&'a Run> {
    let is = |run: &&Run| run.host == host && run.backend == backend && run.mechanism == mechanism;
    results.runs.iter().filter(is).find(|run| run.workload == workload)
}

/// Checks that everything was measured in DRAKVUF, and what the core costs there.
/// (Hits and reads were checked with those of all hosts.)
fn in_drakvuf(results: &Results, drakvuf: &Elsewhere, checks: &mut Checks) {
    let ticks = |backend, mechanism: &str| {
        let run = |workload| find(results, plan::DRAKVUF, backend, mechanism, workload);
        let all = Workload::ALL.iter().all(|workload| run(*workload).is_some());
        all.then(|| run(Workload::ExecBp).map_or(0, |run| run.ticks.median))
    };
    let original = ["view-step", "view-fast-step"].map(|mechanism| (mechanism, ticks(plan::ORIGINAL, mechanism)));
    for (mechanism, measured) in original {
        let what = format!("every workload of {mechanism} was measured in DRAKVUF as it is");
        checks.check(&what, measured.is_some());
    }
    for (mechanism, _) in hyperbp::Mechanism::NAMED.iter().filter(|_| drakvuf.has_hyperbp) {
        let measured = ticks(plan::HYPERBP, mechanism);
        checks.check(&format!("every workload of {mechanism} was measured in DRAKVUF"), measured.is_some());
        // What DRAKVUF has not itself is compared with the cheapest that it has. Repair takes two events, which that does not.
        let same = original.iter().find(|(name, _)| name == mechanism);
        let (own, percent) = same.map_or((original[1].1, 100), |(_, ticks)| (*ticks, OWN_PERCENT));
        if let (Some(ours), Some(own), true) = (measured, own, *mechanism != "repair") {
            let what =
                format!("a hit of {mechanism} costs {ours} ticks in DRAKVUF, at most {percent} % of its own {own}");
            checks.check(&what, ours * 100 <= own * percent);
        }
    }
}

/// Checks that everything was measured with vmi-rs.
/// (Hits and reads were checked with those of all hosts.)
fn in_vmi_rs(results: &Results, checks: &mut Checks) {
    let run = |workload: &Workload| find(results, plan::VMI_RS, plan::ORIGINAL, "view-fast-step", *workload);
    checks
        .check("every workload was measured with vmi-rs", Workload::ALL.iter().all(|workload| run(workload).is_some()));
}

/// Checks that everything was measured in SmartVMI, and what the core costs there.
/// (Hits and reads were checked with those of all hosts.)
fn in_smartvmi(results: &Results, smartvmi: &Elsewhere, checks: &mut Checks) {
    let all = |backend, mechanism: &str| {
        Workload::ALL.iter().all(|workload| find(results, plan::SMARTVMI, backend, mechanism, *workload).is_some())
    };
    let ticks = |backend, mechanism, workload| {
        find(results, plan::SMARTVMI, backend, mechanism, workload).map_or(0, |run| run.ticks.median)
    };
    checks.check("every workload was measured in SmartVMI as it is", all(plan::ORIGINAL, "repair"));
    for (mechanism, _) in hyperbp::Mechanism::NAMED.iter().filter(|_| smartvmi.has_hyperbp) {
        checks.check(&format!("every workload of {mechanism} was measured in SmartVMI"), all(plan::HYPERBP, mechanism));
    }
    for (workload, percent) in OF_SMARTVMI.into_iter().filter(|_| smartvmi.has_hyperbp) {
        let (ours, own) = (ticks(plan::HYPERBP, "auto", workload), ticks(plan::ORIGINAL, "repair", workload));
        let name = workload.name();
        let what = format!("{name} costs {ours} ticks with auto in SmartVMI, at most {percent} % of its own {own}");
        checks.check(&what, ours > 0 && ours * 100 <= own * percent);
    }
}

/// Checks what was counted, and what it cost.
fn results(results: &Results, checks: &mut Checks) {
    let find = |backend: &str, mechanism: &str, workload| {
        let host = if backend == "floor" { "floor" } else { "runner" };
        find(results, host, backend, mechanism, workload)
    };
    for mechanism in PUBLISHED_ORDER {
        let all = Workload::ALL.iter().all(|w| ["hyperbp", "floor"].iter().all(|b| find(b, mechanism, *w).is_some()));
        checks.check(&format!("every workload of {mechanism} was measured"), all);
        let (ours, floor) = (find("hyperbp", mechanism, Workload::ExecBp), find("floor", mechanism, Workload::ExecBp));
        if let (Some(ours), Some(floor)) = (ours, floor) {
            let (ours, floor) = (ours.ticks.median, floor.ticks.median);
            let what = format!(
                "a hit of {mechanism} costs {ours} ticks, at most {FLOOR_PERCENT} % of the bare loop's {floor}"
            );
            checks.check(&what, ours * 100 <= floor * FLOOR_PERCENT);
        }
    }
    let exact = results.runs.iter().all(|run| run.guest_hits == run.monitor_hits);
    checks.check("every execution was reported once", exact);
    checks.check("the guest never saw a breakpoint", results.runs.iter().all(|run| !run.guest_saw_breakpoint));
    // Repair is not in this list: the README says why it comes out below view-step here.
    let ticks = |mechanism| find("hyperbp", mechanism, Workload::ExecBp).map_or(0, |run| run.ticks.median);
    let order = ticks("view-step") > ticks("view-fast-step") && ticks("view-fast-step") > ticks("emulate");
    checks.check("view-step costs more than view-fast-step, and that more than emulate", order);
    for mechanism in ["interpret", "auto"] {
        let (ours, emulate) = (ticks(mechanism), ticks("emulate"));
        let what = format!("a hit of {mechanism} costs {ours} ticks, no more than one of emulate");
        checks.check(&what, ours > 0 && ours <= emulate);
    }
}
