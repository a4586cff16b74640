//! Measures: one attachment for each host, backend, mechanism and workload.

use std::fmt;
use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyperbp::Mechanism;
use hyperbp_bench_abi as abi;
use hyperbp_report::{Collection, Key, Kind, Machine, Measurement, TicksAre, Workload};

use crate::cli::{Backend, Host};
use crate::core::{self, Idle};
use crate::elsewhere::Program;
use crate::floor::{self, FloorMechanism};
use crate::guest::Guest;
use crate::ring::{Monitor, PATIENCE};
use crate::xen::Domain;
use crate::{elsewhere, program};

/// No workload's batch takes this long, even in the emulator.
const STUCK: Duration = Duration::from_secs(300);
/// Between two looks at whether the domain is alive, in calls.
const LOOK: u32 = 1024;
/// Samples of `read_page` between two lines of progress: each is hundreds of hits.
const PAGE_BATCH: u32 = 10;

/// Who owns the breakpoint, and how it works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject<'a> {
    /// Nobody: no monitor is attached.
    None,
    /// The core.
    Core(Mechanism),
    /// The bare loop.
    Floor(FloorMechanism),
    /// Another host, in a process of its own.
    Elsewhere(Program<'a>, elsewhere::Backend),
}

impl<'a> Subject<'a> {
    /// All there are, in canonical order.
    pub(crate) fn all(programs: &[Program<'a>]) -> Vec<Self> {
        let named = Mechanism::NAMED.map(|(_, mechanism)| mechanism);
        let floor = FloorMechanism::ALL.map(Self::Floor);
        let original = programs.iter().flat_map(|program| {
            let backends = program.originals().iter().map(|original| elsewhere::Backend::Original(*original));
            backends.map(|backend| Self::Elsewhere(*program, backend))
        });
        let core = named.into_iter().flat_map(|mechanism| Self::of_core(mechanism, programs));
        [Self::None].into_iter().chain(core).chain(floor).chain(original).collect()
    }

    /// Each host that has the core, with this mechanism.
    pub(crate) fn of_core(mechanism: Mechanism, programs: &[Program<'a>]) -> impl Iterator<Item = Self> {
        let loaded = programs.iter().copied().filter(|program| program.has_hyperbp());
        let backend = elsewhere::Backend::Hyperbp(mechanism);
        iter::once(Self::Core(mechanism)).chain(loaded.map(move |program| Self::Elsewhere(program, backend)))
    }

    pub(crate) fn host(self) -> Host {
        match self {
            Self::None | Self::Core(_) => Host::Runner,
            Self::Floor(_) => Host::Floor,
            Self::Elsewhere(program, _) => program.host(),
        }
    }

    pub(crate) fn backend(self) -> Backend {
        match self {
            Self::None | Self::Core(_) | Self::Elsewhere(_, elsewhere::Backend::Hyperbp(_)) => Backend::Hyperbp,
            Self::Floor(_) => Backend::Floor,
            Self::Elsewhere(_, elsewhere::Backend::Original(_)) => Backend::Original,
        }
    }

    pub(crate) fn mechanism(self) -> String {
        match self {
            Self::None => "none".to_owned(),
            Self::Core(mechanism) => mechanism.to_string(),
            Self::Floor(mechanism) => mechanism.name().to_owned(),
            Self::Elsewhere(_, backend) => backend.mechanism(),
        }
    }

    /// Serves the guest's breakpoint as long as `idle` says, and leaves nothing behind. Returns how often it was hit.
    ///
    /// # Errors
    /// If the domain cannot be monitored, or those of [`core::run`], [`floor::run`] and [`elsewhere::run`].
    pub(crate) fn serve(self, domain: &mut Domain, guest: &Guest, idle: &mut Idle<'_>) -> Result<u64> {
        let attach = |domain: &Domain| Monitor::attach(domain).context("cannot monitor the domain");
        match self {
            Self::None => {
                while let Some(patience) = idle() {
                    std::thread::sleep(patience);
                }
                Ok(0)
            }
            Self::Core(mechanism) => {
                let mut monitor = attach(domain)?;
                Ok(core::run(domain, &mut monitor, mechanism, &[guest.breakpoint()], idle)?.hits())
            }
            Self::Floor(mechanism) => {
                let mut monitor = attach(domain)?;
                Ok(floor::run(domain, &mut monitor, mechanism, guest.breakpoint().0, idle)?.hits)
            }
            Self::Elsewhere(program, backend) => {
                let served = elsewhere::run(program, domain.id(), &[guest.breakpoint()], backend, false, idle);
                if served.is_err() {
                    // It may leave it paused when it cannot attach.
                    domain.let_run().context("cannot let the domain run again")?;
                }
                Ok(served?.hits.iter().sum())
            }
        }
    }

    /// Whether it can be measured with a workload: `skip` hides nothing from a read.
    fn does(self, workload: Workload) -> bool {
        let reads = matches!(workload, Workload::ReadBp | Workload::ReadPage);
        !(reads && self == Self::Floor(FloorMechanism::Skip))
    }
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The runner is what is usual, and not named.
        if matches!(self, Self::Elsewhere(..)) {
            write!(f, "{} ", self.host())?;
        }
        write!(f, "{} {}", self.backend(), self.mechanism())
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) subjects: Vec<Subject<'a>>,
    pub(crate) workloads: Vec<Workload>,
    /// Of each workload but `read_page`.
    pub(crate) samples: u32,
    /// Of `read_page`.
    pub(crate) page_samples: u32,
    pub(crate) kind: Kind,
}

/// Measures everything in the plan, and says in which order it did. `progress` is told how much is done, of how much, and what
/// comes next.
///
/// # Errors
/// If the guest or Xen does not play along, or if a count is wrong.
pub(crate) fn measure(
    domain: &mut Domain,
    plan: &Plan<'_>,
    progress: &mut dyn FnMut(u64, u64, &str),
) -> Result<(Collection, Vec<Key>)> {
    let guest = match Guest::kernel(domain)? {
        Some(guest) => guest,
        None => program::find(domain, &mut |text| progress(0, 0, text))?,
    };
    guest.check(domain)?;
    let interrupted = interrupted()?;
    let mut collection = Collection::new(machine(domain, plan.kind)?);
    let cells: Vec<_> = plan
        .subjects
        .iter()
        .flat_map(|subject| plan.workloads.iter().map(|workload| (*subject, *workload)))
        .filter(|(subject, workload)| subject.does(*workload))
        .collect();
    let samples = |workload| if workload == Workload::ReadPage { plan.page_samples } else { plan.samples };
    let total = cells.iter().map(|(_, workload)| u64::from(samples(*workload).div_ceil(batch(*workload)))).sum();
    let mut done = 0;
    let mut order = Vec::with_capacity(cells.len());
    for (subject, workload) in cells {
        let text = format!("{subject} {}", workload.name());
        let (measurement, ticks) =
            cell(domain, &guest, &interrupted, subject, workload, samples(workload), &mut || {
                progress(done, total, &text);
                done += 1;
            })
            .with_context(|| format!("while measuring {text}"))?;
        order.push(Key {
            host: measurement.host.clone(),
            backend: measurement.backend.clone(),
            mechanism: measurement.mechanism.clone(),
            workload,
        });
        collection.push(measurement, ticks)?;
    }
    progress(total, total, "done");
    Ok((collection, order))
}

/// Becomes true when this process is to stop: someone who wants that is to leave a guest without breakpoints.
///
/// # Errors
/// If signals cannot be handled.
pub(crate) fn interrupted() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).context("cannot handle signals")?;
    }
    Ok(interrupted)
}

