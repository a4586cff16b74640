//! `cargo xtask bench`

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use clap::builder::PossibleValuesParser;
use hyperbp_lab::plan::{self, Selection};
use hyperbp_lab::protocol::{Message, Parser};
use hyperbp_lab::{Elsewhere, Host, Lab, Outcome, Program, Progress};
use hyperbp_report::{About, Collection};

use crate::elsewhere::{self, Skipped};
use crate::report;

/// What the runner measures besides the core's mechanisms.
const OTHERS: &[&str] = &["none", "skip"];

/// What `--quick` measures: enough to see the order of things.
const QUICK: (u64, u64) = (100, 4);

const EXAMPLES: &str = "\
Examples:
  cargo xtask bench
      Everything, in an emulated machine that is built first. Needs Debian 12, and a network the first time.
  cargo xtask bench --quick
      The same with fewer samples.
  cargo xtask bench --mechanism emulate --mechanism view-fast-step --workload exec_bp
      Only these.
  cargo xtask bench --cpus 2
      dom0 and the guest have a CPU each.
  cargo xtask bench --drakvuf ../drakvuf/build
      Measure in DRAKVUF, too: this is Meson's build directory, with DRAKVUF built in it.
  cargo xtask bench --smartvmi ../smartvmi/build
      Measure in SmartVMI, too: this is CMake's build directory of its vmicore, with vmicore built in it.
  cargo xtask bench --domain bench
      On this machine: run it in dom0 of a Xen with `altp2m=1`, with the benchmark guest running as the domain `bench`.

Results are in target/bench: report.html, results.json, pictures, samples/, and bpbench/ for the scripts of the bpbench study.
In the emulator a tick is an instruction; it knows no cost of a VM exit, a cache or a TLB miss.";

/// Measure what a breakpoint hit costs with each mechanism, and print a table
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Bench {
    /// Take fewer samples
    #[arg(long, conflicts_with_all = ["samples", "page_samples"])]
    quick: bool,

    /// Measure only this mechanism: none, skip, auto, repair, view-step, view-fast-step, emulate, interpret, or
    /// PLACEMENT+STEP-OVER+CONCEALMENT; may be repeated
    #[arg(long = "mechanism", value_name = "M", value_parser = mechanism)]
    mechanisms: Vec<String>,

    /// Measure only in this host; may be repeated
    #[arg(long = "host", value_name = "H", value_parser = PossibleValuesParser::new(plan::HOSTS))]
    hosts: Vec<String>,

    /// Measure only this backend: the crate, the least a monitor has to do, or what DRAKVUF and SmartVMI have themselves; may be
    /// repeated
    #[arg(long = "backend", value_name = "B", value_parser = PossibleValuesParser::new(plan::BACKENDS))]
    backends: Vec<String>,

    /// Measure only this workload; may be repeated
    #[arg(long = "workload", value_name = "W", value_parser = PossibleValuesParser::new(plan::WORKLOADS))]
    workloads: Vec<String>,

    /// Samples of each workload
    #[arg(long, value_name = "N")]
    samples: Option<u64>,

    /// Samples of read_page, which takes 512 hits a sample
    #[arg(long, value_name = "N")]
    page_samples: Option<u64>,

    /// CPUs of the emulated machine; with 2, dom0 and the guest have one each
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=2))]
    cpus: u32,

    /// Emulated machines that run at the same time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    jobs: u8,

    /// Measure this running domain of the Xen this machine runs, instead of emulating one
    #[arg(long, value_name = "NAME", conflicts_with_all = ["cpus", "jobs"])]
    domain: Option<String>,

    #[command(flatten)]
    elsewhere: elsewhere::Trees,

    /// Where results go [default: target/bench]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Ask Debian's mirror for newer packages
    #[arg(long)]
    update: bool,
}

/// A name of a mechanism, checked.
pub(crate) fn mechanism(name: &str) -> Result<String, hyperbp::Error> {
    if !OTHERS.contains(&name) {
        name.parse::<hyperbp::Mechanism>()?;
    }
    Ok(name.to_owned())
}

