//! The command line.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use hyperbp_report::{Kind, Workload};

use crate::elsewhere::Program;

const EXAMPLES: &str = "\
Examples:
  hyperbp-bench run --domain bench --out results
      Everything, in the domain `bench`: it must run the benchmark guest (bench/guest).
  hyperbp-bench run --domain 3 --out results --mechanism emulate --workload exec_bp --samples 10000
      Only this, in domain number 3.

Exit codes: 0 fine, 2 bad arguments, 3 no such domain, 4 a domain without altp2m=external, 5 no permission or not in dom0,
6 a monitor of this domain was killed: run `hyperbp-bench recover`, 1 anything else. Whatever it is, and also after Ctrl-C,
no breakpoint is left behind in the domain.";

const STORM_EXAMPLES: &str = "\
Examples:
  hyperbp-bench storm --domain bench --mechanism auto --count 10000
      30,000 hits for each virtual CPU, with a table of what was lost, doubled, and seen by the guest.

Exit code 1 if a hit was lost or doubled by a mechanism that must not, or if the guest saw a breakpoint.";

const HOSTILE_HELP: &str = "\
Each probe of the guest runs without breakpoints first, and then with them, and must see the same: registers, flags, memory,
exceptions with their frames. The monitor must be told of each execution once.

Examples:
  hyperbp-bench hostile --domain bench --config /etc/xen/bench.cfg
      Everything under every mechanism, with a table for each. A guest that does not survive a probe is created again.
  hyperbp-bench hostile --domain bench --mechanism auto --probe single-step
      Under one mechanism, the probes whose names begin so.

Exit code 1 if the guest has seen a breakpoint, or if a hit was lost or doubled by a mechanism that must not.";

const WAITING_HELP: &str = "\
Examples:
  hyperbp-bench waiting --domain bench --seconds 10
      CPU time of dom0 and of the guest, in which nothing else is to run: without hits, with one a second, and with as many as
      there can be; without a monitor, with one that only sleeps, and with one that waits as hyperbp does.

Exit code 1 if a monitor without hits takes more than 1 % of a CPU, or if one that sleeps does better with any of the others.";

const TRACE_HELP: &str = "\
Examples:
  hyperbp-bench trace --domain web --symbols System.map --function vfs_read --function vfs_write --for 10
      Ten seconds of reads and writes. Without --for, until Ctrl-C.
  hyperbp-bench trace --domain web --function 0x1234560
      Any instruction of any guest, by its guest-physical address: that one must not move.

Needs no more than altp2m=\"external\" in the domain's configuration. The domain is not paused but for a moment, and no
breakpoint is left behind, also after Ctrl-C.";

const RECOVER_HELP: &str = "\
A monitor that is killed (SIGKILL, the OOM killer, a crash) cannot take its breakpoints out. The domain stands still at the
next one, or at the next read of a page that is guarded; it sees none of them. This lets it run on, unmodified.

What is to be undone is in the monitor's ledger, /run/hyperbp/NUMBER.ledger. The guest may have been given breakpoints by any
program that keeps one. It is an error if that program is still alive, or any other whose events the domain's are: --force
takes them from it. Exit code 0 also if there is nothing to do.";

/// Measures what a breakpoint hit costs, from inside a guest: bpbench's workloads with every mechanism of hyperbp.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Attach also to a domain whose guest may switch views itself (altp2m="mixed" or "limited"), and so escape
    #[arg(long, global = true)]
    pub(crate) allow_guest_altp2m: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Measure in a domain that runs the benchmark guest
    Run(Run),
    /// Check every combination of placement, step-over and concealment in such a domain
    Check(Check),
    /// Let all virtual CPUs of such a domain execute, hash and write a page with breakpoints at once, and count
    Storm(Storm),
    /// Let such a domain try everything to see, escape or break breakpoints
    Hostile(Hostile),
    /// Restore a domain whose monitor was killed: breakpoints, guards, views, steps, waiting virtual CPUs
    Recover(Recover),
    /// Count calls of functions of the kernel that runs in any domain
    Trace(Trace),
    /// Measure what it takes of the machine that a monitor waits
    Waiting(Waiting),
    /// Check what the monitor does to memory, views and limits that are not its own, in such a domain
    CheckDomain(CheckDomain),
    /// Wait until the benchmark guest has ended a storm without a monitor, and check what it has counted
    Settle(Settle),
}

#[derive(Debug, Args)]
#[command(after_help = TRACE_HELP)]
pub(crate) struct Trace {
    /// Name or number of the domain
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: String,

    /// The function: a name in the symbols, or a guest-physical address, 0x...; may be repeated or a list
    #[arg(long = "function", value_name = "NAME", required = true, value_delimiter = ',')]
    pub(crate) functions: Vec<String>,

    /// System.map of the guest's Linux kernel, or what /proc/kallsyms says in the guest
    #[arg(long, value_name = "FILE")]
    pub(crate) symbols: Option<PathBuf>,

