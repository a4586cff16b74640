//! `cargo xtask smartvmi`

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use hyperbp_lab::{Host, Introspection, Lab, Progress, Xen, plan};
use hyperbp_report::{Pair, Pass};

use crate::pair::{Reported, Said};

const EXAMPLES: &str = "\
Examples:
  cargo xtask smartvmi --build ../smartvmi/vmicore/build --profile kernel.json
      With SmartVMI's own breakpoints.
  cargo xtask smartvmi --build ../smartvmi/vmicore/build --profile kernel.json --hyperbp --compare
      With SmartVMI's own, then with hyperbp's, in one boot of one guest.
  cargo xtask smartvmi --build ../smartvmi/vmicore/build --profile kernel.json --hyperbp=emulate
      With hyperbp's, by another mechanism.

Two processes of the guest, pair-a and pair-b, are one program, so that they have its code in the same page of memory. \
vmicore's plugin libhyperbp_smartvmi.so sets a breakpoint in pair-a. Then both switch to and fro, without running into it, \
and both run through it, in turns and alone. They do so before vmicore is there, with it, and after it has ended.

What must hold, or the exit code is 1:
  - every call of pair-a is reported, and none of pair-b;
  - with --compare, hyperbp adds to a switch of processes at most a tenth of what SmartVMI's own breakpoint adds;
  - neither process ever reads a breakpoint in its code; vmicore ends with exit code 0; the guest goes on without it.

Results are in target/smartvmi. docs/smartvmi.md tells how to get vmicore, the plugin and the profile.";

/// How many times less hyperbp is to add to a switch of processes.
const LESS: u64 = 10;

/// Run a SmartVMI in the emulated machine, on a Linux guest with a breakpoint in one of two processes that share its page
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Smartvmi {
    /// The directory vmicore was built in: CMake's, with smartvmi-patches
    #[arg(long, value_name = "DIR")]
    build: PathBuf,

    /// The profile of the guest's kernel: what dwarf2json makes of its debug symbols
    #[arg(long, value_name = "FILE")]
    profile: PathBuf,

    /// The plugin, if it is not built in `plugins/hyperbp/build` of SmartVMI's source
    #[arg(long, value_name = "FILE")]
    plugin: Option<PathBuf>,

    /// Let hyperbp set the breakpoints, with this mechanism
    #[arg(long, value_name = "M", num_args = 0..=1, require_equals = true, default_missing_value = "auto",
          value_parser = mechanism)]
    hyperbp: Option<String>,

    /// Run it with SmartVMI's own breakpoints as well, in the same boot, and compare what a switch of processes costs
    #[arg(long, requires = "hyperbp")]
    compare: bool,

    /// How many rounds the processes work through each time; each is 100 switches, 25 calls of the one and 30 of the other
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// A name of a mechanism, checked.
fn mechanism(name: &str) -> Result<String, hyperbp::Error> {
    name.parse::<hyperbp::Mechanism>().map(|_| name.to_owned())
}

