//! Counts calls of functions of a guest's kernel.

use std::cell::RefCell;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use hyperbp::{Figures, Gpa, Hypervisor, Mechanism};
use hyperbp_report::{Served, Trace, TracedFunction};

use crate::Usage;
use crate::bench::interrupted;
use crate::core::{self, Outcome};
use crate::ring::Monitor;
use crate::storm::handling;
use crate::symbols::Symbols;
use crate::xen::{Domain, Requests, State};

/// Between two looks at what the domain does, and is asked to do. A look costs some microseconds. A guest that is asked to
/// suspend itself takes longer than this: it stops its processes and devices first.
const LOOK: Duration = Duration::from_millis(20);
/// A toolstack waits a minute for a guest's answer, and another one until it is suspended (`libxl_dom_suspend.c`).
const GIVEN_UP: Duration = Duration::from_secs(130);

/// A function by the name it was asked for, and where it is.
pub(crate) type Place = (String, Gpa);

/// What to count, and until when.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) functions: Vec<Place>,
    /// Counting begins with the first call of this one, and ends with the second.
    pub(crate) between: Option<Place>,
    pub(crate) mechanism: Mechanism,
    /// It ends after this time, if not before.
    pub(crate) limit: Option<Duration>,
}

/// Finds functions: guest-physical addresses that begin with `0x`, or names in a file of symbols.
///
/// # Errors
/// If one is not known, or the symbols are not those of the kernel in the domain.
pub(crate) fn locate(domain: &mut Domain, symbols: Option<&Path>, names: &[&str]) -> Result<Vec<Place>> {
    let names: Vec<_> = names.iter().map(|name| Ok((*name, address(name)?))).collect::<Result<_, Usage>>()?;
    let unknown: Vec<_> = names.iter().filter(|(_, gpa)| gpa.is_none()).map(|(name, _)| *name).collect();
    let Some(first) = unknown.first() else {
        return Ok(names.into_iter().filter_map(|(name, gpa)| Some((name.to_owned(), gpa?))).collect());
    };
    let Some(file) = symbols else {
        return Err(Usage(format!("where is `{first}`? Name a file with --symbols, or give an address, 0x...")).into());
    };
    let read = File::open(file).and_then(|open| Symbols::read(BufReader::new(open), &unknown));
    let symbols = read.with_context(|| format!("cannot read {}", file.display()))?;
    let kernel = symbols.locate(domain).with_context(|| format!("with {}", file.display()))?;
    let place = |(name, gpa): (&str, Option<Gpa>)| Ok((name.to_owned(), gpa.map_or_else(|| kernel.address(name), Ok)?));
    names.into_iter().map(place).collect()
}

/// An address, if it is written as one.
fn address(text: &str) -> Result<Option<Gpa>, Usage> {
    let Some(digits) = text.strip_prefix("0x") else { return Ok(None) };
    let address = u64::from_str_radix(digits, 16);
    address.map(|address| Some(Gpa(address))).map_err(|error| Usage(format!("`{text}` is no address: {error}")))
}

/// What was counted, whatever came in between.
#[derive(Debug)]
pub(crate) struct Traced {
    pub(crate) trace: Trace,
    /// Why it ended, if not because it was to.
    pub(crate) ended: Option<String>,
    /// What is wrong with that.
    pub(crate) problem: Option<anyhow::Error>,
}

/// The first and the second call of [`Plan::between`], and what was counted until then.
type Marks = RefCell<Vec<(Instant, Result<Outcome>)>>;

