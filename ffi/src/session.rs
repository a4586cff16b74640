//! What a host in another language holds.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::Duration;

use cxx::UniquePtr;
use hyperbp::{
    Action, BreakpointId, Engine, Event, Gfn, Gpa, Hypervisor as _, Int3, Mechanism, Observed, Placement, Reason,
    Registers, Reply, StepOver, VcpuId, ViewId,
};

use crate::bridge::ffi;
use crate::clock::Clock;
use crate::convert;
use crate::foreign::Foreign;
use crate::logger;
use crate::machine::{self, Machine};
use crate::recorded::Recorded;

/// INT3.
const INT3: u8 = 0xcc;
/// How long a virtual CPU may take to go on with what it was answered, and how often it is looked after meanwhile.
const PATIENCE: Duration = Duration::from_secs(1);
const LOOKS: u32 = 1000;
/// How many pages are compared at a time.
const VERIFIED: usize = 16;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The engine, or the hypervisor under it, refused. C++ gets the message alone, with the causes in it.
    #[error("{}", .0.with_causes())]
    Core(hyperbp::Error),
    /// The hypervisor refused.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// There was a panic.
    #[error("a bug of hyperbp has ended the session: {0}; close it")]
    Failed(String),
    /// It is closed.
    #[error("the session is closed")]
    Closed,
    /// A callback of the hypervisor's has called the session that has called it, or another thread has.
    #[error("the session is in use: neither a callback of its own, nor another thread at the same time, may call it")]
    InUse,
    /// There is none.
    #[error("there is no breakpoint at {0}")]
    NoBreakpoint(Gpa),
    /// There are no events to wait for.
    #[cfg(feature = "libvmi")]
    #[error("there are no events to wait for: name an instance of LibVMI, and the file of the event channel")]
    NoEventChannel,
    /// It would take a CPU for nothing.
    #[cfg(feature = "libvmi")]
    #[error("{watch} microseconds are too long to watch the ring for: {longest} at most, or 0 to sleep at once")]
    WatchesTooLong {
        /// What was asked for.
        watch: u32,
        /// What is allowed.
        longest: u128,
    },
    /// Waiting has failed.
    #[cfg(feature = "libvmi")]
    #[error("waiting for events: {0}")]
    Wait(#[from] std::io::Error),
    /// Xen has not everything back.
    #[error("the domain could not be left as it was: {0}")]
    NotRestored(Box<Error>),
    /// The library is another one.
    #[cfg(not(feature = "libvmi"))]
    #[error("this libhyperbp was built without LibVMI: build it with the feature libvmi (`cargo xtask install` does)")]
    NoLibVmi,
}

impl From<hyperbp::Error> for Error {
    fn from(error: hyperbp::Error) -> Self {
        Self::Core(error)
    }
}

/// Whether it can be used.
enum State {
    Open,
    /// There was a panic, which said this. What could be undone has been undone.
    Failed(String),
    Closed,
}

/// A session that C++ may call from where it is not to: an event of a callback's, or of a second thread's, finds it in use.
/// What does not change is outside.
pub(crate) struct Session {
    inner: Mutex<Inner>,
    view: ViewId,
    mechanism: Mechanism,
}

impl Session {
    fn new(machine: Machine, mechanism: &str) -> Result<Box<Self>, Error> {
        let inner = Inner::new(machine, mechanism)?;
        Ok(Box::new(Self { view: inner.view, mechanism: inner.mechanism, inner: Mutex::new(inner) }))
    }

