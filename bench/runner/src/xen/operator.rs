//! What an operator, a toolstack or a device model may do to a domain while it is monitored. Only checks do that here.

use std::ptr::NonNull;

use hyperbp::{Gfn, PAGE_SIZE};
use hyperbp_xen_sys as sys;

use super::{Domain, Error, check};

/// Frames whose dirty bits are asked for: the first 128 MiB.
const FRAMES: usize = 8 * PAGE_SIZE;

/// Why a domain does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shutdown {
    Suspend,
    Crash,
}

impl Domain {
    /// Stops all virtual CPUs, as the guest itself does by `SCHEDOP_shutdown`.
    ///
    /// # Errors
    /// If Xen refuses.
    pub(crate) fn shut_down(&self, why: Shutdown) -> Result<(), Error> {
        let reason = match why {
            Shutdown::Suspend => sys::SHUTDOWN_suspend,
            Shutdown::Crash => sys::SHUTDOWN_crash,
        };
        // SAFETY: the handle is open.
        check("xc_domain_shutdown", unsafe { sys::xc_domain_shutdown(self.xc.raw(), self.id, reason as i32) })
    }

    /// Makes a page of RAM read-only for the guest, as a ROM is: Xen drops what it writes. Or makes it RAM again.
    ///
    /// # Errors
    /// If Xen refuses.
    pub(crate) fn set_read_only(&self, gfn: Gfn, read_only: bool) -> Result<(), Error> {
        let kind = if read_only { sys::HVMMEM_ram_ro } else { sys::HVMMEM_ram_rw };
        // SAFETY: the handle is open.
        check("xc_hvm_set_mem_type", unsafe { sys::xc_hvm_set_mem_type(self.xc.raw(), self.id, kind, gfn.0, 1) })
    }

    /// Has Xen keep a record of pages that are written to, as for a migration, or not any more.
    ///
    /// # Errors
    /// If Xen refuses.
    pub(crate) fn set_log_dirty(&self, on: bool) -> Result<(), Error> {
        let operation = if on { sys::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY } else { sys::XEN_DOMCTL_SHADOW_OP_OFF };
        // SAFETY: the handle is open; the operation takes no bitmap.
        let result = unsafe {
            let none = std::ptr::null_mut();
            sys::xc_logdirty_control(self.xc.raw(), self.id, operation, none, 0, 0, std::ptr::null_mut())
        };
        check("xc_logdirty_control", result as i32)
    }

    /// Whether a page of the first 128 MiB was written to since it was asked last with `forget`.
    ///
    /// # Errors
    /// If Xen refuses.
    pub(crate) fn is_dirty(&self, gfn: Gfn, forget: bool) -> Result<bool, Error> {
        let mut buffer = sys::xc_hypercall_buffer_t::default();
        // SAFETY: the handle is open, and a buffer of zeros is one that has no memory yet.
        let bitmap = unsafe { sys::xc__hypercall_buffer_alloc_pages(self.xc.raw(), &mut buffer, 1) };
        let bitmap = NonNull::new(bitmap).ok_or_else(|| Error::last("xc__hypercall_buffer_alloc_pages"))?;
        // SAFETY: it is a page of ours.
        unsafe { bitmap.cast::<u8>().write_bytes(0, PAGE_SIZE) };
        let operation = if forget { sys::XEN_DOMCTL_SHADOW_OP_CLEAN } else { sys::XEN_DOMCTL_SHADOW_OP_PEEK };
        let (frames, statistics) = (FRAMES as u64, std::ptr::null_mut());
        // SAFETY: the handle is open, and the bitmap has room for as many frames as is said.
        let result =
            unsafe { sys::xc_logdirty_control(self.xc.raw(), self.id, operation, &mut buffer, frames, 0, statistics) };
        let checked = check("xc_logdirty_control", result.min(0) as i32);
        // SAFETY: it is a page, and no one writes to it now.
        let bits = unsafe { bitmap.cast::<[u8; PAGE_SIZE]>().read() };
        let dirty = bits.get(gfn.0 as usize / 8).is_some_and(|byte| byte >> (gfn.0 % 8) & 1 != 0);
        // SAFETY: allocated above, and used by nobody any more.
        unsafe { sys::xc__hypercall_buffer_free_pages(self.xc.raw(), &mut buffer, 1) };
        checked.map(|()| dirty)
    }
}
