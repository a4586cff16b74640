//! `cargo xtask check`

use anyhow::Result;
use clap::Args;
use hyperbp_lab::{Host, Lab, Program, Progress, Xen};

use crate::checks::Checks;

/// Check the mechanisms on a live guest in the lab: all of what `cargo xtask test` checks there, or a part of it
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Only the checks that have this text in what they say
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// CPUs of the emulated machine
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=2))]
    cpus: u32,

    /// Xen's version: 4.17, or 4.20
    #[arg(long, value_name = "VERSION", default_value_t)]
    xen: Xen,
}

impl Check {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(self.xen, false)?;
        let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
        let mut job = bench.checks(&runner, self.cpus);
        job.variables.extend(self.only.map(|only| ("ONLY".to_owned(), only)));
        let image = bench.image(&job)?;
        let outcome = bench.run(&[(job, image)], 1)?.remove(0);
        let dir = crate::target().join("check");
        outcome.unpack(&dir)?;
        println!("The console of Xen and dom0 is in {}.", outcome.console.display());
        Checks::judge(&dir)
    }
}
