//! The summary of a run, and its JSON.

use std::num::NonZeroU32;

use anyhow::{Context, Result};
use serde::{Deserialize, Deserializer, Serialize, de::Error};

use crate::Ticks;

/// [`Results::schema`] of what this crate writes, and the only one it reads.
///
/// A later version may add fields under the same number; readers ignore fields they do not know.
pub const SCHEMA: u32 = 1;

/// Everything that was measured on one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    #[serde(deserialize_with = "known_schema")]
    pub schema: u32,
    /// Where it was measured.
    pub machine: Machine,
    /// What was measured.
    pub runs: Vec<Run>,
}

impl Results {
    /// Results of a machine on which nothing has been measured yet.
    #[must_use]
    pub fn new(machine: Machine) -> Self {
        Self { schema: SCHEMA, machine, runs: Vec::new() }
    }

    /// The run of a workload under a mechanism, in a host with a backend.
    #[must_use]
    pub fn run(&self, host: &str, backend: &str, mechanism: &str, workload: Workload) -> Option<&Run> {
        let is = |run: &&Run| run.host == host && run.backend == backend && run.mechanism == mechanism;
        self.runs.iter().filter(is).find(|run| run.workload == workload)
    }

    /// Reads JSON.
    ///
    /// # Errors
    /// If it is not JSON, or not in this [`SCHEMA`].
    pub fn from_json(json: &str) -> Result<Self> {
        serde_json::from_str(json).context("these are no benchmark results")
    }

    /// Writes JSON, indented, with a newline at its end.
    ///
    /// # Errors
    /// Never, for a value of this type; JSON just has a fallible writer.
    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}

fn known_schema<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match u32::deserialize(deserializer)? {
        SCHEMA => Ok(SCHEMA),
        other => Err(D::Error::custom(format_args!(
            "results are in schema {other}, this program reads {SCHEMA}: use the version that wrote them"
        ))),
    }
}

/// The machine that was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Emulated or real.
    pub kind: Kind,
    /// The CPU's model name.
    pub cpu: String,
    /// Xen's version.
    pub xen: String,
    /// Physical (or emulated) CPUs.
    pub cpus: u32,
    /// What the guest's time stamp counter counts.
    pub ticks_are: TicksAre,
    /// How often it does so in a millisecond, where that is a matter of time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tsc_khz: Option<NonZeroU32>,
}

impl Machine {
    /// So many ticks in nanoseconds; none where ticks are no time, or nobody knows how long one is.
    #[must_use]
    pub fn nanoseconds(&self, ticks: u64) -> Option<u64> {
        let khz = self.tsc_khz.filter(|_| self.ticks_are == TicksAre::Tsc)?;
        u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(khz.get())).ok()
    }
}

/// Emulated or real.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Xen inside the Bochs emulator.
    Bochs,
    /// Xen on hardware.
    Xen,
}

/// What a tick is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TicksAre {
    /// Instructions of the whole emulated machine: guest, Xen and dom0.
    Instructions,
    /// Cycles of the time stamp counter.
    Tsc,
}

/// What a workload is called, in results and on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// Two time stamps and nothing between: what the measurement itself costs.
    Timer,
    /// bpbench's WL1: call the breakpointed instruction.
    ExecBp,
    /// bpbench's WL2: run the whole page, with the breakpoint at its end.
    ExecPage,
    /// bpbench's WL3: read the eight bytes at the breakpoint.
    ReadBp,
    /// bpbench's WL4: read the whole page.
    ReadPage,
}

impl Workload {
    /// Every workload, in canonical order.
    pub const ALL: [Self; 5] = [Self::Timer, Self::ExecBp, Self::ExecPage, Self::ReadBp, Self::ReadPage];

    /// Its name in results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Timer => "timer",
            Self::ExecBp => "exec_bp",
            Self::ExecPage => "exec_page",
            Self::ReadBp => "read_bp",
            Self::ReadPage => "read_page",
        }
    }

    /// bpbench's name of the file with its samples, without `.csv`.
    #[must_use]
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Timer => "timing_overhead",
            other => other.name(),
        }
    }
}

/// One workload under one mechanism: what was measured, what was counted, and the samples summarised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The program that owned the event ring: `runner`, `floor`, `drakvuf`, …
    pub host: String,
    /// What answered the events: `hyperbp`, `floor` (the least a monitor can do), `none`, …
    pub backend: String,
    /// `none`, `skip`, or a mechanism of the core's.
    pub mechanism: String,
    /// What the guest did.
    pub workload: Workload,
    /// Virtual CPUs of the guest.
    pub vcpus: u32,
    /// How many samples were taken.
    pub samples: u64,
    /// The samples, summarised.
    pub ticks: Ticks,
    /// How often the guest executed the breakpointed instruction.
    pub guest_hits: u64,
    /// How often the monitor was told.
    pub monitor_hits: u64,
    /// Whether a read of the page under test showed the guest anything but its own bytes.
    pub guest_saw_breakpoint: bool,
}

