//! What was published, beside what was measured.
//!
//! Source: L. Beierlieb et al., *Electronics* 14(3) 534 and *Eng* 6(10) 278, 2025; samples at
//! <https://github.com/lbeierlieb/bpbench_measurement_study>. `repair` and `emulate` are those of SmartVMI there, `view-step`
//! and `view-fast-step` those of DRAKVUF without and with `--fast-singlestep`. For each CPU the median of its samples, and the
//! ratio of that to the same CPU's of view-step; then the median of the CPUs. There are 20 CPUs; of `repair` and `emulate` 14,
//! as the study itself leaves out (`scripts/aggregate.py`) those on which the timer alone took more than 10 µs under SmartVMI
//! (five), and one has no samples of SmartVMI.

use crate::{Results, Workload};

/// A mechanism and a workload, over all CPUs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Published {
    pub(super) mechanism: &'static str,
    pub(super) workload: Workload,
    /// CPUs with samples.
    pub(super) cpus: u32,
    /// Median of the CPUs' medians, in microseconds.
    pub(super) microseconds: f64,
    /// Median of the CPUs' ratios to their own view-step.
    pub(super) ratio: f64,
}

/// The mechanism that ratios are to: every CPU has samples of it.
pub(super) const BASE: &str = "view-step";

const fn published(workload: Workload, mechanism: &'static str, cpus: u32, microseconds: f64, ratio: f64) -> Published {
    Published { mechanism, workload, cpus, microseconds, ratio }
}

pub(super) const PUBLISHED: [Published; 16] = [
    published(Workload::ExecBp, "repair", 14, 86.7, 1.345),
    published(Workload::ExecBp, BASE, 20, 62.2, 1.0),
    published(Workload::ExecBp, "view-fast-step", 20, 37.8, 0.605),
    published(Workload::ExecBp, "emulate", 14, 23.15, 0.371),
    published(Workload::ExecPage, "repair", 14, 87.2, 1.384),
    published(Workload::ExecPage, BASE, 20, 62.6, 1.0),
    published(Workload::ExecPage, "view-fast-step", 20, 38.0, 0.610),
    published(Workload::ExecPage, "emulate", 14, 23.3, 0.374),
    published(Workload::ReadBp, "repair", 14, 24.0, 0.377),
    published(Workload::ReadBp, BASE, 20, 63.3, 1.0),
    published(Workload::ReadBp, "view-fast-step", 20, 62.0, 0.998),
    published(Workload::ReadBp, "emulate", 14, 24.2, 0.380),
    published(Workload::ReadPage, "repair", 14, 24_471.0, 0.374),
    published(Workload::ReadPage, BASE, 20, 66_976.0, 1.0),
    published(Workload::ReadPage, "view-fast-step", 20, 69_039.0, 1.001),
    published(Workload::ReadPage, "emulate", 14, 23_757.0, 0.375),
];

/// Whose ratios stand beside the published ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ours {
    /// The monitors that were published, as they are: repair of SmartVMI, the views of DRAKVUF.
    Originals,
    /// The bare loop.
    Floor,
    /// hyperbp in its own runner.
    Hyperbp,
}

impl Ours {
    pub(super) const ALL: [Self; 3] = [Self::Originals, Self::Floor, Self::Hyperbp];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Originals => "the same monitors",
            Self::Floor => "floor (bare loop)",
            Self::Hyperbp => "hyperbp",
        }
    }

    /// Who has this mechanism: the host and the backend.
    pub(super) fn monitor(self, mechanism: &str) -> (&'static str, &'static str) {
        match (self, mechanism) {
            (Self::Originals, "repair") => ("smartvmi", "original"),
            (Self::Originals, _) => ("drakvuf", "original"),
            (Self::Floor, _) => ("floor", "floor"),
            (Self::Hyperbp, _) => ("runner", "hyperbp"),
        }
    }

    /// The median of a workload.
    fn median(self, results: &Results, mechanism: &str, workload: Workload) -> Option<u64> {
        let (host, backend) = self.monitor(mechanism);
        results.run(host, backend, mechanism, workload).map(|run| run.ticks.median)
    }

    /// Why there is nothing to compare.
    pub(super) fn lacks(self, mechanism: &str) -> &'static str {
        match (self, mechanism) {
            (Self::Originals, "emulate") => "neither has it in this build",
            (Self::Originals, _) => "needs --drakvuf and --smartvmi",
            _ => "not in this run",
        }
    }
}

/// A published ratio, and one of ours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Compared {
    /// Our median.
    pub(super) median: u64,
    /// To our view-step.
    pub(super) ratio: f64,
    /// How much more than the published one that is; less if negative.
    pub(super) difference: f64,
}

impl Compared {
    /// `None` if one of the two was not measured.
    pub(super) fn of(results: &Results, ours: Ours, published: &Published) -> Option<Self> {
        let median = ours.median(results, published.mechanism, published.workload)?;
        let base = ours.median(results, BASE, published.workload)?;
        let ratio = median as f64 / base.max(1) as f64;
        Some(Self { median, ratio, difference: ratio / published.ratio - 1.0 })
    }

    /// Whether it is so much that it is to be explained.
    pub(super) fn is_beyond(&self) -> bool {
        self.difference.abs() > 0.25
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{bochs, measurement};
    use crate::{Collection, Measurement};

    #[test]
    fn ratios_are_to_the_same_monitors_view_step_but_repair_is_smartvmis() {
        let mut collection = Collection::new(bochs());
        for (host, mechanism, ticks) in
            [("drakvuf", "view-step", 1000), ("drakvuf", "view-fast-step", 600), ("smartvmi", "repair", 2000)]
        {
            let run = Measurement { host: host.to_owned(), ..measurement("original", mechanism, Workload::ExecBp) };
            collection.push(run, vec![ticks]).unwrap();
        }
        let of = |ours, n: usize| Compared::of(collection.results(), ours, &PUBLISHED[n]);
        let repair = of(Ours::Originals, 0).unwrap();
        assert!((repair.ratio - 2.0).abs() < 1e-9 && repair.is_beyond() && repair.difference > 0.48);
        assert!(!of(Ours::Originals, 2).unwrap().is_beyond());
        assert!(of(Ours::Originals, 3).is_none() && of(Ours::Floor, 0).is_none());
    }
}