fn batch(workload: Workload) -> u32 {
    if workload == Workload::ReadPage { PAGE_BATCH } else { abi::SAMPLES_MAX }
}

/// Measures one workload. `next` is called before each batch.
fn cell(
    domain: &mut Domain,
    guest: &Guest,
    interrupted: &AtomicBool,
    subject: Subject<'_>,
    workload: Workload,
    samples: u32,
    next: &mut dyn FnMut(),
) -> Result<(Measurement, Vec<u64>)> {
    guest.wait_until_done(STUCK)?;
    let before = guest.counts();
    let mut ticks = Vec::with_capacity(samples as usize);
    let mut batches = Batches {
        guest,
        interrupted,
        workload,
        left: samples,
        asked: 0,
        since: Instant::now(),
        calls: 0,
        stuck: false,
    };
    let mut idle = || batches.go_on(&mut ticks, next).then_some(PATIENCE);
    let hits = subject.serve(domain, guest, &mut idle)?;
    if interrupted.load(Ordering::Relaxed) {
        bail!("interrupted; the breakpoint is removed");
    }
    if batches.stuck {
        if domain.has_crashed()? {
            bail!("the domain has crashed: `xl dmesg` shows what its last words were");
        }
        if guest.is_program() {
            bail!("the program does not come back: has it ended, or has the guest moved its pages? Start it again");
        }
        bail!("the guest does not come back: is the domain paused?");
    }
    guest.check(domain)?;
    let after = guest.counts();
    let executions = after.executions - before.executions;
    let expected = if matches!(workload, Workload::ExecBp | Workload::ExecPage) { samples.into() } else { 0 };
    ensure!(executions == expected, "the guest executed the instruction {executions} times, not {expected}");
    let measurement = Measurement {
        host: subject.host().to_string(),
        backend: subject.backend().to_string(),
        mechanism: subject.mechanism(),
        workload,
        vcpus: guest.vcpus(),
        // Without a breakpoint there is nothing to hit.
        guest_hits: if subject == Subject::None { 0 } else { executions },
        monitor_hits: hits,
        guest_saw_breakpoint: after.mismatches != before.mismatches,
    };
    Ok((measurement, ticks))
}

