//! Asks Xen for the DR7 of a virtual CPU that waits.
//!
//! The DR7 in an event may be old: `hyperbp::Hypervisor::debug_control` says why. The one of
//! `XEN_DOMCTL_gethvmcontext_partial` is current: Xen pauses that virtual CPU, and only that one, and saves its debug
//! registers if the CPU still has them (`vcpu_sleep_sync`, `vmx_save_dr`).
//!
//! This is a system call at each hit of an instruction that accesses memory. libxenctrl copies what a hypercall reads and
//! writes to pages that it takes for that, twice. Here both are in one page, which is mapped once.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{self, NonNull};

use hyperbp::{PAGE_SIZE, VcpuId};

/// `__HYPERVISOR_domctl` (`xen/include/public/xen.h`).
const DOMCTL: u64 = 36;

/// `XEN_DOMCTL_gethvmcontext_partial` (`xen/include/public/domctl.h`). Before Xen 4.12 it pauses all of the domain.
const GET_HVM_CONTEXT_PARTIAL: u32 = 55;

/// The values of `XEN_DOMCTL_INTERFACE_VERSION` that are tried: those of Xen 4.12 (0x11) to 4.20 (0x17), and some to come. The
/// parts that are used here have been the same in all.
const INTERFACE_VERSIONS: std::ops::RangeInclusive<u32> = 0x11..=0x20;

/// `HVM_SAVE_CODE(CPU)` (`xen/include/public/arch-x86/hvm/save.h`).
const SAVED_CPU: u32 = 2;

/// Where DR7 is in `struct hvm_hw_cpu`: behind the FPU's 512 bytes, 16 general registers, RIP, RFLAGS, CR0, CR2, CR3, CR4, DR0
/// to DR3 and DR6. The structure is what a saved domain consists of, and does not change.
const DR7: usize = 512 + (16 + 2 + 4 + 5) * 8;

/// `struct privcmd_hypercall` (Linux, `include/uapi/xen/privcmd.h`).
#[repr(C)]
struct Hypercall {
    operation: u64,
    arguments: [u64; 5],
}

/// `IOCTL_PRIVCMD_HYPERCALL`, `_IOC(_IOC_NONE, 'P', 0, sizeof(struct privcmd_hypercall))`.
const HYPERCALL: libc::c_ulong = (size_of::<Hypercall>() as libc::c_ulong) << 16 | (b'P' as libc::c_ulong) << 8;

/// `struct xen_domctl` with a `struct xen_domctl_hvmcontext_partial`.
#[repr(C)]
struct Domctl {
    command: u32,
    interface_version: u32,
    domain: u16,
    padding: [u16; 3],
    kind: u32,
    instance: u32,
    size: u64,
    buffer: u64,
    /// The union has room for 128 bytes.
    rest: [u64; 13],
}

/// What is in the page: the call, and what Xen writes.
#[repr(C)]
struct Buffer {
    call: Domctl,
    saved: [u64; (PAGE_SIZE - size_of::<Domctl>()) / 8],
}

/// Asks for the DR7 of a domain's virtual CPUs.
#[derive(Debug)]
pub struct DebugControl {
    privcmd: File,
    /// A page that the kernel keeps where it is.
    buffer: NonNull<Buffer>,
    domain: u16,
    interface_version: u32,
}

// SAFETY: the page is this value's alone.
unsafe impl Send for DebugControl {}

impl DebugControl {
    /// For this domain.
    ///
    /// # Errors
    /// If this is no dom0 with Linux 4.18 or newer, or Xen refuses.
    pub fn open(domain: u16) -> io::Result<Self> {
        let privcmd = open("/dev/xen/privcmd")?;
        // A device for just that.
        let device = open("/dev/xen/hypercall")?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping, wherever there is room.
        let address = unsafe { libc::mmap(ptr::null_mut(), PAGE_SIZE, protection, flags, device.as_raw_fd(), 0) };
        let buffer = match NonNull::new(address.cast()) {
            Some(buffer) if address != libc::MAP_FAILED => buffer,
            _ => return Err(io::Error::last_os_error()),
        };
        let mut control = Self { privcmd, buffer, domain, interface_version: 0 };
        for version in INTERFACE_VERSIONS {
            control.interface_version = version;
            match control.get(VcpuId(0)) {
                // `do_domctl` says that of another version.
                Err(error) if error.raw_os_error() == Some(libc::EACCES) => {}
                // A virtual CPU that has not been started has no registers.
                Err(error) if error.raw_os_error() == Some(libc::ENODATA) => return Ok(control),
                got => return got.map(|_| control),
            }
        }
        Err(io::Error::new(io::ErrorKind::Unsupported, "Xen has another version of XEN_DOMCTL_INTERFACE_VERSION"))
    }

    /// The DR7 of a virtual CPU.
    ///
    /// # Errors
    /// If there is no such virtual CPU, or it has not been started.
    pub fn get(&mut self, vcpu: VcpuId) -> io::Result<u64> {
        let buffer = self.buffer.as_ptr();
        // SAFETY: the page is mapped, and large enough.
        let saved = unsafe { &raw mut (*buffer).saved };
        let call = Domctl {
            command: GET_HVM_CONTEXT_PARTIAL,
            interface_version: self.interface_version,
            domain: self.domain,
            padding: [0; 3],
            kind: SAVED_CPU,
            instance: vcpu.0.into(),
            // In and out.
            size: size_of::<Buffer>() as u64 - offset_of!(Buffer, saved) as u64,
            buffer: saved as u64,
            rest: [0; 13],
        };
        // SAFETY: as above.
        let at = unsafe { &raw mut (*buffer).call };
        // SAFETY: as above; Xen reads and writes it in the call below only.
        unsafe { at.write_volatile(call) };
        hypercall(self.privcmd.as_raw_fd(), DOMCTL, at as u64)?;
        // SAFETY: within the page.
        let dr7 = unsafe { saved.cast::<u64>().add(DR7 / 8) };
        // SAFETY: aligned, and Xen has written it.
        Ok(unsafe { dr7.read_volatile() })
    }
}

impl Drop for DebugControl {
    fn drop(&mut self) {
        // SAFETY: mapped in `open`, and nobody else knows of it.
        unsafe { libc::munmap(self.buffer.as_ptr().cast(), PAGE_SIZE) };
    }
}

fn hypercall(privcmd: RawFd, operation: u64, argument: u64) -> io::Result<()> {
    let mut call = Hypercall { operation, arguments: [argument, 0, 0, 0, 0] };
    // SAFETY: the structure is what this request is for; what its argument points to is mapped.
    match unsafe { libc::ioctl(privcmd, HYPERCALL, &raw mut call) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn open(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_xen_reads_has_its_layout() {
        assert_eq!((offset_of!(Domctl, domain), offset_of!(Domctl, kind)), (8, 16));
        assert_eq!((offset_of!(Domctl, size), offset_of!(Domctl, buffer)), (24, 32));
        assert_eq!((size_of::<Domctl>(), size_of::<Buffer>()), (16 + 128, PAGE_SIZE));
        // From `offsetof(struct hvm_hw_cpu, dr7)`.
        assert_eq!(DR7, 728);
    }

    #[test]
    fn elsewhere_than_in_a_dom0_it_is_an_error() {
        if !std::path::Path::new("/dev/xen/privcmd").exists() {
            assert_eq!(DebugControl::open(1).unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }
}
