//! Memory of another domain.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use crate::{PAGE_SIZE, request};

/// `struct privcmd_mmapbatch_v2` (Linux, `include/uapi/xen/privcmd.h`).
#[repr(C)]
struct MapBatch {
    count: u32,
    domain: u16,
    address: u64,
    frames: *const u64,
    errors: *mut i32,
}

/// `IOCTL_PRIVCMD_MMAPBATCH_V2`.
pub(crate) const MAP_BATCH: libc::c_ulong = request(4, size_of::<MapBatch>());

/// Mapped pages. Dropping it unmaps them.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<c_void>,
    length: usize,
}

// SAFETY: it is an address and a length; who accesses what is there has to see to the rest.
unsafe impl Send for Mapping {}

impl Mapping {
    pub(crate) fn new(privcmd: &File, domain: u16, frames: &[u64], writable: bool) -> io::Result<Self> {
        let too_many = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let count = u32::try_from(frames.len()).map_err(too_many)?;
        let length = frames.len() * PAGE_SIZE;
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a new mapping, wherever there is room. There is nothing in it yet.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, privcmd.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mapping = Self { address, length };
        let mut errors = vec![0_i32; frames.len()];
        let (frames, errors_at) = (frames.as_ptr(), errors.as_mut_ptr());
        let batch = MapBatch { count, domain, address: address.as_ptr() as u64, frames, errors: errors_at };
        // SAFETY: both arrays have as many elements as is said, and the mapping is as long.
        let result = unsafe { libc::ioctl(privcmd.as_raw_fd(), MAP_BATCH, &raw const batch) };
        let error = if result == -1 { Some(io::Error::last_os_error()) } else { None };
        // What is said of a page is more than what is said of all.
        match errors.iter().find(|error| **error != 0) {
            Some(of_page) => Err(io::Error::from_raw_os_error(of_page.abs())),
            None => error.map_or(Ok(mapping), Err),
        }
    }

    /// The first byte of the first page.
    #[must_use]
    pub const fn address(&self) -> NonNull<c_void> {
        self.address
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and unmapped nowhere else.
        unsafe { libc::munmap(self.address.as_ptr(), self.length) };
    }
}