    /// The session, unless it is in use. It never waits: that would be for itself.
    fn enter(&self) -> Result<MutexGuard<'_, Inner>, Error> {
        match self.inner.try_lock() {
            Ok(inner) => Ok(inner),
            // Panics are caught within, and remembered.
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Error::InUse),
        }
    }

    /// See [`Inner::leave`].
    ///
    /// # Errors
    /// If it is in use, and those of that. So with all below.
    pub(crate) fn leave(&self) -> Result<(), Error> {
        self.enter()?.leave()
    }

    /// See [`Inner::close`].
    pub(crate) fn close(&self) -> Result<(), Error> {
        self.enter()?.close()
    }

    /// See [`Inner::insert`].
    pub(crate) fn insert(&self, pa: u64) -> Result<(), Error> {
        self.enter()?.insert(pa)
    }

    /// See [`Inner::remove`].
    pub(crate) fn remove(&self, pa: u64) -> Result<(), Error> {
        self.enter()?.remove(pa)
    }

    /// See [`Inner::watch`].
    pub(crate) fn watch(&self, gfn: u64, accesses: ffi::Accesses, after: bool) -> Result<(), Error> {
        self.enter()?.watch(gfn, accesses, after)
    }

    /// See [`Inner::verify`].
    pub(crate) fn verify(&self) -> Result<usize, Error> {
        self.enter()?.verify()
    }

    /// See [`Inner::monitor`].
    pub(crate) fn monitor(&self, vcpu: u16, monitored: bool) -> Result<u16, Error> {
        self.enter()?.monitor(vcpu, monitored)
    }

    /// See [`Inner::monitor_all`].
    pub(crate) fn monitor_all(&self, monitored: bool) -> Result<(), Error> {
        self.enter()?.monitor_all(monitored)
    }

    /// See [`Inner::begin`]. If the session is in use, the reply lets the virtual CPU try again.
    pub(crate) fn begin(&self, event: &ffi::Event, reply: &mut ffi::Reply) -> ffi::Observed {
        match self.enter() {
            Ok(mut inner) => inner.begin(event, reply),
            Err(error) => refused(&error, reply),
        }
    }

    /// See [`Inner::begin_int3`]; for the rest, as [`begin`](Self::begin).
    pub(crate) fn begin_int3(&self, vcpu: u16, view: u16, gpa: u64, rip: u64, reply: &mut ffi::Reply) -> ffi::Observed {
        match self.enter() {
            Ok(mut inner) => inner.begin_int3(vcpu, view, gpa, rip, reply),
            Err(error) => refused(&error, reply),
        }
    }

    /// See [`Inner::step`]. False if it is in use.
    pub(crate) fn step(&self, vcpu: u16, reply: &mut ffi::Reply) -> bool {
        self.enter().is_ok_and(|mut inner| inner.step(vcpu, reply))
    }

    /// See [`Inner::finish`].
    pub(crate) fn finish(&self, reply: &mut ffi::Reply) {
        match self.enter() {
            Ok(mut inner) => inner.finish(reply),
            Err(error) => drop(refused(&error, reply)),
        }
    }

    /// See [`Inner::finish_with`].
    pub(crate) fn finish_with(&self, registers: &ffi::General, reply: &mut ffi::Reply) {
        match self.enter() {
            Ok(mut inner) => inner.finish_with(registers, reply),
            Err(error) => drop(refused(&error, reply)),
        }
    }

    /// Whether a hit needs the registers, for there is something to emulate or to compute.
    pub(crate) const fn hits_need_registers(&self) -> bool {
        let by_stepping = matches!(self.mechanism.step_over(), StepOver::ViewStep | StepOver::ViewFastStep);
        !(by_stepping && matches!(self.mechanism.placement(), Placement::Shadow))
    }

    /// See [`Inner::failed`]. Not while it is in use.
    pub(crate) fn failed(&self) -> bool {
        self.enter().is_ok_and(|inner| inner.failed())
    }

    /// The view in which virtual CPUs meet breakpoints.
    pub(crate) const fn view(&self) -> u16 {
        self.view.0
    }

    /// The name of the mechanism of all breakpoints.
    pub(crate) fn mechanism(&self) -> String {
        self.mechanism.to_string()
    }

    /// See [`Inner::counters`].
    pub(crate) fn counters(&self) -> Result<ffi::Counters, Error> {
        Ok(self.enter()?.counters())
    }

    /// See [`Inner::breakpoints`].
    pub(crate) fn breakpoints(&self, into: &mut [ffi::Figures]) -> Result<usize, Error> {
        Ok(self.enter()?.breakpoints(into))
    }
}

/// The answer to an event that comes when the session is in use: the virtual CPU raises it again.
#[cold]
fn refused(error: &Error, reply: &mut ffi::Reply) -> ffi::Observed {
    log::error!("an event is not handled: {error}");
    convert::reply(&Reply::default(), reply);
    convert::observed(ffi::Kind::Failed)
}

