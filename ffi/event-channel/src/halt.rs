//! Waiting in Xen.

use std::io;

use hyperbp_privcmd::{Buffer, Privcmd};

use crate::{Halting, Port};

/// `__HYPERVISOR_sched_op` (`xen/include/public/xen.h`).
const SCHED_OP: u64 = 29;

/// `SCHEDOP_poll` (`xen/include/public/sched.h`): blocks the virtual CPU until a port is pending, masked or not, or any other
/// event is delivered to it, as the timer's is.
const POLL: u64 = 3;

/// `struct sched_poll`, in words: where the ports are, how many, and no timeout. The port is behind it.
const PORT: usize = 3;

/// Has Xen wait.
#[derive(Debug)]
pub(crate) struct Halt {
    privcmd: Privcmd,
    buffer: Buffer,
}

impl Halt {
    /// None if this domain has other virtual CPUs: the port may be delivered to one of them.
    pub(crate) fn new() -> io::Result<Option<Self>> {
        // SAFETY: no pointer.
        match unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) } {
            1 => Ok(Some(Self { privcmd: Privcmd::open()?, buffer: Buffer::new(1)? })),
            _ => Ok(None),
        }
    }
}

impl Halting for Halt {
    fn halt(&mut self, port: Port) -> io::Result<()> {
        let Self { privcmd, buffer } = self;
        buffer.fill(&[buffer.address_of(PORT), 1, 0, port.into()]);
        privcmd.call(SCHED_OP, &[POLL, buffer.address_of(0)]).map(drop)
    }
}
