//! The way out of the emulated machine: copies standard input to Bochs's port 0xe9, which Bochs prints. With
//! `--power-off` it ends the emulation instead, through Bochs's shutdown port.
//!
//! Port access from dom0's user space is emulated by Xen. One `rep outsb` for a whole buffer costs 210 instructions a
//! byte, an `out` for each byte 1570, and a write to `/dev/port` for each byte 2620.

use std::io::{self, Read};
use std::process::ExitCode;

/// Where Bochs takes text.
const TEXT: u16 = 0xe9;
/// Where Bochs takes [`POWER_OFF`].
const SHUTDOWN: u16 = 0x8900;
const POWER_OFF: &[u8] = b"Shutdown";

fn main() -> ExitCode {
    let result = match std::env::args().nth(1).as_deref() {
        None => Port::open(TEXT).and_then(|port| copy(&port)),
        Some("--power-off") => Port::open(SHUTDOWN).map(|port| port.write(POWER_OFF)),
        Some(_) => Err(io::Error::other("usage: e9 [--power-off]")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("e9: {e}");
            ExitCode::FAILURE
        }
    }
}

fn copy(port: &Port) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match io::stdin().read(&mut buffer)? {
            0 => return Ok(()),
            length => port.write(&buffer[..length]),
        }
    }
}

/// An I/O port this process may write to.
struct Port(u16);

impl Port {
    /// Asks the kernel for permission.
    fn open(port: u16) -> io::Result<Self> {
        // SAFETY: ioperm has no memory arguments; it only adds to what this process may do.
        match unsafe { libc::ioperm(libc::c_ulong::from(port), 1, 1) } {
            0 => Ok(Self(port)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn write(&self, bytes: &[u8]) {
        // SAFETY: rsi and rcx are the bounds of `bytes`, which is only read; the direction flag is clear by the ABI; and
        // with `self` there is permission for the port, so the instruction does not fault. Both of our ports are
        // Bochs's own, and nothing there acts on this program's memory.
        unsafe {
            std::arch::asm!(
                "rep outsb",
                in("dx") self.0,
                inout("rsi") bytes.as_ptr() => _,
                inout("rcx") bytes.len() => _,
                options(readonly, nostack, preserves_flags),
            );
        }
    }
}
