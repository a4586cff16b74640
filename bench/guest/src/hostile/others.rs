//! Probes with another vCPU that does something at the same time.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::log::{executed, note};
use super::{DATA, digest, modified, next, plain, prepare};
use crate::page::write_byte;
use crate::privilege::{self, AX, CX, Cpu, DI, Flow, IF, IPI, Ring, SI};
use crate::{vcpu, xen};

/// Times a vCPU executes a block.
const ROUNDS: u64 = 20;

/// MSRs of an x2APIC, and how it is switched on.
const APIC_BASE: u32 = 0x1b;
const X2APIC: u64 = 0xc00;
const APIC_ID: u32 = 0x802;
const EOI: u32 = 0x80b;
const SPURIOUS: u32 = 0x80f;
const APIC_ON: u64 = 0x1ff;
const COMMAND: u32 = 0x830;
/// Delivery of an NMI.
const NMI: u64 = 0x400;

/// What is to be done.
#[unsafe(link_section = ".volatile")]
static RING: AtomicU64 = AtomicU64::new(0);
/// vCPUs that execute still.
#[unsafe(link_section = ".volatile")]
static EXECUTING: AtomicU64 = AtomicU64::new(0);
/// Rounds after which a vCPU was not in the state it is to be in.
#[unsafe(link_section = ".volatile")]
static WRONG: AtomicU64 = AtomicU64::new(0);
/// The first vCPU's APIC, and interrupts that it has had.
#[unsafe(link_section = ".volatile")]
static APIC: AtomicU64 = AtomicU64::new(0);
#[unsafe(link_section = ".volatile")]
static INTERRUPTS: AtomicU64 = AtomicU64::new(0);

fn ring() -> Ring {
    if RING.load(Relaxed) == 0 { Ring::Kernel } else { Ring::User }
}

fn begin(of: Ring, executing: u64) {
    RING.store(u64::from(of == Ring::User), Relaxed);
    WRONG.store(0, Relaxed);
    INTERRUPTS.store(0, Relaxed);
    EXECUTING.store(executing, Release);
}

/// Executes [`plain`] many times. Each must end in the same state but for what is in memory.
fn execute(vcpu: usize, flags: u64) {
    let mut first = None;
    for _ in 0..ROUNDS {
        let cpu = privilege::cpu(vcpu);
        prepare(cpu, ring(), plain(), flags);
        // Each vCPU has data of its own.
        (cpu.gpr[DI], cpu.gpr[SI]) = (DATA[vcpu % 2].0.address(), 0);
        privilege::run_in(cpu, interrupted);
        let state = (cpu.gpr, cpu.flags, cpu.rip, cpu.vector);
        if *first.get_or_insert(state) != state {
            WRONG.fetch_add(1, Relaxed);
        }
    }
    EXECUTING.fetch_sub(1, Release);
}

/// Takes an interrupt, which is not noted: nobody knows where it comes.
fn interrupted(cpu: &mut Cpu) -> Flow {
    if cpu.vector == IPI {
        INTERRUPTS.fetch_add(1, Relaxed);
        privilege::write_msr(EOI, 0);
        return Flow::Resume;
    }
    next(cpu)
}

/// Lets the other one execute something; it may need this CPU for that.
fn pause() {
    (0..200).for_each(|_| core::hint::spin_loop());
    xen::yield_cpu();
}

/// Both execute the same.
pub(super) fn together(of: Ring) {
    begin(of, 2);
    vcpu::all(
        |vcpu, _| {
            privilege::load_own_idt();
            if vcpu < 2 {
                execute(vcpu, 0);
            }
            crate::exceptions::load();
        },
        0,
    );
    note("wrong", WRONG.load(Relaxed));
    executed(plain(), 2 * ROUNDS);
}

/// One executes, the other sends it NMIs.
pub(super) fn nmis(of: Ring) {
    send(of, NMI);
    note("nmis", u64::from(privilege::cpu(0).nmis > 0));
}

/// One executes, the other sends it interrupts.
pub(super) fn interrupts(of: Ring) {
    send(of, IPI);
    note("some", u64::from(INTERRUPTS.load(Relaxed) > 0));
}

fn send(of: Ring, what: u64) {
    begin(of, 1);
    privilege::write_msr(APIC_BASE, privilege::read_msr(APIC_BASE) | X2APIC);
    privilege::write_msr(SPURIOUS, APIC_ON);
    APIC.store(privilege::read_msr(APIC_ID), Relaxed);
    privilege::cpu(0).nmis = 0;
    // The other one may be the first to begin.
    privilege::load_own_idt();
    vcpu::all(
        |vcpu, what| {
            match vcpu {
                0 => {
                    // `what` says whether interrupts are to be let in, too.
                    execute(0, if what == NMI { 0 } else { IF });
                    // The last one may be on its way.
                    (0..4).for_each(|_| xen::yield_cpu());
                }
                1 => {
                    privilege::write_msr(APIC_BASE, privilege::read_msr(APIC_BASE) | X2APIC);
                    while EXECUTING.load(Acquire) > 0 {
                        privilege::write_msr(COMMAND, APIC.load(Relaxed) << 32 | what);
                        pause();
                    }
                }
                _ => {}
            }
        },
        what,
    );
    // All of them have ended, so nothing is sent any more. What is pending is taken now, and not by another probe.
    (0..4).for_each(|_| {
        xen::yield_cpu();
        let cpu = privilege::cpu(0);
        prepare(cpu, Ring::Kernel, digest(), IF);
        cpu.gpr[CX] = 64;
        privilege::run_in(cpu, interrupted);
    });
    crate::exceptions::load();
    note("wrong", WRONG.load(Relaxed));
    executed(plain(), ROUNDS);
}

/// One executes code that the other writes.
pub(super) fn cross_modifying(of: Ring) {
    const BEFORE: u8 = 0x11;
    begin(of, 1);
    vcpu::all(
        |vcpu, _| {
            privilege::load_own_idt();
            match vcpu {
                0 => {
                    for _ in 0..ROUNDS {
                        let cpu = privilege::cpu(0);
                        prepare(cpu, ring(), modified(), 0);
                        privilege::run_in(cpu, next);
                        let al = cpu.gpr[AX] as u8;
                        if al != BEFORE && al != BEFORE << 1 {
                            WRONG.fetch_add(1, Relaxed);
                        }
                    }
                    EXECUTING.store(0, Release);
                }
                1 => {
                    while EXECUTING.load(Acquire) > 0 {
                        for value in [BEFORE << 1, BEFORE] {
                            write_byte(modified() + 1, value);
                            pause();
                        }
                    }
                }
                _ => {}
            }
            crate::exceptions::load();
        },
        0,
    );
    note("wrong", WRONG.load(Relaxed));
    note("code", crate::page::read(modified()));
    executed(modified(), ROUNDS);
}
