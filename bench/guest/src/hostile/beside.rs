//! Probes of pages that have code with breakpoints, and something that the CPU accesses by itself.

use core::arch::asm;
use core::sync::atomic::Ordering::Relaxed;

use hyperbp_bench_abi::PAGE_SIZE;
use hyperbp_bench_guest::tss_descriptor;

use super::log::{executed, note};
use super::{DATA, in_shared_page, note_end, prepare, shared_page, usual};
use crate::page::{read, write_word};
use crate::privilege::{self, DI, FIRST_TSS, Ring, SI, SP};

const PAGE: u64 = PAGE_SIZE as u64;
/// Bytes of the page that are free. The code is behind them.
const FREE: u64 = 2048;

/// Copies words.
fn copy(words: impl Iterator<Item = u64>, to: u64) {
    words.enumerate().for_each(|(n, word)| write_word(to + 8 * n as u64, word));
}

/// Leaves the page as it was.
fn clear() {
    (shared_page()..shared_page() + FREE).step_by(8).for_each(|at| write_word(at, 0));
}

/// Runs the code, with its stack at `stack` unless that is 0.
fn run(ring: Ring, stack: u64) {
    let cpu = privilege::cpu(0);
    prepare(cpu, ring, in_shared_page(), 0);
    if stack != 0 {
        cpu.gpr[SP] = stack;
    }
    privilege::run_in(cpu, usual);
    note_end(cpu);
    executed(in_shared_page(), 1);
}

/// The stack: what the code pushes, and at CPL 0 the frames of exceptions.
pub(super) fn stack(ring: Ring) {
    privilege::load_own_idt();
    run(ring, shared_page() + FREE);
    (FREE - 256..FREE).step_by(8).for_each(|at| note("page", read(shared_page() + at)));
    clear();
    crate::exceptions::load();
}

/// The stack of what interrupts CPL 3.
pub(super) fn entry_stack() {
    privilege::load_own_idt();
    let before = privilege::set_entry_stack(0, shared_page() + FREE);
    run(Ring::User, 0);
    privilege::set_entry_stack(0, before);
    (FREE - 64..FREE).step_by(8).for_each(|at| note("page", read(shared_page() + at)));
    clear();
    crate::exceptions::load();
}

/// The GDT.
pub(super) fn gdt(ring: Ring) {
    let (gdt, _) = privilege::tables();
    privilege::load_own_idt();
    copy(gdt.iter().map(|word| word.load(Relaxed)), shared_page());
    privilege::load_gdt(shared_page());
    run(ring, 0);
    privilege::load_gdt(gdt.as_ptr() as u64);
    (0..8).for_each(|n| note("gdt", read(shared_page() + 8 * n)));
    clear();
    crate::exceptions::load();
}

/// The IDT: as much of it as has gates.
pub(super) fn idt(ring: Ring) {
    let (_, idt) = privilege::tables();
    let gates = idt.iter().take(FREE as usize / 16);
    copy(gates.flatten().map(|word| word.load(Relaxed)), shared_page());
    privilege::load_idt(shared_page());
    run(ring, 0);
    crate::exceptions::load();
    clear();
}

/// The TSS, from which the CPU takes the stack at each exception. It writes nothing to it but to the GDT.
pub(super) fn tss() {
    privilege::load_own_idt();
    let (gdt, _) = privilege::tables();
    copy(privilege::tss(0).iter().map(|word| word.load(Relaxed)), shared_page());
    let load = |base: u64| {
        let entry = usize::from(FIRST_TSS / 8);
        for (n, word) in tss_descriptor(base, 103).into_iter().enumerate() {
            gdt[entry + n].store(word, Relaxed);
        }
        // SAFETY: the descriptor is of an available TSS.
        unsafe { asm!("ltr {:x}", in(reg) FIRST_TSS, options(nostack, preserves_flags)) };
    };
    load(shared_page());
    run(Ring::User, 0);
    load(privilege::tss(0).as_ptr() as u64);
    clear();
    crate::exceptions::load();
}

/// Where the page of tables maps things.
pub(super) const WINDOW: u64 = 512 << 20;

unsafe extern "C" {
    /// In `boot.s`.
    static page_directory: u8;
}

/// Gives the window this table, or a large page again.
pub(super) fn set_window(table: Option<u64>) {
    let entry = &raw const page_directory as u64 + (WINDOW >> 21) * 8;
    write_word(entry, table.map_or(WINDOW | 0xe7, |table| table | 0x67));
    // SAFETY: reloading CR3 forgets translations.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags)) };
}

/// Page tables: the code is executed, and accesses memory, through a table in its own page. If that is not `accessed`, the CPU sets
/// bits in it.
pub(super) fn tables(ring: Ring, accessed: bool) {
    let bits = if accessed { 0x67 } else { 0x07 };
    privilege::load_own_idt();
    let cpu = privilege::cpu(0);
    prepare(cpu, ring, 0, 0);
    let pages = [cpu.gpr[DI], cpu.gpr[SI], shared_page(), cpu.gpr[SP] - PAGE];
    copy(pages.iter().map(|page| page | bits), shared_page());
    set_window(Some(shared_page()));
    (cpu.gpr[DI], cpu.gpr[SI], cpu.gpr[SP]) = (WINDOW, WINDOW + PAGE, WINDOW + 4 * PAGE);
    cpu.rip = WINDOW + 2 * PAGE + (in_shared_page() & (PAGE - 1));
    privilege::run_in(cpu, usual);
    (0..4).for_each(|n| note("entry", read(shared_page() + 8 * n)));
    (0..4).for_each(|n| note("data", read(DATA[0].0.address() + 8 * n)));
    executed(in_shared_page(), 1);
    set_window(None);
    clear();
    crate::exceptions::load();
}
