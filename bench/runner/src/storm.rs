//! Storms: all virtual CPUs of the guest execute, hash and write the page with the breakpoints at once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyperbp::Mechanism;
use hyperbp_bench_abi::Workload;
use hyperbp_report::{Handling, Served, Storm};

use crate::core::{self, Outcome};
use crate::guest::Guest;
use crate::ring::Monitor;
use crate::xen::Domain;

/// A storm that has not ended by then, and for every call this much longer, will not end.
const STUCK: Duration = Duration::from_secs(60);
const STUCK_PER_CALL: Duration = Duration::from_millis(100);

/// Lets one rage under each mechanism. `progress` is told how many are over, of how many, and what comes next.
///
/// # Errors
/// If the domain does not run the guest, or something goes wrong other than what is counted.
pub(crate) fn all(
    domain: &mut Domain,
    mechanisms: &[Mechanism],
    calls: u32,
    progress: &mut dyn FnMut(u64, u64, &str),
) -> Result<Vec<Storm>> {
    let guest = Guest::find(domain)?;
    let total = mechanisms.len() as u64;
    let mut storms = Vec::new();
    for (done, mechanism) in (0..).zip(mechanisms) {
        let name = mechanism.to_string();
        progress(done, total, &format!("storm {name}"));
        storms.push(one(domain, &guest, *mechanism, calls).with_context(|| format!("in the storm under {name}"))?);
    }
    progress(total, total, "done");
    Ok(storms)
}

fn one(domain: &mut Domain, guest: &Guest, mechanism: Mechanism, calls: u32) -> Result<Storm> {
    guest.wait_until_done(STUCK)?;
    let before = guest.storm();
    let (start, mut asked, mut stuck) = (Instant::now(), false, false);
    let mut idle = || {
        if !guest.is_done() {
            stuck = start.elapsed() > STUCK + STUCK_PER_CALL * calls;
            return !stuck;
        }
        if !asked {
            guest.request(Workload::Storm, calls);
        }
        !std::mem::replace(&mut asked, true)
    };
    let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
    let outcome = core::run(domain, &mut monitor, mechanism, &guest.sites(), &mut idle)?;
    ensure!(!stuck, "the guest does not come back");
    drop(monitor);
    let after = guest.storm();
    guest.check(domain)?;

    let executions: Vec<u64> =
        after.executions.iter().zip(before.executions).map(|(after, before)| after - before).collect();
    let hits = || outcome.figures.iter().map(|figures| figures.hits);
    let sum = |differences: &mut dyn Iterator<Item = u64>| differences.sum();
    Ok(Storm {
        workload: "storm".to_owned(),
        mechanism: mechanism.to_string(),
        counts_on_several_vcpus: mechanism.counts_on_several_vcpus(),
        vcpus: guest.vcpus(),
        cpus: domain.host_cpus()?,
        executions: executions.iter().sum(),
        hits: outcome.hits(),
        lost: sum(&mut executions.iter().zip(hits()).map(|(executions, hits)| executions.saturating_sub(hits))),
        doubled: sum(&mut executions.iter().zip(hits()).map(|(executions, hits)| hits.saturating_sub(*executions))),
        hashes: after.hashes - before.hashes,
        hash_mismatches: after.hash_mismatches - before.hash_mismatches,
        rewrites: after.rewrites - before.rewrites,
        rewrite_mismatches: after.rewrite_mismatches - before.rewrite_mismatches,
        served: served(&outcome),
        fallbacks: outcome.figures.iter().map(|figures| figures.fallbacks).sum(),
        failures: outcome.counters.failures,
        handling: handling(&outcome),
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
    let times = &outcome.handling;
    Handling { median: times.value_at_quantile(0.5), p99: times.value_at_quantile(0.99), max: times.max() }
}