/// A [`Run`] before its samples are summarised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// See [`Run::host`].
    pub host: String,
    /// See [`Run::backend`].
    pub backend: String,
    /// See [`Run::mechanism`].
    pub mechanism: String,
    /// See [`Run::workload`].
    pub workload: Workload,
    /// See [`Run::vcpus`].
    pub vcpus: u32,
    /// See [`Run::guest_hits`].
    pub guest_hits: u64,
    /// See [`Run::monitor_hits`].
    pub monitor_hits: u64,
    /// See [`Run::guest_saw_breakpoint`].
    pub guest_saw_breakpoint: bool,
}

impl Measurement {
    /// The run this is with these samples; `None` if there are none.
    #[must_use]
    pub fn summarised(self, samples: &[u64]) -> Option<Run> {
        let ticks = Ticks::of(&mut samples.to_vec())?;
        let Self { host, backend, mechanism, workload, vcpus, guest_hits, monitor_hits, guest_saw_breakpoint } = self;
        let samples = samples.len() as u64;
        Some(Run {
            host,
            backend,
            mechanism,
            workload,
            vcpus,
            samples,
            ticks,
            guest_hits,
            monitor_hits,
            guest_saw_breakpoint,
        })
    }
}

/// Where a host stands in canonical order: what others are compared with stands in front.
pub(crate) fn host_rank(host: &str) -> usize {
    const ORDER: [&str; 3] = ["none", "floor", "runner"];
    ORDER.iter().position(|known| *known == host).unwrap_or(ORDER.len())
}

/// Where a mechanism stands in canonical order; one this crate does not know stands behind all others.
pub(crate) fn mechanism_rank(mechanism: &str) -> usize {
    const ORDER: [&str; 8] = ["none", "skip", "repair", "view-step", "view-fast-step", "emulate", "interpret", "auto"];
    ORDER.iter().position(|known| *known == mechanism).unwrap_or(ORDER.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{bochs, measurement};
    use proptest::prelude::*;

    #[test]
    fn json_is_the_documented_format() {
        let mut results = Results::new(bochs());
        let run = measurement("hyperbp", "view-step", Workload::ExecBp).summarised(&[3, 1, 2]).unwrap();
        results.runs.push(run);
        let json = concat!(
            r#"{"schema":1,"machine":{"kind":"bochs","cpu":"Haswell","xen":"4.17.5","cpus":1,"#,
            r#""ticks_are":"instructions"},"runs":[{"host":"runner","backend":"hyperbp","mechanism":"view-step","#,
            r#""workload":"exec_bp","vcpus":1,"samples":3,"ticks":{"min":1,"p10":1,"median":2,"p90":3,"max":3},"#,
            r#""guest_hits":3,"monitor_hits":3,"guest_saw_breakpoint":false}]}"#
        );
        assert_eq!(serde_json::to_string(&results).unwrap(), json);
        assert_eq!(Results::from_json(json).unwrap(), results);
    }

    #[test]
    fn fields_of_later_versions_are_ignored() {
        let json = r#"{"schema":1,"colour":"blue","machine":{"kind":"xen","cpu":"","xen":"","cpus":8,
            "ticks_are":"tsc","microcode":5},"runs":[]}"#;
        assert_eq!(Results::from_json(json).unwrap().machine.cpus, 8);
    }

    #[test]
    fn another_schema_is_refused() {
        let json = r#"{"schema":2,"machine":{"kind":"xen","cpu":"","xen":"","cpus":8,"ticks_are":"tsc"},"runs":[]}"#;
        let error = format!("{:#}", Results::from_json(json).unwrap_err());
        assert!(error.contains("schema 2"), "{error}");
    }

    #[test]
    fn workload_names_are_the_ones_in_json() {
        for workload in Workload::ALL {
            assert_eq!(serde_json::to_value(workload).unwrap(), workload.name());
        }
    }

    fn any_run() -> impl Strategy<Value = Run> {
        let names = (".*", ".*", ".*", prop::sample::select(&Workload::ALL[..]));
        let counts = (any::<u32>(), any::<u64>(), any::<u64>(), any::<bool>());
        (names, counts, prop::collection::vec(any::<u64>(), 1..20)).prop_map(|(names, counts, samples)| {
            let (host, backend, mechanism, workload) = names;
            let (vcpus, guest_hits, monitor_hits, guest_saw_breakpoint) = counts;
            Measurement { host, backend, mechanism, workload, vcpus, guest_hits, monitor_hits, guest_saw_breakpoint }
                .summarised(&samples)
                .unwrap()
        })
    }

    proptest! {
        #[test]
        fn json_round_trips(runs in prop::collection::vec(any_run(), 0..10)) {
            let results = Results { runs, ..Results::new(bochs()) };
            prop_assert_eq!(Results::from_json(&results.to_json().unwrap()).unwrap(), results);
        }
    }
}
