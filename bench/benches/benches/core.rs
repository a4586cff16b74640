//! The core alone: what a hit, a concealed read, a write, and setting and removing a breakpoint cost, in time and in instructions,
//! and how much of it is allocating memory. `docs/benchmarks.md` explains.

mod exact;

use std::cell::LazyCell;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use criterion::{BenchmarkId, Criterion};
use hyperbp_benches::{Case, Scene, What, callgrind, scenes};
use hyperbp_lab::Progress;

use exact::Count;

/// How often something happens while its allocations are counted.
const COUNTED: u64 = 640;

fn main() {
    if let Err(e) = bench() {
        fail(&e);
    }
}

fn bench() -> Result<()> {
    allocations()?;
    time(&mut Criterion::default().configure_from_args())?;
    let mut criterion = Criterion::default().with_measurement(Count("instructions")).configure_from_args();
    instructions(&mut criterion);
    criterion.final_summary();
    Ok(())
}

/// Counts them, and says how many there are.
///
/// # Errors
/// If a virtual CPU of the guest waits for one.
fn allocations() -> Result<()> {
    for (name, mechanism, breakpoints) in scenes() {
        let mut scene = Scene::new(mechanism, breakpoints)?;
        let mut all = String::new();
        for what in What::ALL {
            scene.warm_up(what)?;
            let mut count = 0;
            scene.within(what, COUNTED, &mut |work| count += allocation_counter::measure(work).count_total)?;
            let what_is = what.name();
            let problem = format!(
                "{count} allocations in {COUNTED} times {what_is}: while a virtual CPU waits, there must be none"
            );
            ensure!(count == 0 || !what.is_an_event(), "{name} with {breakpoints} breakpoints: {problem}");
            all += &format!(", {what_is} {:.2}", count as f64 / COUNTED as f64);
        }
        println!("Allocations of {name} with {breakpoints} breakpoints: {}", all.trim_start_matches(", "));
    }
    Ok(())
}

fn time(criterion: &mut Criterion) -> Result<()> {
    for what in What::ALL {
        let mut group = criterion.benchmark_group(format!("core {}", what.name()));
        group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(400));
        group.sample_size(40).nresamples(10_000);
        for (name, mechanism, breakpoints) in scenes() {
            let mut scene = Scene::new(mechanism, breakpoints)?;
            group.bench_function(BenchmarkId::new(name, breakpoints), |bencher| {
                bencher.iter_custom(|times| scene.time(what, times).unwrap_or_else(|e| fail(&e.into())));
            });
        }
        group.finish();
    }
    Ok(())
}

fn instructions(criterion: &mut Criterion<Count>) {
    // Counted if one of these benchmarks is selected.
    let counted = LazyCell::new(|| count().unwrap_or_else(|e| fail(&e)));
    for what in What::ALL {
        let mut group = criterion.benchmark_group(format!("core {} instructions", what.name()));
        for case in Case::all().filter(|case| case.what == what) {
            let id = BenchmarkId::new(case.mechanism, case.breakpoints);
            let of_case = || counted.iter().filter(|(of, _)| *of == case).map(|(_, count)| *count).collect();
            exact::replay(&mut group, id, exact::SAMPLES, of_case);
        }
        group.finish();
    }
}

fn count() -> Result<Vec<(Case, u64)>> {
    let program = Path::new(env!("CARGO_BIN_EXE_hyperbp-hits"));
    callgrind::measure(program, &hyperbp_lab::target(), &Progress::new())
}

/// In the middle of a benchmark, there is nobody to hand an error to.
fn fail(error: &anyhow::Error) -> ! {
    eprintln!("error: {error:#}");
    std::process::exit(1)
}
