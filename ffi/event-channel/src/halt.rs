//! Waiting in Xen.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{self, NonNull};

use hyperbp::PAGE_SIZE;

use crate::{Halting, Port};

/// `__HYPERVISOR_sched_op` (`xen/include/public/xen.h`).
const SCHED_OP: u64 = 29;

/// `SCHEDOP_poll` (`xen/include/public/sched.h`): blocks the virtual CPU until a port is pending, masked or not, or any other
/// event is delivered to it, as the timer's is.
const POLL: u64 = 3;

/// `struct privcmd_hypercall` (Linux, `include/uapi/xen/privcmd.h`).
#[repr(C)]
struct Hypercall {
    operation: u64,
    arguments: [u64; 5],
}

/// `IOCTL_PRIVCMD_HYPERCALL`, `_IOC(_IOC_NONE, 'P', 0, sizeof(struct privcmd_hypercall))`.
const HYPERCALL: libc::c_ulong = (size_of::<Hypercall>() as libc::c_ulong) << 16 | (b'P' as libc::c_ulong) << 8;

/// `struct sched_poll`, and the port that it points to.
#[repr(C)]
struct Poll {
    ports: u64,
    number_of_ports: u32,
    /// None, if it is 0.
    timeout: u64,
    port: Port,
}

/// A page that a hypercall can read: the kernel keeps it where it is.
#[derive(Debug)]
struct Buffer(NonNull<Poll>);

impl Buffer {
    fn new() -> io::Result<Self> {
        // A device for just that, of Linux 4.18 and newer.
        let device = open("/dev/xen/hypercall")?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping, wherever there is room.
        let address = unsafe { libc::mmap(ptr::null_mut(), PAGE_SIZE, protection, flags, device.as_raw_fd(), 0) };
        match NonNull::new(address.cast()) {
            Some(poll) if address != libc::MAP_FAILED => Ok(Self(poll)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and nobody else knows of it.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE_SIZE) };
    }
}

/// Has Xen wait.
#[derive(Debug)]
pub(crate) struct Halt {
    privcmd: File,
    buffer: Buffer,
}

// SAFETY: the page is this value's alone.
unsafe impl Send for Halt {}

impl Halt {
    /// None if this domain has other virtual CPUs: the port may be delivered to one of them.
    pub(crate) fn new() -> io::Result<Option<Self>> {
        // SAFETY: no pointer.
        match unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) } {
            1 => Ok(Some(Self { privcmd: open("/dev/xen/privcmd")?, buffer: Buffer::new()? })),
            _ => Ok(None),
        }
    }
}

impl Halting for Halt {
    fn halt(&mut self, port: Port) -> io::Result<()> {
        let poll = self.buffer.0.as_ptr();
        // SAFETY: the page is mapped, and large enough.
        let ports = unsafe { &raw const (*poll).port } as u64;
        // SAFETY: as above; Xen reads it in the call below only.
        unsafe { poll.write_volatile(Poll { ports, number_of_ports: 1, timeout: 0, port }) };
        hypercall(self.privcmd.as_raw_fd(), SCHED_OP, [POLL, poll as u64])
    }
}

fn hypercall(privcmd: RawFd, operation: u64, [first, second]: [u64; 2]) -> io::Result<()> {
    let mut call = Hypercall { operation, arguments: [first, second, 0, 0, 0] };
    // SAFETY: the structure is what this request is for; what its arguments point to is mapped.
    match unsafe { libc::ioctl(privcmd, HYPERCALL, &raw mut call) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn open(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}
