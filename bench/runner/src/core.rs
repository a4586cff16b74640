//! The backend `hyperbp`: the core, driven by the ring.

use anyhow::{Context, Result, ensure};
use hyperbp::{Engine, Gpa, Mechanism, Reason, Verdict};

use crate::ring::{self, Monitor, PATIENCE};
use crate::xen::{Domain, Error};

/// Sets a breakpoint at `gpa`, serves it until `idle` returns false, and removes it. `idle` is asked after each batch
/// of events, and from time to time while there are none. Returns how often the breakpoint was hit.
///
/// # Errors
/// If the breakpoint cannot be set, or Xen refuses something; the domain is left as far as it lets us.
pub(crate) fn run(
    domain: &mut Domain,
    monitor: &mut Monitor,
    mechanism: Mechanism,
    gpa: Gpa,
    idle: &mut dyn FnMut() -> bool,
) -> Result<u64> {
    let mut engine = Engine::new(domain);
    let mut hits = 0;
    let set = engine.insert(domain, gpa, mechanism).context("cannot set the breakpoint");
    let served = set.and_then(|_| {
        while idle() {
            serve(domain, monitor, &mut engine, &mut hits)?;
        }
        Ok(())
    });
    // Also after a failure: the guest is to be left as it was.
    let left = leave(domain, monitor, &mut engine, &mut hits).context("cannot leave the domain");
    served.and(left).map(|()| hits)
}

/// Waits for events, and answers those there are. Whether there were any.
fn serve(domain: &mut Domain, monitor: &mut Monitor, engine: &mut Engine, hits: &mut u64) -> Result<bool, Error> {
    monitor.wait(PATIENCE)?;
    let mut any = false;
    while let Some(request) = monitor.next() {
        any = true;
        let Some(event) = ring::event_of(&request) else {
            monitor.respond(&ring::plain_response(&request));
            continue;
        };
        let reply = engine.handle(domain, &event, &mut |_, _, _| {
            *hits += 1;
            Verdict::Keep
        });
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

fn leave(domain: &mut Domain, monitor: &mut Monitor, engine: &mut Engine, hits: &mut u64) -> Result<()> {
    /// Each ends with [`PATIENCE`] at most.
    const ROUNDS: u32 = 500;
    engine.leave(domain)?;
    for _ in 0..ROUNDS {
        // Without an event for a while, none is queued.
        if !serve(domain, monitor, engine, hits)? && engine.is_idle() {
            return Ok(engine.finish(domain)?);
        }
    }
    let result = engine.finish(domain);
    ensure!(engine.is_idle(), "a virtual CPU does not come out of its step: is the domain paused?");
    Ok(result?)
}
