//! `cargo xtask domains`

use anyhow::Result;
use clap::Args;
use hyperbp_lab::{Host, Lab, Program, Progress, Xen};

use crate::checks::Checks;

/// Check on a Xen in the lab what the monitor does to memory, views and limits that are not its own, in domains of several
/// kinds: with 3, 4 and 6 GiB, with another tool's views, without memory left
#[derive(Debug, Args)]
pub(crate) struct Domains {
    /// Xen's version in the emulator: 4.17, or 4.20
    #[arg(long, value_name = "VERSION", default_value_t)]
    xen: Xen,

    /// Only these: sizes, limits, modes, writes, crashes, saves; may be repeated
    #[arg(long, value_name = "PART", value_parser = PARTS)]
    only: Vec<String>,
}

/// The parts of the job, functions of bench/lab/dom0/domains.sh.
const PARTS: [&str; 6] = ["sizes", "limits", "modes", "writes", "crashes", "saves"];

impl Domains {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(self.xen, false)?;
        let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
        let mut job = bench.domains(&runner, 1);
        if !self.only.is_empty() {
            job.variables.push(("PARTS".to_owned(), self.only.join(" ")));
        }
        let image = bench.image(&job)?;
        let outcome = bench.run(&[(job, image)], 1)?.remove(0);
        let dir = crate::target().join("domains");
        outcome.unpack(&dir)?;
        Checks::judge(&dir)
    }
}
