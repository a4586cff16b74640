//! Exceptions: an INT3 of the guest's own is counted, anything else is reported and ends the domain.

use core::arch::{asm, naked_asm};
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hyperbp_bench_abi::Control;
use hyperbp_bench_guest::interrupt_gate;

use crate::control::CONTROL;
use crate::xen;

/// Vector of #BP.
const BREAKPOINT: usize = 3;

/// Exceptions that push an error code, a bit each: #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP, #VC and #SX.
pub(crate) const WITH_ERROR_CODE: u32 = 1 << 8 | 0b11111 << 10 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;

type Handler = unsafe extern "C" fn() -> !;

macro_rules! unexpected {
    ($($vector:literal)*) => { [$(unexpected::<$vector> as Handler),*] };
}

/// The handlers of the 32 exceptions, by vector, before [`install`] gives #BP its own.
static UNEXPECTED: [Handler; 32] =
    unexpected![0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31];

/// The interrupt descriptor table. No interrupt is ever enabled, so it ends with the exceptions.
static IDT: [[AtomicU64; 2]; UNEXPECTED.len()] = [const { [const { AtomicU64::new(0) }; 2] }; UNEXPECTED.len()];

/// What LIDT loads.
#[repr(C, packed)]
struct TableRegister {
    limit: u16,
    base: u64,
}

/// Fills the interrupt descriptor table and loads it.
pub(crate) fn install() {
    for (vector, (entry, unexpected)) in IDT.iter().zip(UNEXPECTED).enumerate() {
        let handler = if vector == BREAKPOINT { own_int3 } else { unexpected };
        for (word, value) in entry.iter().zip(interrupt_gate(handler as usize as u64)) {
            word.store(value, Relaxed);
        }
    }
    load();
}

/// Loads the table on another virtual CPU.
pub(crate) fn load() {
    let register = TableRegister { limit: (size_of_val(&IDT) - 1) as u16, base: IDT.as_ptr() as u64 };
    // SAFETY: the entries are zero, or gates to handlers in the code segment that is loaded, and the table is a static.
    unsafe { asm!("lidt [{}]", in(reg) &register, options(readonly, nostack, preserves_flags)) };
}

/// #BP: counts it and goes on behind the INT3.
#[unsafe(naked)]
unsafe extern "C" fn own_int3() -> ! {
    naked_asm!(
        "lock inc qword ptr [rip + {control} + {own_int3s}]",
        "iretq",
        control = sym CONTROL,
        own_int3s = const offset_of!(Control, own_int3s),
    )
}

/// Any other exception: brings the stack into the shape of [`Frame`] and reports it.
#[unsafe(naked)]
unsafe extern "C" fn unexpected<const VECTOR: u32>() -> ! {
    naked_asm!(
        ".if ({with_error_code} >> {vector}) & 1 == 0",
        "push 0",
        ".endif",
        "push {vector}",
        "mov rdi, rsp",
        "and rsp, -16",
        "call {report}",
        with_error_code = const WITH_ERROR_CODE,
        vector = const VECTOR,
        report = sym report,
    )
}

/// What [`unexpected`] and the CPU leave on the stack.
#[repr(C)]
struct Frame {
    vector: u64,
    error_code: u64,
    rip: u64,
}

extern "C" fn report(frame: &Frame) -> ! {
    let cr2: u64;
    // SAFETY: reading CR2 has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack, preserves_flags)) };
    let Frame { vector, error_code, rip } = frame;
    xen::print(format_args!("guest: exception {vector} at {rip:#x}, error code {error_code:#x}, cr2 {cr2:#x}\n"));
    xen::crash();
}
