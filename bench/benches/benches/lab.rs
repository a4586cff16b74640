//! Every mechanism, on a real Xen in the lab, in ticks that the guest measures: a group for each workload, and in it a function
//! for each host, backend and mechanism. `docs/benchmarks.md` explains.
//!
//! One run of the lab measures all of it, and criterion is handed its samples.

mod exact;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

use anyhow::{Context, Result};
use criterion::{BenchmarkId, Criterion};
use hyperbp_lab::plan::{self, Selection};
use hyperbp_lab::{Elsewhere, Host, Lab, Measure, Options, Program, Progress, Xen};
use hyperbp_report::{Collection, Ticks, Workload};

use exact::Count;

/// Samples of each workload, and of reading a page, which takes 512 hits.
const SAMPLES: u64 = 100;
const PAGE_SAMPLES: u64 = exact::SAMPLES as u64;

fn main() -> ExitCode {
    match bench(&env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &[String]) -> Result<()> {
    let has = |option: &str| arguments.iter().any(|argument| argument == option);
    if !has("--bench") || has("--list") || has("--test") {
        println!("skipped: the lab, which is for `cargo bench` alone");
        return Ok(());
    }
    let out = hyperbp_lab::target().join("benches").join("lab");
    // criterion compares two baselines then; the names of what there is are those of the last run.
    let (all, skipped) = match has("--load-baseline") {
        true => (Collection::read(&out.join("all"))?, Vec::new()),
        false => measure(arguments, &out)?,
    };
    let mut criterion = Criterion::default().with_measurement(Count("ticks")).configure_from_args();
    for workload in Workload::ALL {
        let mut group = criterion.benchmark_group(workload.name());
        for (run, samples) in all.runs().filter(|(run, _)| run.workload == workload) {
            let id = BenchmarkId::new(format!("{} {}", run.host, run.backend), &run.mechanism);
            exact::replay(&mut group, id, exact::SAMPLES, || medians(samples));
        }
        group.finish();
    }
    criterion.final_summary();
    skipped.iter().for_each(|skipped| println!("skipped: {skipped}"));
    Ok(())
}

/// Measures in the lab, and returns what was measured, and what was not and why.
fn measure(arguments: &[String], out: &Path) -> Result<(Collection, Vec<String>)> {
    let lab = Lab::open(&hyperbp_lab::repo(), &hyperbp_lab::target(), Host::this(), Progress::new())?;
    let (mut programs, mut skipped) = (Vec::new(), Vec::new());
    // vmi-rs needs another Xen than the one that is booted here.
    skipped.push(format!("{}: `cargo xtask bench --xen {}` measures in it", plan::VMI_RS, Xen::V4_20));
    for host in plan::ELSEWHERE.iter().filter(|host| **host != plan::VMI_RS) {
        let variable = format!("HYPERBP_{}", host.to_uppercase());
        match env::var_os(&variable).map(PathBuf::from) {
            None => skipped.push(format!("{host}: {variable} names no build directory")),
            Some(tree) => programs.push(if *host == plan::DRAKVUF { lab.drakvuf(&tree) } else { lab.smartvmi(&tree) }?),
        }
    }
    let without = programs.iter().filter(|program| !program.has_hyperbp);
    skipped.extend(
        without.map(|program| format!("hyperbp in {0}, which was built without it: see {0}-patches", program.host)),
    );
    skipped.iter().for_each(|skipped| lab.progress.note(&format!("skipped: {skipped}")));

    let prepared = lab.prepare(Xen::default(), false)?;
    let runner = lab.build(Program::Runner, Some(&prepared.sysroot))?;
    let selection = Selection {
        workloads: workloads(arguments),
        samples: Some(SAMPLES),
        page_samples: Some(PAGE_SAMPLES),
        elsewhere: Elsewhere::named(&programs, Elsewhere::in_dom0),
        stock: Elsewhere::stock(&programs),
        ..Selection::default()
    };
    if out.exists() {
        fs::remove_dir_all(out).with_context(|| format!("cannot remove {}", out.display()))?;
    }
    let options = Options::default();
    let (programs, program, profile) = (&programs, None, None);
    let measure = Measure { selection: &selection, programs, program, profile, cpus: 1, options, parallel: 2 };
    let measured = prepared.measure(&runner, &measure, &out.join("parts"))?;
    let collections: Vec<_> = measured.into_iter().flat_map(|machine| machine.collections).collect();
    let all = Collection::read_all(&collections)?;
    all.write(&out.join("all"))?;
    Ok((all, skipped))
}

/// The samples as criterion gets them: the median of each tenth of them.
///
/// Every few samples the timer of dom0's kernel comes between, which may double one. criterion compares means, and by their
/// variance, and would not see a change of 2 % between all that; the table of `cargo xtask bench` has medians, too.
fn medians(samples: &[u64]) -> Vec<u64> {
    let tenth = (samples.len() / exact::SAMPLES).max(1);
    samples.chunks_exact(tenth).filter_map(|tenth| Some(Ticks::of(&mut tenth.to_vec())?.median)).collect()
}

/// The workloads that a filter of criterion's asks for by name: all, if it asks for none.
fn workloads(arguments: &[String]) -> Vec<String> {
    let asked = |workload: &&&str| arguments.iter().any(|argument| argument.contains(**workload));
    plan::WORKLOADS.iter().filter(asked).map(|workload| (*workload).to_owned()).collect()
}