/// An engine, the hypervisor it works on, and the event between the two halves of its answer.
pub(crate) struct Inner {
    engine: Engine,
    machine: Recorded<Machine>,
    mechanism: Mechanism,
    /// The view in which virtual CPUs meet breakpoints.
    view: ViewId,
    breakpoints: HashMap<Gpa, BreakpointId>,
    state: State,
    /// [`leave`](Self::leave) was called: there are no breakpoints any more.
    left: bool,
    clock: Clock,
    /// The last event.
    event: Event,
    /// What it is, while it waits for its second half.
    told: Observed,
    /// Where replies are made: each in the same place, for they are large.
    reply: Reply,
    #[cfg(feature = "fault-injection")]
    hits_until_panic: Option<u64>,
}

/// Whether there is a mechanism with this name.
///
/// # Errors
/// If not; the message has those there are.
pub(crate) fn check_mechanism(name: &str) -> Result<(), Error> {
    without_panic(|| Ok(name.parse::<Mechanism>().map(drop)?))
}

/// Opens a session on a hypervisor of C++'s.
///
/// # Errors
/// If there is no such mechanism, or the hypervisor refuses.
pub(crate) fn open(hypervisor: UniquePtr<ffi::Hypervisor>, mechanism: &str) -> Result<Box<Session>, Error> {
    without_panic(|| Session::new(Machine::Foreign(Foreign::new(hypervisor)?), mechanism))
}

/// Opens a session on LibVMI.
///
/// # Errors
/// As [`open`]; and if the library was built without LibVMI.
///
/// # Safety
/// `vmi` is an instance of LibVMI that outlives the session.
#[cfg(feature = "libvmi")]
pub(crate) unsafe fn open_libvmi(
    vmi: *mut ffi::vmi_instance,
    memory: UniquePtr<ffi::Memory>,
    mechanism: &str,
) -> Result<Box<Session>, Error> {
    without_panic(|| {
        // SAFETY: by this function's contract.
        let domain = unsafe { crate::libvmi::Domain::new(vmi.cast(), memory) }?;
        Session::new(Machine::LibVmi(Box::new(domain)), mechanism)
    })
}

/// Says that the library was built without LibVMI.
///
/// # Errors
/// Always.
///
/// # Safety
/// None is needed.
#[cfg(not(feature = "libvmi"))]
pub(crate) unsafe fn open_libvmi(
    _vmi: *mut ffi::vmi_instance,
    _memory: UniquePtr<ffi::Memory>,
    _mechanism: &str,
) -> Result<Box<Session>, Error> {
    Err(Error::NoLibVmi)
}

/// Turns a panic into an error, where there is no session that could remember it.
pub(crate) fn without_panic<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    // What has panicked is gone with what it held: a session undoes what it has done when it is dropped.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(Error::Failed(message_of(&*panic))))
}

/// What a panic said.
fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
        .to_owned()
}

impl Inner {
    fn new(machine: Machine, mechanism: &str) -> Result<Self, Error> {
        logger::install();
        let mechanism = mechanism.parse()?;
        let machine = Recorded::new(machine);
        let mut session = Self {
            engine: Engine::new(&machine),
            clock: Clock::new(machine.now()),
            machine,
            mechanism,
            view: ViewId::HOST,
            breakpoints: HashMap::new(),
            state: State::Open,
            left: false,
            event: Event::new(VcpuId(0), ViewId::HOST, Registers::default(), Reason::EmulationFailed),
            told: Observed::Answered,
            reply: Reply::default(),
            #[cfg(feature = "fault-injection")]
            hits_until_panic: std::env::var("HYPERBP_PANIC_AT_HIT").ok().and_then(|hits| hits.parse().ok()),
        };
        session.view = session.engine.enter(&mut session.machine)?;
        Ok(session)
    }

    /// Removes all breakpoints and watches. The domain should run: it is waited until every virtual CPU has gone on with what
    /// it was answered, of which there is seldom one that has not. From then on none is answered with more than to go on.
    ///
    /// # Errors
    /// If the hypervisor refuses something. The rest has been undone; it may be called again.
    pub(crate) fn leave(&mut self) -> Result<(), Error> {
        self.attempt(|session| {
            session.left = true;
            session.breakpoints.clear();
            let Self { engine, machine, .. } = session;
            let left = engine.leave(machine);
            if engine.is_settled(machine) {
                return Ok(left?);
            }
            if !(0..LOOKS).any(|_| {
                thread::sleep(PATIENCE / LOOKS);
                engine.is_settled(machine)
            }) {
                log::warn!(
                    "a virtual CPU does not go on with what it was answered: is the domain paused, or has an event not \
                     been handled?"
                );
            }
            // The pages that could not be given back before.
            Ok(engine.leave(machine)?)
        })
    }

