//! The backend `hyperbp`: the core, driven by the ring.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyperbp::{
    BreakpointId, Counters, Engine, Figures, Gpa, HandlingTime, Hit, Hypervisor as _, Mechanism, Reason, Reply, Verdict,
};
use rustc_hash::FxHashMap;

use crate::ring::{self, Monitor, PATIENCE};
use crate::xen::{Domain, Error, State};

/// What came of serving breakpoints.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// Of each breakpoint, in the order they were asked for.
    pub(crate) figures: Vec<Figures>,
    pub(crate) counters: Counters,
    /// How long a hit took, in ticks of dom0's time-stamp counter.
    pub(crate) handling: HandlingTime,
    /// What the domain did when it was left.
    pub(crate) state: State,
}

impl Outcome {
    /// What came of it until now.
    fn of(engine: &Engine, breakpoints: &[BreakpointId]) -> Result<Self> {
        let figures = breakpoints.iter().map(|id| engine.figures(*id)).collect::<Result<_, _>>()?;
        let (counters, handling) = (engine.counters(), engine.handling_time());
        Ok(Self { figures, counters, handling, state: State::Running })
    }

    /// What of it has come since `begin`, an earlier outcome of the same breakpoints.
    pub(crate) fn since(mut self, begin: &Self) -> Self {
        self.each_count(begin, |end, begin| *end -= begin);
        self.handling = self.handling.since(&begin.handling);
        self
    }

    /// What has come of the same breakpoints, with what had come of them `before` they were set again.
    pub(crate) fn after(mut self, before: &Self) -> Self {
        self.each_count(before, |now, before| *now += before);
        self.handling = self.handling.plus(&before.handling);
        self
    }

    /// Does something with each count, and that of another outcome of the same breakpoints.
    fn each_count(&mut self, other: &Self, change: impl Fn(&mut u64, u64)) {
        for (one, other) in self.figures.iter_mut().zip(&other.figures) {
            change(&mut one.hits, other.hits);
            change(&mut one.fallbacks, other.fallbacks);
            change(&mut one.rewritten, other.rewritten);
            let (one, other) = (&mut one.served, other.served);
            change(&mut one.repair, other.repair);
            change(&mut one.view_step, other.view_step);
            change(&mut one.view_fast_step, other.view_fast_step);
            change(&mut one.emulate, other.emulate);
            change(&mut one.interpret, other.interpret);
        }
        let (one, other) = (&mut self.counters, other.counters);
        change(&mut one.hits, other.hits);
        change(&mut one.reads, other.reads);
        change(&mut one.writes, other.writes);
        change(&mut one.held, other.held);
        change(&mut one.discarded, other.discarded);
        change(&mut one.rearmed, other.rearmed);
        change(&mut one.resynced, other.resynced);
        change(&mut one.reinjected, other.reinjected);
        change(&mut one.unexplained, other.unexplained);
        change(&mut one.failures, other.failures);
    }

    /// Hits of all breakpoints.
    pub(crate) fn hits(&self) -> u64 {
        self.figures.iter().map(|figures| figures.hits).sum()
    }
}

/// Is told which of the addresses was hit, and can ask what came of all until now.
pub(crate) type OnHit<'a> = dyn FnMut(usize, &dyn Fn() -> Result<Outcome>) + 'a;

/// Looks after other things, after each batch of events, and where there are none after the time it has returned before. None when
/// there is nothing more to wait for.
pub(crate) type Idle<'a> = dyn FnMut() -> Option<Duration> + 'a;

/// Sets a breakpoint at each address, serves them as long as `idle` says, and removes them.
///
/// # Errors
/// If a breakpoint cannot be set, or Xen refuses something; the domain is left as far as it lets us. If somebody has paused it.
pub(crate) fn run(
    domain: &mut Domain,
    monitor: &mut Monitor,
    mechanism: Mechanism,
    at: &[Gpa],
    idle: &mut Idle<'_>,
) -> Result<Outcome> {
    let outcome = serve_all(domain, monitor, mechanism, at, None, idle)?;
    ensure!(outcome.state != State::Paused, "somebody has paused the domain: `xl unpause` lets it run");
    Ok(outcome)
}

/// The same, and tells `on_hit` of each hit, before its instruction runs. If the domain does not go on when it is left, it is
/// paused once more, until the caller, who drops the monitor before, [lets it go on](Domain::let_go_on).
///
/// # Errors
/// Those of [`run`].
pub(crate) fn watch(
    domain: &mut Domain,
    monitor: &mut Monitor,
    mechanism: Mechanism,
    at: &[Gpa],
    on_hit: &mut OnHit<'_>,
    idle: &mut Idle<'_>,
) -> Result<Outcome> {
    serve_all(domain, monitor, mechanism, at, Some(on_hit), idle)
}

