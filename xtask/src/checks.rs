//! What `cargo xtask test` checks on a real Xen in the lab.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use hyperbp_lab::plan::{self, Selection};
use hyperbp_lab::{Bench, Elsewhere, Job, Lab, Program};
use hyperbp_report::{Collection, Results, Workload};

use crate::balloon;
use crate::budgets::{self, Table};
use crate::steps::Steps;
use crate::trace::Trace;

/// The mechanisms of the core, dearest first: the order that was published (Electronics 14(3) 534).
const PUBLISHED_ORDER: [&str; 4] = ["repair", "view-step", "view-fast-step", "emulate"];

/// The machines that measure, and those where several things are checked in turn.
const MEASURED: &str = "test";
const MEASURED_AGAIN: &str = "test-again";
const ONE_CPU: &str = "one-cpu";
const TWO_CPUS: &str = "two-cpus";

/// The storms, small ones: virtual CPUs, and calls each of them makes.
const STORM_VCPUS: [u32; 2] = [2, 4];
const STORM_CALLS: u32 = 20;
/// The hostile guest, under mechanisms that have each placement, step-over and concealment once. All combinations are for
/// `cargo xtask check-hostile`.
const HOSTILE_VCPUS: u32 = 2;
const HOSTILE_CPUS: u32 = 1;
const HOSTILE_UNDER: [&str; 6] = [
    "auto",
    "repair",
    "view-step",
    "shadow+view-fast-step+emulate",
    "shadow+emulate+data",
    "shadow+interpret+view-step",
];
/// All probes but `gdt-beside` and `read-all-memory`, which have not been run with several vCPUs since they were mended.
const HOSTILE_PROBES: [&str; 35] = [
    "plain",
    "prefixes",
    "middle",
    "straddling",
    "int3",
    "faults",
    "privileged",
    "system-call",
    "not-",
    "read-only",
    "supervisor",
    "fetch",
    "unaligned",
    "step",
    "popf",
    "mov-ss",
    "sti",
    "branch-step",
    "debug",
    "time-stamps",
    "self-modifying",
    "read-code",
    "frames",
    "stack-beside",
    "entry-stack-beside",
    "idt-beside",
    "tss-beside",
    "tables-beside",
    "memory-types",
    "altp2m-calls",
    "balloon",
    "together",
    "nmi",
    "interrupt",
    "cross-modifying",
];
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

/// How many checks there were. Each is told when it is made.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
}

impl Checks {
    pub(crate) fn check(&mut self, what: &str, holds: bool) {
        let (count, word) = if holds { (&mut self.passed, "ok") } else { (&mut self.failed, "FAILED") };
        *count += 1;
        println!("{word}: {what}");
    }

    /// Tells the checks that a job has left in `dir`.
    ///
    /// # Errors
    /// If there are none, or one has failed.
    pub(crate) fn judge(dir: &Path) -> Result<()> {
        let mut checks = Self::default();
        checks.add(&fs::read_to_string(dir.join("checks")).context("the checks left nothing")?);
        ensure!(checks.failed == 0, "{} checks failed", checks.failed);
        Ok(())
    }

    /// Counts the lines a job has left.
    fn add(&mut self, lines: &str) {
        for line in lines.lines() {
            match line.split_once(": ") {
                Some(("ok", what)) => self.check(what, true),
                Some(("skipped", _)) => println!("{line}"),
                _ => self.check(line.trim_start_matches("FAILED: "), false),
            }
        }
    }
}

/// Boots what there is to check, and checks it, in these hosts besides the runner.
///
/// # Errors
/// If something could not be built, or a machine did not come to its end. What is wrong in the results is not an error: it is
/// counted in `checks`.
pub(crate) fn run(
    lab: &Lab,
    bench: &Bench<'_>,
    programs: &[Elsewhere],
    steps: &Steps,
    checks: &mut Checks,
) -> Result<()> {
    let runner = steps.time("lab: build of the runner", || lab.build(Program::Runner, Some(&bench.sysroot)))?;
    // Only for a guest that no other host has measured in.
    let counted =
        programs.is_empty().then(|| steps.time("lab: the core's instructions", || Table::counted(lab, bench)));
    let counted = counted.transpose()?;
    let trace = Trace::short(TRACED_SECONDS);
    let jobs = jobs(bench, &runner, programs, &trace)?;
    let images =
        steps.time("lab: images", || jobs.iter().map(|job| bench.image(job)).collect::<Result<Vec<_>, _>>())?;
    let jobs: Vec<_> = jobs.into_iter().zip(images).collect();
    let outcomes = bench.run(&jobs, 2)?;
    let dir = crate::target().join("test");
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    for ((job, _), outcome) in jobs.iter().zip(&outcomes) {
        outcome.unpack(&dir.join(&job.name))?;
        steps.took(format!("lab: machine `{}`", job.name), outcome.begun, outcome.took);
    }

    let first = Collection::read(&dir.join(MEASURED).join("0"))?;
    let second = Collection::read(&dir.join(MEASURED_AGAIN).join("0"))?;
    checks.check("two runs of the same image give the same results and samples", first == second);
    results(first.results(), checks);
    match counted {
        Some(counted) => within_budget(&counted.with_ticks(first.results()), checks)?,
        None => steps.skip("the budgets, which are for a guest that no other host has measured in"),
    }
    steps.time("lab: the report in a browser", || report(&dir.join(MEASURED).join("0"), checks))?;
    for program in programs {
        match program.host {
            plan::SMARTVMI => in_smartvmi(first.results(), program, checks),
            plan::VMI_RS => in_vmi_rs(first.results(), checks),
            _ => in_drakvuf(first.results(), program, checks),
        }
    }
    let lines =
        |dir: &Path| fs::read_to_string(dir.join("checks")).with_context(|| format!("{} has none", dir.display()));
    println!("With 1 CPU:");
    checks.add(&lines(&dir.join(ONE_CPU).join("checks-1"))?);
    let two = dir.join(TWO_CPUS);
    println!("With 2 CPUs:");
    checks.add(&lines(&two.join("checks-2"))?);
    storms(&two.join("storm-2"), checks)?;
    println!("A hostile guest:");
    hostile(&dir.join(ONE_CPU).join(format!("hostile-{HOSTILE_CPUS}")), checks)?;
    println!("Killed and recovered, attached and detached:");
    checks.add(&lines(&two.join("recover-2"))?);
    checks.add(&lines(&dir.join(ONE_CPU).join("recover-1"))?);
    println!("Pages that the guest replaces:");
    checks.add(&lines(&two.join("balloon-2"))?);
    checks.add(&lines(&dir.join(ONE_CPU).join("balloon-1"))?);
    println!("Memory, views and limits that are not the monitor's:");
    checks.add(&lines(&dir.join(ONE_CPU).join("domains-1"))?);
    println!("A Linux guest's kernel:");
    checks.add(&trace.results(&dir.join("trace-1-2"))?.1);
    for program in programs.iter().filter(|program| program.host == plan::SMARTVMI) {
        println!("In SmartVMI:");
        storms(&dir.join(storm_in(program)), checks)?;
    }
    Ok(())
}

