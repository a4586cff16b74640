//! Asks Xen for the DR7 of a virtual CPU that waits.
//!
//! The DR7 in an event may be old: `hyperbp::Hypervisor::debug_control` says why. The one of
//! `XEN_DOMCTL_gethvmcontext_partial` is current: Xen pauses that virtual CPU, and only that one, and saves its debug
//! registers if the CPU still has them (`vcpu_sleep_sync`, `vmx_save_dr`).
//!
//! This is a system call at each hit of an instruction that accesses memory. What Xen reads and writes is in one page.

use std::io;

use hyperbp::VcpuId;
use hyperbp_privcmd::{Buffer, Privcmd};

/// `__HYPERVISOR_domctl` (`xen/include/public/xen.h`).
const DOMCTL: u64 = 36;

/// `XEN_DOMCTL_gethvmcontext_partial` (`xen/include/public/domctl.h`). Before Xen 4.12 it pauses all of the domain.
const GET_HVM_CONTEXT_PARTIAL: u64 = 55;

/// The values of `XEN_DOMCTL_INTERFACE_VERSION` that are tried: those of Xen 4.12 (0x11) to 4.20 (0x17), and some to come. The
/// parts that are used here have been the same in all.
const INTERFACE_VERSIONS: std::ops::RangeInclusive<u32> = 0x11..=0x20;

/// `HVM_SAVE_CODE(CPU)` (`xen/include/public/arch-x86/hvm/save.h`).
const SAVED_CPU: u64 = 2;

/// `struct xen_domctl`, in words: command and version, domain, and a union of 128 bytes.
const CALL: usize = 2 + 16;

/// Where DR7 is in `struct hvm_hw_cpu`, in words: behind the FPU's 512 bytes, 16 general registers, RIP, RFLAGS, CR0, CR2,
/// CR3, CR4, DR0 to DR3 and DR6. The structure is what a saved domain consists of, and does not change.
const DR7: usize = 512 / 8 + 16 + 2 + 4 + 5;

/// Asks for the DR7 of a domain's virtual CPUs.
#[derive(Debug)]
pub struct DebugControl {
    privcmd: Privcmd,
    /// The call, and what Xen writes.
    buffer: Buffer,
    domain: u16,
    interface_version: u32,
}

impl DebugControl {
    /// For this domain.
    ///
    /// # Errors
    /// If this is no dom0 with Linux 4.18 or newer, or Xen refuses.
    pub fn open(domain: u16) -> io::Result<Self> {
        let mut control = Self { privcmd: Privcmd::open()?, buffer: Buffer::new(1)?, domain, interface_version: 0 };
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
        let Self { privcmd, buffer, domain, interface_version } = self;
        let room = (buffer.len() - CALL) * size_of::<u64>();
        buffer.fill(&[
            GET_HVM_CONTEXT_PARTIAL | u64::from(*interface_version) << 32,
            u64::from(*domain),
            // `struct xen_domctl_hvmcontext_partial`: kind and instance, room and what was used of it, where.
            SAVED_CPU | u64::from(vcpu.0) << 32,
            room as u64,
            buffer.address_of(CALL),
        ]);
        privcmd.call(DOMCTL, &[buffer.address_of(0)])?;
        Ok(buffer.get(CALL + DR7))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dr7_is_where_a_saved_domain_has_it() {
        // From `offsetof(struct hvm_hw_cpu, dr7)`.
        assert_eq!(DR7 * size_of::<u64>(), 728);
    }

    #[test]
    fn elsewhere_than_in_a_dom0_it_is_an_error() {
        if !std::path::Path::new("/dev/xen/privcmd").exists() {
            assert_eq!(DebugControl::open(1).unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }
}
