//! Our walks against a walker that was written from the SDM alone, over random tables whose entries often have reserved bits.

use std::collections::BTreeMap;

use super::Walks;
use super::native::Random;
use super::paging::Intent;
use super::tables::Tables;
use crate::{Gpa, PAGE_SIZE, Registers};

#[path = "../../fuzz/src/walker.rs"]
#[allow(unreachable_pub)]
mod walker;

use walker::{Cpu, Denied, Granted, Mode};

/// Cases, and how often each outcome that is counted is to come of them at least.
const CASES: u64 = 150_000;
const FLOOR: u64 = 50;
/// Frames of tables, and how many entries of 4 bytes at the start of each are used.
const FRAMES: u64 = 6;
const SLOTS: u64 = 4;
/// Present, writable, the user's, accessed, dirty.
const ALL: u64 = 0x67;
const LARGE: u64 = 1 << 7;

fn entry(random: &mut Random) -> u64 {
    let (large, to) = match random.below(4) {
        0 => (LARGE, random.below(4) << random.pick(&[21, 22, 30])),
        _ => (0, random.below(FRAMES) << 12),
    };
    let user = if random.below(8) == 0 { 0 } else { 4 };
    // Half of the entries have one bit more, or less, and of those most a bit that is reserved somewhere.
    let flipped = match random.below(16) {
        0 | 1 => 1 << (52 + random.below(12)),
        2 => 1 << (32 + random.below(20)),
        3 => 1 << (12 + random.below(18)),
        4 => 1 << random.below(9),
        _ => 0,
    };
    (to | ALL & !4 | user | large) ^ flipped
}

