//! Samples the way bpbench's measurement study keeps them, for its scripts `aggregate.py`, `plot_individual.py` and
//! `plot_machine.py`.
//!
//! The study has a folder for each machine, in it a folder for each variant, in that a file for each workload. A
//! machine of the study ran one monitor for each variant; here every host and backend counts as a machine of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::collection::{to_csv, write_file};
use crate::format::{monitor, unit};
use crate::{Collection, Machine};

/// Writes the samples as `DIR/results/<machine_label>_<monitor>/result_<date>_<variant>/<workload>.csv`, with a
/// `readme.txt` for each machine. `repair`, `view-step`, `view-fast-step` and `emulate` get the study's names `repair`,
/// `ept`, `ept-fast` and `emul`, other mechanisms keep theirs.
///
/// The study's numbers are nanoseconds. So are these, where ticks are a time; else they are ticks, as `readme.txt` says.
///
/// Earlier results of the same variants are replaced: the study's scripts want exactly one folder for each.
///
/// # Errors
/// If the label or the date cannot be part of a file name (letters, digits, hyphens, underscores), if two hosts would
/// share a folder, or if a file cannot be written.
pub fn write_bpbench(directory: &Path, machine_label: &str, date: &str, collection: &Collection) -> Result<()> {
    for name in [machine_label, date] {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        ensure!(
            !name.is_empty() && name.chars().all(plain),
            "{name:?} cannot be part of a folder's name: use letters, digits, hyphens and underscores"
        );
    }
    let results = directory.join("results");
    let measured_on = &collection.results().machine;
    let mut machines = BTreeMap::new();
    let mut variants = BTreeSet::new();
    for (run, samples) in collection.runs() {
        let machine = results.join(format!("{machine_label}_{}", monitor(&run.host, &run.backend)));
        let host = *machines.entry(machine.clone()).or_insert(&run.host);
        ensure!(
            host == &run.host,
            "the hosts {host} and {} would share the folder {}: write them apart",
            run.host,
            machine.display()
        );
        let variant = variant(&run.mechanism);
        if variants.insert((machine.clone(), variant)) {
            write_file(&machine.join("readme.txt"), &readme(measured_on, &run.host, &run.backend))?;
            remove_earlier(&machine, variant)?;
        }
        let folder = machine.join(format!("result_{date}_{variant}"));
        let times: Option<Vec<u64>> = samples.iter().map(|ticks| measured_on.nanoseconds(*ticks)).collect();
        let csv = to_csv(times.as_deref().unwrap_or(samples));
        write_file(&folder.join(run.workload.file_name()).with_extension("csv"), &csv)?;
    }
    Ok(())
}

/// The study's name of a mechanism, if it has one.
fn variant(mechanism: &str) -> &str {
    match mechanism {
        "view-step" => "ept",
        "view-fast-step" => "ept-fast",
        "emulate" => "emul",
        other => other,
    }
}

/// Removes results of this variant, whatever their date.
fn remove_earlier(machine: &Path, variant: &str) -> Result<()> {
    let cannot = || format!("cannot clear {}", machine.display());
    let ending = format!("_{variant}");
    for entry in fs::read_dir(machine).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.starts_with("result_") && name.ends_with(&ending) {
            fs::remove_dir_all(entry.path()).with_context(cannot)?;
        }
    }
    Ok(())
}

