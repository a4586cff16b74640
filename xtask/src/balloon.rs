//! `cargo xtask balloon`

use anyhow::Result;
use clap::Args;
use hyperbp_lab::{Host, Lab, Program, Progress, Xen};

use crate::checks::Checks;

/// Have a guest give pages back to Xen and get others in their place, under load, and see that it gets its own
#[derive(Debug, Args)]
pub(crate) struct Balloon {
    /// How often each page is replaced, under each mechanism
    #[arg(long, value_name = "N", default_value_t = ROUNDS)]
    rounds: u32,

    /// CPUs of the emulated machine
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4))]
    cpus: u32,

    /// The Xen to boot: that of Debian 12, or of Debian 13
    #[arg(long, default_value_t, value_name = "VERSION")]
    xen: Xen,
}

/// As often as each page is replaced by default. With every third, Xen keeps the old page with the domain, too, and that may
/// have some 250 pages more than it has got.
pub(crate) const ROUNDS: u32 = 6;

/// Virtual CPUs of the guests.
pub(crate) const VCPUS: [u32; 2] = [1, 2];

impl Balloon {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(self.xen, false)?;
        let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
        let job = bench.balloon(&runner, self.cpus, &VCPUS, self.rounds);
        let image = bench.image(&job)?;
        let outcome = bench.run(&[(job, image)], 1)?.remove(0);
        let dir = crate::target().join("balloon");
        outcome.unpack(&dir)?;
        Checks::judge(&dir)
    }
}