/// The machines, the longest first: so none is left alone at the end.
fn jobs(bench: &Bench<'_>, runner: &Path, programs: &[Elsewhere], trace: &Trace) -> Result<Vec<Job>> {
    let with_programs = |mut job: Job| {
        programs.iter().for_each(|program| program.put_into(&mut job));
        job
    };
    let storm = || bench.storm(runner, 2, &STORM_VCPUS, STORM_CALLS, &[]);
    let hostile = bench.hostile(
        runner,
        HOSTILE_CPUS,
        &[HOSTILE_VCPUS],
        &HOSTILE_UNDER.map(str::to_owned),
        &HOSTILE_PROBES.map(str::to_owned),
    );
    // Where all share a CPU, the monitor leaves before a virtual CPU has gone on with its answer.
    let balloon = |cpus| bench.balloon(runner, cpus, &balloon::VCPUS, balloon::ROUNDS);
    let one_cpu = vec![
        with_programs(bench.checks(runner, 1)),
        bench.recover(runner, 1, 0, ATTACHES),
        hostile,
        balloon(1),
        bench.domains(runner, 1),
    ];
    let two_cpus =
        vec![with_programs(bench.checks(runner, 2)), storm(), bench.recover(runner, 2, KILLS, ATTACHES), balloon(2)];
    let quick = Selection {
        elsewhere: Elsewhere::named(programs, Elsewhere::in_dom0),
        stock: Elsewhere::stock(programs),
        ..budgets::selection()
    };
    let measure = with_programs(bench.bench(MEASURED, runner, std::slice::from_ref(&quick), 1));
    let again = Job { name: MEASURED_AGAIN.to_owned(), ..measure.clone() };
    let mut jobs: Vec<_> = Job::in_turn(TWO_CPUS, two_cpus).into_iter().chain(Job::in_turn(ONE_CPU, one_cpu)).collect();
    jobs.push(trace.job(bench, runner));
    for program in programs.iter().filter(|program| program.host == plan::SMARTVMI) {
        let mut job = Job { name: storm_in(program), ..storm() };
        program.put_into(&mut job);
        jobs.push(job);
    }
    // The same image twice, at the same time.
    jobs.extend([measure, again]);
    Ok(jobs)
}

fn storm_in(program: &Elsewhere) -> String {
    format!("storm-2-{}", program.host)
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

/// What a guest has tried, and found.
fn hostile(dir: &Path, checks: &mut Checks) -> Result<()> {
    let results = crate::hostile::results(dir, HOSTILE_VCPUS)?;
    print!("{}", hyperbp_report::hostile_details(&results));
    for result in &results {
        checks.check(&crate::hostile::line(result), result.is_right());
    }
    Ok(())
}

/// Checks that everything was measured in DRAKVUF, and what the core costs there.
/// (Hits and reads were checked with those of all hosts.)
fn in_drakvuf(results: &Results, drakvuf: &Elsewhere, checks: &mut Checks) {
    let ticks = |backend, mechanism: &str| {
        let run = |workload| results.run(plan::DRAKVUF, backend, mechanism, workload);
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
    let run = |workload: &Workload| results.run(plan::VMI_RS, plan::ORIGINAL, "view-fast-step", *workload);
    checks
        .check("every workload was measured with vmi-rs", Workload::ALL.iter().all(|workload| run(workload).is_some()));
}

/// Checks that everything was measured in SmartVMI, and what the core costs there.
/// (Hits and reads were checked with those of all hosts.)
fn in_smartvmi(results: &Results, smartvmi: &Elsewhere, checks: &mut Checks) {
    let all = |backend, mechanism: &str| {
        Workload::ALL.iter().all(|workload| results.run(plan::SMARTVMI, backend, mechanism, *workload).is_some())
    };
    let ticks = |backend, mechanism, workload| {
        results.run(plan::SMARTVMI, backend, mechanism, workload).map_or(0, |run| run.ticks.median)
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
        results.run(host, backend, mechanism, workload)
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
