//! Checks on a live guest: every combination of the three choices counts right, hides itself, delivers the guest's own
//! INT3s and leaves nothing behind. No times are taken.

use std::cell::Cell;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyperbp::{Mechanism, Placement};
use hyperbp_bench_abi::{BREAKPOINT_OFFSET, SITES, TARGET, Workload};

use crate::balloon;
use crate::bench::Subject;
use crate::cli::{Backend, Host};
use crate::core::{self, Idle, OnHit, Outcome};
use crate::elsewhere::{self, Original, Program};
use crate::guest::Guest;
use crate::patch::{self, CODE, Patch};
use crate::recover::Traces;
use crate::ring::{Monitor, PATIENCE};
use crate::xen::Domain;
use crate::{snippets, system_page};

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
pub(crate) const STUCK: Duration = Duration::from_secs(60);

/// Checks them all, and what there is in other hosts, and prints a line for each. Returns how many failed.
///
/// # Errors
/// If the domain does not run the guest.
pub(crate) fn all(domain: &mut Domain, programs: &[Program<'_>], only: Option<&str>) -> Result<usize> {
    let guest = Guest::find(domain)?;
    let mut failed = 0;
    // A check says what it has found besides, if it is all right.
    let mut report = |what: &str, check: &mut dyn FnMut() -> Result<String>| {
        if only.is_some_and(|only| !what.contains(only)) {
            return;
        }
        match check() {
            Ok(found) if found.is_empty() => println!("ok: {what}"),
            Ok(found) => println!("ok: {what}: {found}"),
            Err(error) => {
                failed += 1;
                println!("FAILED: {what}: {error:#}");
            }
        }
    };
    let nothing = |()| String::new();
    for mechanism in Mechanism::all() {
        report(&format!("{mechanism} counts every hit, hides, and leaves nothing"), &mut || {
            one(domain, &guest, Subject::Core(mechanism)).map(nothing)
        });
    }
    for mechanism in Mechanism::all() {
        report(&format!("what dom0 writes to the page is executed under {mechanism}"), &mut || {
            device_writes(domain, &guest, mechanism).map(nothing)
        });
    }
    for (seed, mechanism) in (1..).zip(Mechanism::all()) {
        report(&format!("instructions do the same under {mechanism}"), &mut || {
            snippets::check(domain, &guest, mechanism, seed)
        });
    }
    let system_page = "a page with descriptors, gates, a stack and a page table works";
    if domain.host_cpus()? > 1 {
        // Under `repair` the guest does not come to its end there. The cause is not known yet.
        println!("skipped: {system_page}, with more than one CPU: it does not work there under repair");
    } else {
        for mechanism in Mechanism::all() {
            report(&format!("{system_page} under {mechanism}"), &mut || system_page::check(domain, &guest, mechanism));
        }
    }
    for (_, mechanism) in Mechanism::NAMED {
        report(&format!("all memory reads the same under {mechanism}"), &mut || {
            snippets::scan(domain, &guest, mechanism).map(nothing)
        });
    }
    let original = Subject::all(programs).into_iter().filter(|subject| subject.backend() == Backend::Original);
    let core = Mechanism::all().flat_map(|mechanism| Subject::of_core(mechanism, programs));
    for subject in original.chain(core.filter(|subject| subject.host() != Host::Runner)) {
        report(&format!("{subject} counts every hit, hides, and leaves nothing"), &mut || {
            elsewhere(domain, &guest, subject).map(nothing)
        });
    }
    let watches = programs.iter().find(|program| program.host() == Host::Drakvuf && program.has_hyperbp());
    if let Some(program) = watches.copied() {
        let mut expected = elsewhere::Counts::default();
        report("DRAKVUF's own memory traps are told", &mut || {
            expected = watched(domain, &guest, program, elsewhere::Backend::Original(Original::ViewStep))?;
            Ok(format!("{expected:?}"))
        });
        for mechanism in Mechanism::all() {
            report(&format!("DRAKVUF's memory traps are told the same by hyperbp with {mechanism}"), &mut || {
                let counts = watched(domain, &guest, program, elsewhere::Backend::Hyperbp(mechanism))?;
                ensure!(counts == expected, "they were told {counts:?}, not {expected:?}");
                Ok(String::new())
            });
        }
    }
    report("the guest runs on without a monitor", &mut || one(domain, &guest, Subject::None).map(nothing));
    Ok(failed)
}

/// Has the guest replace its pages, under each mechanism. Returns how many failed.
///
/// # Errors
/// If the domain does not run the guest.
pub(crate) fn balloon(domain: &mut Domain, rounds: u32) -> Result<usize> {
    let guest = Guest::find(domain)?;
    let mut failed = 0;
    for mechanism in Mechanism::all() {
        match balloon::check(domain, &guest, mechanism, rounds) {
            Ok(()) => println!("ok: pages that the guest replaces are its own under {mechanism}"),
            Err(error) => {
                failed += 1;
                println!("FAILED: pages that the guest replaces are its own under {mechanism}: {error:#}");
            }
        }
    }
    Ok(failed)
}

/// Writes code to the page under test as a device does: through a mapping of dom0's, while the breakpoint is set. No view is
/// asked, and there is no event. The guest must execute what was written: at once what is under the breakpoint in a shadow,
/// and after a round of [`Engine::verify`](hyperbp::Engine::verify) the rest.
fn device_writes(domain: &mut Domain, guest: &Guest, mechanism: Mechanism) -> Result<()> {
    const CALLS: u32 = 3;
    enum Act {
        Write(usize, Vec<u8>),
        /// Pages are compared meanwhile.
        Wait,
        /// The guest executes the breakpoint, and this number is what the code leaves.
        Call(u32),
    }
    guest.wait_until_done(STUCK)?;
    let patch = Patch::new(domain, guest)?;
    let code = |number| patch::store(patch::mark(), number);
    let under = |bytes: &[u8]| match mechanism.placement() {
        Placement::Shadow => vec![Act::Write(BREAKPOINT_OFFSET, bytes.to_vec())],
        // It is the breakpoint itself that is written over.
        _ => vec![Act::Write(BREAKPOINT_OFFSET, bytes.to_vec()), Act::Wait],
    };
    // The breakpoint's NOP becomes a jump, over five bytes.
    let jump = patch::jump();
    let mut acts = VecDeque::from([Act::Call(0), Act::Write(CODE, code(1))]);
    acts.extend(under(&jump));
    acts.extend([Act::Call(1), Act::Write(CODE, code(2)), Act::Wait, Act::Call(2)]);
    // And back again, as it was.
    acts.extend(under(&TARGET[BREAKPOINT_OFFSET..][..jump.len()]));
    acts.extend([Act::Write(CODE, TARGET[CODE..][..code(0).len()].to_vec()), Act::Call(2), Act::Wait]);
    let calls = acts.iter().filter(|act| matches!(act, Act::Call(_))).count() as u64 * u64::from(CALLS);

    let (mut since, mut wait, mut expected, mut wrong) = (Instant::now(), false, 0, Vec::new());
    let mut idle = || {
        if !guest.is_done() {
            return (since.elapsed() < STUCK).then_some(PATIENCE);
        }
        if wait && since.elapsed() < 4 * core::VERIFY_EVERY {
            return Some(PATIENCE);
        }
        let mark = patch.mark();
        if mark != expected {
            wrong.push(format!("{mark}, not {expected}"));
            expected = mark;
        }
        (since, wait) = (Instant::now(), false);
        match acts.pop_front()? {
            Act::Write(at, bytes) => patch.write(at, &bytes),
            Act::Wait => wait = true,
            Act::Call(number) => {
                expected = number;
                guest.request(Workload::ExecBp, CALLS);
            }
        }
        Some(Duration::ZERO)
    };
    let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
    let outcome = core::run(domain, &mut monitor, mechanism, &[guest.breakpoint()], &mut idle)?;
    drop(monitor);
    ensure!(guest.is_done(), "the guest does not come back");
    // Whatever came of it, the page is to be as it was.
    drop(patch);
    ensure!(wrong.is_empty(), "the guest executes other code than memory has: it has left {}", wrong.join(", "));
    ensure!(outcome.hits() == calls, "{calls} executions, {} hits", outcome.hits());
    // In place, what is written beside the breakpoint changes nothing of ours.
    let least = if mechanism.placement() == Placement::Shadow { 3 } else { 2 };
    ensure!(outcome.counters.resynced >= least, "the page was taken over {} times", outcome.counters.resynced);
    guest.check(domain)
}

/// Has DRAKVUF watch the page of the breakpoint, too, while the guest reads, writes and executes it.
fn watched(
    domain: &Domain,
    guest: &Guest,
    program: Program<'_>,
    backend: elsewhere::Backend,
) -> Result<elsewhere::Counts> {
    const WORK: [(Workload, u32); 4] =
        [(Workload::ReadBp, 20), (Workload::ExecBp, 10), (Workload::WriteByte, 10), (Workload::ExecBp, 10)];
    guest.wait_until_done(STUCK)?;
    let (mut work, mut since) = (WORK.into_iter(), Instant::now());
    let counts = elsewhere::run(program, domain.id(), &[guest.breakpoint()], backend, true, &mut || {
        if !guest.is_done() {
            return (since.elapsed() < STUCK).then_some(PATIENCE);
        }
        since = Instant::now();
        let (workload, calls) = work.next()?;
        guest.request(workload, calls);
        Some(PATIENCE)
    })?;
    guest.wait_until_done(STUCK)?;
    guest.check_all_but_rewritten(domain)?;
    let calls: u64 =
        WORK.iter().filter(|(workload, _)| *workload == Workload::ExecBp).map(|(_, calls)| u64::from(*calls)).sum();
    ensure!(counts.hits == [calls], "{:?} hits were reported, of {calls}", counts.hits);
    ensure!(counts.before > 0 && counts.after > 0, "no access was reported: {counts:?}");
    Ok(counts)
}

/// Attaches and detaches, under one mechanism after another, while the guest is in the middle of a storm. Looks each time
/// whether anything is left. Returns how many times there was.
///
/// # Errors
/// If the domain does not run the guest, or its storm does not end.
pub(crate) fn attach(domain: &mut Domain, times: u32) -> Result<usize> {
    /// Calls of the storms the guest is kept busy with.
    const CALLS: u32 = 40;
    /// After so many hits the monitor leaves, at most: when a virtual CPU has been answered that has not gone on yet.
    const HITS: u32 = 31;
    let guest = Guest::find(domain)?;
    // The first time takes the page of the ring out of the domain.
    Monitor::attach(domain).context("cannot monitor the domain")?;
    let before = Traces::of(domain)?;
    let quiet = speed(&guest)?;
    let (begin, mut storms) = (guest.storm(), 0);
    let mechanisms: Vec<_> = Mechanism::all().collect();
    let mut failed = 0;
    for time in 0..times as usize {
        let mechanism = mechanisms[time % mechanisms.len()];
        let hits = Cell::new(0);
        let mut idle = || {
            if guest.is_done() {
                guest.request(Workload::Storm, CALLS);
                storms += 1;
            }
            (hits.get() <= time as u32 % HITS).then_some(PATIENCE)
        };
        let mut on_hit = |_, _: &dyn Fn() -> Result<Outcome>| hits.set(hits.get() + 1);
        let served = attach_once(domain, &guest, mechanism, &mut on_hit, &mut idle);
        let after = Traces::of(domain);
        let result = served.and(after).and_then(|after| {
            ensure!(after == before, "{after:?} is left, of {before:?}");
            guest.check_all_but_rewritten(domain)
        });
        if let Err(error) = result {
            failed += 1;
            println!("FAILED: attach and detach number {time}, under {mechanism}: {error:#}");
        }
    }
    guest.wait_until_done(STUCK)?;
    guest.check(domain)?;
    let storm = guest.storm();
    // What a virtual CPU was answered may have been done too late: then it has gone back to where it was before.
    let executed = storm.executions.iter().zip(begin.executions).map(|(after, before)| after - before);
    check_executions(&guest, executed, storms, u64::from(CALLS))?;
    ensure!(
        storm.hash_mismatches + storm.rewrite_mismatches == 0,
        "the guest saw something that is not its own: {storm:?}"
    );
    // A virtual CPU that is still stepped takes an exit at every instruction.
    let after = speed(&guest)?;
    ensure!(after <= quiet + quiet / 4, "the guest's own work takes {after} ticks, and {quiet} before");
    if failed == 0 {
        println!("ok: attached and detached {times} times, {} hits lost nothing", storm.executions.iter().sum::<u64>());
    }
    Ok(failed)
}

fn attach_once(
    domain: &mut Domain,
    guest: &Guest,
    mechanism: Mechanism,
    on_hit: &mut OnHit<'_>,
    idle: &mut Idle<'_>,
) -> Result<()> {
    let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
    core::watch(domain, &mut monitor, mechanism, &guest.sites(), on_hit, idle)?;
    Ok(())
}

/// Ticks of running through the page under test, without a monitor.
fn speed(guest: &Guest) -> Result<u64> {
    // In the emulator, work takes fewer ticks while the other CPU is busy, too. So most of it is to be done when dom0, which has
    // asked for it, has fallen asleep.
    const SAMPLES: u32 = 201;
    guest.wait_until_done(STUCK)?;
    guest.request(Workload::ExecPage, SAMPLES);
    guest.wait_until_done(STUCK)?;
    let mut ticks = Vec::new();
    guest.samples(SAMPLES, &mut ticks);
    ticks.sort_unstable();
    Ok(ticks[ticks.len() / 2])
}

/// Waits until the guest has ended its storm, and checks that it is as if there had never been a monitor: every storm since
/// it began was of `calls` calls.
///
/// # Errors
/// If it is not.
pub(crate) fn settle(domain: &mut Domain, calls: u32) -> Result<()> {
    let guest = Guest::find_busy(domain)?;
    guest.wait_until_done(STUCK)?;
    guest.check(domain)?;
    let storms = u64::from(guest.requests());
    let storm = guest.storm();
    check_executions(&guest, storm.executions.iter().copied(), storms, u64::from(calls))?;
    ensure!(storm.hash_mismatches == 0, "{} hashes of the page were wrong", storm.hash_mismatches);
    ensure!(storm.rewrite_mismatches == 0, "{} writes were lost", storm.rewrite_mismatches);
    Traces::of(domain)?;
    println!("The guest has ended {storms} storms as if nobody had watched.");
    Ok(())
}

/// Checks that each site was executed as often as so many storms of so many calls do.
fn check_executions(guest: &Guest, executed: impl Iterator<Item = u64>, storms: u64, calls: u64) -> Result<()> {
    let hammering = u64::from(if guest.vcpus() > 2 { guest.vcpus() - 1 } else { guest.vcpus() });
    for (site, executions) in (0..).zip(executed) {
        // Calls take the sites in turn, and one to a site runs through those before it in the list.
        let of_one = (0..calls).filter(|call| call % SITES.len() as u64 >= site).count() as u64;
        let expected = storms * hammering * of_one;
        ensure!(executions == expected, "site {site} was executed {executions} times, not {expected}");
    }
    Ok(())
}

/// The same as [`one`] for a monitor that is another process: what it has left can be seen only in the domain.
fn elsewhere(domain: &mut Domain, guest: &Guest, subject: Subject<'_>) -> Result<()> {
    let before = Traces::of(domain)?;
    one(domain, guest, subject)?;
    let after = Traces::of(domain)?;
    // Not the limit: DRAKVUF puts back what it finds when LibVMI has raised it already.
    ensure!(after.pages == before.pages, "{} pages are left", after.pages.abs_diff(before.pages));
    Ok(())
}

fn one(domain: &mut Domain, guest: &Guest, subject: Subject<'_>) -> Result<()> {
    let before = guest.counts();
    let mut program = VecDeque::from(PROGRAM);
    let start = Instant::now();
    let mut stuck = false;
    let mut idle = || {
        if !guest.is_done() {
            stuck = start.elapsed() > STUCK;
            return (!stuck).then_some(PATIENCE);
        }
        let (workload, count) = program.pop_front()?;
        guest.request(workload, count);
        Some(PATIENCE)
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
