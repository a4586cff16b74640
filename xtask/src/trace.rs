//! `cargo xtask trace`

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::Args;
use hyperbp::Mechanism;
use hyperbp_lab::{Bench, Host, Job, Lab, Program, Progress, Xen};
use hyperbp_report::Trace as Report;

/// System calls the guest's load makes, as the kernel names the functions that carry them out.
const SYSTEM_CALLS: &[&str] = &[
    "__x64_sys_read",
    "__x64_sys_write",
    "__x64_sys_openat",
    "__x64_sys_close",
    "__x64_sys_newfstatat",
    "__x64_sys_brk",
    "__x64_sys_dup2",
    "__x64_sys_fcntl",
    "__x64_sys_sendfile64",
    "__x64_sys_set_robust_list",
    "__x64_sys_rt_sigreturn",
    "__x64_sys_clone",
    "__x64_sys_execve",
    "__x64_sys_wait4",
    "__x64_sys_exit_group",
];

/// Other functions, and which of the kernel's counters together count their calls.
const COUNTED: &[(&str, &[&str])] = &[
    ("entry_SYSCALL_64", &["sys_enter"]),
    ("vfs_read", &["sys_read", "sys_pread64"]),
    ("vfs_write", &["sys_write", "sys_pwrite64"]),
    ("do_sys_openat2", &["sys_open", "sys_openat", "sys_openat2", "sys_creat"]),
    // Not by sched_process_fork: a fork in which a signal comes is begun again (ERESTARTNOINTR), and only then is one.
    ("kernel_clone", &["sys_clone", "sys_clone3", "sys_fork", "sys_vfork"]),
    ("begin_new_exec", &["sched_process_exec"]),
    ("do_exit", &["sched_process_exit"]),
    ("exc_page_fault", &["page_fault_user", "page_fault_kernel"]),
    ("handle_mm_fault", &["pgfault"]),
];

/// Hot functions that the kernel does not count.
const UNCOUNTED: &[&str] = &["__schedule", "path_lookupat", "kmem_cache_alloc"];

/// What the guest calls when its work begins and when it ends. The kernel begins and ends to count right before.
const BETWEEN: &str = "__x64_sys_times";

/// How many functions have to be hit.
const FUNCTIONS: usize = 20;

/// Trace functions of a Linux guest's kernel while it works with files and processes, and compare what was counted with what
/// the kernel itself has counted
#[derive(Debug, Args)]
pub(crate) struct Trace {
    /// How long the guest works, in seconds of its own time
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,

    /// How the breakpoints work
    #[arg(long, value_name = "M", default_value = "auto", value_parser = crate::bench::mechanism)]
    mechanism: String,

    /// Virtual CPUs of the guest
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=4))]
    vcpus: u32,

    /// CPUs of the emulated machine: if there are several, one is for dom0, the others for the guest
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4))]
    cpus: u32,
}

impl Trace {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(Xen::default(), false)?;
        let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
        let job = self.job(&bench, &runner);
        let image = bench.image(&job)?;
        let outcome = bench.run(&[(job, image)], 1)?.remove(0);
        let dir = crate::target().join("trace");
        outcome.unpack(&dir)?;
        let (trace, checks) = self.results(&dir)?;
        println!("{}", trace.table());
        print!("{checks}");
        println!("Results:  {}", dir.display());
        let failed = checks.lines().filter(|line| !line.starts_with("ok: ")).count();
        ensure!(failed == 0, "{failed} checks failed");
        Ok(())
    }

    /// A short one, under `auto`.
    pub(crate) fn short(seconds: u32) -> Self {
        Self { seconds, mechanism: Mechanism::AUTO.to_string(), vcpus: 2, cpus: 1 }
    }

    /// What the lab is to do.
    pub(crate) fn job(&self, bench: &Bench<'_>, runner: &Path) -> Job {
        let counted = COUNTED.iter().map(|(function, _)| function);
        let functions: Vec<_> = SYSTEM_CALLS.iter().chain(counted).chain(UNCOUNTED).copied().collect();
        let (mechanism, seconds) = (&*self.mechanism, self.seconds);
        let what = hyperbp_lab::Trace { functions: &functions, between: BETWEEN, mechanism, seconds };
        bench.trace(runner, self.cpus, self.vcpus, &what)
    }

    /// What came of it: what was counted, and a line for each check.
    pub(crate) fn results(&self, dir: &Path) -> Result<(Report, String)> {
        let read = |name: &str| {
            let file = dir.join(name);
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
        };
        let trace = Report::from_json(&read("trace.json")?)?;
        let checks = read("checks")? + &compare(&trace, &Said::parse(&read("console")?), self.seconds);
        Ok((trace, checks))
    }
}

/// What the guest has said on its console: see `bench/lab/linux/init`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    /// Calls and events by the kernel's own count.
    counts: BTreeMap<String, u64>,
    /// How long it worked, by its own clock.
    seconds: u64,
    rounds: u64,
    /// Different hashes of what a round has made: 1 if all rounds made the same.
    hashes: u64,
    /// `/proc/sys/kernel/tainted`: not 0 after an oops, a warning or a lockup.
    tainted: Option<u64>,
    /// Warnings and worse that the kernel has logged meanwhile.
    log: Vec<String>,
}

