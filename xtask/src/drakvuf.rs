//! `cargo xtask drakvuf`

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use hyperbp_lab::{Host, Job, Lab, Monitor, Progress, Xen};

use crate::events::Events;

const EXAMPLES: &str = "\
Examples:
  cargo xtask drakvuf --build ../drakvuf/build --profile kernel.json
      Trace the guest with DRAKVUF's own breakpoints.
  cargo xtask drakvuf --build ../drakvuf/build --profile kernel.json --hyperbp -- -a syscalls --disable-sysret
      The same with hyperbp's, and with other arguments for DRAKVUF.
  cargo xtask drakvuf --build ../drakvuf/build --profile kernel.json --hyperbp --compare
      Both, and compare what they report, event for event.

Results are in target/drakvuf. docs/drakvuf.md tells how to get DRAKVUF and the profile.";

/// The plugins that report most of what our guest does.
const ARGUMENTS: &[&str] = &["-a", "syscalls", "-a", "procmon", "-a", "filetracer"];

/// Run a DRAKVUF in the emulated machine, on a Linux guest that does the same work each time
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Drakvuf {
    /// The directory DRAKVUF was built in
    #[arg(long, value_name = "DIR")]
    build: PathBuf,

    /// The profile of the guest's kernel: what dwarf2json makes of its debug symbols
    #[arg(long, value_name = "FILE")]
    profile: PathBuf,

    /// Let hyperbp serve the breakpoints, with this mechanism
    #[arg(long, value_name = "M", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    hyperbp: Option<String>,

    /// Run it with DRAKVUF's own breakpoints as well, in a second machine with the same image, and compare what both report
    #[arg(long, requires = "hyperbp")]
    compare: bool,

    /// Have hyperbp, built with its feature `fault-injection`, panic in this hit, and see that the guest goes on without it
    #[arg(long, value_name = "N", requires = "hyperbp", conflicts_with = "compare")]
    panic_at: Option<u32>,

    /// How many rounds of work the guest does
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Arguments for DRAKVUF, instead of `-a syscalls -a procmon -a filetracer`
    #[arg(last = true, value_name = "ARGUMENT")]
    arguments: Vec<String>,
}

impl Drakvuf {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(Xen::default(), false)?;
        let default = ARGUMENTS.iter().map(|argument| (*argument).to_owned()).collect();
        let arguments = if self.arguments.is_empty() { &default } else { &self.arguments };
        let (build, profile) = (&*self.build, &*self.profile);
        let job = bench.drakvuf(&Monitor { build, profile, arguments, rounds: self.rounds })?;
        let image = bench.image(&job)?;

        // Both in one image, so that up to DRAKVUF's start both guests are the same.
        let mut runs = Vec::new();
        if let Some(mechanism) = &self.hyperbp {
            let environment = self.panic_at.map(|hit| format!("HYPERBP_PANIC_AT_HIT={hit}")).unwrap_or_default();
            runs.push(("hyperbp", format!("--hyperbp={mechanism}"), environment));
        }
        if self.hyperbp.is_none() || self.compare {
            runs.push(("own", String::new(), String::new()));
        }
        let jobs: Vec<_> = runs
            .iter()
            .map(|(name, hyperbp, environment)| {
                let late = [("HYPERBP", hyperbp), ("ENVIRONMENT", environment)];
                let late = late.map(|(name, value)| (name.to_owned(), value.clone())).to_vec();
                (Job { name: format!("{}-{name}", job.name), late, ..job.clone() }, image.clone())
            })
            .collect();
        let mut reported = Vec::new();
        for ((name, ..), outcome) in runs.iter().zip(bench.run(&jobs, 2)?) {
            let dir = crate::target().join("drakvuf").join(name);
            outcome.unpack(&dir)?;
            reported.push(self.results(&dir)?);
            println!("Results:  {}", dir.display());
        }
        if let [hyperbp, own] = &reported[..] {
            if let Some(difference) = own.difference(hyperbp) {
                bail!("DRAKVUF's own breakpoints and hyperbp's do not report the same: {difference}");
            }
            println!("Compared: {} events, all the same but for the time", own.len());
        }
        Ok(())
    }

    /// What came of one run.
    fn results(&self, dir: &Path) -> Result<Events> {
        let read = |name: &str| {
            let file = dir.join(name);
            fs::read(&file).with_context(|| format!("cannot read {}", file.display()))
        };
        let text = |name: &str| read(name).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let events = Events::parse(&read("events")?);
        let plugins: Vec<String> =
            events.by_plugin().iter().map(|(plugin, count)| format!("{plugin} {count}")).collect();
        println!("Events:   {} ({})", events.len(), plugins.join(", "));
        self.judge(&text("ended")?, &text("console")?).map_err(|e| match text("messages") {
            Ok(messages) => e.context(format!("DRAKVUF said:\n{}", messages.trim_end())),
            Err(unread) => e.context(unread),
        })?;
        ensure!(events.len() > 0, "DRAKVUF has reported nothing: are these plugins for Linux?");
        Ok(events)
    }

    /// Whether DRAKVUF and the guest `ended` as they should.
    fn judge(&self, ended: &str, console: &str) -> Result<()> {
        let (code, when) = ended.trim_end().split_once(' ').context("it is not known how DRAKVUF ended")?;
        match (self.panic_at, code, when) {
            (None, "0", "late") => {}
            (None, _, "late") => bail!("DRAKVUF ended with exit code {code}"),
            (None, ..) => bail!("DRAKVUF ended before the guest did, with exit code {code}"),
            (Some(_), "0", _) => bail!("DRAKVUF ended with exit code 0, as if nothing had been wrong"),
            (Some(_), _, "late") => bail!("DRAKVUF did not end by itself"),
            (Some(hit), ..) => {
                println!("Panic:    in hit {hit}; DRAKVUF ended with exit code {code}, and the guest went on")
            }
        }
        let rounds = console.lines().filter(|line| line.starts_with("round ")).count();
        ensure!(rounds == self.rounds as usize, "the guest did {rounds} rounds, of {}", self.rounds);
        Ok(())
    }
}
