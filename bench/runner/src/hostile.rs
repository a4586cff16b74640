//! Hostile guests: each of the guest's probes is run without breakpoints, and then with them, and must see the same.

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyperbp::{Gpa, Mechanism};
use hyperbp_bench_abi::hostile::{FIRST_NOTE, FIRST_PROBE, FIRST_SITE, NAME_WORDS, NOTES_MAX, PROBE_WORDS, SITES_MAX};
use hyperbp_bench_abi::{SAMPLES_MAX, Workload};
use hyperbp_report::{Hostile, Probe};

use crate::core::{self, Outcome};
use crate::guest::Guest;
use crate::ring::{Monitor, PATIENCE};
use crate::xen::Domain;

/// A probe that has not ended by then will not end.
const STUCK: Duration = Duration::from_secs(20);
/// Between two looks at whether the domain is alive.
const LOOK: Duration = Duration::from_millis(200);
/// No probe has this number: the guest lists them all.
const LIST: u32 = u32::MAX;
/// Most differences that are told of a probe.
const DIFFERENCES: usize = 4;
/// A guest that dies more often than this under one mechanism is given up: each time its domain is created again.
const DEATHS: usize = 3;
/// Hits of a site that are told of a probe that has lost or doubled some.
const MISCOUNTED: usize = 4;

/// What is to be tried.
pub(crate) struct Plan<'a> {
    pub(crate) mechanisms: Vec<Mechanism>,
    /// Only probes whose names begin with one of these; none: all.
    pub(crate) probes: &'a [String],
    /// The domain's configuration, to create it again after a probe that it has not survived.
    pub(crate) config: Option<&'a Path>,
}

/// A probe as the guest lists it.
#[derive(Clone, Debug)]
struct Listed {
    number: u32,
    name: String,
    vcpus: u32,
}

/// What a probe has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    notes: Vec<(String, u64)>,
    /// How often it has executed each site.
    executed: Vec<u64>,
}

/// A domain that runs the benchmark guest, and can be made again.
struct Target<'a> {
    name: String,
    config: Option<&'a Path>,
    domain: Domain,
    guest: Guest,
    sites: Vec<Gpa>,
    probes: Vec<Listed>,
}

impl<'a> Target<'a> {
    fn open(name: &str, config: Option<&'a Path>) -> Result<Self> {
        let domain = Domain::open(name, false)?;
        let guest = Guest::find(&domain)?;
        let mut target = Self { name: name.to_owned(), config, domain, guest, sites: Vec::new(), probes: Vec::new() };
        target.list()?;
        Ok(target)
    }

    /// Asks the guest what there is to be tried.
    fn list(&mut self) -> Result<()> {
        self.guest.request(Workload::Hostile, LIST);
        self.guest.wait_until_done(STUCK)?;
        let samples = samples(&self.guest);
        let (sites, probes) = (samples[0] as usize, samples[1] as usize);
        ensure!(sites <= SITES_MAX, "the guest lists {sites} breakpoints");
        self.sites = samples[FIRST_SITE..][..sites].iter().map(|at| Gpa(*at)).collect();
        let all = samples[FIRST_PROBE..].chunks_exact(PROBE_WORDS).take(probes);
        self.probes = (0..).zip(all).map(|(number, probe)| Listed::new(number, probe)).collect();
        Ok(())
    }

    /// Runs a probe without a monitor.
    fn alone(&self, probe: &Listed) -> Result<Seen> {
        self.guest.request(Workload::Hostile, probe.number);
        self.guest.wait_until_done(STUCK).with_context(|| format!("{} without a monitor", probe.name))?;
        Ok(seen(&self.guest, self.sites.len()))
    }

    /// Destroys the domain, creates it again, and has it do all that it had done.
    fn again(self) -> Result<Self> {
        let Self { name, config, domain, guest, .. } = self;
        let Some(file) = config else {
            bail!("the guest has not survived a probe; with --config its domain can be created again");
        };
        drop((guest, domain));
        for arguments in
            [&["destroy".as_ref(), name.as_ref()][..], &["create".as_ref(), "-q".as_ref(), file.as_os_str()]]
        {
            let status = Command::new("xl").args(arguments).status().context("cannot run xl")?;
            ensure!(status.success(), "xl {arguments:?} has failed ({status})");
        }
        Self::open(&name, config)
    }
}

impl Listed {
    fn new(number: u32, samples: &[u64]) -> Self {
        Self { number, name: text(&samples[..NAME_WORDS]), vcpus: samples[NAME_WORDS] as u32 }
    }

    fn is_wanted(&self, names: &[String], vcpus: u32) -> bool {
        self.vcpus <= vcpus && (names.is_empty() || names.iter().any(|name| self.name.starts_with(name.as_str())))
    }
}