/// Counts, and says on standard error when the breakpoints are set. It leaves before the domain is suspended, and comes back
/// when it runs again.
///
/// # Errors
/// If the domain cannot be monitored, or Xen refuses a breakpoint.
pub(crate) fn trace(domain: &mut Domain, name: &str, plan: &Plan) -> Result<Traced> {
    let id = domain.id();
    let mut session = Session {
        name,
        plan,
        at: plan.functions.iter().chain(&plan.between).map(|(_, gpa)| *gpa).collect(),
        marks: Marks::default(),
        interrupted: interrupted()?,
        // Without xenstore nobody can ask for a suspension that way.
        requests: Requests::of(id).inspect_err(|error| log::info!("no requests are heard of: {error}")).ok(),
        begin: None,
        asked: None,
    };
    let (outcome, mut ended, mut problem) = session.run(domain)?;
    let Session { marks, begin, .. } = session;
    let (end, mut marks) = (Instant::now(), marks.into_inner().into_iter());
    let state = outcome.state;
    if state == State::Crashed {
        problem.get_or_insert_with(|| anyhow!("{state}"));
    }
    let (begin, end, outcome) = match (&plan.between, marks.next(), marks.next()) {
        (None, ..) => (begin.unwrap_or(end), end, outcome),
        (Some(_), Some((begin, from)), Some((end, to))) => (begin, end, to?.since(&from?)),
        (Some((function, _)), first, _) => {
            let calls = if first.is_some() { "only once" } else { "not once" };
            problem.get_or_insert_with(|| {
                anyhow!("`{function}` was called {calls}, so the counts are not of the time between two calls")
            });
            (begin.unwrap_or(end), end, outcome)
        }
    };
    if state != State::Running {
        ended.get_or_insert_with(|| state.to_string());
    }
    let functions =
        plan.functions.iter().zip(&outcome.figures).map(|((name, gpa), figures)| traced(name, *gpa, figures));
    let trace = Trace {
        domain: name.to_owned(),
        vcpus: domain.vcpus().into(),
        mechanism: plan.mechanism.to_string(),
        milliseconds: u64::try_from((end - begin).as_millis())?,
        functions: functions.collect(),
        reads: outcome.counters.reads,
        writes: outcome.counters.writes,
        failures: outcome.counters.failures,
        handling: handling(&outcome),
    };
    Ok(Traced { trace, ended, problem })
}

/// A trace that goes on.
struct Session<'a> {
    name: &'a str,
    plan: &'a Plan,
    at: Vec<Gpa>,
    marks: Marks,
    interrupted: Arc<AtomicBool>,
    requests: Option<Requests>,
    /// When breakpoints were set for the first time.
    begin: Option<Instant>,
    /// When it was noticed that the guest is asked to suspend itself, if it is.
    asked: Option<Instant>,
}

/// What a wait for a suspended domain has come to.
enum Resumed {
    Yes,
    /// The trace is to end.
    No,
    /// It is not to be resumed any more.
    Ended(State),
}

