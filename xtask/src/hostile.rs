//! `cargo xtask check-hostile`

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::Args;
use hyperbp_lab::{Host, Lab, Program, Progress, Xen};

const EXAMPLES: &str = "\
A guest does, at CPL 0 and CPL 3, all that one can think of to see a breakpoint, to run past it or to break the monitor: it reads
and writes its code in every way, steps through it, sets debug registers on it, lets it fault, puts its stack and its descriptor
tables beside it, changes its page tables, looks through all of physical memory, makes hypercalls. Each of these probes runs
without breakpoints first. With them, it must see the same: registers, flags, memory, exceptions and their frames; and the
monitor must be told of each execution once.

In the tables, `seen` is how much a probe saw that is otherwise without breakpoints, and the last column is ok, LOST (executions
the monitor was not told of), DOUBLED, SEEN or DIED.

Examples:
  cargo xtask check-hostile
      Every mechanism, on 1 and on 2 vCPUs, on an emulated machine with 2 CPUs.
  cargo xtask check-hostile --mechanism auto --vcpus 1 --cpus 1 --probe single-step
      One mechanism, and the probes whose names begin so.
  cargo xtask check-hostile --xen 4.20
      With a newer Xen.

Results are in target/hostile/VCPUS/hostile.json. Exit code 1 if the guest has found anything. (repair may lose hits on several
vCPUs: others run through while the byte is back.)";

/// Let a guest try everything to see, escape or break breakpoints, and compare with what it sees without them
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Hostile {
    /// Only this mechanism; may be repeated
    #[arg(long = "mechanism", value_name = "M", value_parser = crate::bench::mechanism)]
    mechanisms: Vec<String>,

    /// Only probes whose names begin with this; may be repeated
    #[arg(long = "probe", value_name = "NAME")]
    probes: Vec<String>,

    /// vCPUs of the guest, 1 to 4; may be a list
    #[arg(long, value_delimiter = ',', default_value = "1,2", value_parser = clap::value_parser!(u32).range(1..=4))]
    vcpus: Vec<u32>,

    /// CPUs of the emulated machine: with more than one, dom0 has the first for itself
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=4))]
    cpus: u32,

    /// Xen's version: 4.17, or 4.20
    #[arg(long, value_name = "VERSION", default_value_t)]
    xen: Xen,

    /// Print all tables, also of mechanisms under which nothing was found
    #[arg(long)]
    all: bool,
}

impl Hostile {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(self.xen, false)?;
        let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
        let job = bench.hostile(&runner, self.cpus, &self.vcpus, &self.mechanisms, &self.probes);
        let image = bench.image(&job)?;
        let outcome = bench.run(&[(job, image)], 1)?.remove(0);
        let dir = crate::target().join("hostile");
        outcome.unpack(&dir)?;
        let mut right = true;
        for vcpus in &self.vcpus {
            let results = results(&dir, *vcpus)?;
            let shown: Vec<_> = results.iter().filter(|result| self.all || !result.is_right()).cloned().collect();
            print!("{}", hyperbp_report::hostile_table(&shown));
            for result in &results {
                println!("{}", line(result));
            }
            right &= shown.iter().all(hyperbp_report::Hostile::is_right);
        }
        println!("Results:  {}", dir.display());
        ensure!(right, "the guest has found something: see the tables");
        Ok(())
    }
}

/// What has come of a mechanism, in a line.
pub(crate) fn line(result: &hyperbp_report::Hostile) -> String {
    let executions: u64 = result.probes.iter().map(|probe| probe.executions).sum();
    let lost: u64 = result.probes.iter().map(|probe| probe.lost).sum();
    format!(
        "{}, {} vCPUs: {} of {} probes of a hostile guest found nothing; {executions} executions, {lost} lost",
        result.mechanism,
        result.vcpus,
        result.probes.len() - result.wrong().count(),
        result.probes.len(),
    )
}

/// What the job has left of the guest with so many vCPUs.
pub(crate) fn results(dir: &Path, vcpus: u32) -> Result<Vec<hyperbp_report::Hostile>> {
    let file = dir.join(vcpus.to_string()).join("hostile.json");
    let json = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    hyperbp_report::hostile_from_json(&json)
}