    /// Count from the first call of this function, and end with its second
    #[arg(long, value_name = "NAME")]
    pub(crate) between: Option<String>,

    /// End after this time, in seconds
    #[arg(long = "for", value_name = "SECONDS")]
    pub(crate) limit: Option<u64>,

    /// How the breakpoints work
    #[arg(long, value_name = "M", default_value = "auto")]
    pub(crate) mechanism: String,

    /// File for the counts as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = RECOVER_HELP)]
pub(crate) struct Recover {
    /// Name or number of the domain
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: String,

    /// Take the domain's events even from a monitor that lives
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
#[command(after_help = WAITING_HELP)]
pub(crate) struct Waiting {
    /// Name or number of the domain
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: String,

    /// How long each is measured
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) seconds: u64,

    /// Directory for waiting.json
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,

    /// How to show progress
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) progress: Progress,
}

#[derive(Debug, Args)]
pub(crate) struct CheckDomain {
    /// Name or number of the domain
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: String,

    /// What to check
    #[arg(value_enum)]
    pub(crate) what: DomainCheck,

    /// A frame that is RAM of the guest's, or becomes it, to see that it stays so; may be repeated
    #[arg(long = "ram", value_name = "GFN")]
    pub(crate) ram: Vec<String>,

    /// How many pages have breakpoints
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) pages: u64,

    /// The image that a domain is saved to
    #[arg(long, value_name = "FILE", default_value = "/tmp/image")]
    pub(crate) image: PathBuf,

    /// How the breakpoints of a domain that is saved work
    #[arg(long, value_name = "M", default_value = "auto")]
    pub(crate) mechanism: String,

    /// From one of these pages to the next, in pages
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) stride: u64,
}

/// See [`CheckDomain`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DomainCheck {
    /// No RAM of the guest's is replaced or freed
    Memory,
    /// Altp2m and another tool's views are left as they were; running out of views is told
    Views,
    /// A memory limit that somebody sets meanwhile stays
    Limit,
    /// The number of pages with breakpoints changes neither what one more costs nor what a hit costs
    Pages,
    /// Only set breakpoints in so many pages
    Insert,
    /// Interpreted writes to a ROM are dropped
    Rom,
    /// Interpreted writes are in Xen's record of written pages
    LogDirty,
    /// A virtual CPU goes on whose own INT3 Xen does not deliver
    RefusedInjection,
    /// A trace of a domain that crashes ends, with its counts. The guest does not survive this
    Crash,
    /// The same for a triple fault
    TripleFault,
    /// `xl save` of a domain that is traced. It is gone then
    Save,
    /// `xl save -c` of a domain that is traced: the trace comes back
    SaveAndResume,
}

#[derive(Debug, Args)]
pub(crate) struct Settle {
    /// Name or number of the domain
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: String,

    /// Calls each virtual CPU was asked for, in every storm since the guest began
    #[arg(long, value_name = "N")]
    pub(crate) count: u32,
}

#[derive(Debug, Args)]
#[command(after_help = STORM_EXAMPLES)]
pub(crate) struct Storm {
    /// Name or number of the domain
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: String,

    /// Only under this mechanism; may be repeated. Without it, under every combination there is
    #[arg(long = "mechanism", value_name = "M")]
    pub(crate) mechanisms: Vec<String>,

    /// Calls each virtual CPU makes into the page; each is 3 hits on average
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,

    /// Directory for storm.json
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,

    /// In SmartVMI instead: with this program, bench/smartvmi built by `cargo xtask storm --smartvmi`. With the breakpoints
    /// it has itself, too
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) smartvmi: Option<PathBuf>,

    /// How to show progress
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) progress: Progress,
}

#[derive(Debug, Args)]
#[command(after_help = HOSTILE_HELP)]
pub(crate) struct Hostile {
    /// Name of the domain
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: String,

    /// Its configuration, to create it again after a probe that it has not survived
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Only under this mechanism; may be repeated. Without it, under every combination there is
    #[arg(long = "mechanism", value_name = "M")]
    pub(crate) mechanisms: Vec<String>,

    /// Only probes whose names begin with this; may be repeated
    #[arg(long = "probe", value_name = "NAME")]
    pub(crate) probes: Vec<String>,

    /// Directory for hostile.json
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,

    /// How to show progress
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) progress: Progress,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Name or number of the domain
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: String,

    /// Instead, attach and detach this often while all virtual CPUs are busy, and look each time what is left
    #[arg(long, value_name = "TIMES", conflicts_with_all = ["drakvuf", "smartvmi", "vmi_rs"])]
    pub(crate) attach: Option<u32>,

    /// Instead, have the guest give pages back to Xen and get others in their place, this often for each, under load
    #[arg(long, value_name = "ROUNDS", conflicts_with_all = ["attach", "drakvuf", "smartvmi", "vmi_rs"])]
    pub(crate) balloon: Option<u32>,

    /// Only the checks that have this text in what they say
    #[arg(long, value_name = "TEXT")]
    pub(crate) only: Option<String>,

    #[command(flatten)]
    pub(crate) elsewhere: Elsewhere,
}

