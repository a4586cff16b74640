//! A summary together with every sample, and the directory they are kept in.
//!
//! ```text
//! DIR/results.json
//! DIR/samples/<host>_<backend>_<mechanism>/<bpbench's name of the workload>.csv
//! DIR/order.json
//! ```
//! A CSV file holds one number per line, in the order of measurement. Whoever measures leaves in `order.json` in which order he
//! measured the runs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::schema::{host_rank, mechanism_rank};
use crate::{Machine, Measurement, Results, Run, Workload};

const ORDER: &str = "order.json";

/// What tells the runs of a collection apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// See [`Run::host`].
    pub host: String,
    /// See [`Run::backend`].
    pub backend: String,
    /// See [`Run::mechanism`].
    pub mechanism: String,
    /// See [`Run::workload`].
    pub workload: Workload,
}

impl Key {
    /// The key of a run.
    #[must_use]
    pub fn of(run: &Run) -> Self {
        Self {
            host: run.host.clone(),
            backend: run.backend.clone(),
            mechanism: run.mechanism.clone(),
            workload: run.workload,
        }
    }

    /// Writes the order of measurement into a collection's directory.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_order(directory: &Path, order: &[Self]) -> Result<()> {
        write_file(&directory.join(ORDER), &(serde_json::to_string(order)? + "\n"))
    }

    /// Reads what [`Self::write_order`] wrote.
    ///
    /// # Errors
    /// If the file cannot be read or makes no sense.
    pub fn read_order(directory: &Path) -> Result<Vec<Self>> {
        let path = directory.join(ORDER);
        serde_json::from_str(&read_file(&path)?).with_context(|| format!("{} is no order of runs", path.display()))
    }

    /// Where in a collection's directory the samples are.
    fn path(&self, directory: &Path) -> PathBuf {
        let Self { host, backend, mechanism, workload } = self;
        let run = format!("{host}_{backend}_{mechanism}");
        directory.join("samples").join(run).join(workload.file_name()).with_extension("csv")
    }

    /// Names become parts of file names, in collections that come from elsewhere too: keep them where they belong.
    fn check(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        for name in [&self.host, &self.backend, &self.mechanism] {
            ensure!(
                !name.is_empty() && name.chars().all(plain),
                "{name:?} cannot name a host, backend or mechanism: use letters, digits and hyphens"
            );
        }
        Ok(())
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} under {}/{}", self.workload.name(), self.mechanism, self.host, self.backend)
    }
}

/// What a benchmark leaves behind.
///
/// The runs are always in canonical order (host, mechanism, backend, workload), each has at least one sample, and none
/// is there twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collection {
    results: Results,
    samples: BTreeMap<Key, Vec<u64>>,
}

impl Collection {
    /// An empty collection for a machine.
    #[must_use]
    pub fn new(machine: Machine) -> Self {
        Self { results: Results::new(machine), samples: BTreeMap::new() }
    }

    /// The summary.
    #[must_use]
    pub fn results(&self) -> &Results {
        &self.results
    }

    /// The runs, each with its samples in the order of measurement.
    pub fn runs(&self) -> impl Iterator<Item = (&Run, &[u64])> {
        self.results.runs.iter().map(|run| (run, &*self.samples[&Key::of(run)]))
    }

    /// The samples of a run, if it is there.
    #[must_use]
    pub fn samples(&self, key: &Key) -> Option<&[u64]> {
        self.samples.get(key).map(Vec::as_slice)
    }

    /// Adds a measurement, its samples in the order they were taken.
    ///
    /// # Errors
    /// If there are no samples, if a name cannot be part of a file name, or if the same workload of the same mechanism
    /// is there already.
    pub fn push(&mut self, measurement: Measurement, samples: Vec<u64>) -> Result<()> {
        let workload = measurement.workload.name();
        let Some(run) = measurement.summarised(&samples) else { bail!("there are no samples of {workload}") };
        self.insert(run, samples)
    }

    fn insert(&mut self, run: Run, samples: Vec<u64>) -> Result<()> {
        let key = Key::of(&run);
        key.check()?;
        ensure!(!self.samples.contains_key(&key), "{key} was measured twice: leave one of the two out");
        let at = self.results.runs.partition_point(|other| order_of(other) < order_of(&run));
        self.results.runs.insert(at, run);
        self.samples.insert(key, samples);
        Ok(())
    }

