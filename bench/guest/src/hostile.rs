//! A hostile guest: what it can try, from ring 0 and ring 3, to see, escape or break breakpoints.
//!
//! It is a table of [`PROBES`]. Each executes code with breakpoints on it (`hostile.s`) and notes what it sees: registers, flags,
//! memory, every exception with the frame the CPU has saved, DR6. The runner has each run without breakpoints, then with them,
//! and compares. A probe also tells how often it has executed each instruction with a breakpoint: the monitor must have been
//! told as often.
//!
//! To add one: write its code as a `block` in `hostile.s`, and a function and a line of the table here.

mod log;

use core::arch::global_asm;

use hyperbp_bench_abi::PAGE_SIZE;

use crate::page::{ForeignPage, PageAligned, write_word};
use crate::privilege::{self, Cpu, DI, EXIT, Flow, Ring, SI, SP, TF};
use log::{executed, note, note_cpu, note_memory};

global_asm!(include_str!("hostile.s"));

/// One thing to try.
struct Probe {
    /// What the runner calls it.
    name: &'static str,
    /// vCPUs it needs.
    vcpus: u32,
    run: fn(),
}

const fn probe(name: &'static str, run: fn()) -> Probe {
    Probe { name, vcpus: 1, run }
}

/// All there are.
static PROBES: &[Probe] = &[
    probe("plain-ring0", || run_block(plain(), Ring::Kernel, 0)),
    probe("plain-ring3", || run_block(plain(), Ring::User, 0)),
    probe("single-step-ring0", || run_block(plain(), Ring::Kernel, TF)),
    probe("single-step-ring3", || run_block(plain(), Ring::User, TF)),
];

macro_rules! symbols {
    ($($name:ident)*) => {$(
        /// In `hostile.s`.
        fn $name() -> u64 {
            unsafe extern "C" {
                static $name: u8;
            }
            &raw const $name as u64
        }
    )*};
}

symbols! { plain }

/// What the code reads and writes.
static DATA: [PageAligned<ForeignPage>; 2] = [const { PageAligned(ForeignPage::new([0; PAGE_SIZE])) }; 2];

/// Words of the data, and of the stack, that are noted.
const NOTED: u64 = 16;

/// The workload: runs a probe, or lists them all.
pub(crate) fn run(number: u32) {
    match PROBES.get(number as usize) {
        Some(probe) if crate::vcpu::count() >= probe.vcpus => {
            log::begin();
            (probe.run)();
            log::end();
        }
        _ => log::list(PROBES.iter().map(|probe| (probe.name, probe.vcpus))),
    }
}

/// A state of all registers for code at this privilege level.
fn prepare(cpu: &mut Cpu, ring: Ring, entry: u64, flags: u64) {
    cpu.reset(ring);
    let stack = cpu.gpr[SP];
    cpu.gpr = core::array::from_fn(|n| 0x0123_4567_89ab_cdef_u64.rotate_left(4 * n as u32));
    (cpu.gpr[SP], cpu.gpr[DI], cpu.gpr[SI]) = (stack, DATA[0].0.address(), DATA[1].0.address());
    (cpu.rip, cpu.flags) = (entry, cpu.flags | flags);
    for (n, page) in DATA.iter().enumerate() {
        let start = page.0.address();
        (0..PAGE_SIZE as u64).step_by(8).for_each(|at| write_word(start + at, (start + at) * 0x1111 + n as u64));
    }
}

/// Executes a block once, and notes what it leaves.
fn run_block(block: u64, ring: Ring, flags: u64) {
    let cpu = privilege::cpu(0);
    prepare(cpu, ring, block, flags);
    privilege::run(cpu, usual);
    note_end(cpu);
    executed(block, 1);
}

/// Notes the state at the end.
fn note_end(cpu: &Cpu) {
    note_memory("data", DATA[0].0.address(), NOTED);
    note_memory("stack", cpu.gpr[SP].saturating_sub(NOTED * 8), NOTED);
}

/// What handlers do unless they have something else to do: note it, and go on.
fn usual(cpu: &mut Cpu) -> Flow {
    note_cpu(cpu);
    match cpu.vector {
        EXIT => Flow::Stop,
        // Traps: they go on behind the instruction.
        1 | 3 | 4 | privilege::OPEN | privilege::SYSCALL => Flow::Resume,
        vector => {
            note("unexpected", vector);
            Flow::Stop
        }
    }
}
