//! The backend `hyperbp`: the core, driven by the ring.

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use hyperbp::{BreakpointId, Counters, Engine, Figures, Gpa, Mechanism, Reason, Verdict};

use crate::ring::{self, Monitor, PATIENCE};
use crate::xen::{Domain, Error};

/// What came of serving breakpoints.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// Of each breakpoint, in the order they were asked for.
    pub(crate) figures: Vec<Figures>,
    pub(crate) counters: Counters,
    /// How long a hit took, in ticks of dom0's time-stamp counter.
    pub(crate) handling: Histogram<u64>,
}

impl Outcome {
    /// Hits of all breakpoints.
    pub(crate) fn hits(&self) -> u64 {
        self.figures.iter().map(|figures| figures.hits).sum()
    }
}

/// Sets a breakpoint at each address, serves them until `idle` returns false, and removes them. `idle` is asked after each
/// batch of events, and from time to time while there are none.
///
/// # Errors
/// If a breakpoint cannot be set, or Xen refuses something; the domain is left as far as it lets us.
pub(crate) fn run(
    domain: &mut Domain,
    monitor: &mut Monitor,
    mechanism: Mechanism,
    at: &[Gpa],
    idle: &mut dyn FnMut() -> bool,
) -> Result<Outcome> {
    let mut engine = Engine::new(domain);
    let set: Result<Vec<BreakpointId>> = at
        .iter()
        .map(|gpa| {
            engine.insert(domain, *gpa, mechanism).with_context(|| format!("cannot set the breakpoint at {gpa}"))
        })
        .collect();
    let served = set.and_then(|breakpoints| {
        while idle() {
            serve(domain, monitor, &mut engine)?;
        }
        let figures = breakpoints.iter().map(|id| engine.figures(*id)).collect::<Result<_, _>>()?;
        Ok(Outcome { figures, counters: engine.counters(), handling: engine.handling_time().clone() })
    });
    // Also after a failure: the guest is to be left as it was.
    let left = leave(domain, monitor, &mut engine).context("cannot leave the domain");
    let outcome = served?;
    left.map(|()| outcome)
}

/// Waits for events, and answers those there are. Whether there were any.
fn serve(domain: &mut Domain, monitor: &mut Monitor, engine: &mut Engine) -> Result<bool, Error> {
    monitor.wait(PATIENCE)?;
    let mut any = false;
    while let Some(request) = monitor.next() {
        any = true;
        let Some(event) = ring::event_of(&request) else {
            monitor.respond(&ring::plain_response(&request));
            continue;
        };
        let reply = engine.handle(domain, &event, &mut |_, _, _| Verdict::Keep);
        let (response, inject) = ring::response_to(&request, &reply);
        if inject && let Reason::Int3(int3) = event.reason {
            domain.inject_int3(event.vcpu, int3.length)?;
        }
        monitor.respond(&response);
    }
    if any {
        monitor.notify()?;
    }
    Ok(any)
}

fn leave(domain: &mut Domain, monitor: &mut Monitor, engine: &mut Engine) -> Result<()> {
    /// Each ends with [`PATIENCE`] at most.
    const ROUNDS: u32 = 500;
    engine.leave(domain)?;
    for _ in 0..ROUNDS {
        // Without an event for a while, none is queued.
        if !serve(domain, monitor, engine)? && engine.is_idle() {
            return Ok(engine.finish(domain)?);
        }
    }
    let result = engine.finish(domain);
    ensure!(engine.is_idle(), "a virtual CPU does not come out of its step: is the domain paused?");
    Ok(result?)
}
