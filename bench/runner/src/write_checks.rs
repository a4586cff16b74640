//! Checks of interpreted writes to pages that are no plain RAM, and of an INT3 that Xen does not deliver.

use std::cell::Cell;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyperbp::{Gfn, Mechanism, PAGE_SIZE, VcpuId};
use hyperbp_bench_abi::{BREAKPOINT_OFFSET, Workload};

use crate::check::STUCK;
use crate::core::{self, Outcome};
use crate::guest::Guest;
use crate::patch::{self, CODE, Patch};
use crate::ring::{Monitor, PATIENCE};
use crate::xen::{Domain, Page};

/// A page that the benchmark guest does not use: at 16 MiB.
const DATA: Gfn = Gfn((16 << 20) / PAGE_SIZE as u64);
/// What the guest writes there, and what is there before.
const WRITTEN: u32 = 0x5eed_cafe;
const BEFORE: u32 = 0;
/// Executions between two looks.
const CALLS: u32 = 10;
/// After this time, what was known of a page's type is asked again, and what was written is reported.
const AGE: Duration = Duration::from_millis(400);

/// Looks at [`DATA`], or changes the domain.
type Step<'a> = dyn FnMut(&Page) -> Result<()> + 'a;

/// What happens in turn, while a breakpoint is set on a write.
enum Act<'a> {
    /// The guest executes it so often.
    Call,
    Wait,
    Do(Box<Step<'a>>),
}

/// Sets a breakpoint on an instruction that writes to [`DATA`], and does all that in turn.
fn interpreted(domain: &mut Domain, acts: Vec<Act<'_>>) -> Result<Outcome> {
    let guest = Guest::find(domain)?;
    guest.wait_until_done(STUCK)?;
    let data = domain.map_page(DATA)?;
    let patch = Patch::new(domain, &guest)?;
    patch.write_code(&patch::store((DATA.at(0).0 as u32).to_le_bytes(), WRITTEN));
    data.write(0, &BEFORE.to_le_bytes());
    let at = guest.breakpoint().gfn().at(CODE as u16);
    let calls = acts.iter().filter(|act| matches!(act, Act::Call)).count() as u64 * u64::from(CALLS);

    let mut acts = VecDeque::from(acts);
    let (mut since, mut wait, mut done) = (Instant::now(), Duration::ZERO, Ok(()));
    let mut idle = || {
        if !guest.is_done() {
            return (since.elapsed() < STUCK).then_some(PATIENCE);
        }
        if since.elapsed() < wait {
            return Some(PATIENCE);
        }
        (since, wait) = (Instant::now(), Duration::ZERO);
        match acts.pop_front()? {
            Act::Call => guest.request(Workload::ExecBp, CALLS),
            Act::Wait => wait = AGE,
            Act::Do(mut act) => done = act(&data),
        }
        done.is_ok().then_some(Duration::ZERO)
    };
    let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
    let mechanism: Mechanism = "interpret".parse()?;
    let outcome = core::run(domain, &mut monitor, mechanism, &[at], &mut idle)?;
    drop(monitor);
    ensure!(guest.is_done(), "the guest does not come back");
    drop(patch);
    done?;
    ensure!(outcome.hits() == calls, "{} hits, of {calls}", outcome.hits());
    ensure!(outcome.counters.failures == 0, "{} failures", outcome.counters.failures);
    guest.check(domain)?;
    Ok(outcome)
}

/// What is in [`DATA`] must be this; then it is what it was before.
fn expect(data: &Page, expected: u32) -> Result<()> {
    let mut bytes = [0; 4];
    data.read(0, &mut bytes);
    let found = u32::from_le_bytes(bytes);
    ensure!(found == expected, "memory has {found:#x}, not {expected:#x}");
    data.write(0, &BEFORE.to_le_bytes());
    Ok(())
}

/// Sees that the interpreter writes nothing to a page that is read-only for the guest.
///
/// # Errors
/// If it does, or does not write where it may.
pub(crate) fn rom(domain: &mut Domain, other: &Domain) -> Result<()> {
    let outcome = interpreted(
        domain,
        vec![
            Act::Call,
            Act::Do(Box::new(|data| expect(data, WRITTEN))),
            Act::Do(Box::new(|_| Ok(other.set_read_only(DATA, true)?))),
            Act::Wait,
            Act::Call,
            Act::Do(Box::new(|data| {
                other.set_read_only(DATA, false)?;
                expect(data, BEFORE)
            })),
            Act::Wait,
            Act::Call,
            Act::Do(Box::new(|data| expect(data, WRITTEN))),
        ],
    );
    // Whatever came of it.
    other.set_read_only(DATA, false)?;
    let outcome = outcome?;
    let interpreted = outcome.figures[0].served.interpret;
    ensure!(
        interpreted == 2 * u64::from(CALLS),
        "of {} writes, {CALLS} of them to a ROM, {interpreted} were interpreted",
        outcome.hits()
    );
    println!("ok: a write to a ROM is stepped, and dropped");
    Ok(())
}

