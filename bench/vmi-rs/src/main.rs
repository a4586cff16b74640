//! Serves the benchmark guest's breakpoint with vmi-rs, for the runner (`bench/runner/src/elsewhere.rs`).
//!
//! It does what vmi-rs's own example of its `BreakpointManager` does at an event, without an operating system to look into:
//! the page has a shadow in a view of its own, where it can only be executed, and both a hit and a read are answered with a
//! fast single-step in the default view.

use std::cell::{Cell, RefCell};
use std::io::Write as _;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};
use vmi::arch::amd64::{Amd64, EventMonitor, EventReason, ExceptionVector};
use vmi::driver::xen::VmiXenDriver;
use vmi::os::NoOS;
use vmi::{Gfn, MemoryAccess, Pa, Va, View, VmiContext, VmiCore, VmiError, VmiEventResponse, VmiHandler, VmiSession};
use vmi_utils::bpm::{Breakpoint, BreakpointController, BreakpointManager};
use xen::XenDomainId;

type Driver = VmiXenDriver<Amd64>;
type Response = VmiEventResponse<Amd64>;
type Session<'a> = VmiSession<'a, NoOS<Driver>>;

/// The name of what vmi-rs does.
const MECHANISM: &str = "view-fast-step";

/// Sets a breakpoint, says `ready`, and serves it until SIGTERM, SIGINT, or until its standard input, a pipe, closes. Then it
/// takes it out and says how often it was hit, {"hits":[N]}.
///
/// Exit codes: 0 fine, 2 bad arguments, 1 anything else; why is on standard error.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Only say which backends there are, one a line
    #[arg(long, exclusive = true)]
    backends: bool,

    /// Number of the domain
    #[arg(long, value_name = "ID", required_unless_present = "backends")]
    domain: Option<u32>,

    /// Guest-physical address of the breakpoint
    #[arg(long, value_name = "ADDRESS", required_unless_present = "backends", value_parser = address)]
    gpa: Option<u64>,

    /// What serves it
    #[arg(long, value_enum, required_unless_present = "backends")]
    backend: Option<Backend>,

    /// How it is served
    #[arg(long, required_unless_present = "backends", value_parser = [MECHANISM])]
    mechanism: Option<String>,
}

/// There is only what vmi-rs has itself.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Backend {
    Original,
}

/// As the runner writes it.
fn address(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").ok_or("an address begins with 0x")?;
    u64::from_str_radix(digits, 16).map_err(|error| error.to_string())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let (Some(domain), Some(gpa)) = (arguments.domain, arguments.gpa) else {
        println!("original");
        return Ok(());
    };
    let hits = serve(domain, gpa)?;
    println!("{{\"hits\":[{hits}]}}");
    Ok(())
}

/// Serves a breakpoint at `gpa` until a signal comes, and returns how often it was hit.
fn serve(domain: u32, gpa: u64) -> Result<u64> {
    let stop = stop_on_signals()?;
    let driver = Driver::new(XenDomainId(domain)).with_context(|| format!("cannot attach to domain {domain}"))?;
    let core = VmiCore::new(driver)?;
    let before = core.info()?.max_gfn;
    let (hits, failure) = (Cell::new(0), RefCell::new(None));
    let outcome = VmiSession::new(&core, &NoOS(PhantomData)).handle(|session| {
        let monitor = Monitor::new(session, gpa, &stop, &hits, &failure)?;
        // What has gone wrong on this side is nobody's fault here.
        let _ = writeln!(std::io::stdout(), "ready");
        watch_input(&stop);
        Ok(monitor)
    });
    // It does not free the frame of a shadow page itself; a mapping of its own may still hold it.
    core.flush_gfn_cache();
    for gfn in before.0 + 1..=core.info()?.max_gfn.0 {
        core.free_gfn(Gfn(gfn)).with_context(|| format!("cannot free the frame {gfn:#x}"))?;
    }
    outcome?;
    match failure.into_inner() {
        Some(error) => bail!("vmi-rs has failed at an event: {error}"),
        None => Ok(hits.get()),
    }
}

/// What serves the breakpoint.
struct Monitor<'a> {
    /// Where there is one.
    view: View,
    breakpoints: BreakpointManager<BreakpointController<Driver>>,
    stop: &'a AtomicBool,
    hits: &'a Cell<u64>,
    failure: &'a RefCell<Option<VmiError>>,
}