fn serve_all(
    domain: &mut Domain,
    monitor: &mut Monitor,
    mechanism: Mechanism,
    at: &[Gpa],
    mut on_hit: Option<&mut OnHit<'_>>,
    idle: &mut Idle<'_>,
) -> Result<Outcome> {
    let mut engine = Engine::new(domain);
    let set: Result<Vec<BreakpointId>> = at
        .iter()
        .map(|gpa| {
            engine.insert(domain, *gpa, mechanism).with_context(|| format!("cannot set the breakpoint at {gpa}"))
        })
        .collect();
    let served = set.and_then(|breakpoints| {
        let indices: FxHashMap<BreakpointId, usize> = breakpoints.iter().copied().zip(0..).collect();
        let mut seen = |engine: &Engine, hit: &Hit<'_>| {
            if let Some(on_hit) = &mut on_hit
                && let Some(index) = indices.get(&hit.breakpoint)
            {
                on_hit(*index, &|| Outcome::of(engine, &breakpoints));
            }
        };
        let mut refused = 0;
        let mut verified = Instant::now();
        while let Some(patience) = idle() {
            let patience = patience.min(VERIFY_EVERY);
            if let Err(error) = serve(domain, monitor, &mut engine, patience, &mut seen, &mut refused) {
                // What was counted until a domain ended is not worth less.
                if !domain.state()?.has_ended() {
                    bail!(error);
                }
                break;
            }
            if verified.elapsed() >= VERIFY_EVERY {
                verify(domain, &mut engine);
                verified = Instant::now();
            }
        }
        let mut outcome = Outcome::of(&engine, &breakpoints)?;
        outcome.counters.failures += refused;
        Ok(outcome)
    });
    // Also after a failure: the guest is to be left as it was.
    let left = leave(domain, monitor, &mut engine).context("cannot leave the domain");
    if left.is_err() {
        // Without the ring, which goes next, Xen lets no rights be changed.
        domain.undo_all();
    }
    let mut outcome = served?;
    outcome.state = left?;
    Ok(outcome)
}

/// Pages are compared with what is known of them so often, and so many at a time: with 160 pages, what a device has written
/// to any is found within half a second. It takes a thousandth of a CPU.
pub(crate) const VERIFY_EVERY: Duration = Duration::from_millis(50);
const VERIFY_PAGES: usize = 16;

/// Looks whether a device, or another domain, has written to pages with breakpoints.
fn verify(domain: &mut Domain, engine: &mut Engine) {
    match engine.verify(domain, VERIFY_PAGES) {
        Ok(0) => {}
        Ok(found) => log::debug!("{found} pages with breakpoints were written to, and not by the guest"),
        // It may have given the page back.
        Err(error) => log::debug!("{}", error.with_causes()),
    }
}

/// Waits for events, and answers those there are. Whether there were any. `refused` counts INT3s that Xen did not deliver.
fn serve(
    domain: &mut Domain,
    monitor: &mut Monitor,
    engine: &mut Engine,
    patience: Duration,
    seen: &mut dyn FnMut(&Engine, &Hit<'_>),
    refused: &mut u64,
) -> Result<bool, Error> {
    monitor.wait(patience)?;
    domain.look_around();
    let (mut any, mut reply) = (false, Reply::default());
    while let Some(request) = monitor.next() {
        any = true;
        let Some(event) = ring::event_of(&request) else {
            monitor.respond(&ring::plain_response(&request));
            continue;
        };
        let mut on_hit = |engine: &mut Engine, _: &mut Domain, hit: &Hit<'_>| {
            seen(engine, hit);
            Verdict::Keep
        };
        engine.answer(domain, &event, &mut on_hit, &mut reply);
        let (response, inject) = ring::response_to(&request, &reply);
        if inject
            && let Reason::Int3(int3) = event.reason
            && !domain.inject_int3(event.vcpu, int3.length)
        {
            *refused += 1;
        }
        monitor.respond(&response);
    }
    if any {
        monitor.notify()?;
    }
    Ok(any)
}

/// How long a virtual CPU may take to go on with what it was answered. Where many share a CPU it takes milliseconds.
const SETTLED: Duration = Duration::from_millis(100);

/// Waits until every virtual CPU has gone on. None is answered meanwhile: one that waits does not keep the others from it.
fn settle(domain: &mut Domain, engine: &mut Engine) {
    const LOOK: Duration = Duration::from_micros(500);
    let start = Instant::now();
    while !engine.is_settled(domain) && start.elapsed() < SETTLED {
        thread::sleep(LOOK);
    }
}

fn leave(domain: &mut Domain, monitor: &mut Monitor, engine: &mut Engine) -> Result<State> {
    /// Each ends with [`SETTLED`] and [`PATIENCE`] at most.
    const ROUNDS: u32 = 500;
    for _ in 0..ROUNDS {
        // One that does not run settles nothing, however long it is waited for.
        let state = domain.state()?;
        if state != State::Running {
            return leave_as_it_is(domain, engine, state);
        }
        engine.leave(domain)?;
        settle(domain, engine);
        engine.leave(domain)?;
        // Without an event for a while, none is queued.
        if !serve(domain, monitor, engine, PATIENCE, &mut |_, _| {}, &mut 0)? && engine.is_idle(domain) {
            engine.finish(domain)?;
            return Ok(State::Running);
        }
    }
    let idle = engine.is_idle(domain);
    engine.finish(domain)?;
    ensure!(idle, "a virtual CPU does not go on, or does not come out of its step");
    Ok(State::Running)
}

/// Leaves a domain none of whose virtual CPUs goes on. What they were answered and have not done yet, Xen forgets with the ring
/// (`vm_event_cleanup_domain`, xen/arch/x86/vm_event.c): they do the instruction by themselves, on the guest's own bytes. So
/// none may go on before the ring is gone.
fn leave_as_it_is(domain: &mut Domain, engine: &mut Engine, state: State) -> Result<State> {
    if state == State::Gone {
        return Ok(state);
    }
    let left = domain.pause().context("cannot pause it").and_then(|()| {
        engine.leave(domain)?;
        Ok(engine.finish(domain)?)
    });
    // It may be destroyed at any time.
    match domain.state()? {
        State::Gone => Ok(State::Gone),
        _ => left.map(|()| state),
    }
}