fn readme(machine: &Machine, host: &str, backend: &str) -> String {
    let numbers = match machine.nanoseconds(0) {
        Some(_) => "nanoseconds".to_owned(),
        None => format!("not nanoseconds but ticks: {}", unit(machine.ticks_are)),
    };
    format!(
        "Breakpoints by the backend {backend} in the host {host}, measured by hyperbp's benchmark.\n\
         CPU: {} ({} in use)\n\
         Xen: {}\n\
         Numbers are {numbers}.\n",
        machine.cpu, machine.cpus, machine.xen,
    )
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::samples::{bochs, collection, measurement};
    use crate::{Measurement, TicksAre, Workload};

    fn listing(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_layout_is_the_studys() {
        let directory = tempfile::tempdir().unwrap();
        write_bpbench(directory.path(), "bochs", "2026-01-31", &collection()).unwrap();
        let results = directory.path().join("results");
        assert_eq!(listing(&results), ["bochs_floor", "bochs_hyperbp", "bochs_none"]);
        let hyperbp = results.join("bochs_hyperbp");
        assert_eq!(listing(&hyperbp), ["readme.txt", "result_2026-01-31_emul", "result_2026-01-31_ept"]);
        let ept = hyperbp.join("result_2026-01-31_ept");
        assert_eq!(
            listing(&ept),
            ["exec_bp.csv", "exec_page.csv", "read_bp.csv", "read_page.csv", "timing_overhead.csv"]
        );
        assert_eq!(fs::read_to_string(ept.join("exec_bp.csv")).unwrap(), "60000\n60002\n60001\n");
    }

    #[test]
    fn cycles_become_nanoseconds_where_it_is_known_how_long_one_is() {
        let directory = tempfile::tempdir().unwrap();
        let numbers = |ticks_are, tsc_khz| {
            let machine = Machine { ticks_are, tsc_khz: NonZeroU32::new(tsc_khz), ..bochs() };
            let mut collection = Collection::new(machine);
            collection.push(measurement("hyperbp", "emulate", Workload::ExecBp), vec![0, 60_000, u64::MAX]).unwrap();
            write_bpbench(directory.path(), "host", "2026-01-31", &collection).unwrap();
            let machine = directory.path().join("results/host_hyperbp");
            let csv = fs::read_to_string(machine.join("result_2026-01-31_emul/exec_bp.csv")).unwrap();
            (csv, fs::read_to_string(machine.join("readme.txt")).unwrap().lines().last().unwrap().to_owned())
        };
        let ticks = "0\n60000\n18446744073709551615\n";
        let (csv, unit) = numbers(TicksAre::Tsc, 3_000_000);
        assert_eq!((&*csv, &*unit), ("0\n20000\n6148914691236517205\n", "Numbers are nanoseconds."));
        let (csv, unit) = numbers(TicksAre::Tsc, 0);
        assert_eq!((&*csv, &*unit), (ticks, "Numbers are not nanoseconds but ticks: TSC cycles."));
        assert_eq!(numbers(TicksAre::Instructions, 3_000_000).0, ticks);
    }

    #[test]
    fn every_variant_is_there_once_whatever_was_there_before() {
        let directory = tempfile::tempdir().unwrap();
        let mut earlier = Collection::new(bochs());
        for mechanism in ["view-step", "view-fast-step"] {
            earlier.push(measurement("hyperbp", mechanism, Workload::ExecBp), vec![1]).unwrap();
        }
        write_bpbench(directory.path(), "bochs", "2026-01-30", &earlier).unwrap();
        write_bpbench(directory.path(), "bochs", "2026-01-31", &collection()).unwrap();
        let hyperbp = directory.path().join("results/bochs_hyperbp");
        assert_eq!(
            listing(&hyperbp),
            ["readme.txt", "result_2026-01-30_ept-fast", "result_2026-01-31_emul", "result_2026-01-31_ept"]
        );
    }

    #[test]
    fn hosts_do_not_share_a_folder() {
        let directory = tempfile::tempdir().unwrap();
        let mut collection = collection();
        let elsewhere = Measurement { host: "floor".to_owned(), ..measurement("floor", "repair", Workload::ExecBp) };
        collection.push(elsewhere, vec![1]).unwrap();
        let error = write_bpbench(directory.path(), "bochs", "2026-01-31", &collection).unwrap_err();
        assert!(error.to_string().contains("bochs_floor"), "{error}");
    }

    #[test]
    fn names_stay_in_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let error = write_bpbench(directory.path(), "../bochs", "2026-01-31", &collection()).unwrap_err();
        assert!(error.to_string().contains("../bochs"), "{error}");
        assert!(listing(directory.path()).is_empty());
    }
}
