//! `cargo xtask domains`

use std::fs;

use anyhow::{Context, Result, ensure};
use clap::Args;
use hyperbp_lab::{Host, Lab, Program, Progress, Xen};

/// Check on a Xen in the lab what the monitor does to memory, views and limits that are not its own, in domains of several
/// kinds: with 3, 4 and 6 GiB, with another tool's views, without memory left
#[derive(Debug, Args)]
pub(crate) struct Domains {
    /// Xen's version in the emulator: 4.17, or 4.20
    #[arg(long, value_name = "VERSION", default_value_t)]
    xen: Xen,
}

impl Domains {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(self.xen, false)?;
        let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
        let job = bench.domains(&runner, 1);
        let image = bench.image(&job)?;
        let outcome = bench.run(&[(job, image)], 1)?.remove(0);
        let dir = crate::target().join("domains");
        outcome.unpack(&dir)?;
        let checks = fs::read_to_string(dir.join("checks")).context("the checks left nothing")?;
        print!("{checks}");
        let failed = checks.lines().filter(|line| !line.starts_with("ok: ")).count();
        ensure!(failed == 0, "{failed} checks failed");
        Ok(())
    }
}