    /// Removes everything from the domain. The domain should be paused, and no event of it be queued; before it was paused,
    /// [`leave`](Self::leave) should have been called.
    ///
    /// # Errors
    /// If the hypervisor refuses something. The rest has been undone; it may be called again.
    pub(crate) fn close(&mut self) -> Result<(), Error> {
        let mut result = Ok(());
        if matches!(self.state, State::Open) {
            let left = self.leave();
            let finished = self.attempt(|session| Ok(session.engine.finish(&mut session.machine)?));
            let left = left.and(finished);
            // If there was a panic now, `fail` has undone everything, and what it left is looked for below.
            result = left.or_else(|error| if let Error::Failed(_) = error { Ok(()) } else { Err(error) });
        }
        let undone = without_panic(|| Ok(self.machine.undo()?));
        if self.machine.is_clean() {
            // What the engine could not do is done now.
            self.state = State::Closed;
            return Ok(());
        }
        result.and(undone).map_err(|error| Error::NotRestored(Box::new(error)))
    }

    /// Sets a breakpoint at a guest-physical address. If there is one already, that is it.
    ///
    /// # Errors
    /// Those of [`Engine::insert`].
    pub(crate) fn insert(&mut self, pa: u64) -> Result<(), Error> {
        self.attempt(|session| {
            let gpa = Gpa(pa);
            if !session.breakpoints.contains_key(&gpa) {
                let id = session.engine.insert(&mut session.machine, gpa, session.mechanism)?;
                session.breakpoints.insert(gpa, id);
            }
            Ok(())
        })
    }

    /// Removes the breakpoint at a guest-physical address.
    ///
    /// # Errors
    /// If there is none, and those of [`Engine::remove`].
    pub(crate) fn remove(&mut self, pa: u64) -> Result<(), Error> {
        self.attempt(|session| {
            let gpa = Gpa(pa);
            let id = *session.breakpoints.get(&gpa).ok_or(Error::NoBreakpoint(gpa))?;
            let removed = session.engine.remove(&mut session.machine, id);
            // It may be gone although the page could not be given back.
            if session.engine.figures(id).is_err() {
                session.breakpoints.remove(&gpa);
            }
            Ok(removed?)
        })
    }

    /// Watches a page.
    ///
    /// # Errors
    /// Those of [`Engine::watch`].
    pub(crate) fn watch(&mut self, gfn: u64, accesses: ffi::Accesses, after: bool) -> Result<(), Error> {
        self.attempt(|session| {
            Ok(session.engine.watch(&mut session.machine, Gfn(gfn), convert::accesses(accesses), after)?)
        })
    }

    /// Looks after what no event tells: compares the next pages with breakpoints with what is known of them. Returns how many
    /// were not the same.
    ///
    /// # Errors
    /// Those of [`Engine::verify`].
    pub(crate) fn verify(&mut self) -> Result<usize, Error> {
        self.attempt(|session| {
            session.machine.inner_mut().look_around();
            if session.left { Ok(0) } else { Ok(session.engine.verify(&mut session.machine, VERIFIED)?) }
        })
    }

    /// The view a virtual CPU is to run in from now on; the caller switches it.
    ///
    /// # Errors
    /// Those of [`Engine::monitor`].
    pub(crate) fn monitor(&mut self, vcpu: u16, monitored: bool) -> Result<u16, Error> {
        self.attempt(|session| Ok(session.engine.monitor(&mut session.machine, VcpuId(vcpu), monitored)?.0))
    }

    /// The same for all virtual CPUs, which are switched here.
    ///
    /// # Errors
    /// Those of [`Engine::monitor_all`].
    pub(crate) fn monitor_all(&mut self, monitored: bool) -> Result<(), Error> {
        self.attempt(|session| Ok(session.engine.monitor_all(&mut session.machine, monitored)?))
    }