    /// Adds everything another collection holds.
    ///
    /// # Errors
    /// If the other one is of a different machine, or holds a run that is here already. Then nothing has been added.
    pub fn merge(&mut self, other: Self) -> Result<()> {
        let (ours, theirs) = (&self.results.machine, &other.results.machine);
        ensure!(ours == theirs, "these were measured on different machines, {ours:?} and {theirs:?}: keep them apart");
        let mut merged = self.clone();
        let mut samples = other.samples;
        for run in other.results.runs {
            let samples = samples.remove(&Key::of(&run)).unwrap_or_default();
            merged.insert(run, samples)?;
        }
        *self = merged;
        Ok(())
    }

    /// Writes the collection into a directory, which is made if need be.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        for (key, samples) in &self.samples {
            write_file(&key.path(directory), &to_csv(samples))?;
        }
        write_file(&directory.join("results.json"), &self.results.to_json()?)
    }

    /// Reads what [`Self::write`] wrote.
    ///
    /// # Errors
    /// If a file cannot be read or makes no sense, or if a summary is not the one of its samples.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("results.json");
        let results = Results::from_json(&read_file(&path)?).with_context(|| format!("in {}", path.display()))?;
        let mut collection = Self::new(results.machine);
        for run in results.runs {
            let key = Key::of(&run);
            key.check()?;
            let path = key.path(directory);
            let samples = from_csv(&read_file(&path)?).with_context(|| format!("in {}", path.display()))?;
            let summary = crate::Ticks::of(&mut samples.clone());
            ensure!(
                samples.len() as u64 == run.samples && summary == Some(run.ticks),
                "the samples in {} are not those that results.json summarises: collect them again",
                path.display()
            );
            collection.insert(run, samples)?;
        }
        Ok(collection)
    }
}

/// What the canonical order goes by. Backends come after mechanisms, so that those of one mechanism are neighbours.
pub(crate) fn order<'a>(
    host: &'a str,
    mechanism: &'a str,
    backend: &'a str,
    workload: Workload,
) -> (usize, &'a str, usize, &'a str, &'a str, Workload) {
    (host_rank(host), host, mechanism_rank(mechanism), mechanism, backend, workload)
}

fn order_of(run: &Run) -> (usize, &str, usize, &str, &str, Workload) {
    order(&run.host, &run.mechanism, &run.backend, run.workload)
}

/// Numbers only, one a line.
pub(crate) fn to_csv(samples: &[u64]) -> String {
    samples.iter().map(|sample| format!("{sample}\n")).collect()
}

fn from_csv(csv: &str) -> Result<Vec<u64>> {
    let number = |line: &str| line.parse().with_context(|| format!("{line:?} is no number of ticks"));
    csv.lines().map(number).collect()
}

