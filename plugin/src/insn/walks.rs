//! Walks of the page tables that are made again and again, at less cost.
//!
//! Nobody tells us when the guest changes its page tables, so nothing of a walk is true a moment later. But what it has read can
//! be read again: if every entry is what it was, and so is everything else that a walk depends on, its end is the same. That
//! spares what is computed, and none of the reads.

use super::paging::{self, Intent, NOWHERE, Path};
use crate::{Gfn, Gpa, Hypervisor, PAGE_SIZE, Registers};

/// The last walks of a virtual CPU, each through four levels and to an end that it may access.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walks {
    read: Walk,
    write: Walk,
}

/// A walk.
#[derive(Clone, Copy, Debug)]
struct Walk {
    /// The linear address of the page it was made for, and with what of the registers.
    page: u64,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    cpl: u8,
    /// What it has read.
    path: Path,
    /// Where it has come.
    frame: Gpa,
}

impl Walks {
    /// None yet.
    pub(crate) const NONE: Self = Self { read: Walk::NONE, write: Walk::NONE };

    /// Where an access to data goes, if it is made as the last one with that intent was, and is in the same page.
    #[inline(always)]
    pub(crate) fn again<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        registers: &Registers,
        linear: u64,
        length: usize,
        intent: Intent,
    ) -> Option<Gpa> {
        let walk = self.of(intent);
        let offset = linear.wrapping_sub(walk.page);
        let same = offset <= (PAGE_SIZE - length) as u64 && walk.is_for(registers) && walk.is_as_it_was(hv);
        same.then(|| Gpa(walk.frame.0 + offset))
    }

    /// Where any access to data, made with the privilege of `registers`, goes: if the CPU would make it at once, without a
    /// fault and without setting an accessed or dirty bit. (A stale TLB may still know another translation; a guest that has
    /// not flushed it cannot rely on either.) The walk reads only `is_plain` frames: in another one a breakpoint in place may
    /// show 0xCC, or what we read is not what the guest sees there, or somebody wants to hear of the walk.
    pub(crate) fn anew<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        registers: &Registers,
        linear: u64,
        length: usize,
        intent: Intent,
        is_plain: &impl Fn(Gfn) -> bool,
    ) -> Option<Gpa> {
        let offset = linear % PAGE_SIZE as u64;
        if offset as usize + length > PAGE_SIZE {
            return None;
        }
        let (gpa, path) = paging::access(hv, registers, linear, intent, is_plain)?;
        if let Some(path) = path {
            let Registers { cr0, cr3, cr4, efer, cpl, .. } = *registers;
            *self.of(intent) =
                Walk { page: linear - offset, cr0, cr3, cr4, efer, cpl, path, frame: Gpa(gpa.0 - offset) };
        }
        Some(gpa)
    }

    /// Both.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn access<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        registers: &Registers,
        linear: u64,
        length: usize,
        intent: Intent,
    ) -> Option<Gpa> {
        let again = self.again(hv, registers, linear, length, intent);
        again.or_else(|| self.anew(hv, registers, linear, length, intent, &|_| true))
    }

    /// None any more: frames are plain that were not, or the other way round.
    pub(crate) fn forget(&mut self) {
        (self.read.cpl, self.write.cpl) = (Walk::NONE.cpl, Walk::NONE.cpl);
    }

    #[inline(always)]
    fn of(&mut self, intent: Intent) -> &mut Walk {
        match intent {
            Intent::Read => &mut self.read,
            Intent::Write => &mut self.write,
        }
    }
}

impl Walk {
    /// With a privilege level that does not exist.
    const NONE: Self = Self { page: 0, cr0: 0, cr3: 0, cr4: 0, efer: 0, cpl: u8::MAX, path: NOWHERE, frame: Gpa(0) };

    /// Whether it would begin the same, and be permitted the same.
    #[inline(always)]
    fn is_for(&self, registers: &Registers) -> bool {
        self.cr0 == registers.cr0
            && self.cr3 == registers.cr3
            && self.cr4 == registers.cr4
            && self.efer == registers.efer
            && self.cpl == registers.cpl
    }

