//! `cargo xtask bench`

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use hyperbp_lab::bochs::Emulator;
use hyperbp_lab::plan::{self, Selection};
use hyperbp_lab::protocol::{Message, Parser};
use hyperbp_lab::{Elsewhere, Host, Lab, Measure, Options, Program, Progress, Xen};
use hyperbp_report::{About, Breakdown, Collection};

use crate::elsewhere::{self, Programs, Skipped};
use crate::{report, ticks};

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
  cargo xtask bench --xen 4.20
      With a newer Xen, and in vmi-rs, too: that needs it.
  cargo xtask bench --quick --ticks
      And say of each hit which of its ticks are the guest's, Xen's, dom0's kernel's and the monitor's.
  cargo xtask bench --quick --guest linux
      The breakpoint is in a program in a Linux guest.
  cargo xtask bench --drakvuf ../drakvuf/build
      Measure in DRAKVUF, too: this is Meson's build directory, with DRAKVUF built in it.
  cargo xtask bench --smartvmi ../smartvmi/build
      Measure in SmartVMI, too: this is CMake's build directory of its vmicore, with vmicore built in it.
  cargo xtask bench --quick --host runner --watch 0 --no-halt --xen-option sched=credit2
      hyperbp asleep between hits, and another scheduler in Xen.
  cargo xtask bench --domain bench
      On this machine: run it in dom0 of a Xen with `altp2m=1`, with the benchmark guest running as the domain `bench`, or the
      program hyperbp-guest in it. docs/real-machines.md tells how.

Results are in target/bench (with --guest linux, target/bench-linux): report.html, results.json, pictures, samples/, and bpbench/ for the scripts of the bpbench study.
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

    /// Measure only this backend: the crate, the least a monitor has to do, or what DRAKVUF, SmartVMI and vmi-rs have
    /// themselves; may be repeated
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

    /// Xen's version in the emulated machine: 4.17, or 4.20, with which vmi-rs is measured, too
    #[arg(long, value_name = "VERSION", default_value_t)]
    xen: Xen,

    /// What executes the breakpoint: a kernel of ours, or a program in Linux
    #[arg(long, value_enum, default_value = "pvh", conflicts_with = "domain")]
    guest: Guest,

    /// Emulated machines that run at the same time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    jobs: u8,

    /// Measure this running domain of the Xen this machine runs, instead of emulating one
    #[arg(long, value_name = "NAME", conflicts_with_all = ["cpus", "jobs"])]
    domain: Option<String>,

    /// hyperbp's runner may watch the ring for so many microseconds before it sleeps, while that pays; 0: never
    #[arg(long, value_name = "US", value_parser = clap::value_parser!(u32).range(0..=10_000))]
    watch: Option<u32>,

    /// hyperbp's runner may not have Xen wait
    #[arg(long)]
    no_halt: bool,

    #[command(flatten)]
    tuning: Tuning,

    #[command(flatten)]
    elsewhere: elsewhere::Trees,

    /// With --guest linux: the profile of its kernel, with which DRAKVUF looks up the process of each hit
    #[arg(long, value_name = "FILE", requires = "drakvuf", conflicts_with = "domain")]
    profile: Option<PathBuf>,

    /// Count where the ticks go, too: how many of them are the guest's, Xen's, dom0's kernel's and the monitor's, VM exits,
    /// hypercalls and system calls. Takes twice the time
    #[arg(long, conflicts_with = "domain")]
    ticks: bool,

    /// Where results go [default: target/bench]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Ask Debian's mirror for newer packages
    #[arg(long)]
    update: bool,
}

/// How the emulated machine is set up.
#[derive(Debug, Args)]
#[command(next_help_heading = "Tuning the emulated machine")]
struct Tuning {
    /// Another option for Xen, such as sched=null; may be repeated
    #[arg(long = "xen-option", value_name = "OPTION", conflicts_with = "domain")]
    xen_options: Vec<String>,

    /// Another option for dom0's kernel, such as preempt=none; may be repeated
    #[arg(long = "dom0-option", value_name = "OPTION", conflicts_with = "domain")]
    dom0_options: Vec<String>,

    /// Another line for the guest's configuration, such as 'cpu_weight = 256'; may be repeated
    #[arg(long = "guest-option", value_name = "LINE", conflicts_with = "domain")]
    guest_options: Vec<String>,
}

impl Tuning {
    fn options(&self) -> Options {
        let Self { xen_options: xen, dom0_options: dom0, guest_options: guest } = self;
        Options { xen: xen.clone(), dom0: dom0.clone(), guest: guest.clone() }
    }
}

/// The benchmark guest in the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Guest {
    /// `bench/guest`
    Pvh,
    /// `bench/guest/program`
    Linux,
}