/// Programs that serve breakpoints from inside other hosts.
#[derive(Debug, Args)]
pub(crate) struct Elsewhere {
    /// DRAKVUF, too: with this program, bench/drakvuf built by `cargo xtask bench --drakvuf`
    #[arg(long, value_name = "PROGRAM")]
    drakvuf: Option<PathBuf>,

    /// SmartVMI, too: with this program, bench/smartvmi built by `cargo xtask bench --smartvmi`
    #[arg(long, value_name = "PROGRAM")]
    smartvmi: Option<PathBuf>,

    /// vmi-rs, too: with this program, bench/vmi-rs
    #[arg(long, value_name = "PROGRAM")]
    vmi_rs: Option<PathBuf>,
}

impl Elsewhere {
    /// Those there are.
    ///
    /// # Errors
    /// If one cannot be run.
    pub(crate) fn programs(&self) -> anyhow::Result<Vec<Program<'_>>> {
        let named = [(Host::Drakvuf, &self.drakvuf), (Host::Smartvmi, &self.smartvmi), (Host::VmiRs, &self.vmi_rs)];
        named.into_iter().filter_map(|(host, path)| Some(Program::new(host, path.as_deref()?))).collect()
    }
}

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Run {
    /// Name or number of the domain
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: String,

    /// Directory for results.json and the samples
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// What this machine is: with `bochs`, a tick is an instruction
    #[arg(long, value_enum, default_value = "xen")]
    pub(crate) machine: MachineKind,

    /// Measure only in this host; may be repeated
    #[arg(long = "host", value_name = "H", value_enum)]
    pub(crate) hosts: Vec<Host>,

    /// Measure only this backend; may be repeated
    #[arg(long = "backend", value_name = "B", value_enum)]
    pub(crate) backends: Vec<Backend>,

    /// Measure only this mechanism: none, skip, auto, repair, view-step, view-fast-step, emulate, interpret, or
    /// PLACEMENT+STEP-OVER+CONCEALMENT; may be repeated
    #[arg(long = "mechanism", value_name = "M")]
    pub(crate) mechanisms: Vec<String>,

    /// Measure only this workload: timer, exec_bp, exec_page, read_bp, read_page; may be repeated
    #[arg(long = "workload", value_name = "W", value_parser = workload)]
    pub(crate) workloads: Vec<Workload>,

    /// Samples of each workload
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) samples: u32,

    /// Watch the ring for so many microseconds before sleeping, while that pays; 0: never. At most 10000
    #[arg(long, value_name = "US", default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub(crate) watch: u32,

    /// Never have Xen wait
    #[arg(long)]
    pub(crate) no_halt: bool,

    /// Samples of read_page, which takes 512 hits a sample
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) page_samples: u32,

    #[command(flatten)]
    pub(crate) elsewhere: Elsewhere,

    /// How to show progress
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) progress: Progress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MachineKind {
    Xen,
    Bochs,
}

impl From<MachineKind> for Kind {
    fn from(kind: MachineKind) -> Self {
        match kind {
            MachineKind::Xen => Self::Xen,
            MachineKind::Bochs => Self::Bochs,
        }
    }
}

/// Who owns the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Host {
    /// This program
    Runner,
    /// This program, with nothing but a bare loop
    Floor,
    /// DRAKVUF
    Drakvuf,
    /// SmartVMI
    Smartvmi,
    /// vmi-rs
    VmiRs,
}

impl Host {
    /// How it is called in messages.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Runner => "the runner",
            Self::Floor => "the floor",
            Self::Drakvuf => "DRAKVUF",
            Self::Smartvmi => "SmartVMI",
            Self::VmiRs => "vmi-rs",
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Runner => "runner",
            Self::Floor => "floor",
            Self::Drakvuf => "drakvuf",
            Self::Smartvmi => "smartvmi",
            Self::VmiRs => "vmi-rs",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    /// The crate
    Hyperbp,
    /// The least a monitor has to do
    Floor,
    /// What DRAKVUF, SmartVMI or vmi-rs has itself
    Original,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hyperbp => "hyperbp",
            Self::Floor => "floor",
            Self::Original => "original",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Progress {
    /// For people, on stderr
    Text,
    /// `@progress DONE TOTAL TEXT` lines on stdout, for programs
    Lines,
}

impl Progress {
    /// Tells how much is done, of how much, and what comes next.
    pub(crate) fn report(self, done: u64, total: u64, text: &str) {
        match self {
            Self::Lines => println!("@progress {done} {total} {text}"),
            Self::Text => eprintln!("[{done}/{total}] {text}"),
        }
    }
}

fn workload(name: &str) -> Result<Workload, String> {
    Workload::ALL.into_iter().find(|workload| workload.name() == name).ok_or_else(|| {
        let known: Vec<_> = Workload::ALL.iter().map(|workload| workload.name()).collect();
        format!("use one of {}", known.join(", "))
    })
}
