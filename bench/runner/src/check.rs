//! Checks on a live guest: every combination of the three choices counts right, hides itself, delivers the guest's own
//! INT3s and leaves nothing behind. No times are taken.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hyperbp::Mechanism;
use hyperbp_bench_abi::Workload;

use crate::bench::Subject;
use crate::guest::Guest;
use crate::xen::Domain;

/// What the guest does under each mechanism. Execution comes after reads and writes too: these lift the breakpoint.
const PROGRAM: [(Workload, u32); 9] = [
    (Workload::ExecBp, 50),
    (Workload::OwnInt3, 20),
    (Workload::ExecPage, 5),
    (Workload::ReadBp, 20),
    (Workload::ExecBp, 10),
    (Workload::WriteByte, 10),
    (Workload::ExecBp, 10),
    (Workload::ReadPage, 1),
    (Workload::ExecBp, 5),
];

/// The guest is given up after this.
const STUCK: Duration = Duration::from_secs(60);

/// Checks them all, and prints a line for each. Returns how many failed.
///
/// # Errors
/// If the domain does not run the guest.
pub(crate) fn all(domain: &mut Domain) -> Result<usize> {
    let guest = Guest::find(domain)?;
    let mut failed = 0;
    let mut report = |what: &str, result: Result<()>| match result {
        Ok(()) => println!("ok: {what}"),
        Err(error) => {
            failed += 1;
            println!("FAILED: {what}: {error:#}");
        }
    };
    for mechanism in Mechanism::all() {
        let result = one(domain, &guest, Subject::Core(mechanism));
        report(&format!("{mechanism} counts every hit, hides, and leaves nothing"), result);
    }
    report("the guest runs on without a monitor", one(domain, &guest, Subject::None));
    Ok(failed)
}

fn one(domain: &mut Domain, guest: &Guest, subject: Subject) -> Result<()> {
    let before = guest.counts();
    let mut program = VecDeque::from(PROGRAM);
    let start = Instant::now();
    let mut stuck = false;
    let mut idle = || {
        if !guest.is_done() {
            stuck = start.elapsed() > STUCK;
            return !stuck;
        }
        match program.pop_front() {
            Some((workload, count)) => guest.request(workload, count),
            None => return false,
        }
        true
    };
    let hits = subject.serve(domain, guest, &mut idle)?;
    ensure!(!stuck, "the guest does not come back");
    let after = guest.counts();
    let sum =
        |of: &[Workload]| -> u64 { PROGRAM.iter().filter(|(w, _)| of.contains(w)).map(|(_, n)| u64::from(*n)).sum() };
    let executions = sum(&[Workload::ExecBp, Workload::ExecPage]);
    ensure!(after.executions - before.executions == executions, "the guest lost executions");
    if subject != Subject::None {
        ensure!(hits == executions, "{executions} executions, {hits} hits");
    }
    let int3s = after.own_int3s - before.own_int3s;
    ensure!(int3s == sum(&[Workload::OwnInt3]), "{int3s} of the guest's own INT3s arrived");
    ensure!(after.mismatches == before.mismatches, "the guest read something that is not its own");
    guest.check(domain)
}
