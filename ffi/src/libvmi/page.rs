//! Pages mapped by the host, or through LibVMI. (Its own functions to write memory map the page anew for each write.)

use std::ffi::c_void;
use std::pin::Pin;
#[cfg(vmi_mmap_guest_pa)]
use std::ptr;
use std::ptr::NonNull;

use hyperbp::{Gfn, PAGE_SIZE};
use hyperbp_guest_page::GuestPage;
use libvmi_sys as sys;

use crate::bridge::ffi;
use crate::machine::Error;

/// A page of a guest.
pub(super) type Page = GuestPage<Mapping>;

/// Unmaps a page when it is dropped.
#[derive(Debug)]
pub(super) struct Mapping(NonNull<c_void>);

/// Maps a page of the guest's own memory.
///
/// # Errors
/// If there is no such page.
///
/// # Safety
/// `vmi` is an instance of LibVMI that lives.
pub(super) unsafe fn map(vmi: sys::vmi_instance_t, memory: Pin<&mut ffi::Memory>, gfn: Gfn) -> Result<Page, Error> {
    let address = if memory.maps_pages() {
        NonNull::new(memory.map_page(gfn.0)?.cast()).ok_or(Error::NoMapping)?
    } else {
        // SAFETY: by this function's contract.
        unsafe { map_with_libvmi(vmi, gfn) }?
    };
    // SAFETY: it is mapped readable and writable, a page long and on a page's boundary, until `Mapping` is dropped.
    Ok(unsafe { GuestPage::new(address.cast(), Mapping(address)) })
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
        // SAFETY: mapped in `map` with this length, and unmapped nowhere else.
        unsafe { libc::munmap(self.0.as_ptr(), PAGE_SIZE) };
    }
}
