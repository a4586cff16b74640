//! Probes with hypercalls.

use hyperbp_bench_abi::PAGE_SIZE;

use super::beside::{WINDOW, set_window};
use super::log::{executed, note, note_memory};
use super::{DATA, plain, prepare, run_block, usual};
use crate::page::{ForeignPage, PageAligned, read, write_word};
use crate::privilege::{self, DI, Ring, SP};
use crate::xen;

const PAGE: u64 = PAGE_SIZE as u64;

/// Where hyperbp's runner begins with shadows in a guest of this size, and how many of the frames are looked at.
const SHADOWS: u64 = 0x14_0000;
const LOOKED_AT: u64 = 16;
/// What Xen and its tools keep for themselves (`LIBXL__X86_SPECIAL`...): the ring, the store, the console.
const SPECIAL: core::ops::Range<u64> = 0xf_e000..0x10_0000;

/// Where a monitor may have its frames: behind the memory, at the highest that Xen knows, and where monitors like to have them.
pub(super) fn frames_without_memory() -> impl Iterator<Item = u64> {
    let mut memory = [const { 0..0 }; xen::REGIONS];
    let end = xen::memory(&mut memory).iter().map(|region| region.end).max().unwrap_or(0) / PAGE;
    let highest = xen::highest_frame();
    let around = |frame: u64| frame.saturating_sub(LOOKED_AT / 2)..frame + LOOKED_AT / 2;
    (end + 1..end + LOOKED_AT)
        .chain(around(highest).filter(move |frame| *frame > end))
        .chain(SHADOWS..SHADOWS + LOOKED_AT)
        .filter(|frame| !SPECIAL.contains(frame))
}

/// Of pages with breakpoints. What Xen says of frames without memory is not compared: see docs/threat-model.md.
pub(super) fn memory_types() {
    for page in [plain(), super::in_shared_page(), super::fetch_fault(), DATA[0].0.address()] {
        note("type", xen::memory_type(page / PAGE));
    }
}

/// Whether any altp2m call succeeds. Which error it is depends on whether altp2m is on: see docs/threat-model.md.
pub(super) fn altp2m() {
    for command in 1..=15 {
        note("done", u64::from(xen::altp2m(command) == 0 && command != 1));
    }
    run_block(plain(), Ring::Kernel, 0);
    run_block(plain(), Ring::User, 0);
}

/// Gives a page back to Xen, and takes another one in its place.
fn exchange(page: u64) {
    note("given", xen::give_back(page / PAGE));
    note("taken", xen::take(page / PAGE));
}

/// What the code accesses is given back and taken anew, between one run and the next.
pub(super) fn balloon_data() {
    for ring in [Ring::Kernel, Ring::User] {
        for _ in 0..2 {
            run_block(plain(), ring, 0);
            let cpu = privilege::cpu(0);
            cpu.reset(ring);
            exchange(cpu.gpr[SP] - PAGE);
            exchange(DATA[0].0.address());
            run_block(plain(), ring, 0);
        }
    }
}

/// The table that maps it.
#[unsafe(link_section = ".volatile")]
static TABLE: PageAligned<ForeignPage> = PageAligned(ForeignPage::new([0; PAGE_SIZE]));

/// The same with the page table that maps it, which maps other data then.
pub(super) fn balloon_tables() {
    let table = TABLE.0.address();
    for ring in [Ring::Kernel, Ring::User] {
        for data in [0, 1, 0, 1] {
            exchange(table);
            let cpu = privilege::cpu(0);
            prepare(cpu, ring, plain(), 0);
            write_word(table, DATA[data].0.address() | 0x67);
            write_word(table + 8, (cpu.gpr[SP] - PAGE) | 0x67);
            set_window(Some(table));
            (cpu.gpr[DI], cpu.gpr[SP]) = (WINDOW, WINDOW + 2 * PAGE);
            privilege::run(cpu, usual);
            note_memory("data", DATA[0].0.address(), 8);
            note_memory("data", DATA[1].0.address(), 8);
            executed(plain(), 1);
            set_window(None);
        }
    }
}

/// Gives back what it does not have: the frames of shadows. Breakpoints must stay.
pub(super) fn balloon_shadows() {
    frames_without_memory().for_each(|frame| {
        xen::give_back(frame);
    });
    for _ in 0..3 {
        run_block(plain(), Ring::Kernel, 0);
        run_block(super::int3s(), Ring::User, 0);
    }
    note("code", read(plain()));
}
