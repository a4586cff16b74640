//! Counts calls of functions of a guest's kernel.

use std::cell::RefCell;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::atomic::Ordering;
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

/// Between two looks at what the domain does.
const LOOK: Duration = Duration::from_millis(100);

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

/// Counts, and says on standard error when the breakpoints are set.
///
/// # Errors
/// If the domain cannot be monitored, or Xen refuses a breakpoint.
pub(crate) fn trace(domain: &mut Domain, name: &str, plan: &Plan) -> Result<Traced> {
    let at: Vec<Gpa> = plan.functions.iter().chain(&plan.between).map(|(_, gpa)| *gpa).collect();
    let mark = plan.functions.len();
    let marks: RefCell<Vec<(Instant, Result<Outcome>)>> = RefCell::default();
    let mut on_hit = |index: usize, outcome: &dyn Fn() -> Result<Outcome>| {
        if index == mark && marks.borrow().len() < 2 {
            marks.borrow_mut().push((Instant::now(), outcome()));
        }
    };
    let interrupted = interrupted()?;
    let id = domain.id();
    let state = domain.watcher();
    // Without xenstore nobody can ask for a suspension that way.
    let requests = Requests::of(id).inspect_err(|error| log::info!("no requests are heard of: {error}")).ok();
    let mut to_suspend = false;
    let (mut begin, mut looked) = (None, Instant::now());
    let mut idle = || {
        let begin = *begin.get_or_insert_with(|| {
            eprintln!("Tracing {} functions of domain {name} ({id}); Ctrl-C ends it.", plan.functions.len());
            Instant::now()
        });
        let ended = marks.borrow().len() == 2 || plan.limit.is_some_and(|limit| begin.elapsed() >= limit);
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            to_suspend = requests.as_ref().is_some_and(Requests::is_to_suspend);
            if to_suspend || state().has_ended() {
                return None;
            }
        }
        let left = plan.limit.map_or(LOOK, |limit| limit.saturating_sub(begin.elapsed()));
        // Ctrl-C ends the wait. If it comes in the moment before that, it is noticed at the next look.
        (!ended && !interrupted.load(Ordering::Relaxed)).then_some(left.min(LOOK))
    };
    let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
    let outcome = core::watch(domain, &mut monitor, plan.mechanism, &at, &mut on_hit, &mut idle);
    drop(monitor);
    let (end, outcome) = (Instant::now(), outcome?);
    // It was paused for the time in which the monitor leaves, if it did not run then.
    if let Err(error) = domain.let_go_on() {
        log::info!("cannot let the domain go on: {error}");
    }
    let state = outcome.state;
    let mut marks = marks.into_inner().into_iter();
    let mut problem = (state == State::Crashed).then(|| anyhow!("{state}"));
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
    let ended = if to_suspend && state == State::Running {
        Some("the domain is about to be suspended, and its image is to have nothing of ours in it".to_owned())
    } else {
        (state != State::Running).then(|| state.to_string())
    };
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
