//! How a bench is spread over emulated machines.
//!
//! Nearly all of the time goes to reading whole pages: 512 events a sample. So hyperbp's reads, in whatever host, get a machine
//! of their own, next to one for all the rest. One emulated instruction is one tick whatever else the host does, so machines
//! beside each other do not disturb each other's figures. All hosts execute the breakpoint, and read at it, in the same guest.

use std::time::Duration;

/// The workload that takes the time.
const READ_PAGE: &str = "read_page";
/// Reads in one sample of it.
const READS: u64 = 512;

/// bpbench's workloads, in its order.
pub const WORKLOADS: &[&str] = &["timer", "exec_bp", "exec_page", "read_bp", READ_PAGE];
/// What the runner can measure: the crate, the least a monitor has to do, and other monitors as they are without the crate.
pub const BACKENDS: &[&str] = &[HYPERBP, "floor", ORIGINAL];
/// The crate.
pub const HYPERBP: &str = "hyperbp";
/// The backend that only a host other than the runner has.
pub const ORIGINAL: &str = "original";
/// Who can own the ring: the runner, DRAKVUF, SmartVMI, and a program on vmi-rs. (The floor counts as a host of its own.)
pub const HOSTS: &[&str] = &["runner", "floor", DRAKVUF, SMARTVMI, VMI_RS];
/// The hosts that are measured only where there is one: those that have the backend [`ORIGINAL`].
pub const ELSEWHERE: &[&str] = &[DRAKVUF, SMARTVMI, VMI_RS];
/// One of them.
pub const DRAKVUF: &str = "drakvuf";
/// Another.
pub const SMARTVMI: &str = "smartvmi";
/// The one that is never there with the crate in it: whoever writes Rust links the crate itself.
pub const VMI_RS: &str = "vmi-rs";

/// What to measure. An empty list stands for everything there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Hosts, of [`HOSTS`].
    pub hosts: Vec<String>,
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
    /// How long the runner may watch the ring, in microseconds; its own choice when not given.
    pub watch: Option<u32>,
    /// Whether the runner may not have Xen wait.
    pub no_halt: bool,
    /// Programs that serve breakpoints from inside other hosts: the host, of [`ELSEWHERE`], and a path where the runner is run.
    pub elsewhere: Vec<(String, String)>,
    /// Those of these hosts that are without the crate: they have no backend but [`ORIGINAL`].
    pub stock: Vec<String>,
}

impl Selection {
    /// The runner's arguments for this selection.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let lists = [
            ("--host", &self.hosts),
            ("--backend", &self.backends),
            ("--mechanism", &self.mechanisms),
            ("--workload", &self.workloads),
        ];
        for (option, values) in lists {
            arguments.extend(values.iter().flat_map(|value| [option.to_owned(), value.clone()]));
        }
        for (option, number) in [("--samples", self.samples), ("--page-samples", self.page_samples)] {
            arguments.extend(number.into_iter().flat_map(|number| [option.to_owned(), number.to_string()]));
        }
        arguments.extend(self.watch.iter().flat_map(|watch| ["--watch".to_owned(), watch.to_string()]));
        arguments.extend(self.no_halt.then(|| "--no-halt".to_owned()));
        arguments.extend(self.elsewhere.iter().flat_map(|(host, program)| [format!("--{host}"), program.clone()]));
        arguments
    }

    /// What of this selection is in `backends` and `workloads`, if anything is.
    fn part(&self, backends: &[&str], workloads: &[&str]) -> Option<Self> {
        let meet = |wanted: &[String], part: &[&str]| -> Vec<String> {
            let has = |name: &&&str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == **name);
            part.iter().filter(has).map(|name| (*name).to_owned()).collect()
        };
        let (mut backends, workloads) = (meet(&self.backends, backends), meet(&self.workloads, workloads));
        backends.retain(|backend| self.has_host_of(backend));
        let some = !backends.is_empty() && !workloads.is_empty();
        some.then(|| Self { backends, workloads, ..self.clone() })
    }

    /// Whether a host with this backend is among those to be measured.
    fn has_host_of(&self, backend: &str) -> bool {
        let wanted = |host: &str| self.hosts.is_empty() || self.hosts.iter().any(|wanted| wanted == host);
        let mut elsewhere = self.elsewhere.iter().map(|(host, _)| host).filter(|host| wanted(host));
        match backend {
            HYPERBP => wanted("runner") || elsewhere.any(|host| *host != VMI_RS && !self.stock.contains(host)),
            ORIGINAL => elsewhere.next().is_some(),
            // The floor is its own host.
            backend => wanted(backend),
        }
    }

    /// Upper bound of how long this takes in the emulator.
    ///
    /// From the dearest mechanism's 80 000 ticks an event, a slow host's 10 million ticks a second, and the seven
    /// mechanisms a backend has at most; a host elsewhere has two backends. (SmartVMI's own breakpoint is dearer, but only one
    /// mechanism.) The samples where none are given are the runner's.
    #[must_use]
    pub fn limit(&self) -> Duration {
        let or_all = |named: &[String], all: usize| if named.is_empty() { all } else { named.len() } as u64;
        let backends = or_all(&self.backends, BACKENDS.len()) + 2 * self.elsewhere.len() as u64;
        let runs = backends * or_all(&self.mechanisms, 7);
        let reads_pages = self.workloads.is_empty() || self.workloads.iter().any(|w| w == READ_PAGE);
        let page_samples = if reads_pages { self.page_samples.unwrap_or(200) } else { 0 };
        let events = self.samples.unwrap_or(1000) * 4 + page_samples * READS;
        Duration::from_secs((runs * events).saturating_mul(80_000) / 10_000_000) + Duration::from_secs(600)
    }
}