    /// Whether it would go on the same.
    #[inline(always)]
    fn is_as_it_was<H: Hypervisor>(&self, hv: &mut H) -> bool {
        // Not `all`: it would have each entry loaded before the call, and saved across it.
        for step in &self.path {
            if hv.read_word(step.at).ok() != Some(step.entry) {
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use proptest::prelude::*;
    use proptest::sample::select;
    use proptest::test_runner::TestRunner;

    use super::super::tables::Tables;
    use super::*;

    /// Frames of tables, of which the first two entries are used.
    const FRAMES: u64 = 4;
    const ENTRIES: usize = PAGE_SIZE / 8;
    /// Present, writable, the user's, accessed, dirty.
    const ALL: u64 = 0x67;
    /// Paging, and write protection.
    const CR0: u64 = 1 << 31 | 1 << 16;
    const PAE: u64 = 1 << 5;
    /// Long mode, and no-execute.
    const EFER: u64 = 1 << 10 | 1 << 11;

    fn registers() -> impl Strategy<Value = Registers> {
        let cr4 = select(vec![PAE, PAE, PAE, PAE | 1 << 12, PAE | 1 << 22]);
        let efer = select(vec![EFER, EFER, EFER, 1 << 10, 0]);
        (select(vec![CR0, CR0, 1 << 31, 0]), 0..2_u64, cr4, efer, select(vec![0, 3])).prop_map(
            |(cr0, root, cr4, efer, cpl)| Registers { cr0, cr3: root << 12, cr4, efer, cpl, ..Registers::default() },
        )
    }

    /// Through the first or the second entry of each table.
    fn linear() -> impl Strategy<Value = u64> {
        (0..16_u64, select(vec![0, 8, 0xffc])).prop_map(|(slots, offset)| {
            (0..4).map(|level| (slots >> level & 1) << (12 + 9 * level)).sum::<u64>() | offset
        })
    }

    fn entry() -> impl Strategy<Value = u64> {
        // Most often all is permitted, and the page is a small one: four of them make a walk.
        let flipped = select(vec![1, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7, 1 << 13, 1 << 63]);
        (0..FRAMES, prop::option::weighted(0.1, flipped), prop::bool::weighted(0.95))
            .prop_map(|(to, flipped, user)| (to << 12 | ALL & !(u64::from(!user) << 2)) ^ flipped.unwrap_or(0))
    }

    fn place() -> impl Strategy<Value = usize> {
        (0..FRAMES as usize, 0..2_usize).prop_map(|(frame, slot)| frame * ENTRIES + slot)
    }

    /// What is changed before it, if anything is; of which of the states, to which of the addresses, of how many bytes, and
    /// whether it is a write.
    fn access() -> impl Strategy<Value = (Option<(usize, u64)>, usize, usize, usize, bool)> {
        (prop::option::weighted(0.15, (place(), entry())), 0..2_usize, 0..3_usize, 1..=8_usize, any::<bool>())
    }

    /// How often each outcome is to come of the cases at least.
    const FLOOR: u32 = 300;

    #[test]
    fn a_walk_that_is_made_again_comes_to_where_a_new_one_does() {
        let inputs = (
            prop::collection::vec(entry(), 2 * FRAMES as usize),
            [registers(), registers()],
            [linear(), linear(), linear()],
            prop::collection::vec(access(), 1..60),
        );
        // Made again, made anew, denied.
        let outcomes = Cell::new([0_u32; 3]);
        let compare = |(entries, states, linears, accesses): (Vec<u64>, [Registers; 2], [u64; 3], Vec<_>)| {
            let mut tables = Tables(vec![0; FRAMES as usize * ENTRIES]);
            for (n, entry) in entries.into_iter().enumerate() {
                tables.0[n / 2 * ENTRIES + n % 2] = entry;
            }
            let mut walks = Walks::NONE;
            for (change, state, linear, length, write) in accesses {
                if let Some((place, entry)) = change {
                    tables.0[place] = entry;
                }
                let (registers, linear) = (states[state], linears[linear]);
                let intent = if write { Intent::Write } else { Intent::Read };
                let mut none = Walks::NONE;
                let anew = none.anew(&mut tables, &registers, linear, length, intent, &|_| true);
                let again = walks.again(&mut tables, &registers, linear, length, intent);
                prop_assert_eq!(walks.access(&mut tables, &registers, linear, length, intent), anew);
                let outcome = if again.is_some() { 0 } else { 1 + usize::from(anew.is_none()) };
                let mut all = outcomes.get();
                all[outcome] += 1;
                outcomes.set(all);
            }
            Ok(())
        };
        TestRunner::new(ProptestConfig::with_source_file(file!())).run(&inputs, compare).unwrap();
        assert!(outcomes.get().iter().all(|count| *count >= FLOOR), "{outcomes:?}");
    }

    #[test]
    fn nothing_that_a_walk_depends_on_may_have_changed() {
        let mut tables = Tables(vec![0; FRAMES as usize * ENTRIES]);
        for frame in 0..FRAMES {
            tables.0[frame as usize * ENTRIES] = (frame + 1) << 12 | ALL;
        }
        let registers = Registers { cr0: CR0, cr4: PAE, efer: EFER, cpl: 3, ..Registers::default() };
        let mut walks = Walks::NONE;
        assert_eq!(
            walks.anew(&mut tables, &registers, 0x10, 8, Intent::Write, &|_| true),
            Some(Gpa(FRAMES << 12 | 0x10))
        );
        let mut again = |tables: &mut Tables, registers: &Registers, linear, intent| {
            walks.again(tables, registers, linear, 8, intent)
        };
        assert_eq!(again(&mut tables, &registers, 0x10, Intent::Write), Some(Gpa(FRAMES << 12 | 0x10)));
        assert_eq!(again(&mut tables, &registers, 0xff8, Intent::Write), Some(Gpa(FRAMES << 12 | 0xff8)));
        assert_eq!(again(&mut tables, &registers, 0xff9, Intent::Write), None, "it crosses the page");
        assert_eq!(again(&mut tables, &registers, 0x1010, Intent::Write), None, "another page");
        assert_eq!(again(&mut tables, &registers, 0x10, Intent::Read), None, "none was read");
        for other in [
            Registers { cr0: 1 << 31, ..registers },
            Registers { cr3: 0x1000, ..registers },
            Registers { cr4: PAE | 1 << 12, ..registers },
            Registers { efer: 1 << 10, ..registers },
            Registers { cpl: 0, ..registers },
        ] {
            assert_eq!(again(&mut tables, &other, 0x10, Intent::Write), None, "{other:x?}");
        }
        for frame in 0..FRAMES {
            let mut tables = tables.clone();
            tables.0[frame as usize * ENTRIES] &= !1;
            assert_eq!(again(&mut tables, &registers, 0x10, Intent::Write), None, "the entry in frame {frame}");
        }
    }
}
