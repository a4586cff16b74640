//! Probes of code that is read, written, or across the end of a page.

use hyperbp_bench_abi::PAGE_SIZE;

use super::log::{self, executed, note, note_cpu, site};
use super::{
    PF, next, note_end, prepare, read_strings, read_widths, self_modifying as self_modifying_code,
    straddling as straddling_code, straddling_call, straddling_push,
};
use crate::page::{read, write_byte};
use crate::privilege::{self, Cpu, DI, Flow, Ring};

const PAGE: u64 = PAGE_SIZE as u64;

/// Instructions across the end of a page. The second page is not present at first.
pub(super) fn straddling(ring: Ring) {
    for block in [straddling_code(), straddling_push(), straddling_call()] {
        for is_present in [true, false] {
            let cpu = privilege::cpu(0);
            prepare(cpu, ring, block, 0);
            let second = (block + PAGE) & !(PAGE - 1);
            let entry = privilege::page_entry(second);
            // Bochs forgets what it has decoded across two pages only when the second one is written to, whatever their
            // translations are.
            write_byte(second, read(second) as u8);
            if !is_present {
                crate::page::write_word(entry, read(entry) & !1);
                privilege::invalidate(second);
            }
            cpu.scratch[0] = second;
            privilege::run(cpu, make_present);
            note_end(cpu);
            executed(block, 1);
        }
    }
}

fn make_present(cpu: &mut Cpu) -> Flow {
    note_cpu(cpu);
    if cpu.vector != PF {
        return next(cpu);
    }
    let page = cpu.scratch[0];
    let entry = privilege::page_entry(page);
    crate::page::write_word(entry, read(entry) | 1);
    privilege::invalidate(page);
    // The instruction runs again, if its first byte was fetched.
    if cpu.rip & !(PAGE - 1) != page {
        log::executed_at(cpu.rip);
    }
    Flow::Resume
}

/// Code that writes what comes next. It is put back afterwards, and read in between.
pub(super) fn self_modifying(ring: Ring, flags: u64) {
    let block = self_modifying_code();
    let mut before = [0; LENGTH / 8];
    for (at, word) in words(block).zip(&mut before) {
        *word = read(at);
    }
    super::run_block(block, ring, flags);
    words(block).for_each(|at| note("code", read(at)));
    for (at, byte) in (block..).zip(before.as_flattened_bytes()) {
        write_byte(at, byte);
    }
    note("put back", words(block).zip(before).filter(|(at, word)| read(*at) != *word).count() as u64);
}

/// Bytes of [`self_modifying_code`], at least.
const LENGTH: usize = 400;

fn words(block: u64) -> impl Iterator<Item = u64> {
    (block..block + LENGTH as u64).step_by(8)
}

trait Bytes {
    fn as_flattened_bytes(&self) -> impl Iterator<Item = u8>;
}

impl Bytes for [u64; LENGTH / 8] {
    fn as_flattened_bytes(&self) -> impl Iterator<Item = u8> {
        self.iter().flat_map(|word| word.to_le_bytes())
    }
}

/// Reads code with breakpoints by all widths, and by string instructions.
pub(super) fn read_as_data(ring: Ring) {
    for number in [0, 3, 9] {
        let cpu = privilege::cpu(0);
        prepare(cpu, ring, read_widths(), 0);
        let at = site(super::plain(), number);
        (cpu.gpr[12], cpu.gpr[13]) = (at - 17, at + 3);
        privilege::run(cpu, super::usual);
    }
    for block in [super::plain(), super::in_shared_page(), straddling_code()] {
        let cpu = privilege::cpu(0);
        prepare(cpu, ring, read_strings(), 0);
        cpu.gpr[12] = block;
        privilege::run(cpu, super::usual);
        let data = cpu.gpr[DI];
        note("rdi", data);
    }
}
