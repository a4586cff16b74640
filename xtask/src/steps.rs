//! The steps of a long command: how long each took, and what was skipped.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};

use crate::tools;

/// A step that takes less is told with the others that do.
const SHORT: Duration = Duration::from_secs(1);

/// What was done, and what was not. Threads may share it: their steps are at the same time.
#[derive(Debug)]
pub(crate) struct Steps {
    begun: Instant,
    done: Mutex<Vec<Step>>,
    skipped: Mutex<Vec<String>>,
}

#[derive(Clone, Debug)]
struct Step {
    name: String,
    /// After the first.
    begun: Duration,
    took: Duration,
    failed: bool,
}

impl Steps {
    pub(crate) fn new() -> Self {
        Self { begun: Instant::now(), done: Mutex::default(), skipped: Mutex::default() }
    }

    /// Does a step, and notes how long it took.
    ///
    /// # Errors
    /// The step's.
    pub(crate) fn time<T, E>(&self, name: impl Into<String>, step: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let begun = Instant::now();
        let result = step();
        self.note(name.into(), begun, begun.elapsed(), result.is_err());
        result
    }

    /// Runs cargo, with Xen's headers and libraries in `sysroot` if there is one.
    ///
    /// # Errors
    /// If it fails.
    pub(crate) fn cargo(&self, name: &str, arguments: &[&str], sysroot: Option<&Path>) -> Result<()> {
        eprintln!("== {name}: cargo {}", arguments.join(" "));
        let mut command = tools::cargo();
        // No bar, for there may be others who write to the terminal.
        command.args(arguments).env("RUSTDOCFLAGS", "-D warnings").env("CARGO_TERM_PROGRESS_WHEN", "never");
        if let Some(sysroot) = sysroot {
            // The programs of the tests run here, with the sysroot's libraries.
            let lib = sysroot.join("usr/lib/x86_64-linux-gnu");
            command.env("HYPERBP_XEN_SYSROOT", sysroot).env("LD_LIBRARY_PATH", lib);
        }
        self.time(name, || {
            ensure!(command.status().context("cannot run cargo")?.success(), "the step `{name}` failed");
            Ok(())
        })
    }

    /// [Runs cargo](Self::cargo) for each of these names and arguments.
    ///
    /// # Errors
    /// The first that fails.
    pub(crate) fn cargo_each(&self, each: &[(&str, &[&str])]) -> Result<()> {
        each.iter().try_for_each(|(name, arguments)| self.cargo(name, arguments, None))
    }

    /// Notes a step that somebody else has timed.
    pub(crate) fn took(&self, name: impl Into<String>, begun: Instant, took: Duration) {
        self.note(name.into(), begun, took, false);
    }

    fn note(&self, name: String, begun: Instant, took: Duration, failed: bool) {
        let begun = begun.saturating_duration_since(self.begun);
        lock(&self.done).push(Step { name, begun, took, failed });
    }

    /// Says that something is not done, at once and [at the end](Self::print).
    pub(crate) fn skip(&self, what: impl Into<String>) {
        let what = what.into();
        println!("skipped: {what}");
        lock(&self.skipped).push(what);
    }

    /// Prints a table of what was done, and what was skipped.
    pub(crate) fn print(&self) {
        print!("{}", self.table());
        // What a child of a child took is in there when each has waited for its own.
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_CHILDREN) {
            let seconds = usage.user_time().tv_sec() + usage.system_time().tv_sec();
            println!("All of it took {}, and {seconds} s of a CPU.", clock(self.begun.elapsed()));
        }
        lock(&self.skipped).iter().for_each(|what| println!("skipped: {what}"));
    }

    fn table(&self) -> String {
        let mut done = lock(&self.done).clone();
        done.sort_by_key(|step| step.begun);
        let (short, long): (Vec<_>, Vec<_>) = done.into_iter().partition(|step| step.took < SHORT && !step.failed);
        let mut table = format!("{:>6} {:>6}  step\n", "begun", "took");
        for Step { name, begun, took, failed } in long {
            let failed = if failed { " (failed)" } else { "" };
            table += &format!("{:>6} {:>6}  {name}{failed}\n", clock(begun), clock(took));
        }
        if !short.is_empty() {
            let names: Vec<_> = short.iter().map(|step| &*step.name).collect();
            table += &format!("{:>6} {:>6}  each: {}\n", "", "< 1 s", names.join(", "));
        }
        table
    }
}

/// `0:07`, `16:40`.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

/// What a thread that panicked has left is as good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_beginning() {
        let steps = Steps::new();
        let at = |seconds| steps.begun + Duration::from_secs(seconds);
        steps.took("machine", at(70), Duration::from_secs(130));
        steps.took("lint", at(1), Duration::from_secs(69));
        steps.took("format", at(0), Duration::from_millis(900));
        let failed: Result<(), ()> = steps.time("test", || Err(()));
        assert!(failed.is_err());
        let table = " begun   took  step\n  0:00   0:00  test (failed)\n  0:01   1:09  lint\n  1:10   2:10  machine\n        < 1 s  each: format\n";
        assert_eq!(steps.table(), table);
    }
}
