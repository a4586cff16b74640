//! `cargo xtask boot`

use anyhow::Result;
use clap::Args;
use hyperbp_lab::{Host, Lab, Progress, Xen};

/// Boot the emulated machine, create the benchmark guest, and show that Xen and its tools work
#[derive(Debug, Args)]
pub(crate) struct Boot {
    /// CPUs of the emulated machine; with 2, dom0 and the guest have one each
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=2))]
    cpus: u32,

    /// Xen's version: 4.17, or 4.20
    #[arg(long, value_name = "VERSION", default_value_t)]
    xen: Xen,

    /// Ask Debian's mirror for newer packages
    #[arg(long)]
    update: bool,
}

impl Boot {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(self.xen, self.update)?;
        let job = bench.smoke(self.cpus);
        let image = bench.image(&job)?;
        let outcome = bench.run(&[(job, image)], 1)?.remove(0);
        print!("{}", std::fs::read_to_string(&outcome.log)?);
        println!("The console of Xen and dom0 is in {}.", outcome.console.display());
        Ok(())
    }
}