/// Sees that what the interpreter writes is in Xen's record of written pages, if that is kept.
///
/// # Errors
/// If it is not.
pub(crate) fn log_dirty(domain: &mut Domain, other: &Domain) -> Result<()> {
    let dirty = |expected: bool, when: &str| {
        ensure!(
            other.is_dirty(DATA, false)? == expected,
            "the page is {}dirty {when}",
            if expected { "not " } else { "" }
        );
        Ok(())
    };
    let outcome = interpreted(
        domain,
        vec![
            Act::Call,
            Act::Do(Box::new(|data| expect(data, WRITTEN))),
            // It counts on nobody to write past it, and nobody has told the monitor yet.
            Act::Do(Box::new(|_| Ok(other.set_log_dirty(true)?))),
            Act::Call,
            Act::Do(Box::new(|data| expect(data, WRITTEN))),
            Act::Wait,
            Act::Do(Box::new(|_| {
                dirty(true, "that was written to right after log-dirty mode was switched on")?;
                other.is_dirty(DATA, true)?;
                dirty(false, "that nobody has written to since")
            })),
            Act::Wait,
            Act::Call,
            Act::Do(Box::new(|data| {
                expect(data, WRITTEN)?;
                dirty(true, "that was written to in log-dirty mode")
            })),
        ],
    );
    // Whatever came of it.
    other.set_log_dirty(false)?;
    let served = outcome?.figures[0].served;
    ensure!(served.interpret < 3 * u64::from(CALLS), "all writes were interpreted");
    println!("ok: a write in log-dirty mode is in Xen's record of it");
    Ok(())
}

/// Sees that a virtual CPU goes on whose own INT3 Xen does not deliver.
///
/// # Errors
/// If it does not, or is not given its INT3 once.
pub(crate) fn refused_injection(domain: &mut Domain, other: &mut Domain) -> Result<()> {
    const INT3: u8 = 0xcc;
    let guest = Guest::find(domain)?;
    guest.wait_until_done(STUCK)?;
    let before = guest.counts();
    let patch = Patch::new(domain, &guest)?;
    patch.write(BREAKPOINT_OFFSET, &[INT3]);
    let (start, told, refused) = (Instant::now(), Cell::new(0_u32), Cell::new(0_u64));
    let mut on_hit = |_: usize, _: &dyn Fn() -> Result<Outcome>| {
        // Every other time, somebody else has had an exception delivered. Xen takes one at a time. Not at first: the monitor gives
        // a few answers without an INT3 while Xen is late.
        if told.get() >= CALLS && told.get() % 2 == 0 && other.inject_int3(VcpuId(0), 1) {
            refused.set(refused.get() + 1);
        }
        told.set(told.get() + 1);
    };
    let mut asked = false;
    let mut idle = || {
        if !std::mem::replace(&mut asked, true) {
            guest.request(Workload::ExecBp, 2 * CALLS);
        }
        (!guest.is_done() && start.elapsed() < STUCK).then_some(PATIENCE)
    };
    let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
    let outcome = core::watch(domain, &mut monitor, Mechanism::AUTO, &[guest.breakpoint()], &mut on_hit, &mut idle)?;
    drop(monitor);
    ensure!(guest.is_done(), "the guest does not come back: its virtual CPU stays paused");
    drop(patch);
    let (int3s, refused) = (guest.counts().own_int3s - before.own_int3s, refused.get());
    ensure!(refused >= u64::from(CALLS / 2), "Xen has taken {refused} of another's INT3s");
    ensure!(outcome.counters.failures == refused, "{} were refused, not {refused}", outcome.counters.failures);
    // The first ones may be hit again: see docs/mechanisms.md.
    ensure!(outcome.hits() >= u64::from(2 * CALLS), "{} hits", outcome.hits());
    ensure!(int3s == u64::from(2 * CALLS), "{int3s} of {} INT3s have come to the guest", 2 * CALLS);
    println!("ok: {refused} INT3s that Xen refused to deliver, and the guest goes on");
    guest.check(domain)
}
