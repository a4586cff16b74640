//! `cargo xtask storm`

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use hyperbp_lab::{Host, Lab, Program, Progress, Xen};

const EXAMPLES: &str = "\
Examples:
  cargo xtask storm
      Every mechanism, with 2 and with 4 virtual CPUs, on an emulated machine with 2 CPUs.
  cargo xtask storm --mechanism auto --vcpus 4 --cpus 4 --count 5000
      One mechanism; dom0 has one CPU, and the guest three.
  cargo xtask storm --smartvmi ../smartvmi/build --mechanism auto
      In SmartVMI: this is CMake's build directory of its vmicore.

Results are in target/storm. Exit code 1 if a mechanism that must not has lost or doubled a hit, or if the guest saw a
breakpoint. (repair may lose hits: other virtual CPUs run through while the byte is back.)";

/// Let several virtual CPUs execute, hash and write a page with breakpoints at once, and count what is lost
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Storm {
    /// Only this mechanism; may be repeated
    #[arg(long = "mechanism", value_name = "M", value_parser = crate::bench::mechanism)]
    mechanisms: Vec<String>,

    /// Virtual CPUs of the guest, 1 to 4; may be a list
    #[arg(long, value_delimiter = ',', default_value = "2,4", value_parser = clap::value_parser!(u32).range(1..=4))]
    vcpus: Vec<u32>,

    /// CPUs of the emulated machine: one for dom0, the others for the guest
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=4))]
    cpus: u32,

    /// Calls each virtual CPU makes into the page; each is 3 hits on average
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,

    /// In SmartVMI instead: CMake's build directory of its vmicore, with or without smartvmi-patches. The breakpoints it has
    /// itself are let in, too, and not judged
    #[arg(long, value_name = "BUILD_DIR")]
    smartvmi: Option<PathBuf>,
}

impl Storm {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let smartvmi = self.smartvmi.as_deref().map(|tree| lab.smartvmi(tree)).transpose()?;
        let bench = lab.prepare(Xen::default(), false)?;
        let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
        let mut job = bench.storm(&runner, self.cpus, &self.vcpus, self.count, &self.mechanisms);
        if let Some(smartvmi) = &smartvmi {
            smartvmi.put_into(&mut job);
        }
        let image = bench.image(&job)?;
        let outcome = bench.run(&[(job, image)], 1)?.remove(0);
        let dir = crate::target().join("storm");
        outcome.unpack(&dir)?;
        let mut right = true;
        for vcpus in &self.vcpus {
            let storms = storms(&dir, *vcpus)?;
            println!("{}", hyperbp_report::storm_table(&storms));
            right &= storms.iter().all(hyperbp_report::Storm::is_right);
        }
        println!("Results:  {}", dir.display());
        if smartvmi.is_some_and(|smartvmi| !smartvmi.has_hyperbp) {
            println!("Skipped:  hyperbp in SmartVMI (this one was built without it: see smartvmi-patches)");
        }
        ensure!(right, "something is wrong: see the table");
        Ok(())
    }
}

/// What the job has left of its storms with so many virtual CPUs.
pub(crate) fn storms(dir: &Path, vcpus: u32) -> Result<Vec<hyperbp_report::Storm>> {
    let file = dir.join(vcpus.to_string()).join("storm.json");
    let json = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    hyperbp_report::storms_from_json(&json)
}