fn cpu(random: &mut Random, tables: &Tables) -> Cpu {
    let mut flag = |bit: u32, of: u64| if random.below(of) == 0 { 0 } else { 1 << bit };
    let (paging, protect) = (flag(31, 32), flag(16, 4));
    let (pae, long, no_execute) = (flag(5, 3), flag(10, 2), flag(11, 2));
    let (pse, smap) = (flag(4, 4), flag(21, 2));
    let (five, keys) = (flag(12, 2) ^ 1 << 12, (flag(22, 16) | flag(24, 16)) ^ (1 << 22 | 1 << 24));
    let cr3 = random.below(FRAMES) << 12 | random.below(2) << 5;
    // What memory has where CR3 points: the CPU may have other ones.
    let of_memory = std::array::from_fn(|n| tables.0[cr3 as usize / 8 + n]);
    let loaded = std::array::from_fn(|_| random.below(FRAMES) << 12 | 1);
    Cpu {
        cr0: paging | protect,
        cr3,
        // In long mode PAE is on.
        cr4: pse | smap | five | keys | if long != 0 { 1 << 5 } else { pae },
        efer: long | no_execute,
        user: random.below(2) == 0,
        alignment_check: random.below(4) == 0,
        physical_bits: random.pick(&[36, 39, 40, 46, 52]),
        gigabyte_pages: random.below(2) == 0,
        pointers: if random.below(2) == 0 { of_memory } else { loaded },
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// Both grant it.
    Granted(Mode, u32, Intent),
    /// The CPU would grant it; we leave it to a step.
    Left(&'static str),
    Denied(Mode, Denied),
}

/// Why we leave an access to a step that the CPU would make at once. Nothing else is left.
fn left(cpu: &Cpu, granted: Granted, smap_forbids: bool) -> Option<&'static str> {
    match granted {
        Granted { mode: Mode::Pae, .. } => Some("the CPU has the page-directory pointers"),
        Granted { page_bits: 30, .. } => Some("not every CPU has pages of 1 GiB"),
        Granted { mode: Mode::Bits32, gpa, .. } if gpa >> 32 != 0 => Some("an address above 4 GiB in 32-bit tables"),
        _ if smap_forbids => Some("AC lifts SMAP"),
        _ if cpu.cr4 & (1 << 22 | 1 << 24) != 0 => Some("protection keys"),
        _ => None,
    }
}

#[test]
fn no_access_is_granted_that_the_cpu_would_not_make() {
    let mut random = Random(1);
    let mut counted: BTreeMap<Outcome, u64> = BTreeMap::new();
    let mut tables = Tables(vec![0; (FRAMES + 4) as usize * PAGE_SIZE / 8]);
    for case in 0..CASES {
        if case % 4 == 0 {
            for frame in 0..FRAMES as usize {
                for slot in 0..SLOTS as usize {
                    tables.0[frame * PAGE_SIZE / 8 + slot] = entry(&mut random);
                }
            }
        }
        let cpu = cpu(&mut random, &tables);
        let offset = random.pick(&[0, 8, 0x123, 0xff8, 0xffc]);
        // One of the first entries of each table; seldom what is no address.
        let shifts: &[u64] = match (cpu.efer >> 10 & 1, cpu.cr4 >> 5 & 1, cpu.cr4 >> 12 & 1) {
            (0, 0, _) => &[12, 22],
            (0, ..) => &[12, 21, 30],
            (_, _, 0) => &[12, 21, 30, 39],
            _ => &[12, 21, 30, 39, 48],
        };
        let mut linear = shifts.iter().fold(offset, |all, shift| all | random.below(4) << shift);
        if random.below(16) == 0 {
            linear ^= 1 << (32 + random.below(32));
        }
        let length = random.pick(&[1, 2, 4, 8]);
        let intent = random.pick(&[Intent::Read, Intent::Write]);
        let Cpu { cr0, cr3, cr4, efer, .. } = cpu;
        let cpl = if cpu.user { 3 } else { 0 };
        let rflags = if cpu.alignment_check { 1 << 18 } else { 0 };
        let registers = Registers { rflags, cr0, cr3, cr4, efer, cpl, ..Registers::default() };

        let mut walks = Walks::NONE;
        let ours = walks.access(&mut tables, &registers, linear, length, intent);
        let write = intent == Intent::Write;
        let read = |tables: &Tables, at: u64, size: usize| {
            let word = tables.0.get(at as usize / 8).copied().unwrap_or(0);
            Some(if size == 4 { u64::from((word >> (at % 8 * 8)) as u32) } else { word })
        };
        let theirs = cpu.walk(linear, length, write, |at, size| read(&tables, at, size));
        let what = || format!("{ours:x?}, but {theirs:x?}: {linear:#x}, {intent:?} of {length} with {cpu:x?}");
        // Where there can be no memory, the access itself fails.
        let nowhere = |gpa: Gpa| gpa.0 >> cpu.physical_bits != 0;
        let outcome = match (ours, theirs) {
            (Some(gpa), Ok(Granted { gpa: place, mode, page_bits })) => {
                assert_eq!(gpa.0, place, "{}", what());
                Outcome::Granted(mode, page_bits, intent)
            }
            (None, Ok(granted)) => {
                let forbidding = Cpu { alignment_check: false, ..cpu };
                let forbidden = forbidding.walk(linear, length, write, |at, size| read(&tables, at, size)).is_err();
                Outcome::Left(left(&cpu, granted, forbidden).unwrap_or_else(|| panic!("{}", what())))
            }
            (Some(gpa), Err(denied)) => {
                assert!(denied == Denied::Reserved && nowhere(gpa), "{}", what());
                Outcome::Denied(Mode::Off, denied)
            }
            (None, Err(denied)) => {
                Outcome::Denied(if efer & 1 << 10 != 0 { Mode::Level4 } else { Mode::Bits32 }, denied)
            }
        };
        *counted.entry(outcome).or_default() += 1;
    }
    println!("{counted:#?}");
    let count = |outcome| counted.get(&outcome).copied().unwrap_or(0);
    let pages = [
        (Mode::Off, 12),
        (Mode::Bits32, 12),
        (Mode::Bits32, 22),
        (Mode::Level4, 12),
        (Mode::Level4, 21),
        (Mode::Level5, 12),
        (Mode::Level5, 21),
    ];
    for (mode, page_bits) in pages {
        for intent in [Intent::Read, Intent::Write] {
            let granted = Outcome::Granted(mode, page_bits, intent);
            assert!(count(granted) >= FLOOR, "{granted:?} {} times", count(granted));
        }
    }
    let mut expected: Vec<_> = [Mode::Level4, Mode::Bits32]
        .into_iter()
        .flat_map(|mode| {
            use Denied::*;
            [NoAddress, Crossing, NotPresent, Reserved, Protection, Unmarked]
                .map(|denied| Outcome::Denied(mode, denied))
        })
        .collect();
    expected.extend([Outcome::Denied(Mode::Level4, Denied::Keys), Outcome::Denied(Mode::Off, Denied::Reserved)]);
    expected.extend(counted.keys().filter(|outcome| matches!(outcome, Outcome::Left(_))));
    for outcome in expected {
        assert!(count(outcome) >= FLOOR, "{outcome:?} {} times", count(outcome));
    }
    let left = counted.keys().filter(|outcome| matches!(outcome, Outcome::Left(_))).count();
    assert!(left >= 5, "every reason to leave an access is tried");
}