impl Bench {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let parts = crate::target().join("bench/parts");
        let out = self.out.clone().unwrap_or_else(|| crate::target().join("bench"));
        // Parts of an earlier run must not be taken for this one's.
        if parts.exists() {
            std::fs::remove_dir_all(&parts).with_context(|| format!("cannot remove {}", parts.display()))?;
        }
        let programs = self.elsewhere.build(&lab)?;
        let skipped = self.skipped(&programs);
        if plan::machines(&self.selection(&programs, Elsewhere::in_dom0)).is_empty() {
            let skipped =
                if skipped.is_empty() { String::new() } else { format!("; skipped: {}", whys(&skipped).join("; ")) };
            bail!("no host has what was selected{skipped}");
        }
        let (collections, label) = match &self.domain {
            Some(domain) => (self.measure_here(&lab, &programs, domain, &parts)?, "xen"),
            None => (self.measure_in_the_lab(&lab, &programs, &parts)?, "bochs"),
        };
        present(collections, label, &self.about(&skipped), &out)?;
        for (_, skipped) in skipped {
            println!("Skipped:  {skipped}");
        }
        Ok(())
    }

    /// Of which hosts the selection cannot be measured, and why.
    fn skipped(&self, programs: &[Elsewhere]) -> Vec<(&'static str, String)> {
        let wants = |names: &[String], name: &str| names.is_empty() || names.iter().any(|wanted| wanted == name);
        let (original, hyperbp) = (wants(&self.backends, plan::ORIGINAL), wants(&self.backends, plan::HYPERBP));
        let skipped = |host: &&'static str| match elsewhere::skipped(host, programs) {
            _ if !wants(&self.hosts, host) => None,
            Some(Skipped::Host(what)) if original || hyperbp => Some((*host, what)),
            Some(Skipped::Hyperbp(what)) if hyperbp => Some((*host, what)),
            _ => None,
        };
        plan::ELSEWHERE.iter().filter_map(skipped).collect()
    }

    /// How these results come about.
    fn about(&self, skipped: &[(&str, String)]) -> About {
        About {
            date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
            command: report::command(),
            versions: report::versions(&self.elsewhere.named()),
            missing: skipped.iter().map(|(host, why)| ((*host).to_owned(), why.clone())).collect(),
        }
    }

    /// `place` says where the runner finds a program.
    fn selection(&self, programs: &[Elsewhere], place: impl Fn(&Elsewhere) -> String) -> Selection {
        let (samples, page_samples) = match self.quick {
            true => (Some(QUICK.0), Some(QUICK.1)),
            false => (self.samples, self.page_samples),
        };
        Selection {
            hosts: self.hosts.clone(),
            backends: self.backends.clone(),
            mechanisms: self.mechanisms.clone(),
            workloads: self.workloads.clone(),
            samples,
            page_samples,
            elsewhere: elsewhere::named(programs, place),
        }
    }

    /// Returns the directories of the collections that were measured.
    fn measure_in_the_lab(&self, lab: &Lab, programs: &[Elsewhere], parts: &Path) -> Result<Vec<PathBuf>> {
        let prepared = lab.prepare(self.update)?;
        let runner = lab.build(Program::Runner, Some(&prepared.sysroot))?;
        let machines = plan::machines(&self.selection(programs, Elsewhere::in_dom0));
        let mut jobs = Vec::new();
        for (n, selections) in (1..).zip(&machines) {
            let mut job = prepared.bench(&format!("bench-{n}"), &runner, selections, self.cpus);
            for program in programs {
                program.put_into(&mut job);
            }
            let image = prepared.image(&job)?;
            jobs.push((job, image));
        }
        let outcomes: Vec<Outcome> = prepared.run(&jobs, self.jobs.into())?;
        let mut collections = Vec::new();
        for ((n, outcome), selections) in outcomes.iter().enumerate().zip(&machines) {
            let dir = parts.join(n.to_string());
            outcome.unpack(&dir)?;
            collections.extend((0..selections.len()).map(|run| dir.join(run.to_string())));
        }
        Ok(collections)
    }

    fn measure_here(&self, lab: &Lab, programs: &[Elsewhere], domain: &str, parts: &Path) -> Result<Vec<PathBuf>> {
        // The system's own Xen is the one that runs; its headers are needed only when they are not installed.
        let sysroot = match Path::new("/usr/include/xenctrl.h").exists() {
            true => None,
            false => Some(lab.sysroot(self.update)?),
        };
        let runner = lab.build(Program::Runner, sysroot.as_deref())?;
        let mut command = Command::new(runner);
        command.args(["run", "--domain", domain, "--progress", "lines", "--out"]).arg(parts);
        let selection = self.selection(programs, |program| program.program.display().to_string());
        command.args(selection.arguments()).stdout(Stdio::piped());
        let task = lab.progress.start("bench");
        let mut child = command.spawn().context("cannot run the runner")?;
        let mut parser = Parser::new();
        for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()) {
            let line = line.context("cannot read what the runner says")?;
            match parser.line(&line) {
                Message::Progress { done, total, text } => task.at(done, total, &text),
                _ => lab.progress.note(&line),
            }
        }
        let status = child.wait()?;
        if !status.success() {
            bail!("the runner failed ({status}); it says why above");
        }
        Ok(vec![parts.to_owned()])
    }
}

/// The reasons alone.
fn whys(skipped: &[(&str, String)]) -> Vec<String> {
    skipped.iter().map(|(_, why)| why.clone()).collect()
}

/// Merges the collections into one in `out`, and prints it.
fn present(dirs: Vec<PathBuf>, label: &str, about: &About, out: &Path) -> Result<()> {
    let mut collections = dirs.iter().map(|dir| Collection::read(dir));
    let mut all = collections.next().context("nothing was selected")??;
    for collection in collections {
        all.merge(collection?)?;
    }
    ensure!(!all.results().runs.is_empty(), "no host has what was selected");
    all.write(out)?;
    let bpbench = out.join("bpbench");
    hyperbp_report::write_bpbench(&bpbench, label, &about.date, &all)?;
    about.write(out)?;
    let report = report::write(out)?;
    println!("{}", hyperbp_report::table(all.results()));
    println!("Results:  {}", out.join("results.json").display());
    println!("Report:   {}", report.display());
    println!("Picture:  {}", out.join("results.svg").display());
    println!("Samples:  {}", out.join("samples").display());
    println!("bpbench:  {}", bpbench.display());
    Ok(())
}