/// Writes a file, and the directories above it if need be.
pub(crate) fn write_file(path: &Path, text: &str) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make the directory {}", parent.display()))?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn read_file(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{bochs, collection, measurement};
    use proptest::prelude::*;

    fn message(result: Result<impl std::fmt::Debug>) -> String {
        format!("{:#}", result.unwrap_err())
    }

    #[test]
    fn a_directory_reads_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let collection = collection();
        collection.write(directory.path()).unwrap();
        assert_eq!(Collection::read(directory.path()).unwrap(), collection);
        let csv = directory.path().join("samples/runner_hyperbp_emulate/exec_bp.csv");
        assert_eq!(fs::read_to_string(csv).unwrap(), "30000\n30002\n30001\n");
        assert!(directory.path().join("samples/runner_none_none/timing_overhead.csv").exists());
    }

    #[test]
    fn the_order_of_measurement_reads_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let collection = collection();
        let mut order: Vec<_> = collection.runs().map(|(run, _)| Key::of(run)).collect();
        order.reverse();
        Key::write_order(directory.path(), &order).unwrap();
        assert_eq!(Key::read_order(directory.path()).unwrap(), order);
        assert_eq!(collection.samples(&order[0]), collection.runs().last().map(|(_, samples)| samples));
        fs::write(directory.path().join(ORDER), "[1]").unwrap();
        assert!(message(Key::read_order(directory.path())).contains("no order"));
    }

    #[test]
    fn runs_are_in_canonical_order_whatever_the_order_of_measurement() {
        let mut collection = Collection::new(bochs());
        for (mechanism, workload) in [
            ("emulate", Workload::Timer),
            ("none", Workload::ReadBp),
            ("repair", Workload::ReadPage),
            ("repair", Workload::ExecBp),
        ] {
            collection.push(measurement("hyperbp", mechanism, workload), vec![1]).unwrap();
        }
        let order: Vec<_> = collection.runs().map(|(run, _)| (&*run.mechanism, run.workload)).collect();
        let expected = [
            ("none", Workload::ReadBp),
            ("repair", Workload::ExecBp),
            ("repair", Workload::ReadPage),
            ("emulate", Workload::Timer),
        ];
        assert_eq!(order, expected);
    }

    #[test]
    fn hosts_come_after_what_they_are_compared_with() {
        let mut collection = Collection::new(bochs());
        for (host, backend) in
            [("drakvuf", "original"), ("runner", "hyperbp"), ("drakvuf", "hyperbp"), ("floor", "floor")]
        {
            let of_runner = measurement(backend, "view-step", Workload::ExecBp);
            collection.push(Measurement { host: host.to_owned(), ..of_runner }, vec![1]).unwrap();
        }
        let order: Vec<_> = collection.runs().map(|(run, _)| (&*run.host, &*run.backend)).collect();
        let expected = [("floor", "floor"), ("runner", "hyperbp"), ("drakvuf", "hyperbp"), ("drakvuf", "original")];
        assert_eq!(order, expected);
    }

    #[test]
    fn what_does_not_belong_is_refused() {
        let mut collection = collection();
        let again = measurement("hyperbp", "emulate", Workload::Timer);
        assert!(message(collection.push(again, vec![1])).contains("twice"));
        assert!(message(collection.push(measurement("x", "skip", Workload::Timer), vec![])).contains("no samples"));
        assert!(message(collection.push(measurement("..", "/etc", Workload::Timer), vec![1])).contains("cannot name"));
        assert_eq!(collection, crate::samples::collection());
    }

    #[test]
    fn collections_of_different_machines_stay_apart() {
        let mut ours = collection();
        let theirs = Collection::new(Machine { cpus: 2, ..bochs() });
        assert!(message(ours.merge(theirs)).contains("different machines"));
    }

    #[test]
    fn a_failed_merge_adds_nothing() {
        let mut ours = Collection::new(bochs());
        ours.push(measurement("hyperbp", "emulate", Workload::ReadPage), vec![1]).unwrap();
        let before = ours.clone();
        assert!(message(ours.merge(collection())).contains("twice"));
        assert_eq!(ours, before);
    }

    #[test]
    fn samples_that_do_not_belong_to_the_summary_are_noticed() {
        let directory = tempfile::tempdir().unwrap();
        collection().write(directory.path()).unwrap();
        let csv = directory.path().join("samples/runner_floor_view-step/read_bp.csv");
        fs::write(&csv, "1\n2\n3\n").unwrap();
        assert!(message(Collection::read(directory.path())).contains("collect them again"));
        fs::write(&csv, "1\nmany\n").unwrap();
        assert!(message(Collection::read(directory.path())).contains("\"many\" is no number"));
        fs::remove_file(&csv).unwrap();
        assert!(message(Collection::read(directory.path())).contains("cannot read"));
    }

    proptest! {
        #[test]
        fn merging_two_halves_is_the_same_as_collecting_all(in_first in prop::collection::vec(any::<bool>(), 20)) {
            let whole = collection();
            let (mut first, mut second) = (Collection::new(bochs()), Collection::new(bochs()));
            for ((run, samples), in_first) in whole.runs().zip(in_first) {
                let half = if in_first { &mut first } else { &mut second };
                half.insert(run.clone(), samples.to_vec()).unwrap();
            }
            first.merge(second).unwrap();
            prop_assert_eq!(first, whole);
        }

        #[test]
        fn csv_round_trips(samples in prop::collection::vec(any::<u64>(), 0..50)) {
            prop_assert_eq!(from_csv(&to_csv(&samples)).unwrap(), samples);
        }
    }
}
