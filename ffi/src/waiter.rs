//! What waits for events, for a host in another language.

use crate::bridge::ffi;
use crate::session::Error;
#[cfg(feature = "libvmi")]
use crate::session::without_panic;
#[cfg(feature = "libvmi")]
use {
    hyperbp_event_channel::{EventChannel, Ways},
    libvmi_sys as sys,
    std::io::ErrorKind,
    std::os::fd::BorrowedFd,
    std::time::Duration,
};

/// An event channel, as it is waited for.
pub(crate) struct Waiter {
    #[cfg(feature = "libvmi")]
    vmi: sys::vmi_instance_t,
    #[cfg(feature = "libvmi")]
    device: BorrowedFd<'static>,
    #[cfg(feature = "libvmi")]
    channel: EventChannel,
}

/// Makes one, which may watch for so many microseconds, and have Xen wait or not.
///
/// # Errors
/// If there is no such instance or device, if it may watch for too long, or the library was built without LibVMI.
///
/// # Safety
/// `vmi` is an instance of LibVMI that was initialised with events, `device` an open file: both outlive the result.
#[cfg(feature = "libvmi")]
pub(crate) unsafe fn open_waiter(
    vmi: *mut ffi::vmi_instance,
    device: i32,
    watch: u32,
    halt: bool,
) -> Result<Box<Waiter>, Error> {
    let ways = Ways { watch: Duration::from_micros(watch.into()), halt };
    if ways.watch > Ways::LONGEST {
        return Err(Error::WatchesTooLong { watch, longest: Ways::LONGEST.as_micros() });
    }
    if vmi.is_null() || device < 0 {
        return Err(Error::NoEventChannel);
    }
    // SAFETY: by this function's contract.
    let device = unsafe { BorrowedFd::borrow_raw(device) };
    without_panic(|| Ok(Box::new(Waiter { vmi: vmi.cast(), device, channel: EventChannel::new(ways) })))
}

/// Says that the library was built without LibVMI.
///
/// # Errors
/// Always.
///
/// # Safety
/// None is needed.
#[cfg(not(feature = "libvmi"))]
pub(crate) unsafe fn open_waiter(
    _vmi: *mut ffi::vmi_instance,
    _device: i32,
    _watch: u32,
    _halt: bool,
) -> Result<Box<Waiter>, Error> {
    Err(Error::NoLibVmi)
}

impl Waiter {
    /// Waits for events, for so many milliseconds, or for ever if that is negative.
    ///
    /// # Errors
    /// If the device does not block, or cannot be read or written.
    #[cfg(feature = "libvmi")]
    pub(crate) fn wait(&mut self, timeout: i32) -> Result<ffi::Waited, Error> {
        let Self { vmi, device, channel } = self;
        let timeout = u64::try_from(timeout).ok().map(Duration::from_millis);
        // SAFETY: `open_waiter` was promised that the instance lives. (It looks at the ring, in memory.)
        let pending = || unsafe { sys::vmi_are_events_pending(*vmi) } > 0;
        without_panic(|| match channel.wait(*device, timeout, pending) {
            Ok(true) => Ok(ffi::Waited::Woken),
            Ok(false) => Ok(ffi::Waited::TimedOut),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(ffi::Waited::Interrupted),
            Err(error) => Err(error.into()),
        })
    }

    /// Lets the device be waited for in another way.
    ///
    /// # Errors
    /// If it cannot be written.
    #[cfg(feature = "libvmi")]
    pub(crate) fn stop(&mut self) -> Result<(), Error> {
        let Self { device, channel, .. } = self;
        without_panic(|| Ok(channel.stop(*device)?))
    }

    /// What came of waiting so far.
    #[cfg(feature = "libvmi")]
    pub(crate) fn waits(&self) -> ffi::Waits {
        let hyperbp::Waits { watched, watched_in_vain, halted, halted_in_vain, slept, .. } = self.channel.waits();
        ffi::Waits { watched, watched_in_vain, halted, halted_in_vain, slept }
    }

    /// There is none.
    #[cfg(not(feature = "libvmi"))]
    pub(crate) fn wait(&mut self, _timeout: i32) -> Result<ffi::Waited, Error> {
        Err(Error::NoLibVmi)
    }

    /// There is none.
    #[cfg(not(feature = "libvmi"))]
    pub(crate) fn stop(&mut self) -> Result<(), Error> {
        Err(Error::NoLibVmi)
    }

    /// There is none.
    #[cfg(not(feature = "libvmi"))]
    pub(crate) fn waits(&self) -> ffi::Waits {
        ffi::Waits { watched: 0, watched_in_vain: 0, halted: 0, halted_in_vain: 0, slept: 0 }
    }
}
