//! A hostile guest: what it can try, from ring 0 and ring 3, to see, escape or break breakpoints.
//!
//! It is a table of [`PROBES`]. Each executes code with breakpoints on it (`hostile.s`) and notes what it sees: registers, flags,
//! memory, every exception with the frame the CPU has saved, DR6. The runner has each run without breakpoints, then with them,
//! and compares. A probe also tells how often it has executed each instruction with a breakpoint: the monitor must have been
//! told as often.
//!
//! To add one: write its code as a `block` in `hostile.s`, and a function and a line of the table here.

mod beside;
mod code;
mod debug;
mod hypercalls;
mod log;
mod memory;
mod others;

use core::arch::global_asm;

use hyperbp_bench_abi::PAGE_SIZE;

use crate::page::{ForeignPage, PageAligned, write_word};
use crate::privilege::{self, Cpu, DI, EXIT, Flow, OPEN, Ring, SI, SP, SYSCALL, TF};
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

const fn with_vcpus(vcpus: u32, name: &'static str, run: fn()) -> Probe {
    Probe { name, vcpus, run }
}

/// All there are.
static PROBES: &[Probe] = &[
    probe("plain-ring0", || run_block(plain(), Ring::Kernel, 0)),
    probe("plain-ring3", || run_block(plain(), Ring::User, 0)),
    probe("prefixes-ring0", || run_block(prefixes(), Ring::Kernel, 0)),
    probe("prefixes-ring3", || run_block(prefixes(), Ring::User, 0)),
    probe("middle-ring0", || run_block(middle(), Ring::Kernel, 0)),
    probe("middle-ring3", || run_block(middle(), Ring::User, 0)),
    probe("straddling-ring0", || code::straddling(Ring::Kernel)),
    probe("straddling-ring3", || code::straddling(Ring::User)),
    // Exceptions.
    probe("int3-ring0", || run_block(int3s(), Ring::Kernel, 0)),
    probe("int3-ring3", || run_block(int3s(), Ring::User, 0)),
    probe("faults-ring0", || run_block(faults(), Ring::Kernel, 0)),
    probe("faults-ring3", || run_block(faults(), Ring::User, 0)),
    probe("privileged-ring3", || run_block(privileged(), Ring::User, 0)),
    probe("system-call-ring3", || run_block(system_call(), Ring::User, 0)),
    probe("not-present-ring0", || memory::page_faults(Ring::Kernel, 0)),
    probe("not-present-ring3", || memory::page_faults(Ring::User, 0)),
    probe("read-only-ring0", || memory::page_faults(Ring::Kernel, memory::READ_ONLY)),
    probe("read-only-ring3", || memory::page_faults(Ring::User, memory::READ_ONLY)),
    probe("supervisor-ring3", || memory::page_faults(Ring::User, memory::SUPERVISOR)),
    probe("not-accessed-ring0", || memory::page_faults(Ring::Kernel, memory::NOT_ACCESSED)),
    probe("not-accessed-ring3", || memory::page_faults(Ring::User, memory::NOT_ACCESSED)),
    probe("fetch-not-present-ring0", || memory::fetch_faults(Ring::Kernel, 0)),
    probe("fetch-not-present-ring3", || memory::fetch_faults(Ring::User, 0)),
    probe("fetch-supervisor-ring3", || memory::fetch_faults(Ring::User, memory::SUPERVISOR)),
    probe("fetch-not-accessed-ring0", || memory::fetch_faults(Ring::Kernel, memory::NOT_ACCESSED)),
    probe("unaligned-ring0", || debug::unaligned(Ring::Kernel)),
    probe("unaligned-ring3", || debug::unaligned(Ring::User)),
    // Single steps.
    probe("step-plain-ring0", || run_block(plain(), Ring::Kernel, TF)),
    probe("step-plain-ring3", || run_block(plain(), Ring::User, TF)),
    probe("step-prefixes-ring0", || run_block(prefixes(), Ring::Kernel, TF)),
    probe("step-prefixes-ring3", || run_block(prefixes(), Ring::User, TF)),
    probe("step-middle-ring3", || run_block(middle(), Ring::User, TF)),
    probe("step-int3-ring0", || run_block(int3s(), Ring::Kernel, TF)),
    probe("step-int3-ring3", || run_block(int3s(), Ring::User, TF)),
    probe("step-faults-ring0", || run_block(faults(), Ring::Kernel, TF)),
    probe("step-faults-ring3", || run_block(faults(), Ring::User, TF)),
    probe("step-system-call-ring3", || run_block(system_call(), Ring::User, TF)),
    probe("step-self-modifying-ring3", || code::self_modifying(Ring::User, TF)),
    probe("popf-tf-ring0", || run_block(popf_tf(), Ring::Kernel, 0)),
    probe("popf-tf-ring3", || run_block(popf_tf(), Ring::User, 0)),
    probe("mov-ss-ring0", || run_block(mov_ss(), Ring::Kernel, 0)),
    probe("mov-ss-ring3", || run_block(mov_ss(), Ring::User, 0)),
    probe("step-mov-ss-ring0", || run_block(mov_ss(), Ring::Kernel, TF)),
    probe("step-mov-ss-ring3", || run_block(mov_ss(), Ring::User, TF)),
    probe("sti-ring0", || run_block(sti_shadow(), Ring::Kernel, 0)),
    probe("step-sti-ring0", || run_block(sti_shadow(), Ring::Kernel, TF)),
    probe("branch-step-ring0", debug::branch_step),
    // Debug registers.
    probe("debug-execute-ring0", || debug::execute(Ring::Kernel)),
    probe("debug-execute-ring3", || debug::execute(Ring::User)),
    probe("debug-data-ring0", || debug::data(Ring::Kernel)),
    probe("debug-data-ring3", || debug::data(Ring::User)),
    probe("debug-at-once-ring0", debug::at_once),
    probe("debug-code-ring0", || debug::code(Ring::Kernel)),
    probe("debug-code-ring3", || debug::code(Ring::User)),
    probe("time-stamps-ring0", || run_block(time_stamps(), Ring::Kernel, 0)),
    probe("time-stamps-ring3", || run_block(time_stamps(), Ring::User, 0)),
    // Code as data.
    probe("self-modifying-ring0", || code::self_modifying(Ring::Kernel, 0)),
    probe("self-modifying-ring3", || code::self_modifying(Ring::User, 0)),
    probe("read-code-ring0", || code::read_as_data(Ring::Kernel)),
    probe("read-code-ring3", || code::read_as_data(Ring::User)),
    probe("read-all-memory-ring0", || memory::read_all(Ring::Kernel)),
    probe("read-all-memory-ring3", || memory::read_all(Ring::User)),
    probe("frames-ring0", || memory::frames(Ring::Kernel)),
    probe("frames-ring3", || memory::frames(Ring::User)),
    // What the CPU reads and writes by itself.
    probe("stack-beside-ring0", || beside::stack(Ring::Kernel)),
    probe("stack-beside-ring3", || beside::stack(Ring::User)),
    probe("entry-stack-beside-ring3", beside::entry_stack),
    probe("gdt-beside-ring0", || beside::gdt(Ring::Kernel)),
    probe("gdt-beside-ring3", || beside::gdt(Ring::User)),
    probe("idt-beside-ring0", || beside::idt(Ring::Kernel)),
    probe("idt-beside-ring3", || beside::idt(Ring::User)),
    probe("tss-beside-ring3", beside::tss),
    probe("tables-beside-ring0", || beside::tables(Ring::Kernel, true)),
    probe("tables-beside-ring3", || beside::tables(Ring::User, true)),
    probe("tables-beside-dirty-ring0", || beside::tables(Ring::Kernel, false)),
    probe("tables-beside-dirty-ring3", || beside::tables(Ring::User, false)),
    // Hypercalls.
    probe("memory-types", hypercalls::memory_types),
    probe("altp2m-calls", hypercalls::altp2m),
    probe("balloon-data", hypercalls::balloon_data),
    probe("balloon-tables", hypercalls::balloon_tables),
    probe("balloon-shadows", hypercalls::balloon_shadows),
    // Others at the same time.
    with_vcpus(2, "together-ring0", || others::together(Ring::Kernel)),
    with_vcpus(2, "together-ring3", || others::together(Ring::User)),
    with_vcpus(2, "nmi-ring0", || others::nmis(Ring::Kernel)),
    with_vcpus(2, "nmi-ring3", || others::nmis(Ring::User)),
    with_vcpus(2, "interrupt-ring0", || others::interrupts(Ring::Kernel)),
    with_vcpus(2, "interrupt-ring3", || others::interrupts(Ring::User)),
    with_vcpus(2, "cross-modifying-ring0", || others::cross_modifying(Ring::Kernel)),
    with_vcpus(2, "cross-modifying-ring3", || others::cross_modifying(Ring::User)),
];