impl<'a> Monitor<'a> {
    /// Sets a breakpoint at `gpa`.
    fn new(
        session: &Session<'_>,
        gpa: u64,
        stop: &'a AtomicBool,
        hits: &'a Cell<u64>,
        failure: &'a RefCell<Option<VmiError>>,
    ) -> Result<Self, VmiError> {
        session.monitor_enable(EventMonitor::Interrupt(ExceptionVector::Breakpoint))?;
        // Without it, Xen ends no fast single-step.
        session.monitor_enable(EventMonitor::Singlestep)?;
        let view = session.create_view(MemoryAccess::RWX)?;
        session.switch_to_view(view)?;
        let paused = session.pause_guard()?;
        let root = Pa::from(paused.registers().cr3);
        // The guest is mapped one to one, by all its page tables: it has no process.
        let breakpoint = Breakpoint::new((Va(gpa), root), view).global().with_tag("benchmark");
        let mut breakpoints = BreakpointManager::new();
        breakpoints.insert(session, breakpoint)?;
        Ok(Self { view, breakpoints, stop, hits, failure })
    }

    fn respond(&mut self, vmi: &VmiContext<'_, NoOS<Driver>>) -> Result<Response, VmiError> {
        let step = VmiEventResponse::fast_singlestep(vmi.default_view());
        match vmi.event().reason() {
            EventReason::Interrupt(_) if self.breakpoints.get_by_event(vmi.event(), ()).is_some() => {
                self.hits.set(self.hits.get() + 1);
                Ok(step)
            }
            // The guest's own.
            EventReason::Interrupt(_) if BreakpointController::is_breakpoint(vmi, vmi.event())? => {
                Ok(VmiEventResponse::reinject_interrupt())
            }
            // One that is gone; or an access to the page: to the original one.
            EventReason::Interrupt(_) | EventReason::MemoryAccess(_) => Ok(step),
            _ => Err(VmiError::NotSupported),
        }
    }
}

impl VmiHandler<NoOS<Driver>> for Monitor<'_> {
    type Output = ();

    fn handle_event(&mut self, vmi: VmiContext<'_, NoOS<Driver>>) -> Response {
        // As in the example: pages of the guest's tables may have changed.
        vmi.flush_v2p_cache();
        self.respond(&vmi).unwrap_or_else(|error| {
            *self.failure.borrow_mut() = Some(error);
            VmiEventResponse::default()
        })
    }

    fn poll(&self) -> Option<()> {
        (self.stop.load(Ordering::Relaxed) || self.failure.borrow().is_some()).then_some(())
    }

    fn cleanup(&mut self, session: &Session<'_>) {
        let cleared = session.switch_to_view(session.default_view()).and_then(|()| self.breakpoints.clear(session));
        if let Err(error) = cleared.and_then(|()| session.destroy_view(self.view)) {
            self.failure.borrow_mut().get_or_insert(error);
        }
    }
}

/// Becomes true when a signal says that it is to stop.
fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGIO] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("cannot handle signals")?;
    }
    Ok(stop)
}

/// Asks for a signal when standard input closes: the loop that is measured waits for no file of ours, and has no second
/// thread for it, for both would cost it instructions. Where this does not work (a file, `/dev/null`), the other signals remain.
fn watch_input(stop: &AtomicBool) {
    // SAFETY: it only gives a number.
    let own = unsafe { libc::getpid() };
    // SAFETY: it takes and returns numbers, and so do the next two.
    let flags = unsafe { libc::fcntl(libc::STDIN_FILENO, libc::F_GETFL) };
    // SAFETY: as above.
    let owned = flags >= 0 && unsafe { libc::fcntl(libc::STDIN_FILENO, libc::F_SETOWN, own) } >= 0;
    // SAFETY: as above.
    if !owned || unsafe { libc::fcntl(libc::STDIN_FILENO, libc::F_SETFL, flags | libc::O_ASYNC) } < 0 {
        return;
    }
    // It may have been closed before.
    let mut input = libc::pollfd { fd: libc::STDIN_FILENO, events: libc::POLLIN, revents: 0 };
    // SAFETY: the one element outlives the call.
    let polled = unsafe { libc::poll(&mut input, 1, 0) };
    if polled == 1 && input.revents & libc::POLLHUP != 0 {
        stop.store(true, Ordering::Relaxed);
    }
}