impl Said {
    fn parse(console: &str) -> Self {
        let mut said = Self::default();
        for line in console.lines() {
            let (word, rest) = line.trim_end().split_once(' ').unwrap_or_default();
            let number = rest.parse();
            match (word, number) {
                ("count", _) => {
                    let count = rest.split_once(' ').and_then(|(name, count)| Some((name, count.parse().ok()?)));
                    said.counts.extend(count.map(|(name, count)| (name.to_owned(), count)));
                }
                ("seconds", Ok(seconds)) => said.seconds = seconds,
                ("round", _) => said.rounds += 1,
                ("hashes", Ok(hashes)) => said.hashes = hashes,
                ("tainted", Ok(tainted)) => said.tainted = Some(tainted),
                ("log", _) => said.log.push(rest.to_owned()),
                _ => {}
            }
        }
        said
    }

    /// The sum of those of the counters that have counted anything.
    fn count(&self, counters: &[&str]) -> u64 {
        counters.iter().filter_map(|counter| self.counts.get(*counter)).sum()
    }
}

/// A line for each check, `ok: ` or `FAILED: `.
fn compare(trace: &Report, said: &Said, seconds: u32) -> String {
    let mut lines = String::new();
    let mut check = |holds: bool, what: String| {
        lines.push_str(if holds { "ok: " } else { "FAILED: " });
        lines.push_str(&what);
        lines.push('\n');
    };
    let hit = trace.functions.iter().filter(|function| function.hits > 0).count();
    check(hit >= FUNCTIONS, format!("{hit} functions were called, of {FUNCTIONS} that are to be at least"));
    check(
        said.seconds >= seconds.into(),
        format!("the guest worked for {} s of its time, {} rounds", said.seconds, said.rounds),
    );
    check(said.hashes == 1, format!("every round made the same files ({} different hashes)", said.hashes));
    check(said.tainted == Some(0), format!("no oops, no warning: the kernel is not tainted ({:?})", said.tainted));
    check(said.log.is_empty(), format!("the kernel logged no warning: {:?}", said.log));
    check(trace.failures == 0, format!("Xen refused nothing ({} failures)", trace.failures));
    for function in &trace.functions {
        let (name, hits, served) = (&function.name, function.hits, function.served);
        let sum = served.repair + served.view_step + served.view_fast_step + served.emulate + served.interpret;
        if sum != hits {
            check(false, format!("{name}: {hits} hits, and {sum} of them served"));
        }
        let system_call = name.strip_prefix("__x64_");
        let counters = COUNTED.iter().find(|(function, _)| function == name).map(|(_, counters)| counters.to_vec());
        if let Some(counters) = counters.or_else(|| system_call.map(|name| vec![name])) {
            let count = said.count(&counters);
            check(
                hits == count,
                format!("{name}: {hits} hits, {count} by the kernel's count ({})", counters.join(" + ")),
            );
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperbp_report::{Handling, Served, TracedFunction};

    const CONSOLE: &str = "ready\r
round 1 after 31\r
round 2 after 61\r
seconds 61\r
count sys_read 1000\r
count sys_pread64 7\r
count pgfault 44\r
hashes 1\r
tainted 0\r
log <4>[   12.3] something happened\r
count nonsense\r
done\r
";

    fn function(name: &str, hits: u64) -> TracedFunction {
        let served = Served { interpret: hits, ..Served::default() };
        TracedFunction { name: name.to_owned(), gpa: 0x1000, hits, served, fallbacks: 0, rewritten: 0 }
    }

    #[test]
    fn the_guest_is_understood() {
        let said = Said::parse(CONSOLE);
        assert_eq!((said.seconds, said.rounds, said.hashes, said.tainted), (61, 2, 1, Some(0)));
        assert_eq!(said.log, ["<4>[   12.3] something happened"]);
        assert_eq!(said.counts.len(), 3);
        assert_eq!(said.count(&["sys_read", "sys_pread64", "sys_never"]), 1007);
        assert_eq!(Said::parse(""), Said::default());
    }

    #[test]
    fn what_is_wrong_is_told() {
        let handling = Handling { median: 1, p99: 1, max: 1 };
        let mut trace = Report {
            domain: "linux".to_owned(),
            vcpus: 1,
            mechanism: "auto".to_owned(),
            milliseconds: 61_000,
            functions: vec![function("vfs_read", 1007), function("__x64_sys_read", 1000), function("__schedule", 5)],
            reads: 0,
            writes: 0,
            failures: 0,
            handling,
        };
        let mut said = Said::parse(CONSOLE);
        said.log.clear();
        let failed = |trace: &Report, said: &Said| -> Vec<String> {
            let lines = compare(trace, said, 60);
            lines.lines().filter_map(|line| line.strip_prefix("FAILED: ")).map(str::to_owned).collect()
        };
        assert_eq!(failed(&trace, &said), ["3 functions were called, of 20 that are to be at least"]);
        trace.functions[0].served.interpret -= 1;
        trace.functions[1] = function("__x64_sys_read", 999);
        said.tainted = None;
        let failed = failed(&trace, &said).join("\n");
        for told in ["not tainted", "vfs_read: 1007 hits, and 1006", "__x64_sys_read: 999 hits, 1000 by the kernel"] {
            assert!(failed.contains(told), "{failed}");
        }
    }
}
