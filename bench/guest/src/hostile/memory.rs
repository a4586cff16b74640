//! Probes of memory: pages that lack something, all of memory, and frames where there is none.

use hyperbp_bench_abi::{CONTROL_GPA, PAGE_SIZE, SAMPLES_MAX};
use hyperbp_bench_guest::LARGE_PAGES;

use super::log::{self, executed, note, note_cpu, note_memory};
use super::{GP, PF, UD, digest, fetch_fault, next, note_end, page_faults as page_faults_code, prepare};
use crate::page::{ForeignPage, PageAligned, SAMPLES, read, write_word};
use crate::privilege::{self, CX, Cpu, EXIT, Flow, Ring, SI};
use crate::{STACK_SIZE, xen};

const PAGE: u64 = PAGE_SIZE as u64;

/// Bits of page-table entries: all that there are, and what may be lacking.
const ALL: u64 = 0x67;
pub(super) const READ_ONLY: u64 = ALL & !2;
pub(super) const SUPERVISOR: u64 = ALL & !4;
pub(super) const NOT_ACCESSED: u64 = ALL & !0x60;

/// Pages that lack something.
const LACKING: usize = 12;
#[unsafe(link_section = ".volatile")]
static PAGES: [PageAligned<ForeignPage>; LACKING] = [const { PageAligned(ForeignPage::new([0; PAGE_SIZE])) }; LACKING];

fn set_entry(page: u64, bits: u64) {
    write_word(privilege::page_entry(page), page & !(PAGE - 1) | bits);
    privilege::invalidate(page);
}

/// Accesses of pages whose entries have only these bits. The handler adds the others.
pub(super) fn page_faults(ring: Ring, bits: u64) {
    let first = PAGES[0].0.address();
    let cpu = privilege::cpu(0);
    prepare(cpu, ring, page_faults_code(), 0);
    cpu.gpr[12] = first;
    for page in (first..first + LACKING as u64 * PAGE).step_by(PAGE_SIZE) {
        (page..page + PAGE).step_by(8).for_each(|at| write_word(at, at * 0x101));
        set_entry(page, bits);
    }
    privilege::run(cpu, add_bits);
    for page in &PAGES {
        let page = page.0.address();
        note("entry", read(privilege::page_entry(page)));
        set_entry(page, ALL);
        note_memory("page", page, 2);
        note_memory("page", page + PAGE - 8, 1);
    }
    note_end(cpu);
    // A stack that is not there ends it, at CPL 0: the CPU can push no frame there.
    match cpu.vector {
        EXIT => executed(page_faults_code(), 1),
        _ => log::executed_until(page_faults_code(), cpu.rip),
    }
}

/// Code whose page has an entry with only these bits.
pub(super) fn fetch_faults(ring: Ring, bits: u64) {
    let block = fetch_fault();
    let cpu = privilege::cpu(0);
    prepare(cpu, ring, block, 0);
    set_entry(block, bits);
    privilege::run(cpu, add_bits);
    note("entry", read(privilege::page_entry(block)));
    set_entry(block, ALL);
    note_end(cpu);
    executed(block, 1);
}

fn add_bits(cpu: &mut Cpu) -> Flow {
    note_cpu(cpu);
    if cpu.vector != PF {
        return next(cpu);
    }
    // Only those that are needed: so it is seen whether the CPU sets the others.
    let entry = privilege::page_entry(cpu.cr2);
    note("entry", read(entry));
    write_word(entry, read(entry) | 7);
    privilege::invalidate(cpu.cr2);
    // What could not be fetched has not been executed, and what is repeated (REP) goes on where it was.
    let fetched = cpu.cr2 & !(PAGE - 1) != cpu.rip & !(PAGE - 1);
    if fetched && read(cpu.rip) as u8 != 0xf3 {
        log::executed_at(cpu.rip);
    }
    Flow::Resume
}

unsafe extern "C" {
    /// In `link.ld`.
    static volatile_start: u8;
    static volatile_end: u8;
    /// In `boot.s`.
    static boot_stack_top: u8;
}

/// Whether a page has other contents each time, by the guest's own doing.
fn is_changed(page: u64) -> bool {
    let samples = SAMPLES.0.as_ptr() as u64;
    let stack = &raw const boot_stack_top as u64;
    page == CONTROL_GPA
        || (&raw const volatile_start as u64..&raw const volatile_end as u64).contains(&page)
        || (samples..samples + u64::from(SAMPLES_MAX) * 8).contains(&page)
        || (stack - STACK_SIZE..stack).contains(&page)
}

/// Reads all memory.
pub(super) fn read_all(ring: Ring) {
    /// Digests of so much.
    const CHUNK: u64 = 256 * PAGE;
    let mut memory = [const { 0..0 }; xen::REGIONS];
    for region in xen::memory(&mut memory) {
        for chunk in region.clone().step_by(CHUNK as usize) {
            let cpu = privilege::cpu(0);
            prepare(cpu, ring, digest(), 0);
            let (mut state, end) = (cpu.gpr, region.end.min(chunk + CHUNK));
            for page in (chunk..end).step_by(PAGE_SIZE).filter(|page| !is_changed(*page)) {
                (state[SI], state[CX]) = (page, PAGE / 8);
                cpu.gpr = state;
                cpu.rip = digest();
                privilege::run(cpu, next);
                state = cpu.gpr;
            }
            note("digest", state[15]);
        }
    }
}

/// Where there is no memory, as far as it is mapped: reads, writes and executes it.
pub(super) fn frames(ring: Ring) {
    let mut found = 0;
    // What `boot.s` maps where it is, by GiB.
    let is_mapped = |frame: &u64| matches!(*frame >> 18, 0 | 3 | 5);
    for frame in super::hypercalls::frames_without_memory().filter(is_mapped) {
        let at = frame * PAGE;
        for offset in [0, 8, 0x7f8, 0xff8] {
            found += u64::from(read(at + offset) != u64::MAX);
        }
        write_word(at + 0x10, 0x1122_3344_5566_7788);
        found += u64::from(read(at + 0x10) != u64::MAX);
        let cpu = privilege::cpu(0);
        prepare(cpu, ring, at, 0);
        // Xen raises #GP where there is nothing, and 0xFF is no instruction: see docs/threat-model.md.
        privilege::run(cpu, stop);
        found += u64::from(!matches!(cpu.vector, UD | GP) || cpu.rip != at);
    }
    note("found", found);
    // A second mapping shows the same.
    note("window", read(LARGE_PAGES + super::plain()));
}

fn stop(_: &mut Cpu) -> Flow {
    Flow::Stop
}
