//! `cargo xtask recover`

use std::fs;

use anyhow::{Context, Result, ensure};
use clap::Args;
use hyperbp_lab::{Host, Lab, Program, Progress, Xen};

/// Kill the monitor of a busy guest again and again, recover the domain, and see that the guest has noticed nothing
#[derive(Debug, Args)]
pub(crate) struct Recover {
    /// How often to kill it, each time at another moment
    #[arg(long, value_name = "N", default_value_t = 50)]
    kills: u32,

    /// How often to attach and detach after that
    #[arg(long, value_name = "N", default_value_t = 200)]
    attach: u32,

    /// CPUs of the emulated machine
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=4))]
    cpus: u32,
}

impl Recover {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(Xen::default(), false)?;
        let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
        let job = bench.recover(&runner, self.cpus, self.kills, self.attach);
        let image = bench.image(&job)?;
        let outcome = bench.run(&[(job, image)], 1)?.remove(0);
        let dir = crate::target().join("recover");
        outcome.unpack(&dir)?;
        let checks = fs::read_to_string(dir.join("checks")).context("the checks left nothing")?;
        print!("{checks}");
        let failed = checks.lines().filter(|line| !line.starts_with("ok: ")).count();
        ensure!(failed == 0, "{failed} checks failed");
        Ok(())
    }
}
