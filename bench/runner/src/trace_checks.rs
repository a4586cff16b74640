//! Checks of a trace, another process, whose domain crashes, or is saved.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyperbp::Gpa;
use hyperbp_bench_abi::{BREAKPOINT_OFFSET, TARGET, Workload};
use hyperbp_report::Trace;

use crate::check::STUCK;
use crate::guest::Guest;
use crate::patch::{self, Patch};
use crate::xen::{Domain, Requests, Shutdown, State};

/// Executions before the domain stops, and after it was resumed.
const BEFORE: u32 = 20;
const AFTER: u32 = 10;
/// A trace must have ended so long after its domain has.
const SOON: Duration = Duration::from_secs(5);
/// Xen's tools look at a million frame numbers, most of them empty.
const SAVED: Duration = Duration::from_secs(900);
/// From a guest's answer to its suspension: its drivers have to stop devices and processes.
const DRIVERS: Duration = Duration::from_millis(100);
const LOOK: Duration = Duration::from_millis(5);
/// What the trace leaves, and says.
const COUNTS: &str = "/tmp/trace.json";
const SAID: &str = "/tmp/trace.said";

/// A trace in another process.
struct Tracer {
    child: Child,
    /// How much of what it has said was looked at.
    seen: usize,
}

impl Tracer {
    /// Starts one, and waits until it counts.
    fn start(domain: &Domain, at: Gpa, mechanism: &str) -> Result<Self> {
        // There may be none.
        let _ = fs::remove_file(COUNTS);
        let this = std::env::current_exe().context("cannot tell where this program is")?;
        let (id, function) = (domain.id().to_string(), format!("{:#x}", at.0));
        let mut command = Command::new(this);
        command.args(["trace", "--domain", &id, "--function", &function, "--mechanism", mechanism, "--json", COUNTS]);
        let said = File::create(SAID).with_context(|| format!("cannot create {SAID}"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        let child = command.spawn().context("cannot start a trace")?;
        let mut tracer = Self { child, seen: 0 };
        tracer.until("Tracing")?;
        Ok(tracer)
    }

    /// Waits until it says this, after what it was waited for before.
    fn until(&mut self, text: &str) -> Result<()> {
        let begun = Instant::now();
        loop {
            let said = said()?;
            if let Some(at) = said[self.seen..].find(text) {
                self.seen += at + text.len();
                return Ok(());
            }
            if begun.elapsed() >= SOON || self.child.try_wait()?.is_some() {
                // It may never end.
                let _ = self.child.kill();
                bail!("the trace does not say `{text}`: {}", one_line(&said));
            }
            thread::sleep(LOOK);
        }
    }

    /// As Ctrl-C does.
    fn interrupt(&self) -> Result<()> {
        let status = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status()?;
        ensure!(status.success(), "the trace cannot be interrupted");
        Ok(())
    }

    /// Waits until it has ended with this exit code and counts. Returns what it has said.
    fn end(mut self, code: i32, hits: u32) -> Result<String> {
        let Some(status) = end_of(&mut self.child, SOON)? else {
            bail!("the trace has not ended after {SOON:?}: {}", one_line(&said()?));
        };
        let said = one_line(&said()?);
        ensure!(status.code() == Some(code), "the trace has ended with {status}: {said}");
        let counts = fs::read_to_string(COUNTS).with_context(|| format!("the trace has no counts: {said}"))?;
        let counted = Trace::from_json(&counts)?.functions.iter().map(|function| function.hits).sum::<u64>();
        ensure!(counted == u64::from(hits), "the trace has counted {counted}, not {hits}: {said}");
        Ok(said)
    }
}

/// How a process ends, if it does within this time; else it is killed.
fn end_of(child: &mut Child, within: Duration) -> Result<Option<ExitStatus>> {
    let begun = Instant::now();
    while begun.elapsed() < within {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        thread::sleep(LOOK);
    }
    child.kill()?;
    Ok(None)
}

/// What the trace has said on standard error.
fn said() -> Result<String> {
    fs::read_to_string(SAID).with_context(|| format!("cannot read {SAID}"))
}

fn one_line(said: &str) -> String {
    said.replace('\n', " ")
}

/// Has the guest execute the breakpoint.
fn work(guest: &Guest, executions: u32) -> Result<()> {
    guest.request(Workload::ExecBp, executions);
    guest.wait_until_done(STUCK)
}

/// Sees that a trace ends at once when its guest is no more, and keeps what it has counted: after a triple fault, or a crash.
///
/// # Errors
/// If not.
pub(crate) fn crash(domain: &Domain, triple_fault: bool) -> Result<()> {
    let guest = Guest::find(domain)?;
    let patch = Patch::new(domain, &guest)?;
    // Does nothing but return until the number is set.
    let code = [
        &[0x83, 0x3c, 0x25][..], // cmp dword [number], 0
        &patch::mark(),
        &[
            0x00, 0x74, 0x13, // je 2f
            0x0f, 0x01, 0x1d, 0x02, 0x00, 0x00, 0x00, // lidt [1f]
            0x0f, 0x0b, // ud2
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0,    // 1: no table
            0xc3, // 2: ret
        ],
    ]
    .concat();
    patch.write_code(&code);
    let tracer = Tracer::start(domain, guest.breakpoint(), "auto")?;
    work(&guest, BEFORE)?;
    // A triple fault is a reset.
    let (expected, code, hits) = if triple_fault {
        patch.set_mark(1);
        guest.request(Workload::ExecBp, 1);
        (State::ShutDown, 0, BEFORE + 1)
    } else {
        domain.shut_down(Shutdown::Crash)?;
        (State::Crashed, 1, BEFORE)
    };
    let begun = Instant::now();
    while domain.state()? == State::Running {
        ensure!(begun.elapsed() < STUCK, "the guest has survived");
        thread::sleep(LOOK);
    }
    let state = domain.state()?;
    ensure!(state == expected, "{state}");
    let said = tracer.end(code, hits)?;
    ensure!(said.contains(&state.to_string()), "the trace does not say that {state}: {said}");
    println!("ok: a trace ends at once, with its counts: {state}");
    Ok(())
}

/// Has a toolstack save the domain while it is traced, and sees that its image has nothing of the trace in it. If it is
/// resumed afterwards, the trace must have come back.
///
/// # Errors
/// If not.
pub(crate) fn save(domain: &Domain, mechanism: &str, image: &Path, resumed: bool) -> Result<()> {
    let guest = Guest::find(domain)?;
    let mut tracer = Tracer::start(domain, guest.breakpoint(), mechanism)?;
    work(&guest, BEFORE)?;
    let id = domain.id().to_string();
    let requests = Requests::of(domain.id())?;
    let options: &[&str] = if resumed { &["save", "-c"] } else { &["save"] };
    let mut xl = Command::new("xl");
    xl.args(options).arg(&id).arg(image).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut xl = xl.spawn().context("cannot run xl")?;
    // The benchmark guest has no drivers. Without their answer, xl gives up after a minute.
    let begun = Instant::now();
    while !requests.is_to_suspend() {
        ensure!(begun.elapsed() < STUCK, "xl does not ask the guest to suspend itself");
        thread::sleep(LOOK);
    }
    requests.acknowledge()?;
    thread::sleep(DRIVERS);
    domain.shut_down(Shutdown::Suspend)?;
    let left = SAVED.saturating_sub(begun.elapsed());
    let status = end_of(&mut xl, left)?.context("xl save does not end")?;
    let mut errors = String::new();
    xl.stderr.take().map(|mut stderr| stderr.read_to_string(&mut errors)).transpose()?;
    ensure!(status.success(), "xl save has failed ({status}): {}", one_line(&errors));
    look_at(image)?;
    tracer.until("about to be suspended")?;
    if !resumed {
        drop(guest);
        let said = tracer.end(0, BEFORE)?;
        ensure!(said.contains("the domain was suspended"), "{said}");
        println!(
            "ok: a domain that is saved has nothing of {mechanism} in its image, and the trace ends with its counts"
        );
        return Ok(());
    }
    tracer.until("runs again")?;
    tracer.until("Tracing")?;
    work(&guest, AFTER).with_context(|| said().unwrap_or_default())?;
    tracer.interrupt()?;
    tracer.end(0, BEFORE + AFTER)?;
    guest.check(domain)?;
    println!(
        "ok: a domain that is saved has nothing of {mechanism} in its image, and the trace comes back when it runs again"
    );
    Ok(())
}

/// Looks at the page under test in an image of a domain.
fn look_at(image: &Path) -> Result<()> {
    /// What is before the breakpoint.
    const SIGN: usize = BREAKPOINT_OFFSET - 16;
    let bytes = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    let (sign, rest) = (&TARGET[SIGN..BREAKPOINT_OFFSET], &TARGET[BREAKPOINT_OFFSET..]);
    let starts = 0..bytes.len().saturating_sub(TARGET.len() - SIGN);
    let found: Vec<usize> = starts.filter(|at| bytes[*at] == sign[0] && bytes[*at..].starts_with(sign)).collect();
    // The guest's kernel has a copy of its own to compare with. One with a breakpoint is that of a monitor's.
    ensure!(!found.is_empty(), "the page under test is not in the image");
    for at in found {
        let seen = &bytes[at + sign.len()..][..rest.len()];
        ensure!(seen == rest, "at the breakpoint, the image has {seen:02x?}, not {rest:02x?}");
    }
    Ok(())
}
