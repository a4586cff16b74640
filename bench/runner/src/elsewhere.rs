//! The hosts `drakvuf`, `smartvmi` and `vmi-rs`: a program with DRAKVUF (`bench/drakvuf`), SmartVMI (`bench/smartvmi`) or vmi-rs
//! (`bench/vmi-rs`) in it owns the ring, and this one only looks on.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyperbp::{Gpa, Mechanism};

use crate::cli::Host;
use crate::core::Idle;
use crate::ring::PATIENCE;

/// How long it may take to attach, and to leave. In the emulator a second of its time is some seconds of ours.
const ATTACHING: Duration = Duration::from_secs(120);
const LEAVING: Duration = Duration::from_secs(60);

/// What serves the breakpoint there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// What the host has itself.
    Original(Original),
    /// The core, loaded in the host.
    Hyperbp(Mechanism),
}

/// What a host has itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Original {
    Repair,
    ViewStep,
    ViewFastStep,
}

impl Original {
    /// The core's name for it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Repair => "repair",
            Self::ViewStep => "view-step",
            Self::ViewFastStep => "view-fast-step",
        }
    }
}

impl Backend {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Original(_) => "original",
            Self::Hyperbp(_) => "hyperbp",
        }
    }

    pub(crate) fn mechanism(self) -> String {
        match self {
            Self::Original(original) => original.name().to_owned(),
            Self::Hyperbp(mechanism) => mechanism.to_string(),
        }
    }
}

/// The program, and what it can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Program<'a> {
    host: Host,
    path: &'a Path,
    has_hyperbp: bool,
}

impl<'a> Program<'a> {
    /// Asks the program what it can do.
    ///
    /// # Errors
    /// If it cannot be run.
    pub(crate) fn new(host: Host, path: &'a Path) -> Result<Self> {
        let asked = Command::new(path).arg("--backends").stdin(Stdio::null()).output();
        let said = asked.with_context(|| format!("cannot run {}", path.display()))?;
        let stderr = String::from_utf8_lossy(&said.stderr);
        ensure!(said.status.success(), "{} has ended ({}): {}", path.display(), said.status, stderr.trim());
        let has_hyperbp = String::from_utf8_lossy(&said.stdout).lines().any(|backend| backend == "hyperbp");
        Ok(Self { host, path, has_hyperbp })
    }

    /// The host that is in it.
    pub(crate) fn host(self) -> Host {
        self.host
    }

    /// What its host has itself. (DRAKVUF's option for the second is `--fast-singlestep`.)
    pub(crate) fn originals(self) -> &'static [Original] {
        match self.host {
            Host::Drakvuf => &[Original::ViewStep, Original::ViewFastStep],
            Host::Smartvmi => &[Original::Repair],
            Host::VmiRs => &[Original::ViewFastStep],
            Host::Runner | Host::Floor => &[],
        }
    }

    /// The program's name in messages: the host's.
    fn name(self) -> &'static str {
        self.host.title()
    }

    /// Whether the core is loaded in its host.
    pub(crate) fn has_hyperbp(self) -> bool {
        self.has_hyperbp
    }
}

/// How often its traps were told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// That a breakpoint was hit, in the order they were asked for.
    pub(crate) hits: Vec<u64>,
    /// That its page was about to be read or written.
    pub(crate) before: u64,
    /// That it has been written.
    pub(crate) after: u64,
}

impl Counts {
    /// What the program says at last: one number of hits, or a list of them; and if it watches pages, how often it was told.
    fn parse(line: &str) -> Option<Self> {
        let hits = line.strip_prefix("{\"hits\":")?.strip_suffix('}')?;
        let numbers = |list: &str| list.split(',').map(|number| number.parse().ok()).collect::<Option<Vec<u64>>>();
        if let Some(list) = hits.strip_prefix('[') {
            return Some(Self { hits: numbers(list.strip_suffix(']')?)?, before: 0, after: 0 });
        }
        let (hits, rest) = hits.split_once(",\"before\":")?;
        let (before, after) = rest.split_once(",\"after\":")?;
        Some(Self { hits: numbers(hits)?, before: before.parse().ok()?, after: after.parse().ok()? })
    }
}

/// Has the program serve breakpoints at `at`, and memory traps on their page if it is to be `watched`, as long as
/// `idle` says, and leave. Returns how often they were told. (Only SmartVMI's takes several addresses, and only DRAKVUF's watches.)
///
/// # Errors
/// If it cannot attach, ends before it is told to, or does not end when it is: with what it said.
pub(crate) fn run(
    program: Program<'_>,
    domain: u32,
    at: &[Gpa],
    backend: Backend,
    watched: bool,
    idle: &mut Idle<'_>,
) -> Result<Counts> {
    let mut command = Command::new(program.path);
    let at: Vec<_> = at.iter().map(|gpa| format!("{:#x}", gpa.0)).collect();
    command.args(["--domain", &domain.to_string(), "--gpa", &at.join(",")]);
    command.args(["--backend", backend.name(), "--mechanism", &backend.mechanism()]);
    if watched {
        command.args(["--watch", "page"]);
    }
    let mut running = Running::start(program.name(), command, domain)?;
    running.until(ATTACHING, is_ready)?;
    while idle().is_some() {
        if let Some(status) = running.try_wait()? {
            let recover = recover(domain);
            bail!(running.problem(&format!("has ended in the middle of a measurement ({status}); {recover}")));
        }
        thread::sleep(PATIENCE);
    }
    running.leave()
}

/// What to do when it has not left by itself.
fn recover(domain: u32) -> String {
    format!("if the domain stands still, run `hyperbp-bench recover --domain {domain}`")
}

