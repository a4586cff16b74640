//! How a bench is spread over emulated machines.
//!
//! Nearly all of the time goes to reading whole pages: 512 events a sample. So hyperbp's reads get a machine of their
//! own, next to one for all the rest. One emulated instruction is one tick whatever else the host does, so machines
//! beside each other do not disturb each other's figures.

use std::time::Duration;

/// The workload that takes the time.
const READ_PAGE: &str = "read_page";
/// Reads in one sample of it.
const READS: u64 = 512;

/// bpbench's workloads, in its order.
pub const WORKLOADS: &[&str] = &["timer", "exec_bp", "exec_page", "read_bp", READ_PAGE];
/// What the runner can measure: the crate, and the least a monitor has to do.
pub const BACKENDS: &[&str] = &["hyperbp", "floor"];

/// What to measure. An empty list stands for everything there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Backends, of [`BACKENDS`].
    pub backends: Vec<String>,
    /// Mechanisms; the runner knows which there are.
    pub mechanisms: Vec<String>,
    /// Workloads, of [`WORKLOADS`].
    pub workloads: Vec<String>,
    /// Samples of each workload; the runner's own number when not given.
    pub samples: Option<u64>,
    /// Samples of `read_page`; the runner's own number when not given.
    pub page_samples: Option<u64>,
}

impl Selection {
    /// The runner's arguments for this selection.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let lists = [("--backend", &self.backends), ("--mechanism", &self.mechanisms), ("--workload", &self.workloads)];
        for (option, values) in lists {
            arguments.extend(values.iter().flat_map(|value| [option.to_owned(), value.clone()]));
        }
        for (option, number) in [("--samples", self.samples), ("--page-samples", self.page_samples)] {
            arguments.extend(number.into_iter().flat_map(|number| [option.to_owned(), number.to_string()]));
        }
        arguments
    }

    /// What of this selection is in `backends` and `workloads`, if anything is.
    fn part(&self, backends: &[&str], workloads: &[&str]) -> Option<Self> {
        let meet = |wanted: &[String], part: &[&str]| -> Vec<String> {
            let has = |name: &&&str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == **name);
            part.iter().filter(has).map(|name| (*name).to_owned()).collect()
        };
        let (backends, workloads) = (meet(&self.backends, backends), meet(&self.workloads, workloads));
        let some = !backends.is_empty() && !workloads.is_empty();
        some.then(|| Self { backends, workloads, ..self.clone() })
    }

    /// Upper bound of how long this takes in the emulator.
    ///
    /// From the dearest mechanism's 65 000 ticks an event, a slow host's 10 million ticks a second, and the seven
    /// mechanisms a backend has at most. The samples where none are given are the runner's.
    #[must_use]
    pub fn limit(&self) -> Duration {
        let or_all = |named: &[String], all: usize| if named.is_empty() { all } else { named.len() } as u64;
        let runs = or_all(&self.backends, BACKENDS.len()) * or_all(&self.mechanisms, 7);
        let reads_pages = self.workloads.is_empty() || self.workloads.iter().any(|w| w == READ_PAGE);
        let page_samples = if reads_pages { self.page_samples.unwrap_or(200) } else { 0 };
        let events = self.samples.unwrap_or(1000) * 4 + page_samples * READS;
        Duration::from_secs((runs * events).saturating_mul(65_000) / 10_000_000) + Duration::from_secs(600)
    }
}

/// The machines to start for `selection`, each with the selections to run in it one after the other.
#[must_use]
pub fn machines(selection: &Selection) -> Vec<Vec<Selection>> {
    let short = &WORKLOADS[..WORKLOADS.len() - 1];
    let rest = [selection.part(BACKENDS, short), selection.part(&["floor"], &[READ_PAGE])];
    let rest: Vec<Selection> = rest.into_iter().flatten().collect();
    let pages: Vec<Selection> = selection.part(&["hyperbp"], &[READ_PAGE]).into_iter().collect();
    [rest, pages].into_iter().filter(|machine| !machine.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// Every backend and workload of the plan, as pairs.
    fn pairs(machines: &[Vec<Selection>]) -> Vec<(String, String)> {
        let mut pairs: Vec<_> = machines
            .iter()
            .flatten()
            .flat_map(|s| s.backends.iter().flat_map(|b| s.workloads.iter().map(|w| (b.clone(), w.clone()))))
            .collect();
        pairs.sort();
        pairs
    }

    #[test]
    fn everything_is_measured_once() {
        let machines = machines(&Selection::default());
        assert_eq!(machines.len(), 2);
        let mut all: Vec<_> =
            BACKENDS.iter().flat_map(|b| WORKLOADS.iter().map(|w| ((*b).to_owned(), (*w).to_owned()))).collect();
        all.sort();
        assert_eq!(pairs(&machines), all);
        assert_eq!(machines[1].len(), 1);
        assert_eq!(machines[1][0].backends, ["hyperbp"]);
        assert_eq!(machines[1][0].workloads, [READ_PAGE]);
    }

    #[test]
    fn without_whole_pages_one_machine_does() {
        let selection = Selection { workloads: strings(&["exec_bp", "read_bp"]), ..Selection::default() };
        let machines = machines(&selection);
        assert_eq!(machines.len(), 1);
        assert_eq!(machines[0].len(), 1);
        assert_eq!(machines[0][0].workloads, ["exec_bp", "read_bp"]);
    }

    #[test]
    fn a_selection_of_pages_only_is_spread_too() {
        let machines = machines(&Selection { workloads: strings(&[READ_PAGE]), ..Selection::default() });
        assert_eq!(machines.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(machines[0][0].backends, ["floor"]);
    }

    #[test]
    fn what_is_not_asked_for_is_not_measured() {
        let selection = Selection {
            backends: strings(&["floor"]),
            mechanisms: strings(&["emulate"]),
            samples: Some(7),
            ..Selection::default()
        };
        let machines = machines(&selection);
        assert_eq!(machines.len(), 1);
        assert!(machines[0].iter().all(|s| s.backends == ["floor"] && s.samples == Some(7)));
        assert!(machines[0].iter().all(|s| s.mechanisms == ["emulate"]));
    }

    #[test]
    fn arguments_are_the_runners() {
        let selection = Selection {
            backends: strings(&["hyperbp"]),
            mechanisms: strings(&["repair", "emulate"]),
            workloads: strings(&["exec_bp"]),
            samples: Some(10),
            page_samples: None,
        };
        let expected = "--backend hyperbp --mechanism repair --mechanism emulate --workload exec_bp --samples 10";
        assert_eq!(selection.arguments().join(" "), expected);
        assert!(Selection::default().arguments().is_empty());
    }

    #[test]
    fn more_samples_may_take_longer() {
        let samples = |samples| Selection { samples: Some(samples), ..Selection::default() }.limit();
        assert!(samples(10_000) > samples(10));
    }
}
