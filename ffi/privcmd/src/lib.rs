//! Hypercalls, and mappings of other domains' memory, by the device that Linux has for them.
//!
//! libxenctrl does both, too. But it copies what a hypercall reads and writes to pages that it takes for that, twice; and
//! a program must be linked with the version of it that belongs to the running Xen.

mod buffer;
mod mapping;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

pub use buffer::Buffer;
pub use mapping::Mapping;

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;

/// `struct privcmd_hypercall` (Linux, `include/uapi/xen/privcmd.h`).
#[repr(C)]
struct Hypercall {
    operation: u64,
    arguments: [u64; 5],
}

/// A request of the device's, with a structure of this size: `_IOC(_IOC_NONE, 'P', number, size)`.
const fn request(number: u8, size: usize) -> libc::c_ulong {
    (size as libc::c_ulong) << 16 | (b'P' as libc::c_ulong) << 8 | number as libc::c_ulong
}

/// `IOCTL_PRIVCMD_HYPERCALL`.
const HYPERCALL: libc::c_ulong = request(0, size_of::<Hypercall>());

/// The device, open.
#[derive(Debug)]
pub struct Privcmd(File);

impl Privcmd {
    /// Opens it.
    ///
    /// # Errors
    /// If this is no domain of Xen's with Linux, or the user may not.
    pub fn open() -> io::Result<Self> {
        open("/dev/xen/privcmd").map(Self)
    }

    /// Makes a hypercall. `operation` is one of `__HYPERVISOR_*` (`xen/include/public/xen.h`). Pointers among the arguments
    /// are to go into a [`Buffer`]. Returns the lower 32 bits of what it returns.
    ///
    /// # Errors
    /// What Xen says, or the kernel.
    pub fn call(&self, operation: u64, arguments: &[u64]) -> io::Result<u32> {
        let mut call = Hypercall { operation, arguments: [0; 5] };
        for (to, from) in call.arguments.iter_mut().zip(arguments) {
            *to = *from;
        }
        // SAFETY: the structure is what this request is for. Xen accesses only what its arguments say.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), HYPERCALL, &raw mut call) } {
            -1 => Err(io::Error::last_os_error()),
            result => Ok(result as u32),
        }
    }

    /// Maps pages of a domain, by their frame numbers, one behind the other.
    ///
    /// # Errors
    /// If one of them cannot be mapped.
    pub fn map(&self, domain: u16, frames: &[u64], writable: bool) -> io::Result<Mapping> {
        Mapping::new(&self.0, domain, frames, writable)
    }
}

fn open(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_linux() {
        assert_eq!(HYPERCALL, 0x305000);
        assert_eq!(mapping::MAP_BATCH, 0x205004);
    }

    #[test]
    fn elsewhere_than_on_xen_it_is_an_error() {
        if !std::path::Path::new("/dev/xen/privcmd").exists() {
            assert_eq!(Privcmd::open().unwrap_err().kind(), io::ErrorKind::NotFound);
            assert_eq!(Buffer::new(1).unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }
}