/// Text in numbers of eight bytes, up to the first zero.
fn text(words: &[u64]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Runs the probes under each mechanism. `progress` is told how many mechanisms are done, of how many, and what comes next.
/// `keep` gets all results after each mechanism, so that a run that is cut leaves what it has.
///
/// # Errors
/// If the domain does not run the guest, if a probe fails without a monitor, or if the domain cannot be created again; and those
/// of `keep`. What a probe finds is no error.
pub(crate) fn all(
    name: &str,
    plan: &Plan<'_>,
    progress: &mut dyn FnMut(u64, u64, &str),
    keep: &mut dyn FnMut(&[Hostile]) -> Result<()>,
) -> Result<Vec<Hostile>> {
    let mut target = Target::open(name, plan.config)?;
    let vcpus = target.guest.vcpus();
    let probes: Vec<_> = target.probes.iter().filter(|probe| probe.is_wanted(plan.probes, vcpus)).cloned().collect();
    ensure!(!probes.is_empty(), "there is no such probe: {}", names(&target.probes));
    let total = plan.mechanisms.len() as u64;
    progress(0, total, "hostile guest without breakpoints");
    // Twice: what a probe sees must not depend on what has been before.
    let expected: Vec<Seen> = probes.iter().map(|probe| target.alone(probe)).collect::<Result<_>>()?;
    let (mut stable, mut unstable) = (Vec::new(), Vec::new());
    for (probe, expected) in probes.into_iter().zip(expected) {
        let differences = differences(&expected, &target.alone(&probe)?);
        if differences.is_empty() {
            stable.push((probe, expected));
        } else {
            let ended = format!("it sees something else each time, without a monitor: {}", differences.join("; "));
            unstable.push(Probe { name: probe.name, ended: Some(ended), ..Probe::default() });
        }
    }
    let mut results = Vec::new();
    for (done, mechanism) in (0..).zip(&plan.mechanisms) {
        progress(done, total, &format!("hostile guest under {mechanism}"));
        let (mut result, next) = one(target, *mechanism, &stable)?;
        result.probes.extend(unstable.iter().cloned());
        results.push(result);
        keep(&results)?;
        target = next;
    }
    progress(total, total, "done");
    Ok(results)
}

fn names(probes: &[Listed]) -> String {
    probes.iter().map(|probe| &*probe.name).collect::<Vec<_>>().join(", ")
}

/// What has come of the probes under a mechanism so far.
struct State {
    left: std::vec::IntoIter<(Listed, Seen)>,
    current: Option<(Listed, Seen)>,
    since: Instant,
    /// Hits of each site since the current probe began.
    hits: Vec<u64>,
    done: Vec<Probe>,
    stuck: bool,
}

fn one<'a>(mut target: Target<'a>, mechanism: Mechanism, probes: &[(Listed, Seen)]) -> Result<(Hostile, Target<'a>)> {
    let mut result = Hostile {
        mechanism: mechanism.to_string(),
        counts_on_several_vcpus: mechanism.counts_on_several_vcpus(),
        vcpus: target.guest.vcpus(),
        cpus: target.domain.host_cpus()?,
        probes: Vec::new(),
        failures: 0,
        unexplained: 0,
    };
    let (mut left, mut deaths) = (probes.to_vec(), 0);
    while !left.is_empty() {
        let state = RefCell::new(State {
            left: left.clone().into_iter(),
            current: None,
            since: Instant::now(),
            hits: vec![0; target.sites.len()],
            done: Vec::new(),
            stuck: false,
        });
        let served = attempt(&mut target, mechanism, &state);
        let State { done, current, stuck, .. } = state.into_inner();
        let ended = match &served {
            Ok(outcome) => {
                result.failures += outcome.counters.failures;
                result.unexplained += outcome.counters.unexplained;
                if stuck { Some(end_of(&target)) } else { None }
            }
            Err(error) => Some(format!("{error:#}")),
        };
        left.drain(..done.len());
        result.probes.extend(done);
        if let Some(ended) = ended {
            // Not even the breakpoints could be set, or taken out again.
            let name = current.or(left.first().cloned()).map_or("(leaving)".to_owned(), |(probe, _)| probe.name);
            eprintln!("{mechanism}: {name}: {ended}");
            result.probes.push(Probe { name, ended: Some(ended), ..Probe::default() });
            left.drain(..left.len().min(1));
            deaths += 1;
            if deaths >= DEATHS {
                let ended = format!("it was not tried, for the guest had died {deaths} times before");
                let rest = left.iter().map(|(probe, _)| probe.name.clone());
                result.probes.extend(rest.map(|name| Probe { name, ended: Some(ended.clone()), ..Probe::default() }));
                left.clear();
            }
            target = target.again()?;
            // It has other memory than the one before.
            for (probe, expected) in &mut left {
                *expected = target.alone(probe)?;
            }
        }
    }
    Ok((result, target))
}

/// Why a probe does not end.
fn end_of(target: &Target<'_>) -> String {
    match target.domain.has_crashed() {
        Ok(true) => "the guest has crashed".to_owned(),
        Ok(false) => "the guest does not come back".to_owned(),
        Err(error) => format!("the guest is gone: {error:#}"),
    }
}

