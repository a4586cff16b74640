//! Event channels that others have to a domain.

use hyperbp_xen_sys as sys;

use super::store::device_channels;
use super::{Domain, Error, check};

/// `DOMID_SELF`, xen/include/public/xen.h.
const OURSELVES: u16 = 0x7ff0;

impl Domain {
    /// Whether a monitor lives: somebody in this domain holds the event channel of its ring. When a process dies, the kernel gives
    /// its channels back, and so this tells a live monitor from one that has died and whose ring is still there.
    ///
    /// Xen does not say whose a channel is. What is neither xenstore's, nor the console's, nor of a device of the guest's, is a
    /// ring's, or a device model's: that has one for each virtual CPU, and one for all. A guest that names the ring's channel as
    /// one of a device's is believed; so what this says is for operators, and nothing that protects anybody from a guest.
    ///
    /// # Errors
    /// If Xen or xenstore does not answer.
    pub(crate) fn is_monitored(&self) -> Result<bool, Error> {
        let mut known = device_channels(self.id)?;
        for which in [sys::HVM_PARAM_STORE_EVTCHN, sys::HVM_PARAM_CONSOLE_EVTCHN] {
            let mut port = 0;
            // SAFETY: the handle is open, and `port` outlives the call.
            let result = unsafe { sys::xc_hvm_param_get(self.xc.raw(), self.id, which, &mut port) };
            check("xc_hvm_param_get", result)?;
            known.extend(u32::try_from(port));
        }
        let mut held = 0;
        for port in 0.. {
            let status = match self.channel(port) {
                // There are no more.
                Err(error) if error.is(libc::EINVAL) => break,
                // It is Xen's own.
                Err(error) if error.is(libc::EACCES) => continue,
                status => status?,
            };
            if status.status != sys::EVTCHNSTAT_interdomain {
                continue;
            }
            // SAFETY: that is the part of the union for this status.
            let remote = unsafe { status.u.interdomain };
            held += u32::from(u32::from(remote.dom) == self.id && !known.contains(&remote.port));
        }
        let of_devices = if self.limits()?.has_devices { u32::from(self.vcpus) + 1 } else { 0 };
        Ok(held > of_devices)
    }

    fn channel(&self, port: u32) -> Result<sys::xc_evtchn_status_t, Error> {
        let mut status = sys::xc_evtchn_status_t { dom: OURSELVES, port, ..Default::default() };
        // SAFETY: the handle is open, and `status` outlives the call.
        check("xc_evtchn_status", unsafe { sys::xc_evtchn_status(self.xc.raw(), &mut status) })?;
        Ok(status)
    }
}