impl Smartvmi {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(Xen::default(), false)?;
        let own = (self.hyperbp.is_none() || self.compare).then_some(plan::ORIGINAL);
        let hyperbp = self.hyperbp.as_ref().map(|_| plan::HYPERBP);
        let passes: Vec<&str> = ["before"].into_iter().chain(own).chain(hyperbp).chain(["after"]).collect();
        let job = bench.vmicore(&Introspection {
            build: &self.build,
            plugin: self.plugin.as_deref(),
            profile: &self.profile,
            passes: &passes,
            mechanism: self.hyperbp.as_deref().unwrap_or_default(),
            rounds: self.rounds,
        })?;
        let image = bench.image(&job)?;
        let outcome = bench.run(&[(job, image)], 1)?.remove(0);
        let dir = crate::target().join("smartvmi");
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        outcome.unpack(&dir)?;
        self.results(&dir, &passes)
    }

    /// What came of it.
    fn results(&self, dir: &Path, names: &[&str]) -> Result<()> {
        let said = Said::parse(&read(&dir.join("console"))?);
        let (mut passes, mut checks) = (Vec::new(), Checks::default());
        checks.add(said.is_one_page(), format!("both processes have the code in one page of memory: {}", said.pages()));
        for name in names {
            let dir = dir.join(name);
            let work = said.pass(name).with_context(|| format!("the guest has not worked through `{name}`"))?;
            let has_monitor = [plan::ORIGINAL, plan::HYPERBP].contains(name);
            let mechanism = match *name {
                plan::ORIGINAL => "repair",
                plan::HYPERBP => self.hyperbp.as_deref().unwrap_or_default(),
                _ => "none",
            };
            let host = has_monitor.then(|| plan::SMARTVMI.to_owned());
            let mut pass = work.summary(name, host, mechanism, self.rounds)?;
            if has_monitor {
                let reported = Reported::read(&dir.join("hyperbp.jsonl")).with_context(|| last_words(&dir))?;
                checks.add(
                    said.is_at(reported.pa),
                    format!("{name}: the breakpoint is at {:#x}, in that page", reported.pa),
                );
                checks.add_calls(&pass, &reported);
                pass.reported = Some(reported.callbacks);
                let ended = read(&dir.join("ended"))?;
                let ended = ended.trim_end();
                checks.add(ended == "0 late", format!("{name}: vmicore ended when it was told to, with 0 ({ended})"));
                let log = read(&dir.join("log"))?;
                let errors = errors(&log);
                checks.add(errors.is_empty(), format!("{name}: vmicore has logged no error {errors:?}"));
            }
            checks.add(
                work.has_switched(),
                format!("{name}: each time one waited, the other ran: {}", work.times_left()),
            );
            checks.add(
                work.code_is_whole(),
                format!("{name}: both processes read their code as it was {:?}", work.changes()),
            );
            passes.push(pass);
        }
        let pair = Pair { workload: "pair".to_owned(), passes };
        let file = dir.join("results.json");
        fs::write(&file, pair.to_json()?).with_context(|| format!("cannot write {}", file.display()))?;
        println!("{}", pair.table());
        if self.compare {
            let cost = |name| pair.cost_of_a_switch(name).unwrap_or_default();
            let (own, ours) = (cost(plan::ORIGINAL), cost(plan::HYPERBP));
            checks.add(
                ours * LESS <= own,
                format!("hyperbp adds {ours} ticks to a switch, a tenth or less of SmartVMI's own {own}"),
            );
        }
        print!("{}", checks.lines);
        println!("Results:  {}", dir.display());
        ensure!(checks.failed == 0, "{} of the checks failed: they are marked above", checks.failed);
        Ok(())
    }
}

/// A line for each check, `ok: ` or `FAILED: `.
#[derive(Debug, Default)]
struct Checks {
    lines: String,
    failed: u32,
}

impl Checks {
    fn add(&mut self, holds: bool, what: String) {
        self.failed += u32::from(!holds);
        self.lines += &format!("{}: {what}\n", if holds { "ok" } else { "FAILED" });
    }

    /// Who is reported.
    fn add_calls(&mut self, pass: &Pass, reported: &Reported) {
        let (name, calls, others) = (&pass.name, pass.calls, pass.calls_of_the_other);
        self.add(
            reported.callbacks == calls,
            format!("{name}: {} calls are reported, of {calls} of pair-a (and {others} of pair-b)", reported.callbacks),
        );
        // hyperbp meets both, and tells one from the other.
        if let Some(hits) = reported.hits {
            self.add(
                hits == calls + others,
                format!("{name}: hyperbp has met {hits} of the {} of both", calls + others),
            );
        }
    }
}

fn read(file: &Path) -> Result<String> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The errors in what vmicore has logged.
fn errors(log: &str) -> Vec<&str> {
    log.lines().filter(|line| line.contains("ERROR") || line.contains("\"error\"")).collect()
}

/// What vmicore said at last, for when it has not done what it was to do.
fn last_words(dir: &Path) -> String {
    let tail = |name: &str| {
        let text = read(&dir.join(name)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    };
    format!("vmicore's plugin has reported nothing; vmicore said last:\n{}\n{}", tail("log"), tail("errors"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_counted() {
        let mut checks = Checks::default();
        checks.add(true, "this".to_owned());
        checks.add(false, "that".to_owned());
        assert_eq!((checks.failed, &*checks.lines), (1, "ok: this\nFAILED: that\n"));
    }
}
