//! Xen's machine-to-physical table (M2P), and what it tells about a mapped page.
//!
//! A foreign mapping keeps the machine frame that a guest frame number (gfn) had when it was mapped. The guest can give
//! that number another frame at any time (XENMEM_decrease_reservation, XENMEM_populate_physmap, XENMEM_add_to_physmap,
//! XENMEM_exchange, XENMEM_remove_from_physmap). Xen has no notice that covers all of these: `populate_physmap` of a gfn
//! that has a page marks no map cache. But Xen keeps the M2P right in each of them, before the hypercall returns: the
//! old frame's entry is no longer the gfn. So one load tells whether a mapping is still that of its gfn.
//!
//! Xen does not tell which machine frame a mapping shows. But all frames whose entry is the gfn are candidates, and the
//! mapped one is among them: only RAM that the domain owns can be mapped, and the entry of that is its gfn. (Other
//! domains have a page with this number, too.) As long as no entry of a candidate changes, the mapped frame is at its gfn.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hyperbp::Gfn;

/// Most candidates of a gfn: about as many as there are domains. With more, a page is not kept mapped.
const MOST: usize = 15;

/// The table, mapped readable. `M` keeps it so.
#[derive(Debug)]
pub struct M2p<M> {
    entries: NonNull<u64>,
    count: usize,
    _mapping: M,
}

impl<M> M2p<M> {
    /// The table of `count` entries at `entries`.
    ///
    /// # Safety
    /// So many entries must be readable there while `mapping` lives, and the address be a multiple of 8.
    #[must_use]
    pub const unsafe fn new(entries: NonNull<u64>, count: usize, mapping: M) -> Self {
        Self { entries, count, _mapping: mapping }
    }

    /// How many entries it has: one for each machine frame.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Whether it has none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Finds the candidates of gfns: all machine frames whose entry is one of them. Reads the whole table. The domain must
    /// not run: a frame that moves meanwhile might be missed.
    pub fn find(&self, wanted: &[Gfn]) -> Vec<Frames> {
        let mut found = vec![Frames::NONE; wanted.len()];
        // Most entries are none of them, which one bit tells.
        let filter = wanted.iter().fold(0_u64, |filter, gfn| filter | 1 << (gfn.0 % 64));
        for mfn in 0..self.count {
            let gfn = self.gfn(mfn);
            if filter >> (gfn % 64) & 1 == 0 {
                continue;
            }
            for (frames, _) in found.iter_mut().zip(wanted).filter(|(_, wanted)| wanted.0 == gfn) {
                frames.add(mfn);
            }
        }
        found
    }

    /// Whether a page that was mapped while `gfn` had these candidates still is the one at `gfn`.
    #[inline(always)]
    pub fn is_at(&self, frames: &Frames, gfn: Gfn) -> bool {
        frames.count > 0 && frames.mfns[..usize::from(frames.count)].iter().all(|mfn| self.gfn(*mfn as usize) == gfn.0)
    }

    #[inline(always)]
    fn gfn(&self, mfn: usize) -> u64 {
        assert!(mfn < self.count, "a machine frame that is not in the table");
        // SAFETY: within the table, by the assertion.
        let entry = unsafe { self.entries.add(mfn) };
        // SAFETY: aligned, as the table is; mapped while `self` lives; Xen writes whole entries.
        unsafe { AtomicU64::from_ptr(entry.as_ptr()) }.load(Relaxed)
    }
}

/// The machine frames that a gfn may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    mfns: [u32; MOST],
    /// None: there are none, or too many.
    count: u8,
    too_many: bool,
}

impl Frames {
    /// No candidates: nothing [is there](M2p::is_at).
    pub const NONE: Self = Self { mfns: [0; MOST], count: 0, too_many: false };

    fn add(&mut self, mfn: usize) {
        match (u32::try_from(mfn), self.mfns.get_mut(usize::from(self.count))) {
            (Ok(mfn), Some(free)) if !self.too_many => {
                *free = mfn;
                self.count += 1;
            }
            _ => (self.count, self.too_many) = (0, true),
        }
    }

    /// Whether there are candidates, and not too many of them.
    #[must_use]
    pub const fn is_known(&self) -> bool {
        self.count > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table over entries of the test's own.
    fn table(entries: &mut [u64]) -> M2p<()> {
        let count = entries.len();
        // SAFETY: the tests drop the table before the entries, which they change through it alone.
        unsafe { M2p::new(NonNull::from(entries).cast(), count, ()) }
    }

    fn set(table: &M2p<()>, mfn: usize, gfn: u64) {
        // SAFETY: within the table.
        let entry = unsafe { table.entries.add(mfn) };
        // SAFETY: as in `M2p::gfn`.
        unsafe { AtomicU64::from_ptr(entry.as_ptr()) }.store(gfn, Relaxed);
    }

    #[test]
    fn a_page_is_at_its_gfn_until_any_candidate_changes() {
        let mut entries = [u64::MAX, 7, 5, 7, 64 + 7, 5];
        let table = table(&mut entries);
        let found = table.find(&[Gfn(7), Gfn(5), Gfn(6)]);
        assert!(table.is_at(&found[0], Gfn(7)) && table.is_at(&found[1], Gfn(5)));
        assert!(!found[2].is_known() && !table.is_at(&found[2], Gfn(6)), "nothing has that number");
        // Ballooned out: its entry is none.
        set(&table, 3, u64::MAX);
        assert!(!table.is_at(&found[0], Gfn(7)));
        assert!(table.is_at(&found[1], Gfn(5)), "another page");
        // In again, in another frame: the old mapping is of the old one.
        set(&table, 0, 7);
        assert!(!table.is_at(&found[0], Gfn(7)));
        assert!(table.is_at(&table.find(&[Gfn(7)])[0], Gfn(7)));
        // Moved to another number.
        set(&table, 2, 6);
        assert!(!table.is_at(&found[1], Gfn(5)));
    }

    #[test]
    fn too_many_candidates_are_none() {
        let mut entries = [3; MOST + 1];
        let table = table(&mut entries);
        assert!(!table.find(&[Gfn(3)])[0].is_known());
        set(&table, 4, 9);
        assert!(table.find(&[Gfn(3)])[0].is_known());
    }
}
