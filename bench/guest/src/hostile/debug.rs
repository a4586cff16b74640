//! Probes with debug registers and single steps.

use core::arch::asm;

use super::log::{executed, note, site};
use super::{
    DATA, DB, branch_step as branch_step_code, branch_step_there, dr7_at_once, next, note_end, plain, prefixes,
    prepare, read_widths, unaligned as unaligned_code, usual,
};
use crate::privilege::{self, AX, Cpu, DX, Flow, RF, Ring, TF};

/// DR7: what is always set; in each breakpoint's two bits, that it is on in this task; and what it is for.
const DR7: u64 = 0x400;
const EXECUTE: u64 = 0b0000;
const WRITE: u64 = 0b1101;
const ACCESS: u64 = 0b1111;
const BYTE: u64 = 0b0011;

/// AC in RFLAGS, AM in CR0.
const AC: u64 = 1 << 18;
const AM: u64 = 1 << 18;

fn set_address(register: usize, address: u64) {
    macro_rules! set {
        ($register:literal) => {
            // SAFETY: a debug register that is not on in DR7 has no effect.
            unsafe { asm!(concat!("mov ", $register, ", {}"), in(reg) address, options(nomem, nostack, preserves_flags)) }
        };
    }
    match register {
        0 => set!("dr0"),
        1 => set!("dr1"),
        2 => set!("dr2"),
        _ => set!("dr3"),
    }
}

fn set_control(control: u64) {
    // SAFETY: the addresses are of code and data of probes, whose handlers take a #DB.
    unsafe { asm!("mov dr7, {}", in(reg) control, options(nomem, nostack, preserves_flags)) };
}

/// Sets breakpoints of the guest's own, and returns what DR7 is to be.
fn breakpoints(all: &[(u64, u64)]) -> u64 {
    let mut control = DR7;
    for (n, (address, kind)) in all.iter().enumerate() {
        set_address(n, *address);
        control |= 1 << (2 * n) | kind << (16 + 4 * n);
    }
    control
}

/// Runs a block with breakpoints of the guest's own.
fn with(block: u64, ring: Ring, flags: u64, all: &[(u64, u64)]) {
    let cpu = privilege::cpu(0);
    prepare(cpu, ring, block, flags);
    let control = breakpoints(all);
    set_control(control);
    privilege::run(cpu, resumed);
    set_control(DR7);
    let (dr0, dr7): (u64, u64);
    // SAFETY: reading debug registers has no effect.
    unsafe { asm!("mov {}, dr0", "mov {}, dr7", out(reg) dr0, out(reg) dr7, options(nomem, nostack, preserves_flags)) };
    note("dr0", dr0);
    note("dr7", dr7);
    note_end(cpu);
    executed(block, 1);
}

/// As [`usual`]. The instruction that a breakpoint of the guest's is on runs then.
fn resumed(cpu: &mut Cpu) -> Flow {
    let flow = usual(cpu);
    if cpu.vector == DB && cpu.dr6 & 0xf != 0 {
        cpu.flags |= RF;
    }
    flow
}

/// On instructions that have breakpoints of ours, too; and RF, which skips one.
pub(super) fn execute(ring: Ring) {
    let all = [1, 3, 10, 16].map(|n| (site(plain(), n), EXECUTE));
    // Not with TF: of a trap and a breakpoint at the next instruction, Bochs makes one #DB.
    with(plain(), ring, 0, &all);
    let first = [(plain(), EXECUTE)];
    with(plain(), ring, 0, &first);
    with(plain(), ring, RF, &first);
}

/// On what instructions with breakpoints access.
pub(super) fn data(ring: Ring) {
    let data = DATA[0].0.address();
    let stack = {
        let cpu = privilege::cpu(0);
        cpu.reset(ring);
        cpu.gpr[privilege::SP]
    };
    with(plain(), ring, 0, &[(data, ACCESS), (data + 8, WRITE), (data + 16, ACCESS), (stack - 8, ACCESS)]);
    with(plain(), ring, TF, &[(data, ACCESS), (data + 24, WRITE), (data + 32, WRITE), (stack - 16, WRITE)]);
    with(prefixes(), ring, 0, &[(data + 1, BYTE), (data + 0x100, ACCESS)]);
}

/// The same, switched on by the instruction before.
pub(super) fn at_once() {
    let block = dr7_at_once();
    let cpu = privilege::cpu(0);
    prepare(cpu, Ring::Kernel, block, 0);
    let data = DATA[0].0.address();
    (cpu.gpr[AX], cpu.gpr[DX]) = (breakpoints(&[(data, ACCESS)]), DR7);
    privilege::run(cpu, usual);
    set_control(DR7);
    note_end(cpu);
    executed(block, 1);
}

/// On bytes of code that have breakpoints of ours, and are read.
pub(super) fn code(ring: Ring) {
    let at = site(plain(), 3);
    let cpu = privilege::cpu(0);
    prepare(cpu, ring, read_widths(), 0);
    (cpu.gpr[12], cpu.gpr[13]) = (at - 9, at + 2);
    let control = breakpoints(&[(at, BYTE)]);
    set_control(control);
    privilege::run(cpu, usual);
    set_control(DR7);
    with(plain(), ring, 0, &[(at, BYTE), (plain(), BYTE)]);
}

/// Single steps from branch to branch, if the CPU has them: Bochs steps each instruction.
pub(super) fn branch_step() {
    let cpu = privilege::cpu(0);
    prepare(cpu, Ring::Kernel, branch_step_there(), 0);
    privilege::run(cpu, |cpu| {
        cpu.scratch[0] += u64::from(cpu.vector == DB);
        next(cpu)
    });
    note("steps", cpu.scratch[0]);
    if cpu.scratch[0] == 0 {
        super::run_block(branch_step_code(), Ring::Kernel, 0);
    }
}

/// Operands that are not aligned, with AC set.
pub(super) fn unaligned(ring: Ring) {
    let cr0: u64;
    // SAFETY: AM changes nothing at CPL 0.
    unsafe {
        asm!("mov {0}, cr0", "mov {1}, {0}", "or {1}, {am}", "mov cr0, {1}", out(reg) cr0, out(reg) _, am = const AM)
    };
    super::run_block(unaligned_code(), ring, AC);
    // SAFETY: it is what it was.
    unsafe { asm!("mov cr0, {}", in(reg) cr0, options(nostack, preserves_flags)) };
}
