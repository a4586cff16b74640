//! Pages of the guest, mapped by the host, by hypercalls of our own, or through LibVMI. (Its own functions to write memory map
//! the page anew for each write.)

use std::ffi::c_void;
use std::pin::Pin;
#[cfg(vmi_mmap_guest_pa)]
use std::ptr;
use std::ptr::NonNull;

use cxx::UniquePtr;
use hyperbp::{Gfn, PAGE_SIZE};
use hyperbp_guest_page::{GuestPage, Source};
use hyperbp_xen_domain as xen;
use libvmi_sys as sys;

use crate::bridge::ffi;
use crate::machine::Error;

/// What keeps a page mapped.
#[derive(Debug)]
pub(crate) enum Mapping {
    /// A page of this process's memory, which only it unmaps.
    Page(NonNull<c_void>),
    Xen {
        _mapping: hyperbp_privcmd::Mapping,
    },
}

/// Who maps pages, and says what they are.
pub(crate) struct Mapper {
    pub(super) vmi: sys::vmi_instance_t,
    /// The host's functions.
    pub(super) host: UniquePtr<ffi::Memory>,
    /// None if hypercalls of our own are not to be had.
    pub(super) xen: Option<xen::Domain>,
}

impl Mapper {
    pub(super) fn host(&mut self) -> Pin<&mut ffi::Memory> {
        self.host.pin_mut()
    }

    /// # Errors
    /// If hypercalls of our own are not to be had.
    pub(super) fn xen(&mut self) -> Result<&mut xen::Domain, Error> {
        self.xen.as_mut().ok_or(Error::NoMemory)
    }
}

impl Source for Mapper {
    type Mapping = Mapping;
    type Table = hyperbp_privcmd::Mapping;
    type Error = Error;

    fn map(&mut self, gfn: Gfn) -> Result<GuestPage<Mapping>, Error> {
        let address = if self.host.maps_pages() {
            NonNull::new(self.host().map_page(gfn.0)?.cast()).ok_or(Error::NoMapping)?
        } else if let Some(xen) = &self.xen {
            let (address, mapping) = xen.map_page(gfn).map_err(Error::of("mapping a page"))?;
            // SAFETY: it is mapped readable and writable, a page long and on a page's boundary, until the mapping is dropped;
            // nobody else knows of it.
            return Ok(unsafe { GuestPage::new(address, Mapping::Xen { _mapping: mapping }) });
        } else {
            // SAFETY: `Domain::new` was promised that the instance lives.
            unsafe { map_with_libvmi(self.vmi, gfn) }?
        };
        // SAFETY: it is mapped readable and writable, a page long and on a page's boundary, until `Mapping` is dropped.
        Ok(unsafe { GuestPage::new(address.cast(), Mapping::Page(address)) })
    }

    fn is_ram(&mut self, gfn: Gfn) -> Result<bool, Error> {
        match &mut self.xen {
            Some(xen) => xen.is_ram(gfn).map_err(Error::of("HVMOP_get_mem_type")),
            // It may be anything.
            None => Ok(false),
        }
    }
}

/// # Safety
/// `vmi` is an instance of LibVMI that lives.
#[cfg(vmi_mmap_guest_pa)]
unsafe fn map_with_libvmi(vmi: sys::vmi_instance_t, gfn: Gfn) -> Result<NonNull<c_void>, Error> {
    let mut address = ptr::null_mut();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the instance lives, and there is room for the address of the one page asked for.
    let status = unsafe { sys::vmi_mmap_guest_pa(vmi, gfn.at(0).0, 1, protection, &mut address) };
    super::check("vmi_mmap_guest_pa", status)?;
    NonNull::new(address).ok_or(Error::LibVmi("vmi_mmap_guest_pa"))
}

#[cfg(not(vmi_mmap_guest_pa))]
unsafe fn map_with_libvmi(_: sys::vmi_instance_t, _: Gfn) -> Result<NonNull<c_void>, Error> {
    Err(Error::NoMapping)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Self::Page(address) = self {
            // SAFETY: mapped in `map` with this length, and unmapped nowhere else.
            unsafe { libc::munmap(address.as_ptr(), PAGE_SIZE) };
        }
    }
}