macro_rules! symbols {
    ($($name:ident)*) => {$(
        /// In `hostile.s`.
        #[inline]
        pub(crate) fn $name() -> u64 {
            unsafe extern "C" {
                static $name: u8;
            }
            &raw const $name as u64
        }
    )*};
}

symbols! {
    plain prefixes middle straddling straddling_push straddling_call int3s faults privileged system_call page_faults fetch_fault
    popf_tf mov_ss sti_shadow branch_step branch_step_there unaligned dr7_at_once time_stamps self_modifying read_widths read_strings digest
    shared_page in_shared_page modified
}

/// What the code reads and writes.
#[unsafe(link_section = ".volatile")]
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
        _ => {
            // The others may not have run yet: what they set up for themselves, the descriptor of a TSS for example, is there then.
            crate::vcpu::all(|_, _| {}, 0);
            log::list(PROBES.iter().map(|probe| (probe.name, probe.vcpus)));
        }
    }
}

/// A state of all registers for code at this privilege level.
fn prepare(cpu: &mut Cpu, ring: Ring, entry: u64, flags: u64) {
    cpu.reset(ring);
    let stack = cpu.gpr[SP];
    // R12 is no canonical address.
    cpu.gpr = core::array::from_fn(|n| 0x0123_4567_89ab_cdef_u64.rotate_left(4 * n as u32));
    (cpu.gpr[SP], cpu.gpr[DI], cpu.gpr[SI]) = (stack, DATA[0].0.address(), DATA[1].0.address());
    (cpu.gpr[12], cpu.gpr[15]) = (1 << 63, entry);
    (cpu.rip, cpu.flags) = (entry, cpu.flags | flags);
    (stack - PAGE_SIZE as u64..stack).step_by(8).for_each(|at| write_word(at, 0));
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
    note_memory("stack", cpu.gpr[SP].wrapping_sub(NOTED * 8), NOTED);
}

/// What handlers do unless they have something else to do: note it, and go on. A fault is not tried again.
fn usual(cpu: &mut Cpu) -> Flow {
    note_cpu(cpu);
    next(cpu)
}

/// The same without a note.
fn next(cpu: &mut Cpu) -> Flow {
    match cpu.vector {
        EXIT => Flow::Stop,
        // Traps: they go on behind the instruction.
        DB | BP | OF | OPEN | SYSCALL => Flow::Resume,
        DE | UD | NP | SS | GP | AC => {
            cpu.rip = cpu.gpr[15];
            Flow::Resume
        }
        vector => {
            note("stopped", vector);
            Flow::Stop
        }
    }
}

/// Vectors.
const DE: u64 = 0;
const DB: u64 = 1;
const BP: u64 = 3;
const OF: u64 = 4;
const UD: u64 = 6;
const NP: u64 = 11;
const SS: u64 = 12;
const GP: u64 = 13;
const PF: u64 = 14;
const AC: u64 = 17;