/// Whether the program says that the breakpoint is set.
fn is_ready(line: &str) -> Option<()> {
    (line == "ready").then_some(())
}

/// The running program. If it is dropped without [`leave`](Self::leave), it is told to leave all the same.
struct Running {
    name: &'static str,
    child: Child,
    domain: u32,
    lines: Receiver<Line>,
    /// What it has said that nobody waited for: most likely why something goes wrong.
    said: String,
}

/// What it says.
enum Line {
    Out(String),
    Err(String),
}

impl Running {
    fn start(name: &'static str, mut command: Command, domain: u32) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let (sender, lines) = mpsc::channel();
        forward(child.stdout.take(), sender.clone(), Line::Out);
        forward(child.stderr.take(), sender, Line::Err);
        Ok(Self { name, child, domain, lines, said: String::new() })
    }

    /// Waits until it says something that `understand` understands.
    fn until<T>(&mut self, limit: Duration, understand: impl Fn(&str) -> Option<T>) -> Result<T> {
        let end = Instant::now() + limit;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Line::Out(line)) => match understand(&line) {
                    Some(understood) => return Ok(understood),
                    None => self.keep(&line),
                },
                Ok(Line::Err(line)) => self.keep(&line),
                Err(RecvTimeoutError::Timeout) => bail!(self.problem(&format!("says nothing for {limit:?}"))),
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.wait()?;
                    bail!(self.problem(&format!("has ended ({status})")));
                }
            }
        }
    }

    /// Tells it to leave, and returns its counts.
    fn leave(mut self) -> Result<Counts> {
        drop(self.child.stdin.take());
        let counts = self.until(LEAVING, Counts::parse)?;
        let status = self.wait()?;
        ensure!(status.success(), self.problem(&format!("has ended ({status})")));
        Ok(counts)
    }

    fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        let end = Instant::now() + LEAVING;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < end, self.problem(&format!("does not end within {LEAVING:?}")));
            thread::sleep(PATIENCE);
        }
    }

    fn keep(&mut self, line: &str) {
        if !self.said.is_empty() {
            self.said.push_str(": ");
        }
        self.said.push_str(line.trim());
    }

    /// What is wrong with it, and what it has said itself.
    fn problem(&mut self, what: &str) -> String {
        while let Ok(Line::Out(line) | Line::Err(line)) = self.lines.recv_timeout(PATIENCE) {
            self.keep(&line);
        }
        let Self { name, said, .. } = self;
        if said.is_empty() { format!("{name} {what}") } else { format!("{name} {what}: {said}") }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        if self.wait().is_err() {
            log::warn!("{} does not leave, and is killed; {}", self.name, recover(self.domain));
            // It may end by itself at this very moment.
            let _ = self.child.kill().and_then(|()| self.child.wait());
        }
    }
}

/// Passes on each line that comes out of `from`, until it ends.
fn forward(from: Option<impl Read + Send + 'static>, to: Sender<Line>, line: fn(String) -> Line) {
    let Some(from) = from else { return };
    thread::spawn(move || {
        for said in BufReader::new(from).lines().map_while(Result::ok) {
            if to.send(line(said)).is_err() {
                break;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that says these things, and then waits until its input ends.
    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    /// Waits until it is ready, and tells it to leave.
    fn serve(script: &str) -> Result<Counts> {
        let mut running = Running::start("DRAKVUF", shell(script), 1)?;
        running.until(Duration::from_secs(10), is_ready)?;
        running.leave()
    }

    #[test]
    fn it_is_told_to_leave_and_says_its_count() {
        let script =
            "echo some library says this; echo ready; read line; echo '{\"hits\":1048577,\"before\":2,\"after\":1}'";
        assert_eq!(serve(script).unwrap(), Counts { hits: vec![1_048_577], before: 2, after: 1 });
    }

    #[test]
    fn several_breakpoints_have_a_count_each() {
        let hits = |line| Counts::parse(line).map(|counts| counts.hits);
        assert_eq!(hits("{\"hits\":[1,20,3]}"), Some(vec![1, 20, 3]));
        assert_eq!(hits("{\"hits\":[7]}"), Some(vec![7]));
        for other in ["", "ready", "{\"hits\":[]}", "{\"hits\":[1,]}", "{\"hits\":[1]", "{\"hits\":1}"] {
            assert_eq!(hits(other), None, "{other}");
        }
    }

    #[test]
    fn why_it_failed_is_told() {
        let error = |script| serve(script).unwrap_err().to_string();
        assert_eq!(error("echo no such domain >&2; exit 1"), "DRAKVUF has ended (exit status: 1): no such domain");
        assert_eq!(error("echo ready; kill -9 $$"), "DRAKVUF has ended (signal: 9 (SIGKILL))");
        let count =
            error("echo ready; read line; echo '{\"hits\":3,\"before\":0,\"after\":0}'; echo too late >&2; exit 1");
        assert_eq!(count, "DRAKVUF has ended (exit status: 1): too late");
        let silent =
            Running::start("DRAKVUF", shell("read line"), 1).unwrap().until(Duration::from_millis(10), is_ready);
        assert_eq!(silent.unwrap_err().to_string(), "DRAKVUF says nothing for 10ms");
    }

    #[test]
    fn one_that_is_not_there_is_named() {
        let error = |result: anyhow::Error| format!("{result:#}");
        assert!(error(Program::new(Host::Smartvmi, Path::new("/no/such")).unwrap_err()).contains("/no/such"));
        let started = Running::start("SmartVMI", Command::new("/no/such"), 1).err().map(error);
        assert!(started.unwrap_or_default().contains("/no/such"));
    }
}
