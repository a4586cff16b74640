//! `cargo xtask bench --ticks`: what the counting emulator wrote of each sample becomes what was counted of each run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use hyperbp_lab::windows::{self, Counts, Window};
use hyperbp_report::{Breakdown, BreakdownRow, Collection, Instructions, Key, Workload};

/// Reads in one sample of `read_page`.
const READS: u64 = 512;

/// What was counted of each run in the collections `measured`, one after the other, in one machine, which left the file `windows`.
///
/// # Errors
/// If the samples are not the windows', one by one, or if a window's ticks are not the sum of its instructions.
pub(crate) fn rows(windows: &Path, measured: &[PathBuf]) -> Result<Vec<BreakdownRow>> {
    let text = fs::read_to_string(windows).with_context(|| format!("cannot read {}", windows.display()))?;
    let mut lines = (1..).zip(text.lines());
    let mut rows = Vec::new();
    for dir in measured {
        let collection = Collection::read(dir)?;
        for key in Key::read_order(dir)? {
            let samples = collection.samples(&key).with_context(|| format!("there are no samples of {key}"))?;
            let mut sum = Window::default();
            for sample in samples {
                let (number, line) = lines.next().with_context(|| format!("the emulator saw too little of {key}"))?;
                let window = of_sample(line, *sample);
                sum.add(&window.with_context(|| format!("in {}, line {number}, of {key}", windows.display()))?);
            }
            if let Some(row) = row(key, samples.len() as u64, &sum) {
                rows.push(row);
            }
        }
    }
    let left = lines.count();
    ensure!(left == 0, "the emulator saw {left} samples more than there are");
    Ok(rows)
}

/// The window of a sample, checked.
fn of_sample(line: &str, sample: u64) -> Result<Window> {
    let window = Window::parse(line).context("no line of the emulator's")?;
    ensure!(window.ticks == sample, "the guest measured {sample} ticks, the emulator {}", window.ticks);
    let sum = window.sum();
    ensure!(
        sum.abs_diff(sample) < windows::TRACE,
        "the guest measured {sample} ticks, and those of guest, Xen and dom0 add up to {sum}"
    );
    Ok(window)
}

/// Means per hit. `None` if there is nothing to hit.
fn row(key: Key, samples: u64, sum: &Window) -> Option<BreakdownRow> {
    let hits = match key.workload {
        Workload::Timer => return None,
        Workload::ExecBp | Workload::ExecPage | Workload::ReadBp => samples,
        Workload::ReadPage => samples * READS,
    };
    // To a thousandth: no one wants more, and the file stays readable.
    let mean = |count: u64| (count as f64 / hits as f64 * 1000.0).round() / 1000.0;
    let named = |counts: &Counts, name: fn(u64) -> String| -> BTreeMap<String, f64> {
        counts.iter().map(|(number, count)| (name(*number), mean(*count))).collect()
    };
    let programs: u64 = sum.programs.values().sum();
    let monitor = sum.programs.values().copied().max().unwrap_or_default();
    let Key { host, backend, mechanism, workload } = key;
    Some(BreakdownRow {
        host,
        backend,
        mechanism,
        workload,
        hits,
        ticks: mean(sum.sum()),
        instructions: Instructions {
            guest: mean(sum.guest),
            xen: mean(sum.xen),
            dom0_kernel: mean(sum.kernel),
            monitor: mean(monitor),
            others: mean(programs - monitor),
            idle: mean(sum.idle),
        },
        exits: named(&sum.exits, windows::exit_name),
        hypercalls: named(&sum.hypercalls, windows::hypercall_name),
        syscalls: named(&sum.syscalls, windows::syscall_name),
    })
}