impl Session<'_> {
    /// Counts until the trace is to end, and says why it does, if that is to be said, and what is wrong with it.
    fn run(&mut self, domain: &mut Domain) -> Result<(Outcome, Option<String>, Option<anyhow::Error>)> {
        let mut outcome = self.watch(domain, None)?;
        while (self.asked.is_some() && outcome.state == State::Running) || outcome.state == State::Suspended {
            let late = outcome.state == State::Suspended;
            eprintln!(
                "The trace has left domain {}, which is {} suspended. It comes back when the domain runs again.",
                self.name,
                if late { "already" } else { "about to be" }
            );
            if late {
                eprintln!("An image that is made of it now may have breakpoints or shadow pages in it.");
            }
            match self.wait_for_resume(domain, late)? {
                Resumed::Yes => eprintln!("Domain {} runs again.", self.name),
                Resumed::No => return Ok((outcome, None, None)),
                Resumed::Ended(state) => {
                    outcome.state = state;
                    return Ok((outcome, Some(format!("the domain was suspended, and then: {state}")), None));
                }
            }
            self.asked = None;
            // What was counted until now is not lost, whatever happens.
            match self.watch(domain, Some(&outcome)) {
                Ok(more) => outcome = more,
                Err(error) => {
                    let problem = error.context("the trace cannot come back after a suspension");
                    return Ok((outcome, None, Some(problem)));
                }
            }
        }
        Ok((outcome, None, None))
    }

    /// Sets the breakpoints, and counts until the trace is to end or the domain does not go on. `before` is what was counted
    /// before that.
    fn watch(&mut self, domain: &mut Domain, before: Option<&Outcome>) -> Result<Outcome> {
        let with_before = |outcome: Outcome| match before {
            Some(before) => outcome.after(before),
            None => outcome,
        };
        let Self { name, plan, at, marks, interrupted, requests, begin, asked } = self;
        let mark = plan.functions.len();
        let mut on_hit = |index: usize, outcome: &dyn Fn() -> Result<Outcome>| {
            if index == mark && marks.borrow().len() < 2 {
                marks.borrow_mut().push((Instant::now(), outcome().map(with_before)));
            }
        };
        let (id, state, mut looked, mut said) = (domain.id(), domain.watcher(), Instant::now(), false);
        let mut idle = || {
            let begin = *begin.get_or_insert_with(Instant::now);
            if !std::mem::replace(&mut said, true) {
                eprintln!("Tracing {} functions of domain {name} ({id}); Ctrl-C ends it.", plan.functions.len());
            }
            let ended = marks.borrow().len() == 2 || plan.limit.is_some_and(|limit| begin.elapsed() >= limit);
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                if requests.as_ref().is_some_and(Requests::was_asked) {
                    *asked = Some(looked);
                }
                if asked.is_some() || state().has_ended() {
                    return None;
                }
            }
            let left = plan.limit.map_or(LOOK, |limit| limit.saturating_sub(begin.elapsed()));
            // Ctrl-C ends the wait. If it comes in the moment before that, it is noticed at the next look.
            (!ended && !interrupted.load(Ordering::Relaxed)).then_some(left.min(LOOK))
        };
        let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
        let outcome = core::watch(domain, &mut monitor, plan.mechanism, at, &mut on_hit, &mut idle);
        drop(monitor);
        let outcome = outcome?;
        // It was paused for the time in which the monitor leaves, if it did not run then.
        if let Err(error) = domain.let_go_on() {
            log::info!("cannot let the domain go on: {error}");
        }
        Ok(with_before(outcome))
    }

    /// Waits until the domain has been suspended and runs again, or is asked no more. `suspended`: it is suspended already.
    fn wait_for_resume(&mut self, domain: &Domain, mut suspended: bool) -> Result<Resumed> {
        loop {
            if self.requests.as_ref().is_some_and(Requests::was_asked) {
                self.asked = Some(Instant::now());
            }
            match domain.state()? {
                State::Suspended => suspended = true,
                State::Running | State::Paused if suspended => return Ok(Resumed::Yes),
                // It may have been suspended and resumed between two looks, or the toolstack has given up.
                State::Running | State::Paused if self.asked.is_none_or(|asked| asked.elapsed() >= GIVEN_UP) => {
                    return Ok(Resumed::Yes);
                }
                State::Running | State::Paused => {}
                ended => return Ok(Resumed::Ended(ended)),
            }
            let is_over = self.plan.limit.zip(self.begin).is_some_and(|(limit, begin)| begin.elapsed() >= limit);
            if is_over || self.interrupted.load(Ordering::Relaxed) {
                return Ok(Resumed::No);
            }
            thread::sleep(LOOK);
        }
    }
}

fn traced(name: &str, gpa: Gpa, figures: &Figures) -> TracedFunction {
    let hyperbp::Served { repair, view_step, view_fast_step, emulate, interpret, .. } = figures.served;
    TracedFunction {
        name: name.to_owned(),
        gpa: gpa.0,
        hits: figures.hits,
        served: Served { repair, view_step, view_fast_step, emulate, interpret },
        fallbacks: figures.fallbacks,
        rewritten: figures.rewritten,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_told_from_a_name() {
        assert_eq!(address("0x1234560").unwrap(), Some(Gpa(0x123_4560)));
        assert_eq!(address("vfs_read").unwrap(), None);
        assert!(address("0xvfs").unwrap_err().to_string().contains("0xvfs"));
        assert!(address("0x").is_err());
    }
}