/// A name of a mechanism, checked.
pub(crate) fn mechanism(name: &str) -> Result<String, hyperbp::Error> {
    if !OTHERS.contains(&name) {
        name.parse::<hyperbp::Mechanism>()?;
    }
    Ok(name.to_owned())
}

/// Whether something with this name was selected.
fn wants(names: &[String], name: &str) -> bool {
    names.is_empty() || names.iter().any(|wanted| wanted == name)
}

impl Bench {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let default = match self.guest {
            Guest::Pvh => "bench",
            Guest::Linux => "bench-linux",
        };
        let parts = crate::target().join(default).join("parts");
        let out = self.out.clone().unwrap_or_else(|| crate::target().join(default));
        // Parts of an earlier run must not be taken for this one's.
        if parts.exists() {
            std::fs::remove_dir_all(&parts).with_context(|| format!("cannot remove {}", parts.display()))?;
        }
        let mut programs = self.elsewhere.build(&lab)?;
        // When it is the system's own Xen that runs, its headers are needed only if they are not installed.
        let installed = self.domain.is_some() && Path::new("/usr/include/xenctrl.h").exists();
        let sysroot = if installed { None } else { Some(lab.sysroot(self.xen, self.update)?) };
        if wants(&self.hosts, plan::VMI_RS) && wants(&self.backends, plan::ORIGINAL) {
            programs.add_vmi_rs(&lab, sysroot.as_deref());
        }
        let (skipped, programs) = (self.skipped(&programs), programs.all);
        if plan::machines(&self.selection(&programs, Elsewhere::in_dom0)).is_empty() {
            let skipped =
                if skipped.is_empty() { String::new() } else { format!("; skipped: {}", whys(&skipped).join("; ")) };
            bail!("no host has what was selected{skipped}");
        }
        let linux = self.guest == Guest::Linux;
        ensure!(self.profile.is_none() || linux, "--profile is for --guest linux: the other guest is no system's");
        ensure!(!self.ticks || self.cpus == 1, "--ticks is for one CPU: with more, several instructions share a tick");
        let (collections, label, ticks) = match &self.domain {
            Some(domain) => (self.measure_here(&lab, sysroot.as_deref(), &programs, domain, &parts)?, "xen", None),
            None => {
                let (collections, ticks) = self.measure_in_the_lab(&lab, &programs, &parts)?;
                (collections, "bochs", ticks)
            }
        };
        // The report shows where the ticks went, too.
        ticks::present(ticks, &out)?;
        present(collections, label, &self.about(&skipped), &out)?;
        for (_, skipped) in skipped {
            println!("Skipped:  {skipped}");
        }
        Ok(())
    }

    /// Of which hosts the selection cannot be measured, and why.
    fn skipped(&self, programs: &Programs) -> Vec<(&'static str, String)> {
        let (original, hyperbp) = (wants(&self.backends, plan::ORIGINAL), wants(&self.backends, plan::HYPERBP));
        let skipped = |host: &&'static str| match programs.skipped(host) {
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
            watch: self.watch,
            no_halt: self.no_halt,
            elsewhere: Elsewhere::named(programs, place),
            stock: Elsewhere::stock(programs),
        }
    }

    /// Returns the directories of the collections that were measured, and where the ticks went if that was asked for.
    fn measure_in_the_lab(
        &self,
        lab: &Lab,
        programs: &[Elsewhere],
        parts: &Path,
    ) -> Result<(Vec<PathBuf>, Option<Breakdown>)> {
        let emulator = if self.ticks { Emulator::Counting } else { Emulator::Plain };
        let prepared = lab.prepare_for(emulator, self.xen, false)?;
        let runner = lab.build(Program::Runner, Some(&prepared.sysroot))?;
        let selection = self.selection(programs, Elsewhere::in_dom0);
        let program = if self.guest == Guest::Linux { Some(lab.program()?) } else { None };
        let (program, options) = (program.as_deref(), self.tuning.options());
        let (cpus, parallel) = (self.cpus, self.jobs.into());
        let profile = self.profile.as_deref();
        let measure = Measure { selection: &selection, programs, program, profile, cpus, options, parallel };
        let (mut collections, mut rows) = (Vec::new(), Vec::new());
        for machine in prepared.measure(&runner, &measure, parts)? {
            if self.ticks {
                rows.extend(ticks::rows(&machine.windows, &machine.collections)?);
            }
            collections.extend(machine.collections);
        }
        Ok((collections, self.ticks.then(|| Breakdown::new(rows))))
    }

    fn measure_here(
        &self,
        lab: &Lab,
        sysroot: Option<&Path>,
        programs: &[Elsewhere],
        domain: &str,
        parts: &Path,
    ) -> Result<Vec<PathBuf>> {
        let runner = lab.build(Program::Runner, sysroot)?;
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
    let all = Collection::read_all(&dirs)?;
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
