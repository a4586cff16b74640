//! Storms: all virtual CPUs of the guest execute, hash and write the page with the breakpoints at once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyperbp::LatencySummary;
use hyperbp_bench_abi::Workload;
use hyperbp_report::{Handling, Served, Storm};

use crate::bench::Subject;
use crate::core::{self, Idle, Outcome};
use crate::elsewhere::{self, Backend, Original};
use crate::guest::Guest;
use crate::ring::{Monitor, PATIENCE};
use crate::xen::Domain;

/// A storm that has not ended by then, and for every call this much longer, will not end.
const STUCK: Duration = Duration::from_secs(60);
const STUCK_PER_CALL: Duration = Duration::from_millis(100);

/// Lets one rage under each subject: the core, or what another host has that serves several breakpoints. `progress` is told how many are over, of how many, and what comes next.
///
/// # Errors
/// If the domain does not run the guest, or something goes wrong other than what is counted.
pub(crate) fn all(
    domain: &mut Domain,
    subjects: &[Subject<'_>],
    calls: u32,
    progress: &mut dyn FnMut(u64, u64, &str),
) -> Result<Vec<Storm>> {
    let guest = Guest::find(domain)?;
    let total = subjects.len() as u64;
    let mut storms = Vec::new();
    for (done, subject) in (0..).zip(subjects) {
        progress(done, total, &format!("storm {subject}"));
        storms.push(one(domain, &guest, *subject, calls).with_context(|| format!("in the storm under {subject}"))?);
        // The guest is as its host has left it.
        if storms.last().is_some_and(|storm| storm.ended.is_some()) {
            break;
        }
    }
    progress(total, total, "done");
    Ok(storms)
}

/// What a monitor tells of a storm.
#[derive(Default)]
struct Told {
    /// By breakpoint.
    hits: Vec<u64>,
    /// What only the core tells.
    outcome: Option<Outcome>,
}

/// Serves the storm's breakpoints as long as `idle` says.
fn serve(domain: &mut Domain, guest: &Guest, subject: Subject<'_>, idle: &mut Idle<'_>) -> Result<Told> {
    match subject {
        Subject::Core(mechanism) => {
            let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
            let outcome = core::run(domain, &mut monitor, mechanism, &guest.sites(), idle)?;
            Ok(Told { hits: outcome.figures.iter().map(|figures| figures.hits).collect(), outcome: Some(outcome) })
        }
        Subject::Elsewhere(program, backend) => {
            let told = elsewhere::run(program, domain.id(), &guest.sites(), backend, false, idle);
            if told.is_err() {
                // It may leave it paused.
                domain.let_run().context("cannot let the domain run again")?;
            }
            Ok(Told { hits: told?.hits, outcome: None })
        }
        Subject::None | Subject::Floor(_) => bail!("{subject} has only one breakpoint"),
    }
}

/// Whether it is one that counts every hit on any number of virtual CPUs.
fn counts_on_several_vcpus(subject: Subject<'_>) -> bool {
    match subject {
        Subject::Core(mechanism) | Subject::Elsewhere(_, Backend::Hyperbp(mechanism)) => {
            mechanism.counts_on_several_vcpus()
        }
        Subject::Elsewhere(_, Backend::Original(original)) => original != Original::Repair,
        Subject::None | Subject::Floor(_) => false,
    }
}

fn one(domain: &mut Domain, guest: &Guest, subject: Subject<'_>, calls: u32) -> Result<Storm> {
    guest.wait_until_done(STUCK)?;
    let before = guest.storm();
    let (start, mut asked, mut stuck) = (Instant::now(), false, false);
    let mut idle = || {
        if !guest.is_done() {
            stuck = start.elapsed() > STUCK + STUCK_PER_CALL * calls;
            return (!stuck).then_some(PATIENCE);
        }
        if !asked {
            guest.request(Workload::Storm, calls);
        }
        (!std::mem::replace(&mut asked, true)).then_some(PATIENCE)
    };
    let told = serve(domain, guest, subject, &mut idle);
    let (told, ended) = match told.and_then(|told| {
        ensure!(!stuck, "the guest does not come back");
        guest.check(domain)?;
        Ok(told)
    }) {
        Ok(told) => (told, None),
        // What is not ours may fail, and the others' results are not lost for it.
        Err(error) if subject.backend() == crate::cli::Backend::Original => {
            (Told::default(), Some(format!("{error:#}")))
        }
        Err(error) => return Err(error),
    };
    let after = guest.storm();

    let executions: Vec<u64> =
        after.executions.iter().zip(before.executions).map(|(after, before)| after - before).collect();
    let hits = || told.hits.iter().copied();
    let of_core = told.outcome.as_ref();
    let sum = |differences: &mut dyn Iterator<Item = u64>| differences.sum();
    Ok(Storm {
        workload: "storm".to_owned(),
        host: subject.host().to_string(),
        backend: subject.backend().to_string(),
        mechanism: subject.mechanism(),
        ended,
        counts_on_several_vcpus: counts_on_several_vcpus(subject),
        vcpus: guest.vcpus(),
        cpus: domain.host_cpus()?,
        executions: executions.iter().sum(),
        hits: hits().sum(),
        lost: sum(&mut executions.iter().zip(hits()).map(|(executions, hits)| executions.saturating_sub(hits))),
        doubled: sum(&mut executions.iter().zip(hits()).map(|(executions, hits)| hits.saturating_sub(*executions))),
        hashes: after.hashes - before.hashes,
        hash_mismatches: after.hash_mismatches - before.hash_mismatches,
        rewrites: after.rewrites - before.rewrites,
        rewrite_mismatches: after.rewrite_mismatches - before.rewrite_mismatches,
        served: of_core.map(served).unwrap_or_default(),
        fallbacks: of_core.iter().flat_map(|outcome| &outcome.figures).map(|figures| figures.fallbacks).sum(),
        failures: of_core.map_or(0, |outcome| outcome.counters.failures),
        handling: of_core.map(handling).unwrap_or_default(),
    })
}

/// Over all breakpoints.
pub(crate) fn served(outcome: &Outcome) -> Served {
    let sum = |of: fn(&hyperbp::Served) -> u64| outcome.figures.iter().map(|figures| of(&figures.served)).sum();
    Served {
        repair: sum(|served| served.repair),
        view_step: sum(|served| served.view_step),
        view_fast_step: sum(|served| served.view_fast_step),
        emulate: sum(|served| served.emulate),
        interpret: sum(|served| served.interpret),
    }
}

pub(crate) fn handling(outcome: &Outcome) -> Handling {
    let LatencySummary { median, p99, max, .. } = outcome.handling.summary();
    Handling { median, p99, max }
}
