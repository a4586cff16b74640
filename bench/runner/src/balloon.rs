//! A guest that replaces its pages under load: a stack, an operand, a page table, and the page with the breakpoints.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use hyperbp::Mechanism;
use hyperbp_bench_abi::{BALLOON_RUNS, Workload};

use crate::check::STUCK;
use crate::core;
use crate::guest::Guest;
use crate::ring::{Monitor, PATIENCE};
use crate::xen::Domain;

/// What the guest counts.
const WRONG: [&str; 5] = [
    "not what it had pushed",
    "not what it had pushed, where its page table was another one",
    "not what it had written",
    "not its code",
    "no page from Xen",
];

/// Has the guest replace each of its pages so often, and checks that it gets what it must, and that every execution is a hit.
///
/// # Errors
/// If not.
pub(crate) fn check(domain: &mut Domain, guest: &Guest, mechanism: Mechanism, rounds: u32) -> Result<()> {
    guest.wait_until_done(STUCK)?;
    let (start, mut asked, mut stuck) = (Instant::now(), false, false);
    let mut idle = || {
        if !guest.is_done() {
            stuck = start.elapsed() > STUCK;
            return (!stuck).then_some(PATIENCE);
        }
        if std::mem::replace(&mut asked, true) {
            return None;
        }
        guest.request(Workload::Balloon, rounds);
        Some(PATIENCE)
    };
    let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
    let outcome = core::run(domain, &mut monitor, mechanism, &guest.balloon_sites(), &mut idle)?;
    ensure!(!domain.has_crashed()?, "the guest has crashed: `xl dmesg` shows what its last words were");
    ensure!(!stuck, "the guest does not come back");
    let mut counts = Vec::new();
    guest.samples(WRONG.len() as u32, &mut counts);
    for (count, wrong) in counts.into_iter().zip(WRONG) {
        ensure!(count == 0, "{count} times, the guest has got {wrong}");
    }
    for figures in &outcome.figures {
        let executions = u64::from(BALLOON_RUNS * rounds);
        ensure!(figures.hits == executions, "{executions} executions, {} hits", figures.hits);
    }
    Ok(())
}
