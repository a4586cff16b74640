//! The walks of the guest's page tables: any tables, any control registers.
#![no_main]

use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use hyperbp::fuzzing::{Walks, translate};
use hyperbp::{Gfn, Gpa, Hypervisor, PAGE_SIZE, Registers, Rights, VcpuId, ViewId};
use hyperbp_fuzz::AnyRegisters;
use hyperbp_fuzz::walker::Cpu;
use libfuzzer_sys::fuzz_target;

/// Frames of memory the guest has.
const FRAMES: u64 = 16;
/// Levels of the deepest tables.
const LEVELS: usize = 5;
/// Bits 51 to 12: where an entry points.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;
/// Present, writable, the user's, accessed, dirty.
const PERMITS: u64 = 0x67;

#[derive(Arbitrary, Debug)]
struct Input {
    registers: AnyRegisters,
    /// The root is in a frame that is there.
    rooted: bool,
    linear: u64,
    length: u8,
    write: bool,
    entries: Vec<Entry>,
    /// What the entries that are not named are, in all frames.
    others: u64,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Entry {
    frame: u8,
    slot: Slot,
    bits: u64,
    /// It permits everything, whatever the bits say.
    permits: bool,
    /// It points to this frame, whatever the bits say.
    to: Option<u8>,
}

/// Which entry of a table, counted in entries of 8 bytes.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Slot {
    Number(u16),
    /// The one that a walk for the address looks at on this level.
    OfAddress(u8),
}

#[derive(Clone)]
struct Memory {
    /// Entries of 8 bytes that are unlike the others, by frame and number.
    entries: BTreeMap<(u64, u64), u64>,
    others: u64,
    /// What was read.
    reads: Vec<(u64, usize)>,
}

impl Memory {
    fn new(input: &Input) -> Self {
        let entry = |entry: &Entry| {
            let number = match entry.slot {
                Slot::Number(number) => number.into(),
                Slot::OfAddress(level) => input.linear >> (12 + 9 * (usize::from(level) % LEVELS)),
            };
            let to = entry.to.map(|to| (u64::from(to) % FRAMES) << 12);
            let bits = entry.bits | if entry.permits { PERMITS } else { 0 };
            let value = to.map_or(bits, |to| bits & !ADDRESS | to);
            ((u64::from(entry.frame) % FRAMES, number % (PAGE_SIZE as u64 / 8)), value)
        };
        Self { entries: input.entries.iter().map(entry).collect(), others: input.others, reads: Vec::new() }
    }

    /// The entry of 8 bytes that a guest-physical address is in.
    fn entry(&mut self, gpa: Gpa) -> &mut u64 {
        self.entries.entry((gpa.gfn().0, u64::from(gpa.offset()) / 8)).or_insert(self.others)
    }
}

/// No memory there.
#[derive(Debug, thiserror::Error)]
#[error("no memory there")]
struct Nowhere;

impl Hypervisor for Memory {
    type Error = Nowhere;

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Nowhere> {
        let offset = usize::from(gpa.offset());
        assert!(offset + into.len() <= PAGE_SIZE, "a read crosses a page");
        self.reads.push((gpa.0, into.len()));
        if gpa.gfn().0 >= FRAMES {
            return Err(Nowhere);
        }
        for (at, byte) in (gpa.0..).zip(into) {
            *byte = self.entry(Gpa(at)).to_le_bytes()[at as usize % 8];
        }
        Ok(())
    }

    fn vcpus(&self) -> u16 {
        1
    }

    fn now(&self) -> u64 {
        0
    }

