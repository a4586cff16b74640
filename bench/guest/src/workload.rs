//! The workloads.
//!
//! What lies between two time stamps is assembly, so that the compiler cannot change what is measured; everything
//! that is not measured is outside.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hyperbp_bench_abi::{BREAKPOINT_OFFSET, PAGE_SIZE, TARGET, Workload};
use hyperbp_bench_guest::Request;

use crate::control;
use crate::page::{PAGE_UNDER_TEST, PageAligned, SAMPLES};

/// Does what was asked for, `count` times, and leaves a sample of each.
pub(crate) fn run(request: Request) {
    let page = PAGE_UNDER_TEST.0.address();
    let sample: fn(u64) -> u64 = match request.workload {
        Workload::Timer => timer,
        Workload::ExecBp => exec_bp,
        Workload::ExecPage => exec_page,
        Workload::ReadBp => read_bp,
        Workload::ReadPage => read_page,
        Workload::OwnInt3 => own_int3,
        Workload::WriteByte => write_byte,
        // Nothing to measure: `main` deals with them, and labels are for programs.
        Workload::Shutdown
        | Workload::Storm
        | Workload::Snippets
        | Workload::Scan
        | Workload::Label
        | Workload::Hostile
        | Workload::Balloon
        | Workload::SystemPage => return,
    };
    for slot in &SAMPLES.0[..request.count] {
        slot.store(sample(page), Relaxed);
    }
}

/// Runs the instructions in brackets between two time stamps; the expression is the difference in ticks.
///
/// LFENCE keeps RDTSC from running early, and what comes after it from starting before (Intel SDM, RDTSC).
///
/// The measured instruction must be followed by at least two others, hence the NOPs: a monitor's single step does not
/// end with the instruction it was for. Xen arms the monitor trap flag of the paused vCPU once more before the
/// monitor's answer clears it, and so takes a second VM exit after the next instruction. It belongs to the same hit, and
/// must lie within the same measurement.
macro_rules! timed {
    ([$($body:literal),*] $($operands:tt)*) => {{
        let ticks: u64;
        asm!(
            "lfence",
            "rdtsc",
            "shl rdx, 32",
            "or rdx, rax",
            "mov {begin}, rdx",
            $($body,)*
            "lfence",
            "rdtsc",
            "shl rdx, 32",
            "or rax, rdx",
            "sub rax, {begin}",
            $($operands)*
            begin = out(reg) _,
            out("rax") ticks,
            out("rdx") _,
        );
        ticks
    }};
}

fn timer(_page: u64) -> u64 {
    // SAFETY: two time stamps and nothing else.
    unsafe { timed!([]) }
}

fn exec_bp(page: u64) -> u64 {
    call(page + BREAKPOINT_OFFSET as u64)
}

fn exec_page(page: u64) -> u64 {
    call(page)
}

/// Calls into the page under test: whatever the entry, the breakpointed instruction runs once.
fn call(entry: u64) -> u64 {
    // SAFETY: from any entry the page is NOPs, then RET. No clobbers: NOPs change nothing, and neither does a
    // breakpoint that keeps its promise. The block may push, so the compiler keeps nothing below the stack pointer.
    let ticks = unsafe { timed!(["call {entry}", "nop", "nop"] entry = in(reg) entry,) };
    control::count_execution();
    ticks
}

fn read_bp(page: u64) -> u64 {
    let seen: u64;
    // SAFETY: reads the page's last eight bytes.
    let ticks = unsafe {
        timed!(
            ["mov {seen}, [{address}]", "nop", "nop"]
            address = in(reg) page + BREAKPOINT_OFFSET as u64,
            seen = out(reg) seen,
        )
    };
    control::check_read(BREAKPOINT_OFFSET, seen);
    ticks
}

/// What [`read_page`] saw: the values are checked when the clock has stopped, and must not be read a second time.
static SEEN: PageAligned<[AtomicU64; PAGE_SIZE / 8]> = PageAligned([const { AtomicU64::new(0) }; PAGE_SIZE / 8]);

fn read_page(page: u64) -> u64 {
    // SAFETY: reads the page under test eight bytes at a time, and writes SEEN, which is as long and interior-mutable.
    // One read an instruction, as bpbench does it: a string instruction might be emulated for the page as a whole.
    let ticks = unsafe {
        timed!(
            [
                "2:",
                "mov {value}, [{page} + {offset}]",
                "mov [{seen} + {offset}], {value}",
                "add {offset}, 8",
                "cmp {offset}, {page_size}",
                "jb 2b"
            ]
            page = in(reg) page,
            seen = in(reg) SEEN.0.as_ptr(),
            offset = inout(reg) 0_u64 => _,
            value = out(reg) _,
            page_size = const PAGE_SIZE,
        )
    };
    for (index, value) in SEEN.0.iter().enumerate() {
        control::check_read(index * 8, value.load(Relaxed));
    }
    ticks
}

fn own_int3(_page: u64) -> u64 {
    // SAFETY: the handler counts and returns; this code is not on the page under test.
    unsafe { timed!(["int3", "nop", "nop"]) }
}

/// Writes the page's last byte, with the value it has.
fn write_byte(page: u64) -> u64 {
    const LAST: usize = PAGE_SIZE - 1;
    // SAFETY: the byte is in the page under test, which is mapped writable and is not a Rust object.
    unsafe {
        timed!(
            ["mov byte ptr [{address}], {value}", "nop", "nop"]
            address = in(reg) page + LAST as u64,
            value = const TARGET[LAST],
        )
    }
}