/// The requests that make up a workload.
struct Batches<'a> {
    guest: &'a Guest,
    interrupted: &'a AtomicBool,
    workload: Workload,
    left: u32,
    /// Samples of the request the guest works on; 0 if it has none.
    asked: u32,
    since: Instant,
    calls: u32,
    stuck: bool,
}

impl Batches<'_> {
    /// Looks after the guest. False when there is nothing more to wait for.
    fn go_on(&mut self, ticks: &mut Vec<u64>, next: &mut dyn FnMut()) -> bool {
        if self.interrupted.load(Ordering::Relaxed) {
            return false;
        }
        if !self.guest.is_done() {
            self.calls += 1;
            self.stuck = self.calls.is_multiple_of(LOOK) && self.since.elapsed() > STUCK;
            return !self.stuck;
        }
        self.guest.samples(self.asked, ticks);
        self.asked = self.left.min(batch(self.workload));
        if self.asked == 0 {
            return false;
        }
        self.left -= self.asked;
        next();
        self.since = Instant::now();
        self.guest.request(wire(self.workload), self.asked);
        true
    }
}

fn wire(workload: Workload) -> abi::Workload {
    match workload {
        Workload::Timer => abi::Workload::Timer,
        Workload::ExecBp => abi::Workload::ExecBp,
        Workload::ExecPage => abi::Workload::ExecPage,
        Workload::ReadBp => abi::Workload::ReadBp,
        Workload::ReadPage => abi::Workload::ReadPage,
    }
}

/// This machine. Xen tells its version through sysfs.
fn machine(domain: &Domain, kind: Kind) -> Result<Machine> {
    let part = |name: &str| {
        let file = format!("/sys/hypervisor/version/{name}");
        std::fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))
    };
    let (major, minor, extra) = (part("major")?, part("minor")?, part("extra")?);
    let info = std::fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    // In the emulator it is not a matter of time, nor the same in each boot.
    let tsc_khz = domain.tsc_khz()?.filter(|_| kind == Kind::Xen);
    Ok(Machine {
        kind,
        cpu: model.unwrap_or("unknown").to_owned(),
        xen: format!("{}.{}{}", major.trim(), minor.trim(), extra.trim()),
        cpus: domain.host_cpus()?,
        ticks_are: match kind {
            Kind::Bochs => TicksAre::Instructions,
            Kind::Xen => TicksAre::Tsc,
        },
        tsc_khz,
    })
}
