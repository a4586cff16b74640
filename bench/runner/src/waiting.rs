//! What waiting costs: the same breakpoint, with hits that are more and less frequent, by monitors that wait in different ways.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hyperbp::{Mechanism, Waits};
use hyperbp_bench_abi::Workload;
use hyperbp_event_channel::Ways;
use hyperbp_report::{Load, Manner, Waited};

use crate::core;
use crate::guest::Guest;
use crate::ring::{Monitor, PATIENCE};
use crate::xen::{CpuTime, Domain};

/// Between two hits of [`Load::Rare`].
const RARE: Duration = Duration::from_secs(1);
/// Hits of [`Load::Busy`] that are asked for at once.
const BATCH: u32 = 1_000;
/// What is asked for takes less, even in the emulator.
const STUCK: Duration = Duration::from_secs(60);
/// dom0, as Xen numbers it.
const DOM0: u32 = 0;

const MANNERS: [Manner; 3] = [Manner::None, Manner::Sleep, Manner::Adaptive];
const LOADS: [Load; 3] = [Load::Idle, Load::Rare, Load::Busy];

/// Measures every manner with every load, for so long each.
///
/// # Errors
/// If the guest or Xen does not play along.
pub(crate) fn all(
    domain: &mut Domain,
    time: Duration,
    progress: &mut dyn FnMut(u64, u64, &str),
) -> Result<Vec<Waited>> {
    let guest = Guest::find(domain)?;
    let cells = || LOADS.into_iter().flat_map(|load| MANNERS.map(|manner| (load, manner)));
    // Nobody is told of hits that nobody waits for.
    let cells: Vec<_> = cells().filter(|(load, manner)| *manner != Manner::None || *load == Load::Idle).collect();
    let total = cells.len() as u64;
    let mut rows = Vec::new();
    for (done, (load, manner)) in (0..).zip(cells) {
        progress(done, total, &format!("{load:?}, {manner:?}").to_lowercase());
        rows.push(one(domain, &guest, manner, load, time)?);
    }
    progress(total, total, "done");
    Ok(rows)
}

fn one(domain: &mut Domain, guest: &Guest, manner: Manner, load: Load, time: Duration) -> Result<Waited> {
    guest.wait_until_done(STUCK)?;
    let clock = Clock { dom0: domain.cpu_time_of(DOM0), guest: domain.cpu_time_of(domain.id()) };
    let (begin, end, hits, waits);
    if manner == Manner::None {
        begin = clock.now()?;
        std::thread::sleep(time);
        end = clock.now()?;
        (hits, waits) = (0, Waits::default());
    } else {
        domain.wait_by(if manner == Manner::Sleep { Ways::SLEEP } else { Ways::default() });
        let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
        let mut span = Span { clock: &clock, time, load, guest, begin: None, end: None, asked: None };
        let outcome = core::run(domain, &mut monitor, Mechanism::AUTO, &[guest.breakpoint()], &mut || span.goes_on());
        (hits, waits) = (outcome?.hits(), monitor.waits());
        (begin, end) = span.ended()?;
    }
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    Ok(Waited {
        manner,
        load,
        elapsed_ns: nanoseconds(end.at - begin.at),
        dom0_ns: nanoseconds(end.dom0.saturating_sub(begin.dom0)),
        guest_ns: nanoseconds(end.guest.saturating_sub(begin.guest)),
        hits,
        watched: waits.watched,
        watched_in_vain: waits.watched_in_vain,
        halted: waits.halted,
        halted_in_vain: waits.halted_in_vain,
        slept: waits.slept,
    })
}

/// Tells the time, and who has had the CPUs.
struct Clock {
    dom0: CpuTime,
    guest: CpuTime,
}

impl Clock {
    fn now(&self) -> Result<Moment> {
        Ok(Moment { at: Instant::now(), dom0: self.dom0.get()?, guest: self.guest.get()? })
    }
}

struct Moment {
    at: Instant,
    dom0: Duration,
    guest: Duration,
}

/// The time while the breakpoint is set.
struct Span<'a> {
    clock: &'a Clock,
    time: Duration,
    load: Load,
    guest: &'a Guest,
    begin: Option<Moment>,
    end: Option<Result<Moment>>,
    /// When the guest was last asked for hits.
    asked: Option<Instant>,
}

impl Span<'_> {
    /// Has the guest do what it is to do by now, until the time is up. How long that may be waited with.
    fn goes_on(&mut self) -> Option<Duration> {
        if self.begin.is_none() {
            match self.clock.now() {
                Ok(moment) => self.begin = Some(moment),
                Err(error) => {
                    self.end = Some(Err(error));
                    return None;
                }
            }
        }
        let now = Instant::now();
        let is_done = self.guest.is_done();
        let elapsed = self.begin.as_ref().map_or(Duration::ZERO, |begin| now - begin.at);
        let left = self.time.saturating_sub(elapsed);
        let asked = self.asked.map_or(Duration::MAX, |asked| now - asked);
        if !is_done {
            // After the last hit it is soon, and no event tells.
            let patience = if self.load == Load::Rare { RARE.min(left).max(PATIENCE) } else { PATIENCE };
            return (asked < STUCK).then_some(patience);
        }
        if left.is_zero() {
            self.end = Some(self.clock.now());
            return None;
        }
        match self.load {
            Load::Idle => return Some(left),
            Load::Rare if asked < RARE => return Some((RARE - asked).min(left)),
            Load::Rare => self.ask(now, 1),
            Load::Busy => self.ask(now, BATCH),
        }
        Some(PATIENCE)
    }

    fn ask(&mut self, now: Instant, hits: u32) {
        self.asked = Some(now);
        self.guest.request(Workload::ExecBp, hits);
    }

    fn ended(self) -> Result<(Moment, Moment)> {
        match (self.begin, self.end) {
            (_, Some(Err(error))) => Err(error),
            (Some(begin), Some(Ok(end))) => Ok((begin, end)),
            _ => bail!("the guest does not come back"),
        }
    }
}
