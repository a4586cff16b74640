//! Waits for the events of a domain.
//!
//! Xen signals each on an event channel, which dom0's kernel hands out as a device, `/dev/xen/evtchn`. When it signals, the
//! kernel masks it, and its number can be read from the device; written there, it is unmasked
//! (`drivers/xen/evtchn.c`). Reading is how to sleep until then.
//!
//! To be woken from a sleep, and to fall asleep again, is a third of what a hit costs, and where the guest has a CPU of its own
//! more than half. So while events come one after another the channel is left masked, and the ring is looked at until there
//! is one; or Xen itself waits until the channel is pending.

mod halt;
mod ways;

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::time::{Duration, Instant};

use hyperbp::{Wait, Waiting, Waits};

use crate::halt::Halt;
pub use crate::ways::Ways;

/// The number of an event channel, in this domain (`evtchn_port_t`).
type Port = u32;

/// What waits in Xen until a port is pending, or for less.
trait Halting {
    /// # Errors
    /// If it cannot, and is not to be tried again.
    fn halt(&mut self, port: Port) -> io::Result<()>;
}

/// One port, as it is waited for. Nobody else may read from, or write to, the device meanwhile.
#[derive(Debug)]
pub struct EventChannel {
    /// Masked since it signalled last.
    masked: Option<Port>,
    ways: Ways,
    /// How often it can look in the time it may watch: tried out before it does for the first time.
    looks: Option<u32>,
    waiting: Waiting,
    /// It sleeps since then, but for waking up without an event.
    asleep: Option<Instant>,
    /// There was an event: only after one can another come soon.
    any: bool,
    halt: Option<Halt>,
    /// There were events since, whose signals nobody has waited for.
    signalled: bool,
    /// How often the kernel has noted, for a read that did not come, that it signalled.
    unread: usize,
}

impl EventChannel {
    /// How many notes are let pile up. The kernel has room for 64 at least, and then none of them can be read any more.
    const UNREAD: usize = 32;

    /// A sleep that an event ends in this time was short: about as long as it is between two ticks of a kernel's timer.
    const SOON: Duration = Duration::from_millis(4);

    /// The port is unmasked, and everything read that there was.
    ///
    /// Xen is not asked to wait if it cannot be, or this domain has more than one virtual CPU: where one gets the signal
    /// while the other asks to wait for it, it may be too late.
    #[must_use]
    pub fn new(ways: Ways) -> Self {
        let halt = || {
            Halt::new().unwrap_or_else(|error| {
                log::debug!("waiting for events in dom0's kernel only: Xen cannot be asked to: {error}");
                None
            })
        };
        Self {
            masked: None,
            ways,
            looks: None,
            waiting: Waiting::new(!ways.watch.is_zero()),
            asleep: None,
            any: false,
            halt: ways.halt.then(halt).flatten(),
            signalled: false,
            unread: 0,
        }
    }

