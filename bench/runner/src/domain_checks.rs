//! Checks of what a monitor does to a domain besides breakpoints: to memory, views and limits that are not its own.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyperbp::{Gfn, Hypervisor, Mechanism, PAGE_SIZE, Rights, ViewId};
use hyperbp_bench_abi::Workload;

use crate::core::{self, Outcome};
use crate::guest::Guest;
use crate::recover::Traces;
use crate::ring::{Monitor, PATIENCE};
use crate::xen::Domain;

/// The guest is given up after this.
const STUCK: Duration = Duration::from_secs(60);
/// Where pages begin that the benchmark guest does not use: 16 MiB.
const UNUSED: u64 = (16 << 20) / PAGE_SIZE as u64;
/// Hits of a round.
const HITS: u32 = 200;

/// What one round of hits has come to.
struct Round {
    outcome: Outcome,
    /// How long setting all breakpoints has taken.
    attached: Duration,
    /// The median of what a hit has taken of the guest, in ticks.
    ticks: u64,
}

/// Sets breakpoints on the page under test, and in so many others, serves some hits, and leaves. `meanwhile` is done
/// when the breakpoints are set.
fn round(domain: &mut Domain, pages: u64, stride: u64, meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<Round> {
    let guest = Guest::find(domain)?;
    let mut at = vec![guest.breakpoint()];
    // A page of zeros has instructions, too.
    at.extend((0..pages).map(|page| Gfn(UNUSED + page * stride).at(8)));
    let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
    let (start, mut attached, mut done, mut stuck) = (Instant::now(), None, Ok(()), false);
    let mut idle = || {
        if attached.is_none() {
            attached = Some(start.elapsed());
            done = meanwhile();
            guest.request(Workload::ExecBp, HITS);
        }
        stuck = start.elapsed() > STUCK + attached.unwrap_or_default();
        (!stuck && done.is_ok() && !guest.is_done()).then_some(PATIENCE)
    };
    // As a tracer, which wants to know which breakpoint it was.
    let mut told = 0;
    let mut on_hit = |index: usize, _: &dyn Fn() -> Result<Outcome>| told += u32::from(index == 0);
    let outcome = core::watch(domain, &mut monitor, Mechanism::AUTO, &at, &mut on_hit, &mut idle)?;
    done?;
    ensure!(!stuck, "the guest does not come back");
    ensure!(outcome.hits() == u64::from(HITS), "{} hits, of {HITS}", outcome.hits());
    ensure!(told == HITS, "{told} hits were told, of {HITS}");
    ensure!(outcome.counters.failures == 0, "{} failures", outcome.counters.failures);
    guest.check(domain)?;
    let mut ticks = Vec::new();
    guest.samples(HITS, &mut ticks);
    ticks.sort_unstable();
    Ok(Round { outcome, attached: attached.unwrap_or_default(), ticks: ticks[ticks.len() / 2] })
}

/// Sees that frames of the guest's keep what is in them, as long as the monitor is there and when it has left, and
/// that it leaves nothing.
///
/// # Errors
/// If not.
pub(crate) fn memory(domain: &mut Domain, ram: &[Gfn]) -> Result<()> {
    // The first time takes the page of the ring out of the domain.
    Monitor::attach(domain).context("cannot monitor the domain")?;
    let mut other = Domain::connect(&domain.id().to_string())?;
    let end = ram.iter().max().map_or(0, |gfn| gfn.0 + 1);
    let limit = other.memory()?.1.max(end * PAGE_SIZE as u64 / 1024);
    other.set_memory_limit(limit)?;
    for gfn in ram {
        if other.map_page(*gfn).is_err() {
            other.add_ram(*gfn).with_context(|| format!("the guest can get no RAM at {gfn}"))?;
        }
        let page = other.map_page(*gfn).with_context(|| format!("{gfn} is no RAM of the guest's"))?;
        page.write(0, &pattern(*gfn));
    }
    let before = Traces::of(domain)?;
    let look = |when: &str| {
        ram.iter().try_for_each(|gfn| {
            // A new mapping: an old one would show a page that the guest has lost.
            let mut seen = [0; PAGE_SIZE];
            other.map_page(*gfn).with_context(|| format!("{gfn} is gone {when}"))?.read(0, &mut seen);
            ensure!(seen == pattern(*gfn), "{gfn} has {:02x?}... {when}", &seen[..8]);
            Ok(())
        })
    };
    look("before the trace")?;
    let first = domain.first_shadow_gfn()?;
    round(domain, 20, 1, &mut || look("during the trace"))?;
    look("after the trace")?;
    let after = Traces::of(domain)?;
    ensure!(after == before, "{after:?} is left, of {before:?}");
    println!("ok: no RAM is lost, shadow pages begin at {first}");
    Ok(())
}

/// Bytes that tell one frame from another.
fn pattern(gfn: Gfn) -> [u8; PAGE_SIZE] {
    std::array::from_fn(|n| (n as u64 ^ gfn.0.wrapping_mul(0x9e37_79b9) >> (n % 24)) as u8)
}

/// Sees that altp2m and views of another tool are as they were, and that having no view left is told as such.
///
/// # Errors
/// If not.
pub(crate) fn views(domain: &mut Domain, other: &mut Domain) -> Result<()> {
    round(domain, 2, 1, &mut || Ok(()))?;
    ensure!(!other.is_altp2m_on()?, "altp2m was off, and is on");
    println!("ok: altp2m that was off is off again");
    // Without a ring no right can be set, and other tools have none of their own then.
    let view = other.create_view()?;
    other.switch_view(view)?;
    round(domain, 2, 1, &mut || Ok(()))?;
    ensure!(other.is_altp2m_on()?, "altp2m was on, and is off");
    let monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
    other.set_rights(view, Gfn(UNUSED), Rights::ReadExecute).context("the other tool's view is gone")?;
    ensure!(other.first_view()? == view, "virtual CPUs are not in the other tool's view any more");
    other.set_rights(view, Gfn(UNUSED), Rights::All)?;
    drop(monitor);
    println!("ok: altp2m that was on is on, with the other tool's view, and virtual CPUs in it");
    other.switch_view(ViewId::HOST)?;
    other.switch_to_host_view()?;
    let mut taken = vec![view];
    while let Ok(view) = other.create_view() {
        taken.push(view);
    }
    let refused = round(domain, 2, 1, &mut || Ok(())).err().map(|error| format!("{error:#}"));
    for view in taken {
        other.drop_view(view)?;
    }
    match refused {
        Some(error) if error.contains("no view left") && error.contains("another tool's") => println!("ok: {error}"),
        Some(error) => bail!("having no view left is told as: {error}"),
        None => bail!("there was a view left where there should have been none"),
    }
    round(domain, 2, 1, &mut || Ok(()))?;
    ensure!(!other.is_altp2m_on()?, "altp2m was off, and is on");
    Ok(())
}

/// Sees that a memory limit that somebody else sets is left alone, and that one of ours is not.
///
/// # Errors
/// If not.
pub(crate) fn limit(domain: &mut Domain, other: &Domain) -> Result<()> {
    let (_, found) = other.memory()?;
    let mut during = 0;
    round(domain, 2, 1, &mut || {
        during = other.memory()?.1;
        Ok(())
    })?;
    ensure!(found < during && during <= found + 1024, "{during} KiB with breakpoints, and {found} without");
    let (_, now) = other.memory()?;
    ensure!(now == found, "the limit was {found} KiB, and is {now}");
    let theirs = found + 8192;
    round(domain, 2, 1, &mut || Ok(other.set_memory_limit(theirs)?))?;
    let (_, now) = other.memory()?;
    other.set_memory_limit(found)?;
    ensure!(now == theirs, "somebody has set the limit to {theirs} KiB, and it is {now}");
    println!("ok: the memory limit is put back, and left alone where it is another's");
    Ok(())
}

/// Sees that neither a breakpoint more nor a hit costs more where there are many.
///
/// # Errors
/// If one does.
pub(crate) fn pages(domain: &mut Domain, pages: u64, stride: u64) -> Result<()> {
    let few = pages / 4;
    // The first one has page tables to be made and pages to be mapped.
    round(domain, few, stride, &mut || Ok(()))?;
    let (less, more) = (round(domain, few, stride, &mut || Ok(()))?, round(domain, pages, stride, &mut || Ok(()))?);
    let per_page = |round: &Round, pages: u64| round.attached.as_nanos() as u64 / pages;
    let (attached, attached_more) = (per_page(&less, few), per_page(&more, pages));
    let handling = |round: &Round| round.outcome.handling.summary().median;
    let said = format!(
        "with {few} and {pages} pages, setting a breakpoint takes {attached} and {attached_more} ns, a hit {} and {} ticks, \
         {} and {} of them in the monitor",
        less.ticks,
        more.ticks,
        handling(&less),
        handling(&more)
    );
    ensure!(attached_more <= attached + attached / 4, "{said}");
    ensure!(more.ticks <= less.ticks + less.ticks / 20, "{said}");
    println!("ok: {said}");
    Ok(())
}

/// Sets breakpoints, and takes them away again.
///
/// # Errors
/// If they cannot be set: where there is no memory, that is to be told.
pub(crate) fn insert(domain: &mut Domain, pages: u64, stride: u64) -> Result<()> {
    let before = Traces::of(domain)?;
    let set = round(domain, pages, stride, &mut || Ok(()));
    let after = Traces::of(domain).and_then(|after| {
        ensure!(after.limit == before.limit, "{after:?} is left, of {before:?}");
        Ok(())
    });
    if let (Err(set), Err(after)) = (&set, &after) {
        bail!("{set:#}, and then {after:#}");
    }
    after?;
    set.map(|_| println!("ok: set breakpoints in {pages} pages"))
}
