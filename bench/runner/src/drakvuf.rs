//! The host `drakvuf`: a program with DRAKVUF in it (`bench/drakvuf`) owns the ring, and this one only looks on.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyperbp::{Gpa, Mechanism};

use crate::ring::PATIENCE;

/// How long DRAKVUF may take to attach, and to leave. In the emulator a second of its time is some seconds of ours.
const ATTACHING: Duration = Duration::from_secs(120);
const LEAVING: Duration = Duration::from_secs(60);

/// What serves the breakpoint inside DRAKVUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// What DRAKVUF has itself.
    Original(Original),
    /// The core, loaded in DRAKVUF.
    Hyperbp(Mechanism),
}

/// What DRAKVUF has itself. (Its option for the second is `--fast-singlestep`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Original {
    ViewStep,
    ViewFastStep,
}

impl Original {
    pub(crate) const ALL: [Self; 2] = [Self::ViewStep, Self::ViewFastStep];

    /// The core's name for it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
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
    path: &'a Path,
    has_hyperbp: bool,
}

impl<'a> Program<'a> {
    /// Asks the program what it can do.
    ///
    /// # Errors
    /// If it cannot be run.
    pub(crate) fn new(path: &'a Path) -> Result<Self> {
        let asked = Command::new(path).arg("--backends").stdin(Stdio::null()).output();
        let said = asked.with_context(|| format!("cannot run {}", path.display()))?;
        let stderr = String::from_utf8_lossy(&said.stderr);
        ensure!(said.status.success(), "{} has ended ({}): {}", path.display(), said.status, stderr.trim());
        let has_hyperbp = String::from_utf8_lossy(&said.stdout).lines().any(|backend| backend == "hyperbp");
        Ok(Self { path, has_hyperbp })
    }

    /// Whether the core is loaded in its DRAKVUF.
    pub(crate) fn has_hyperbp(self) -> bool {
        self.has_hyperbp
    }
}

/// How often DRAKVUF's traps were told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// That the breakpoint was hit.
    pub(crate) hits: u64,
    /// That its page was about to be read or written.
    pub(crate) before: u64,
    /// That it has been written.
    pub(crate) after: u64,
}

impl Counts {
    /// What the program says at last.
    fn parse(line: &str) -> Option<Self> {
        let mut rest = line.strip_prefix('{')?.strip_suffix('}')?.split(',');
        let mut number = |name: &str| rest.next()?.strip_prefix(name)?.parse().ok();
        Some(Self { hits: number("\"hits\":")?, before: number("\"before\":")?, after: number("\"after\":")? })
    }
}

/// Has DRAKVUF serve a breakpoint at `gpa`, and memory traps on its page if it is to be `watched`, until `idle` returns false,
/// and leave. Returns how often they were told.
///
/// # Errors
/// If DRAKVUF cannot attach, ends before it is told to, or does not end when it is: with what it said.
pub(crate) fn run(
    program: Program<'_>,
    domain: u32,
    gpa: Gpa,
    backend: Backend,
    watched: bool,
    idle: &mut dyn FnMut() -> bool,
) -> Result<Counts> {
    let mut command = Command::new(program.path);
    command.args(["--domain", &domain.to_string(), "--gpa", &format!("{:#x}", gpa.0)]);
    command.args(["--backend", backend.name(), "--mechanism", &backend.mechanism()]);
    if watched {
        command.args(["--watch", "page"]);
    }
    let mut drakvuf = Drakvuf::start(command, domain)?;
    drakvuf.until(ATTACHING, is_ready)?;
    while idle() {
        if let Some(status) = drakvuf.child.try_wait().context("cannot wait for DRAKVUF")? {
            let recover = recover(domain);
            bail!(drakvuf.problem(&format!("has ended in the middle of a measurement ({status}); {recover}")));
        }
        thread::sleep(PATIENCE);
    }
    drakvuf.leave()
}

/// What to do when DRAKVUF has not left by itself.
fn recover(domain: u32) -> String {
    format!("if the domain stands still, run `hyperbp-bench recover --domain {domain}`")
}

/// Whether the program says that the breakpoint is set.
fn is_ready(line: &str) -> Option<()> {
    (line == "ready").then_some(())
}

/// The running program. If it is dropped without [`leave`](Self::leave), it is told to leave all the same.
struct Drakvuf {
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

impl Drakvuf {
    fn start(mut command: Command, domain: u32) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let (sender, lines) = mpsc::channel();
        forward(child.stdout.take(), sender.clone(), Line::Out);
        forward(child.stderr.take(), sender, Line::Err);
        Ok(Self { child, domain, lines, said: String::new() })
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

    fn wait(&mut self) -> Result<ExitStatus> {
        let end = Instant::now() + LEAVING;
        loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for DRAKVUF")? {
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
        if self.said.is_empty() { format!("DRAKVUF {what}") } else { format!("DRAKVUF {what}: {}", self.said) }
    }
}

impl Drop for Drakvuf {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        if self.wait().is_err() {
            log::warn!("DRAKVUF does not leave, and is killed; {}", recover(self.domain));
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
        let mut drakvuf = Drakvuf::start(shell(script), 1)?;
        drakvuf.until(Duration::from_secs(10), is_ready)?;
        drakvuf.leave()
    }

    #[test]
    fn it_is_told_to_leave_and_says_its_count() {
        let script =
            "echo some library says this; echo ready; read line; echo '{\"hits\":1048577,\"before\":2,\"after\":1}'";
        assert_eq!(serve(script).unwrap(), Counts { hits: 1_048_577, before: 2, after: 1 });
    }

    #[test]
    fn why_it_failed_is_told() {
        let error = |script| serve(script).unwrap_err().to_string();
        assert_eq!(error("echo no such domain >&2; exit 1"), "DRAKVUF has ended (exit status: 1): no such domain");
        assert_eq!(error("echo ready; kill -9 $$"), "DRAKVUF has ended (signal: 9 (SIGKILL))");
        let count =
            error("echo ready; read line; echo '{\"hits\":3,\"before\":0,\"after\":0}'; echo too late >&2; exit 1");
        assert_eq!(count, "DRAKVUF has ended (exit status: 1): too late");
        let silent = Drakvuf::start(shell("read line"), 1).unwrap().until(Duration::from_millis(10), is_ready);
        assert_eq!(silent.unwrap_err().to_string(), "DRAKVUF says nothing for 10ms");
    }

    #[test]
    fn one_that_is_not_there_is_named() {
        let error = |result: anyhow::Error| format!("{result:#}");
        assert!(error(Program::new(Path::new("/no/such")).unwrap_err()).contains("/no/such"));
        let started = Drakvuf::start(Command::new("/no/such"), 1).err().map(error);
        assert!(started.unwrap_or_default().contains("/no/such"));
    }
}
