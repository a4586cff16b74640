//! `cargo xtask waiting`

use std::fs;

use anyhow::{Context, Result, ensure};
use clap::Args;
use hyperbp_lab::{Host, Lab, Program, Progress, Xen};

const EXAMPLES: &str = "\
Examples:
  cargo xtask waiting
      One CPU for dom0 and the guest: without hits, with one a second, and with as many as there can be.
  cargo xtask waiting --cpus 2
      A CPU each.

Results are in target/waiting. Exit code 1 if a monitor without hits takes more than 1 % of a CPU, or if one that only sleeps
does better with any of the others.";

/// Measure what it takes of the machine that hyperbp waits for hits, and compare with a monitor that only sleeps
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Waiting {
    /// CPUs of the emulated machine; with 2, dom0 and the guest have one each
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=2))]
    cpus: u32,

    /// How long each is measured, in the emulated machine's time: its second takes some seconds here
    #[arg(long, value_name = "SECONDS", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
}

impl Waiting {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(Xen::default(), false)?;
        let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
        let job = bench.waiting(&runner, self.cpus, self.seconds);
        let image = bench.image(&job)?;
        let outcome = bench.run(&[(job, image)], 1)?.remove(0);
        let dir = crate::target().join("waiting");
        outcome.unpack(&dir)?;
        let file = dir.join("waiting.json");
        let json = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let rows = hyperbp_report::waiting_from_json(&json)?;
        println!("{}", hyperbp_report::waiting_table(&rows));
        println!("Results:  {}", file.display());
        let problems = hyperbp_report::waiting_problems(&rows);
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        Ok(())
    }
}