    /// How it has waited so far.
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.waiting.waits()
    }

    /// Waits until the port signals, or for less: look whether there are events. `pending` says whether there are, of those
    /// that are signalled, in memory. False if there was no signal for about as long as `timeout`; without that it costs a
    /// system call less to sleep.
    ///
    /// # Errors
    /// What reading and writing the device says; if a signal comes, [`io::ErrorKind::Interrupted`]; and
    /// [`io::ErrorKind::WouldBlock`] if the device does not block. The port is unmasked then.
    pub fn wait(
        &mut self,
        device: BorrowedFd<'_>,
        timeout: Option<Duration>,
        pending: impl Fn() -> bool,
    ) -> io::Result<bool> {
        let mut halt = self.halt.take();
        let waited = self.wait_with(&mut halt, device, timeout, pending);
        self.halt = halt;
        waited
    }

    /// Unmasks the port: then the device can be waited for in another way.
    ///
    /// # Errors
    /// What writing to the device says.
    pub fn stop(&mut self, device: BorrowedFd<'_>) -> io::Result<()> {
        match self.masked.take() {
            Some(port) => unmask(device, port),
            None => Ok(()),
        }
    }

    fn wait_with(
        &mut self,
        halting: &mut Option<impl Halting>,
        device: BorrowedFd<'_>,
        timeout: Option<Duration>,
        pending: impl Fn() -> bool,
    ) -> io::Result<bool> {
        let (ways, waiting) = (self.ways, &mut self.waiting);
        let mut how = waiting.choose(halting.is_some());
        if let Wait::Watch(halved) = how {
            let looks = *self.looks.get_or_insert_with(|| ways.looks(&pending));
            let event = watch(looks >> halved, &pending);
            waiting.watched(event);
            if event {
                // It has signalled, or is about to.
                self.signalled = true;
                return Ok(true);
            }
            how = waiting.choose_again(halting.is_some());
        }
        if how == Wait::Halt
            && let Some(port) = self.masked
            && let Some(halt) = halting
        {
            if self.unread >= Self::UNREAD {
                read(device)?;
                self.unread = 0;
            }
            if std::mem::take(&mut self.signalled) {
                // Of what has been served.
                unmask(device, port)?;
                self.unread += 1;
            }
            let halted = halt.halt(port);
            // If it is pending the kernel sees that now, notes it, and masks it again. Else it stays unmasked.
            unmask(device, port)?;
            let event = pending();
            waiting.halted(event);
            if let Err(error) = halted {
                log::debug!("from here on waiting for events in dom0's kernel: Xen has refused to: {error}");
                *halting = None;
            }
            if event {
                self.unread += 1;
                return Ok(true);
            }
            self.masked = None;
        }
        if waiting.times_sleep(halting.is_some()) {
            self.asleep.get_or_insert_with(Instant::now);
        }
        self.signalled = false;
        self.stop(device)?;
        if let Some(timeout) = timeout
            && !is_readable(device, timeout)?
        {
            self.waiting.slept(Some(false));
            return Ok(false);
        }
        let port = read(device)?;
        self.unread = 0;
        // It may have been an old note: then it is not masked.
        let event = pending();
        match event {
            true => self.masked = Some(port),
            false => unmask(device, port)?,
        }
        self.waiting.slept(self.asleep.map(|since| event && self.any && since.elapsed() < Self::SOON));
        if event {
            (self.asleep, self.any) = (None, true);
        }
        Ok(true)
    }
}

/// Looks whether there are events.
fn watch(looks: u32, pending: impl Fn() -> bool) -> bool {
    (0..looks).any(|_| look(&pending))
}

/// Looks once, and lets whoever shares the core go first.
fn look(pending: impl Fn() -> bool) -> bool {
    std::hint::spin_loop();
    pending()
}

/// Reads what has been noted, after waiting until there is something. All of it is the same port.
fn read(device: BorrowedFd<'_>) -> io::Result<Port> {
    let mut notes = [0; 2 * EventChannel::UNREAD * size_of::<Port>()];
    let length = file(device).read(&mut notes)?;
    match notes.first_chunk() {
        Some(port) if length >= size_of::<Port>() => Ok(Port::from_ne_bytes(*port)),
        _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "there was no event channel in what was read")),
    }
}

/// Whether there is something to read, at the latest after this time.
fn is_readable(device: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // Rounded up: who waits for the end of that time is not to wait for nothing again and again.
    let timeout = libc::c_int::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(libc::c_int::MAX);
    // SAFETY: the one entry outlives the call.
    match unsafe { libc::poll(&raw mut poll, 1, timeout) } {
        0 => Ok(false),
        1.. => Ok(true),
        _ => Err(io::Error::last_os_error()),
    }
}

fn unmask(device: BorrowedFd<'_>, port: Port) -> io::Result<()> {
    match file(device).write(&port.to_ne_bytes())? {
        4 => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::WriteZero, "the event channel was not taken")),
    }
}