/// The machines to start for `selection`, each with the selections to run in it one after the other.
#[must_use]
pub fn machines(selection: &Selection) -> Vec<Vec<Selection>> {
    let short = &WORKLOADS[..WORKLOADS.len() - 1];
    let rest = [selection.part(BACKENDS, short), selection.part(&BACKENDS[1..], &[READ_PAGE])];
    let rest: Vec<Selection> = rest.into_iter().flatten().collect();
    let pages: Vec<Selection> = selection.part(&[HYPERBP], &[READ_PAGE]).into_iter().collect();
    [rest, pages].into_iter().filter(|machine| !machine.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// Programs for these hosts.
    fn programs(hosts: &[&str]) -> Vec<(String, String)> {
        hosts.iter().map(|host| ((*host).to_owned(), format!("/bin/{host}-bench"))).collect()
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
        let all = |backends: &[&str]| {
            let pair = |backend: &str, workload: &&str| (backend.to_owned(), (*workload).to_owned());
            let mut all: Vec<_> = backends.iter().flat_map(|b| WORKLOADS.iter().map(move |w| pair(b, w))).collect();
            all.sort();
            all
        };
        assert_eq!(pairs(&machines), all(&["hyperbp", "floor"]));
        for host in ELSEWHERE {
            let with_host = Selection { elsewhere: programs(&[host]), ..Selection::default() };
            assert_eq!(pairs(&super::machines(&with_host)), all(BACKENDS));
        }
        assert_eq!(machines[1].len(), 1);
        assert_eq!(machines[1][0].backends, ["hyperbp"]);
        assert_eq!(machines[1][0].workloads, [READ_PAGE]);
    }

    #[test]
    fn whoever_executes_the_breakpoint_does_so_in_one_machine() {
        let selection = Selection { elsewhere: programs(ELSEWHERE), ..Selection::default() };
        let machines = machines(&selection);
        assert_eq!(machines[0][0].backends, BACKENDS);
        assert!(machines[0][0].hosts.is_empty(), "all hosts");
        assert_eq!(machines[0][1].backends, ["floor", "original"]);
        assert_eq!(machines[1][0].backends, ["hyperbp"]);
        assert!(machines.iter().flatten().all(|selection| selection.elsewhere.len() == ELSEWHERE.len()));
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
            hosts: strings(&["drakvuf"]),
            backends: strings(&["hyperbp"]),
            mechanisms: strings(&["repair", "emulate"]),
            workloads: strings(&["exec_bp"]),
            samples: Some(10),
            page_samples: None,
            watch: Some(0),
            no_halt: true,
            elsewhere: programs(&["drakvuf", "smartvmi", "vmi-rs"]),
            stock: strings(&["drakvuf"]),
        };
        let expected = "--host drakvuf --backend hyperbp --mechanism repair --mechanism emulate --workload exec_bp \
            --samples 10 --watch 0 --no-halt --drakvuf /bin/drakvuf-bench --smartvmi /bin/smartvmi-bench --vmi-rs /bin/vmi-rs-bench";
        assert_eq!(selection.arguments().join(" "), expected);
        assert!(Selection::default().arguments().is_empty());
    }

    #[test]
    fn a_machine_that_has_nothing_to_measure_is_not_started() {
        let hosts = |hosts: &[&str], elsewhere: &[&str]| {
            machines(&Selection { hosts: strings(hosts), elsewhere: programs(elsewhere), ..Selection::default() }).len()
        };
        assert_eq!(hosts(&["floor"], &[]), 1);
        assert_eq!(hosts(&["drakvuf"], &["drakvuf"]), 2);
        assert_eq!(hosts(&["drakvuf"], &[]), 0);
        assert_eq!(hosts(&["drakvuf"], &["smartvmi"]), 0);
        assert_eq!(hosts(&["smartvmi"], ELSEWHERE), 2);
        assert_eq!(hosts(&["vmi-rs"], ELSEWHERE), 1);
        let original = Selection { backends: strings(&["original"]), ..Selection::default() };
        assert!(machines(&original).is_empty());
        let stock = |backends: &[&str]| {
            let (hosts, backends, stock) = (strings(&["smartvmi"]), strings(backends), strings(&["smartvmi"]));
            let elsewhere = programs(&["smartvmi"]);
            machines(&Selection { hosts, backends, elsewhere, stock, ..Selection::default() }).len()
        };
        assert_eq!((stock(&["hyperbp"]), stock(&[])), (0, 1));
    }

    #[test]
    fn more_samples_may_take_longer() {
        let samples = |samples| Selection { samples: Some(samples), ..Selection::default() }.limit();
        assert!(samples(10_000) > samples(10));
    }
}