/// Serves the breakpoints until all probes that are left have ended, or one does not.
fn attempt(target: &mut Target<'_>, mechanism: Mechanism, state: &RefCell<State>) -> Result<Outcome> {
    // Only to look whether the domain has crashed: the other handle serves it.
    let other = Domain::connect(&target.name)?;
    let mut monitor = Monitor::attach(&target.domain).context("cannot monitor the domain")?;
    let Target { domain, guest, sites, .. } = target;
    let mut looked = Instant::now();
    let mut idle = || {
        let mut state = state.borrow_mut();
        if !guest.is_done() {
            state.stuck = state.since.elapsed() > STUCK;
            if looked.elapsed() > LOOK {
                looked = Instant::now();
                state.stuck |= other.has_crashed().unwrap_or(true);
            }
            return (!state.stuck).then_some(PATIENCE);
        }
        if let Some((probe, expected)) = state.current.take() {
            let mut result = compare(&probe.name, &expected, &seen(guest, sites.len()), &state.hits, sites);
            result.milliseconds = u64::try_from(state.since.elapsed().as_millis()).unwrap_or(u64::MAX);
            state.done.push(result);
        }
        let next = state.left.next()?;
        guest.request(Workload::Hostile, next.0.number);
        (state.current, state.since) = (Some(next), Instant::now());
        state.hits.fill(0);
        Some(PATIENCE)
    };
    let mut on_hit = |site: usize, _: &dyn Fn() -> Result<Outcome>| state.borrow_mut().hits[site] += 1;
    core::watch(domain, &mut monitor, mechanism, sites, &mut on_hit, &mut idle)
}

/// All samples.
fn samples(guest: &Guest) -> Vec<u64> {
    let mut samples = Vec::new();
    guest.samples(SAMPLES_MAX, &mut samples);
    samples
}

/// What the probe that has just ended has seen, with so many sites.
fn seen(guest: &Guest, sites: usize) -> Seen {
    let samples = samples(guest);
    let count = (samples[0] as usize).min(NOTES_MAX);
    let notes = samples[FIRST_NOTE..].chunks_exact(2).take(count).map(|pair| (text(&pair[..1]), pair[1])).collect();
    Seen { notes, executed: samples[FIRST_SITE..][..sites].to_vec() }
}

/// Compares what a probe has seen with what it is to see, and what was counted.
fn compare(name: &str, expected: &Seen, seen: &Seen, hits: &[u64], sites: &[Gpa]) -> Probe {
    let mut differences = differences(expected, seen);
    let counted = || seen.executed.iter().copied().zip(hits.iter().copied());
    let miscounted = counted().zip(sites).filter(|((executed, hits), _)| executed != hits);
    differences.extend(
        miscounted
            .take(MISCOUNTED)
            .map(|((executed, hits), at)| format!("{executed} executions and {hits} hits at {at}")),
    );
    Probe {
        name: name.to_owned(),
        executions: seen.executed.iter().sum(),
        hits: hits.iter().sum(),
        lost: counted().map(|(executed, hits)| executed.saturating_sub(hits)).sum(),
        doubled: counted().map(|(executed, hits)| hits.saturating_sub(executed)).sum(),
        seen: different(expected, seen),
        milliseconds: 0,
        differences,
        ended: None,
    }
}

/// How many notes are not what they are to be.
fn different(expected: &Seen, seen: &Seen) -> u64 {
    let pairs = expected.notes.iter().zip(&seen.notes).filter(|(expected, seen)| expected != seen).count();
    let executed = expected.executed.iter().zip(&seen.executed).filter(|(expected, seen)| expected != seen).count();
    (pairs + executed + expected.notes.len().abs_diff(seen.notes.len())) as u64
}

/// The first of them, for people.
fn differences(expected: &Seen, seen: &Seen) -> Vec<String> {
    let mut differences: Vec<String> = Vec::new();
    let count = |seen: &Seen| seen.notes.len();
    if count(expected) != count(seen) {
        differences.push(format!("{} notes, not {}", count(seen), count(expected)));
    }
    let mut event = String::new();
    for (n, (expected, seen)) in expected.notes.iter().zip(&seen.notes).enumerate() {
        // So that whoever reads it knows after which exception.
        if is_event(&expected.0) {
            event = format!(" after {} {:#x}", expected.0, expected.1);
        }
        if expected != seen {
            let ((name, expected), (other, seen)) = (expected, seen);
            differences.push(match name == other {
                true => format!("note {n}: {name} is {seen:#x}, not {expected:#x}{event}"),
                false => format!("note {n}: {other} {seen:#x} instead of {name} {expected:#x}{event}"),
            });
        }
    }
    let executed = expected.executed.iter().zip(&seen.executed).enumerate().filter(|(_, (a, b))| a != b);
    differences.extend(executed.map(|(n, (a, b))| format!("site {n} was executed {b} times, not {a}")));
    differences.truncate(DIFFERENCES);
    differences
}

/// Whether a note is of an interruption.
fn is_event(name: &str) -> bool {
    name.starts_with('#') || matches!(name, "INT" | "SYSCALL")
}