    fn write(&mut self, _: Gpa, _: &[u8]) -> Result<(), Nowhere> {
        unreachable!("a walk only reads")
    }

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Nowhere> {
        self.write(gpa, bytes).map(|()| true)
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Nowhere> {
        unreachable!("a walk only reads")
    }

    fn drop_shadow_gfn(&mut self, _: Gfn) -> Result<(), Nowhere> {
        unreachable!("a walk only reads")
    }

    fn create_view(&mut self) -> Result<ViewId, Nowhere> {
        unreachable!("a walk only reads")
    }

    fn switch_view(&mut self, _: ViewId) -> Result<(), Nowhere> {
        unreachable!("a walk only reads")
    }

    fn drop_view(&mut self, _: ViewId) -> Result<(), Nowhere> {
        unreachable!("a walk only reads")
    }

    fn remap(&mut self, _: ViewId, _: Gfn, _: Option<Gfn>) -> Result<(), Nowhere> {
        unreachable!("a walk only reads")
    }

    fn set_rights(&mut self, _: ViewId, _: Gfn, _: Rights) -> Result<(), Nowhere> {
        unreachable!("a walk only reads")
    }

    fn rip(&mut self, _: VcpuId) -> Result<u64, Nowhere> {
        unreachable!("a walk only reads")
    }

    fn stop_step(&mut self, _: VcpuId) -> Result<(), Nowhere> {
        unreachable!("a walk only reads")
    }

    fn pause(&mut self) -> Result<(), Nowhere> {
        unreachable!("a walk only reads")
    }

    fn resume(&mut self) -> Result<(), Nowhere> {
        unreachable!("a walk only reads")
    }
}

/// A walk, from memory as it was, and the entries that were read in it.
fn walk<T>(memory: &Memory, work: impl FnOnce(&mut Memory) -> Option<T>) -> (Option<T>, Vec<(u64, usize)>) {
    let mut memory = Memory { reads: Vec::new(), ..memory.clone() };
    let found = work(&mut memory);
    // What is remembered of a walk is read before another is made.
    assert!(memory.reads.len() <= 2 * LEVELS, "more reads than there are levels");
    (found, memory.reads)
}

fuzz_target!(|input: Input| {
    let mut registers = Registers::from(input.registers);
    if input.rooted {
        registers.cr3 = registers.cr3 & !ADDRESS | registers.cr3 & (FRAMES - 1) << 12;
    }
    let memory = Memory::new(&input);
    let (linear, write) = (input.linear, input.write);
    let length = usize::from(input.length);
    let translated = |memory: &Memory| walk(memory, |memory| translate(memory, &registers, linear));
    let access = |memory: &Memory, walks: &mut Walks, length, write| {
        walk(memory, |memory| walks.access(memory, &registers, linear, length, write)).0
    };
    let accessed = |memory: &Memory, length, write| access(memory, &mut Walks::default(), length, write);

    let (place, entries) = translated(&memory);
    assert!(place.is_none_or(|gpa| gpa.0 & 0xfff == linear & 0xfff), "the offset in the page is not translated");
    let mut walks = Walks::default();
    let granted = access(&memory, &mut walks, length, write);
    assert_eq!(access(&memory, &mut walks, length, write), granted, "and again");
    if granted.is_some() {
        assert_eq!(granted, place, "an access goes where the address does");
        let Registers { cr0, cr3, cr4, efer, cpl, rflags, .. } = registers;
        let (user, alignment_check) = (cpl == 3, rflags >> 18 & 1 != 0);
        // What is not known of the CPU is such that it grants the least.
        let (physical_bits, gigabyte_pages, pointers) = (52, false, [0; 4]);
        let cpu = Cpu { cr0, cr3, cr4, efer, user, alignment_check, physical_bits, gigabyte_pages, pointers };
        let read = |at: u64, size: usize| {
            let entry = *memory.clone().entry(Gpa(at));
            let there = Gpa(at).gfn().0 < FRAMES;
            there.then_some(if size == 4 { u64::from((entry >> (at % 8 * 8)) as u32) } else { entry })
        };
        let theirs = cpu.walk(linear, length, write, read).map(|granted| granted.gpa);
        assert_eq!(theirs.map(Gpa), Ok(place.unwrap_or_default()), "the CPU makes it, too");
        assert_eq!(accessed(&memory, 1, write), granted, "and so does its first byte");
        assert_eq!(accessed(&memory, length, false), granted, "what can be written can be read");
        assert!((linear & 0xfff) as usize + length <= PAGE_SIZE, "an access crosses a page");
    }
    if place.is_none() {
        return;
    }
    // Whatever entry of the walk is taken away, there is no translation.
    for (at, _) in entries {
        let mut without = memory.clone();
        *without.entry(Gpa(at)) &= !(PRESENT << (at % 8 * 8));
        assert_eq!(translated(&without).0, None, "an entry at {at:#x} that is not present");
        let accessed = access(&without, &mut walks.clone(), length, write);
        assert_eq!(accessed, None, "an entry at {at:#x} that is not present");
    }
});