/// Writes and prints where the ticks went. If that was not counted, none of an earlier run is left in `out`.
///
/// # Errors
/// If the file cannot be written or removed.
pub(crate) fn present(breakdown: Option<Breakdown>, out: &Path) -> Result<()> {
    let file = out.join("ticks.json");
    let Some(breakdown) = breakdown else {
        return match fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot remove {}", file.display()))
            }
            _ => Ok(()),
        };
    };
    fs::create_dir_all(out).with_context(|| format!("cannot make the directory {}", out.display()))?;
    fs::write(&file, breakdown.to_json()?).with_context(|| format!("cannot write {}", file.display()))?;
    println!("\n{}", breakdown.table());
    println!("Ticks:    {}", file.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperbp_report::{Kind, Machine, Measurement, TicksAre};

    /// The rows of a machine that measured these workloads in this order, with these samples, and left these lines.
    fn rows_of(measured: &[(Workload, &[u64])], lines: &str) -> Result<Vec<BreakdownRow>> {
        let dir = tempfile::tempdir()?;
        let (cpu, xen) = ("Haswell".to_owned(), "4.17.5".to_owned());
        let machine =
            Machine { kind: Kind::Bochs, cpu, xen, cpus: 1, ticks_are: TicksAre::Instructions, tsc_khz: None };
        let mut collection = Collection::new(machine);
        let mut order = Vec::new();
        for (workload, samples) in measured {
            let [host, backend, mechanism] = ["drakvuf", "hyperbp", "auto"].map(str::to_owned);
            let names = (host.clone(), backend.clone(), mechanism.clone());
            order.push(Key { host, backend, mechanism, workload: *workload });
            let (host, backend, mechanism) = names;
            let hits = samples.len() as u64;
            let measurement = Measurement {
                host,
                backend,
                mechanism,
                workload: *workload,
                vcpus: 1,
                guest_hits: hits,
                monitor_hits: hits,
                guest_saw_breakpoint: false,
            };
            collection.push(measurement, samples.to_vec())?;
        }
        collection.write(dir.path())?;
        Key::write_order(dir.path(), &order)?;
        let windows = dir.path().join("windows.log");
        fs::write(&windows, lines)?;
        rows(&windows, &[dir.path().to_owned()])
    }

    const READ: &str = "1000 10 600 300 90 2 x48=1 h23=2 s16=1 u1000=80 u2000=10\n";
    const EXEC: &str = "2000 20 1500 400 80 0 x0=1 x37=1 u1000=80\n";

    #[test]
    fn runs_get_what_was_counted_in_the_order_of_measurement() {
        // The other way round than in the results.
        let measured: [(Workload, &[u64]); 3] =
            [(Workload::ReadBp, &[1000]), (Workload::ExecBp, &[2000, 2000]), (Workload::Timer, &[3])];
        let rows = rows_of(&measured, &format!("{READ}{EXEC}{EXEC}3 4 0 0 0 0\n")).unwrap();
        let [read, exec] = &rows[..] else { panic!("{rows:?}") };
        assert_eq!((read.workload, read.hits, read.ticks), (Workload::ReadBp, 1, 1002.0));
        let (xen, dom0_kernel) = (600.0, 300.0);
        let whose = Instructions { guest: 10.0, xen, dom0_kernel, monitor: 80.0, others: 10.0, idle: 2.0 };
        assert_eq!(read.instructions, whose);
        assert_eq!(read.exits, BTreeMap::from([("EPT_VIOLATION".to_owned(), 1.0)]));
        assert_eq!((exec.workload, exec.hits, exec.ticks), (Workload::ExecBp, 2, 2000.0));
        assert_eq!(exec.exits["MONITOR_TRAP_FLAG"], 1.0);
    }

    #[test]
    fn a_page_is_many_reads() {
        let rows = rows_of(&[(Workload::ReadPage, &[512_000])], "512000 5120 506880 0 0 0 x48=512\n").unwrap();
        assert_eq!((rows[0].hits, rows[0].ticks, rows[0].exits["EPT_VIOLATION"]), (512, 1000.0, 1.0));
    }

    #[test]
    fn what_does_not_add_up_is_an_error() {
        let error =
            |samples: &[u64], lines: &str| format!("{:#}", rows_of(&[(Workload::ExecBp, samples)], lines).unwrap_err());
        assert!(error(&[2000, 2001], &format!("{EXEC}{EXEC}")).contains("measured 2001 ticks, the emulator 2000"));
        assert!(error(&[2000, 2000], EXEC).contains("too little"));
        assert!(error(&[2000], &format!("{EXEC}{EXEC}")).contains("1 samples more"));
        assert!(error(&[2000], "2000 20 1500 400 0 0\n").contains("add up to 1920"));
        assert!(error(&[2000], "2000 20\n").contains("line 1"));
    }
}