    /// First half of an event: what it is, and, if nobody needs to be told, the reply.
    pub(crate) fn begin(&mut self, event: &ffi::Event, reply: &mut ffi::Reply) -> ffi::Observed {
        convert::event(event, &mut self.event);
        self.begin_event(reply)
    }

    fn begin_event(&mut self, reply: &mut ffi::Reply) -> ffi::Observed {
        self.told = Observed::Answered;
        if self.left && matches!(self.event.reason, Reason::Int3(_)) {
            // Whatever it was, it is the guest's own now. To deliver it would be one more answer on its way.
            self.engine.has_gone_on(self.event.vcpu);
            convert::reply(&Reply::default(), reply);
            return convert::observed(ffi::Kind::Answered);
        }
        if matches!(self.state, State::Open)
            && let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.observe(reply)))
        {
            self.fail(&*panic);
        }
        if !matches!(self.state, State::Open) {
            convert::reply(&self.let_go(), reply);
            return convert::observed(ffi::Kind::Failed);
        }
        match &self.told {
            Observed::Answered => convert::observed(ffi::Kind::Answered),
            Observed::Hit(gpa) => ffi::Observed { pa: gpa.0, ..convert::observed(ffi::Kind::Hit) },
            Observed::Access { access, breakpoint } => ffi::Observed {
                breakpoint: breakpoint.is_some(),
                breakpoint_pa: breakpoint.map_or(0, |gpa| gpa.0),
                ..convert::observed_access(ffi::Kind::Access, access)
            },
            Observed::Accessed(access) => convert::observed_access(ffi::Kind::Accessed, access),
        }
    }

    /// First half of an INT3 of one byte, if hits do not need the registers.
    pub(crate) fn begin_int3(
        &mut self,
        vcpu: u16,
        view: u16,
        gpa: u64,
        rip: u64,
        reply: &mut ffi::Reply,
    ) -> ffi::Observed {
        self.event.vcpu = VcpuId(vcpu);
        self.event.view = ViewId(view);
        self.event.registers.rip = rip;
        self.event.reason = Reason::Int3(Int3::new(Gpa(gpa), 1));
        self.begin_event(reply)
    }

    fn observe(&mut self, reply: &mut ffi::Reply) {
        self.told = self.engine.begin(&mut self.machine, &self.event, &mut self.reply);
        if self.told == Observed::Answered {
            convert::reply(&self.reply, reply);
        }
        #[cfg(feature = "fault-injection")]
        if let (Observed::Hit(gpa), Some(hits)) = (&self.told, &mut self.hits_until_panic) {
            *hits = hits.saturating_sub(1);
            assert!(*hits > 0, "HYPERBP_PANIC_AT_HIT: at the breakpoint at {gpa}");
        }
    }

    /// The whole of the end of a single-step that nobody needs to be told of: it needs no registers. Returns false if it is
    /// not one, and has done nothing then: begin the event.
    pub(crate) fn step(&mut self, vcpu: u16, reply: &mut ffi::Reply) -> bool {
        if !matches!(self.state, State::Open) {
            return false;
        }
        self.told = Observed::Answered;
        let stepped = catch_unwind(AssertUnwindSafe(|| {
            let stepped = self.engine.stepped(&mut self.machine, VcpuId(vcpu), &mut self.reply);
            if stepped {
                convert::reply(&self.reply, reply);
            }
            stepped
        }));
        stepped.unwrap_or_else(|panic| {
            self.fail(&*panic);
            false
        })
    }

    /// Second half of the event that was begun last, if those who were told have left its registers alone.
    pub(crate) fn finish(&mut self, reply: &mut ffi::Reply) {
        self.conclude(None, reply);
    }

    /// The same, with what they have made of the registers.
    pub(crate) fn finish_with(&mut self, registers: &ffi::General, reply: &mut ffi::Reply) {
        self.conclude(Some(registers), reply);
    }

    fn conclude(&mut self, registers: Option<&ffi::General>, reply: &mut ffi::Reply) {
        let told = std::mem::replace(&mut self.told, Observed::Answered);
        if told == Observed::Answered {
            if matches!(self.state, State::Open) {
                log::warn!("an event was finished that was not begun, or finished before: the virtual CPU goes on");
            }
            return convert::reply(&self.let_go(), reply);
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.end(&told, registers, reply))) {
            self.fail(&*panic);
            convert::reply(&self.let_go(), reply);
        }
    }

    fn end(&mut self, told: &Observed, registers: Option<&ffi::General>, reply: &mut ffi::Reply) {
        let changed = registers.map(|&ffi::General { gpr, rip, rflags }| {
            self.event.registers.with(|registers| {
                (registers.gpr, registers.rip, registers.rflags) = (gpr, rip, rflags);
            })
        });
        self.engine.end(&mut self.machine, &self.event, told, changed.as_ref(), &mut self.reply);
        convert::reply(&self.reply, reply);
    }

    /// Whether there was a panic: then it can only be closed.
    pub(crate) const fn failed(&self) -> bool {
        matches!(self.state, State::Failed(_))
    }

    /// What happened so far.
    pub(crate) fn counters(&self) -> ffi::Counters {
        let counters = self.engine.counters();
        let unit = match self.machine.inner().has_nanoseconds() {
            true => 1.0,
            false => self.clock.nanoseconds_per_tick(self.machine.now()),
        };
        let times = self.engine.handling_time().summary();
        let nanoseconds = |time| (time as f64 * unit).round() as u64;
        ffi::Counters {
            hits: counters.hits,
            reads: counters.reads,
            writes: counters.writes,
            held: counters.held,
            discarded: counters.discarded,
            resynced: counters.resynced,
            rearmed: counters.rearmed,
            reinjected: counters.reinjected,
            emulation_failures: counters.emulation_failures,
            unexplained: counters.unexplained,
            failures: counters.failures,
            p50_ns: nanoseconds(times.median),
            p90_ns: nanoseconds(times.p90),
            p99_ns: nanoseconds(times.p99),
            max_ns: nanoseconds(times.max),
        }
    }

    /// What the breakpoints have done, by address, as many as there is room for. Returns how many there are.
    pub(crate) fn breakpoints(&self, into: &mut [ffi::Figures]) -> usize {
        let ids = self.engine.breakpoints();
        for (id, into) in ids.iter().zip(into) {
            if let Ok(figures) = self.engine.figures(*id) {
                *into = convert::figures(id.gpa(), &figures);
            }
        }
        ids.len()
    }

    /// Does something with the engine, unless it has failed or does so now.
    fn attempt<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        match &self.state {
            State::Open => {}
            State::Failed(message) => return Err(Error::Failed(message.clone())),
            State::Closed => return Err(Error::Closed),
        }
        catch_unwind(AssertUnwindSafe(|| work(self))).unwrap_or_else(|panic| {
            self.fail(&*panic);
            Err(Error::Failed(message_of(&*panic)))
        })
    }

    /// There was a panic. The engine is not asked any more; all it has done is undone at once.
    #[cold]
    fn fail(&mut self, panic: &(dyn Any + Send)) {
        let message = message_of(panic);
        log::error!("a bug of hyperbp has ended the session: {message}");
        self.state = State::Failed(message);
        self.told = Observed::Answered;
        if let Err(error) = without_panic(|| Ok(self.machine.undo()?)) {
            log::error!("the domain could not be left as it was: {error}");
        }
    }

    /// The answer to an event that the engine is not to be asked about: on with the guest's own bytes.
    fn let_go(&mut self) -> Reply {
        let own = match self.event.reason {
            // With prefixes, the 0xCC is the last byte. What is in the next page is left to the guest.
            Reason::Int3(int3) => {
                // Where that is, is the host's word.
                let at = Gpa(int3.gpa.0.wrapping_add(u64::from(int3.length.max(1)) - 1));
                let mut byte = [0];
                let read = without_panic(|| Ok(self.machine.read(at, &mut byte)?));
                at.offset() < int3.gpa.offset() || read.is_err() || byte == [INT3]
            }
            _ => false,
        };
        let action = if own { Action::Reinject } else { Action::Resume };
        // If it was still to be stepped, that was stopped when the rest was undone.
        Reply { view: Some(ViewId::HOST), action, ..Reply::default() }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !matches!(self.state, State::Closed)
            && let Err(error) = self.close()
        {
            log::error!("{error}");
        }
    }
}