/// The device, not to be closed.
fn file(device: BorrowedFd<'_>) -> ManuallyDrop<File> {
    // SAFETY: it is open while it is borrowed, and not closed here.
    ManuallyDrop::new(unsafe { File::from_raw_fd(device.as_raw_fd()) })
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;

    use super::*;

    const PORT: Port = 7;

    /// The kernel's side of the device, and Xen's.
    struct Kernel {
        device: UnixStream,
        kernel: UnixStream,
        masked: Cell<bool>,
        pending: Cell<bool>,
        /// Events in the ring.
        ring: Cell<usize>,
        calls: RefCell<Vec<&'static str>>,
        /// What comes while it halts.
        coming: Cell<usize>,
        refuses: Cell<bool>,
    }

    impl Kernel {
        fn new() -> Rc<Self> {
            let (device, kernel) = UnixStream::pair().unwrap();
            kernel.set_nonblocking(true).unwrap();
            device.set_nonblocking(true).unwrap();
            Rc::new(Self {
                device,
                kernel,
                masked: Cell::new(false),
                pending: Cell::new(false),
                ring: Cell::new(0),
                calls: RefCell::default(),
                coming: Cell::new(0),
                refuses: Cell::new(false),
            })
        }

        /// An event is put in the ring, and signalled.
        fn event(&self) {
            self.ring.set(self.ring.get() + 1);
            self.pending.set(true);
            self.deliver();
        }

        fn deliver(&self) {
            if self.pending.get() && !self.masked.get() {
                self.pending.set(false);
                self.masked.set(true);
                assert!(self.notes() < 64, "the kernel has no room for more notes");
                (&self.kernel).write_all(&PORT.to_ne_bytes()).unwrap();
            }
        }

        /// How many there are that have not been read.
        fn notes(&self) -> usize {
            let mut bytes: libc::c_int = 0;
            // SAFETY: the request writes one integer.
            assert_eq!(unsafe { libc::ioctl(self.device.as_raw_fd(), libc::FIONREAD, &raw mut bytes) }, 0);
            bytes as usize / size_of::<Port>()
        }

        /// What the channel has written unmasks.
        fn settle(&self) {
            let mut bytes = [0; 4];
            while (&self.kernel).read_exact(&mut bytes).is_ok() {
                assert_eq!(Port::from_ne_bytes(bytes), PORT);
                self.calls.borrow_mut().push("unmask");
                self.masked.set(false);
                self.deliver();
            }
        }

        fn wait(self: &Rc<Self>, channel: &mut EventChannel) -> io::Result<bool> {
            let mut halting = (!self.refuses.get()).then(|| Xen(self.clone()));
            channel.wait_with(&mut halting, self.device.as_fd(), None, || {
                self.settle();
                self.ring.get() > 0
            })
        }

        /// Takes all events there are.
        fn serve(&self) -> usize {
            self.ring.take()
        }
    }

    struct Xen(Rc<Kernel>);

    impl Halting for Xen {
        fn halt(&mut self, port: Port) -> io::Result<()> {
            assert_eq!(port, PORT);
            self.0.settle();
            assert!(self.0.masked.get(), "an unmasked port is not to be waited for: it may be delivered before");
            self.0.calls.borrow_mut().push("halt");
            for _ in 0..self.0.coming.take() {
                self.0.event();
            }
            Ok(())
        }
    }

    /// It has seen an event before.
    fn channel() -> EventChannel {
        EventChannel { any: true, ..EventChannel::new(Ways::SLEEP) }
    }

    /// As if it had blocked until now: the kernel sees the write that came before the read.
    fn sleep_until_event(kernel: &Rc<Kernel>, channel: &mut EventChannel) {
        let asleep = kernel.wait(channel);
        assert_eq!(asleep.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        kernel.settle();
        assert!(!kernel.masked.get(), "who sleeps with a masked channel is never woken");
        kernel.event();
        kernel.wait(channel).unwrap();
    }

    #[test]
    fn a_storm_is_waited_for_in_xen() {
        let kernel = Kernel::new();
        let mut channel = channel();
        kernel.event();
        kernel.wait(&mut channel).unwrap();
        assert_eq!(kernel.serve(), 1);
        for _ in 0..1_000 {
            kernel.coming.set(1);
            kernel.wait(&mut channel).unwrap();
            assert_eq!(kernel.serve(), 1);
        }
        let calls = kernel.calls.take();
        assert_eq!(calls.iter().filter(|call| **call == "halt").count(), 1_000);
        assert_eq!(calls.iter().filter(|call| **call == "unmask").count(), 1_000);
    }

    #[test]
    fn where_no_event_comes_it_sleeps_and_is_woken() {
        let kernel = Kernel::new();
        let mut channel = channel();
        kernel.event();
        kernel.wait(&mut channel).unwrap();
        for _ in 0..100 {
            kernel.serve();
            sleep_until_event(&kernel, &mut channel);
        }
        let halts = kernel.calls.borrow().iter().filter(|call| **call == "halt").count();
        assert!(halts <= 8, "{halts} halts in vain");
    }

    #[test]
    fn old_notes_wake_nobody_for_good() {
        let kernel = Kernel::new();
        let mut channel = channel();
        kernel.event();
        kernel.wait(&mut channel).unwrap();
        kernel.serve();
        for _ in 0..10 {
            kernel.coming.set(1);
            kernel.wait(&mut channel).unwrap();
            kernel.serve();
        }
        // It halts in vain, and then reads the ten notes: for nothing, once.
        kernel.wait(&mut channel).unwrap();
        assert_eq!(kernel.serve(), 0);
        sleep_until_event(&kernel, &mut channel);
        assert_eq!(kernel.serve(), 1);
    }

    #[test]
    fn what_comes_while_it_watches_takes_no_system_call() {
        let kernel = Kernel::new();
        let mut channel = channel();
        kernel.event();
        kernel.wait(&mut channel).unwrap();
        assert_eq!(kernel.serve(), 1);
        channel.waiting = Waiting::new(true);
        channel.waiting.slept(Some(true));
        for _ in 0..100 {
            kernel.event();
            kernel.wait(&mut channel).unwrap();
            assert_eq!(kernel.serve(), 1);
        }
        assert!(kernel.calls.take().is_empty());
        // What is pending of those does not end the halt that comes next.
        kernel.coming.set(1);
        kernel.wait(&mut channel).unwrap();
        assert_eq!(kernel.serve(), 1);
        assert_eq!(*kernel.calls.borrow(), ["unmask", "halt", "unmask"]);
        // And having slept it is woken.
        for _ in 0..10 {
            kernel.event();
            kernel.wait(&mut channel).unwrap();
            assert_eq!(kernel.serve(), 1);
        }
        kernel.refuses.set(true);
        let in_vain = (0..10).take_while(|_| kernel.wait(&mut channel).is_ok()).count();
        assert!(in_vain <= 2, "{in_vain} old notes");
        kernel.settle();
        sleep_until_event(&kernel, &mut channel);
        assert_eq!(kernel.serve(), 1);
    }

    #[test]
    fn it_waits_for_no_longer_than_it_is_told_to() {
        let kernel = Kernel::new();
        let mut channel = channel();
        let wait = |channel: &mut EventChannel| {
            channel.wait(kernel.device.as_fd(), Some(Duration::from_millis(1)), || true).unwrap()
        };
        assert!(!wait(&mut channel));
        kernel.event();
        assert!(wait(&mut channel));
    }

    #[test]
    fn waking_up_without_an_event_makes_no_long_sleep_short() {
        let kernel = Kernel::new();
        let mut channel = EventChannel::new(Ways { halt: false, ..Ways::default() });
        let wait = |channel: &mut EventChannel, most| {
            channel.wait(kernel.device.as_fd(), Some(most), || kernel.ring.get() > 0).unwrap()
        };
        for (nothing, watches) in [(EventChannel::SOON, 0), (Duration::ZERO, 1)] {
            assert!(!wait(&mut channel, nothing));
            kernel.event();
            assert!(wait(&mut channel, Duration::MAX));
            assert_eq!(kernel.serve(), 1);
            kernel.settle();
            assert!(!wait(&mut channel, Duration::ZERO));
            kernel.settle();
            assert_eq!(channel.waits().watched_in_vain, watches);
        }
    }

    #[test]
    fn stopped_it_is_unmasked() {
        let kernel = Kernel::new();
        let mut channel = channel();
        kernel.event();
        kernel.wait(&mut channel).unwrap();
        assert!(kernel.masked.get());
        channel.stop(kernel.device.as_fd()).unwrap();
        kernel.settle();
        assert!(!kernel.masked.get());
        channel.stop(kernel.device.as_fd()).unwrap();
        kernel.settle();
        assert_eq!(*kernel.calls.borrow(), ["unmask"]);
    }

    #[test]
    fn an_event_that_comes_while_others_are_served_is_not_waited_for() {
        for refuses in [false, true] {
            let kernel = Kernel::new();
            kernel.refuses.set(refuses);
            let mut channel = channel();
            kernel.event();
            kernel.wait(&mut channel).unwrap();
            assert_eq!(kernel.serve(), 1);
            kernel.event();
            // Masked, pending: halting ends at once, and so does a read after unmasking.
            if refuses {
                let asleep = kernel.wait(&mut channel);
                assert_eq!(asleep.unwrap_err().kind(), io::ErrorKind::WouldBlock);
                kernel.settle();
            }
            kernel.wait(&mut channel).unwrap();
            assert_eq!(kernel.serve(), 1);
        }
    }
}
