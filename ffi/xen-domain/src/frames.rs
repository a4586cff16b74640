//! Where shadow pages may be: guest frame numbers that are no memory, and the memory limit that makes room for them.
//!
//! The numbers begin above 4 GiB and above all that a guest of its limit can have in RAM, at a multiple of 1 GiB.
//! So RAM, the special pages, the devices and ROMs below 4 GiB, and what a balloon or hotplug adds later are
//! never there. BARs, grants and foreign pages can be anywhere, so Xen is asked about each number before it is used.

use std::collections::HashSet;

use hyperbp::{Gfn, PAGE_SIZE};

/// Frames in 1 GiB.
const GIB: u64 = (1 << 30) / PAGE_SIZE as u64;
/// The first frame above all that a machine has below 4 GiB.
const ABOVE_DEVICES: u64 = 4 * GIB;
/// The first frame that no page table of Xen's reaches: its EPT has four levels.
const END: u64 = 1 << 36;
/// KiB in a page.
pub const PAGE_KIB: u64 = PAGE_SIZE as u64 / 1024;

/// Why there is no frame to be had, or to be given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The domain has something at all numbers.
    NoneLeft,
    /// This one was not taken.
    NotOurs(Gfn),
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoneLeft => {
                write!(f, "no frame number is left for a shadow page, below {END:#x} and above all of the domain's")
            }
            Self::NotOurs(gfn) => write!(f, "{gfn} is no shadow page"),
        }
    }
}

impl std::error::Error for FrameError {}

/// What Xen says about a domain's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Pages it has.
    pub pages: u64,
    /// Pages it may have.
    pub limit: u64,
}

/// A domain's memory, as Xen lets it be changed.
pub trait GuestMemory {
    /// Why it was refused.
    type Error: From<FrameError> + std::fmt::Display;

    /// What it has and may have.
    fn usage(&self) -> Result<Usage, Self::Error>;

    /// The highest number of a frame that it has had.
    fn last_gfn(&self) -> Result<u64, Self::Error>;

    /// Pages that the toolstack will let it have at most. The limit may be below that for now.
    fn most(&self) -> Result<u64, Self::Error>;

    /// Whether nothing at all is at this number.
    fn is_unused(&self, gfn: Gfn) -> Result<bool, Self::Error>;

    /// Sets how many pages it may have, in place of `found`, which is another's.
    fn raise_limit(&mut self, found: u64, limit: u64) -> Result<(), Self::Error>;

    /// Puts the limit back that is another's, or, if there is none, only forgets ours.
    fn restore_limit(&mut self, found: Option<u64>) -> Result<(), Self::Error>;

    /// Adds a page of memory at a number where nothing is.
    fn populate(&mut self, gfn: Gfn) -> Result<(), Self::Error>;

    /// Takes such a page away again.
    fn depopulate(&mut self, gfn: Gfn) -> Result<(), Self::Error>;

    /// Why [`populate`](Self::populate) has failed, `before` being what the domain had.
    fn explain(&self, error: Self::Error, before: Usage) -> Self::Error;
}

/// The frames that are ours.
#[derive(Debug, Default)]
pub struct Frames {
    taken: HashSet<Gfn>,
    /// Numbers that were ours, and had nothing when they were given back.
    free: Vec<Gfn>,
    /// Where to look when none of them is left. None before the first look.
    next: Option<u64>,
    limit: Limit,
}

impl Frames {
    /// Adds a page to the domain. Its cost does not depend on how many there are.
    ///
    /// # Errors
    /// If no number is free, or Xen refuses.
    pub fn allocate<M: GuestMemory>(&mut self, memory: &mut M) -> Result<Gfn, M::Error> {
        let usage = memory.usage()?;
        let gfn = self.find(memory, usage)?;
        let limit = self.limit.raised(usage.limit, self.taken.len() as u64 + 1);
        memory.raise_limit(self.limit.found, limit)?;
        self.limit.set = Some(limit);
        let added = memory.populate(gfn).map_err(|error| memory.explain(error, usage));
        if added.is_err() {
            self.free.push(gfn);
            if self.taken.is_empty()
                && let Err(error) = self.restore_limit(memory)
            {
                log::warn!("the memory limit cannot be put back: {error}");
            }
        }
        added?;
        self.taken.insert(gfn);
        Ok(gfn)
    }

    /// Takes a page of ours away from the domain, and with the last one the room that was made for them.
    ///
    /// # Errors
    /// If it is none of ours, or Xen refuses.
    pub fn release<M: GuestMemory>(&mut self, memory: &mut M, gfn: Gfn) -> Result<(), M::Error> {
        if !self.taken.contains(&gfn) {
            return Err(FrameError::NotOurs(gfn).into());
        }
        memory.depopulate(gfn)?;
        self.taken.remove(&gfn);
        self.free.push(gfn);
        if self.taken.is_empty() { self.restore_limit(memory) } else { Ok(()) }
    }

    /// All that are ours now.
    pub fn all(&self) -> Vec<Gfn> {
        self.taken.iter().copied().collect()
    }

    /// The first number that a page would be added at. It adds none.
    ///
    /// # Errors
    /// If none is free, or Xen does not tell.
    pub fn first<M: GuestMemory>(memory: &M) -> Result<Gfn, M::Error> {
        Self::default().find(memory, memory.usage()?)
    }

    /// A number where nothing is.
    fn find<M: GuestMemory>(&mut self, memory: &M, usage: Usage) -> Result<Gfn, M::Error> {
        while let Some(gfn) = self.free.pop() {
            if memory.is_unused(gfn)? {
                return Ok(gfn);
            }
        }
        let mut next = match self.next {
            Some(next) => next,
            None => first(memory.last_gfn()?, usage.limit.max(memory.most()?)),
        };
        if next < END && !memory.is_unused(Gfn(next))? {
            // Above all that there is, there is nothing.
            next = align(memory.last_gfn()?.max(next).saturating_add(1));
        }
        if next >= END || !memory.is_unused(Gfn(next))? {
            return Err(FrameError::NoneLeft.into());
        }
        self.next = Some(next + 1);
        Ok(Gfn(next))
    }

    fn restore_limit<M: GuestMemory>(&mut self, memory: &mut M) -> Result<(), M::Error> {
        if self.limit.set.is_some() {
            let back = self.limit.put_back(memory.usage()?.limit);
            memory.restore_limit(back)?;
            self.limit.set = None;
        }
        Ok(())
    }
}

/// The lowest number for a shadow page, in a domain with this highest frame and limit.
fn first(last: u64, limit: u64) -> u64 {
    let above_ram = ABOVE_DEVICES.saturating_add(limit);
    // A domain without a limit has its RAM where it has it.
    align(if above_ram < END / 2 { above_ram } else { last.saturating_add(1).max(ABOVE_DEVICES) })
}

/// The next multiple of 1 GiB.
fn align(gfn: u64) -> u64 {
    gfn.div_ceil(GIB).saturating_mul(GIB)
}

/// A domain's memory limit, in pages.
#[derive(Clone, Copy, Debug, Default)]
struct Limit {
    /// What somebody else has set: the domain builder, or `xl mem-max`.
    found: u64,
    /// What we have set last.
    set: Option<u64>,
}

impl Limit {
    /// What makes room for so many pages of ours beside the domain's own, `now` being the limit that there is.
    fn raised(&mut self, now: u64, ours: u64) -> u64 {
        // One that is not what we have set is another's, and then it is the domain's own.
        if self.set != Some(now) {
            self.found = now;
        }
        self.found.saturating_add(ours)
    }

    /// What is to be put back, `now` being the limit that there is; `None` if another has set that.
    fn put_back(self, now: u64) -> Option<u64> {
        (self.set == Some(now)).then_some(self.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No room, or what `Frames` says.
    #[derive(Debug)]
    struct Error(String);

    impl From<FrameError> for Error {
        fn from(error: FrameError) -> Self {
            Self(error.to_string())
        }
    }

    impl std::fmt::Display for Error {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(&self.0)
        }
    }
    use std::cell::Cell;
    use std::collections::BTreeSet;

    const MIB: u64 = GIB / 1024;

    /// A domain as Xen has it. Whatever is lost of it is a panic.
    #[derive(Default)]
    struct Guest {
        /// RAM, BARs, grants: what must not be replaced.
        own: BTreeSet<u64>,
        ours: BTreeSet<u64>,
        last: u64,
        limit: u64,
        room: u64,
        calls: Cell<u64>,
    }

    impl Guest {
        /// A PVH guest, as libxl lays it out: RAM up to a hole below 4 GiB, the rest above it, special pages in the hole.
        fn pvh(mib: u64) -> Self {
            const HOLE: u64 = 0xf_c000;
            let pages = mib * MIB;
            let low = pages.min(HOLE);
            let high = ABOVE_DEVICES..ABOVE_DEVICES + (pages - low);
            let own: BTreeSet<u64> = (0..low).chain(0xf_eff8..0xf_f000).chain(high).collect();
            Self { last: *own.last().unwrap(), own, limit: pages + MIB, room: 1 << 20, ..Self::default() }
        }

        fn called(&self) {
            self.calls.set(self.calls.get() + 1);
        }
    }

    impl GuestMemory for Guest {
        type Error = Error;

        fn usage(&self) -> Result<Usage, Error> {
            self.called();
            Ok(Usage { pages: (self.own.len() + self.ours.len()) as u64, limit: self.limit })
        }

        fn last_gfn(&self) -> Result<u64, Error> {
            self.called();
            Ok(self.last)
        }

        fn most(&self) -> Result<u64, Error> {
            self.called();
            Ok(self.limit)
        }

        fn is_unused(&self, gfn: Gfn) -> Result<bool, Error> {
            self.called();
            Ok(!self.own.contains(&gfn.0) && !self.ours.contains(&gfn.0))
        }

        fn raise_limit(&mut self, found: u64, limit: u64) -> Result<(), Error> {
            self.called();
            assert!(found <= limit);
            self.limit = limit;
            Ok(())
        }

        fn restore_limit(&mut self, found: Option<u64>) -> Result<(), Error> {
            self.called();
            self.limit = found.unwrap_or(self.limit);
            Ok(())
        }

        fn populate(&mut self, gfn: Gfn) -> Result<(), Error> {
            self.called();
            assert!(!self.own.contains(&gfn.0), "the guest has lost {gfn}");
            if self.room == 0 {
                return Err(Error("no room".to_owned()));
            }
            self.room -= 1;
            assert!(self.ours.insert(gfn.0));
            self.last = self.last.max(gfn.0);
            Ok(())
        }

        fn depopulate(&mut self, gfn: Gfn) -> Result<(), Error> {
            self.called();
            assert!(self.ours.remove(&gfn.0), "{gfn} is not ours to free");
            self.room += 1;
            Ok(())
        }

        fn explain(&self, error: Error, _: Usage) -> Error {
            error
        }
    }

    #[test]
    fn no_frame_is_where_a_guest_of_any_size_has_memory() {
        for mib in [32, 1024, 3 * 1024, 4 * 1024, 6 * 1024] {
            let mut guest = Guest::pvh(mib);
            let mut frames = Frames::default();
            for _ in 0..50 {
                frames.allocate(&mut guest).unwrap();
            }
            assert!(guest.ours.iter().all(|gfn| *gfn >= 5 * GIB));
            // What the guest can still get up to its limit, wherever its RAM ends.
            assert!(guest.ours.iter().all(|gfn| *gfn > ABOVE_DEVICES + guest.limit - 50));
            for gfn in frames.all() {
                frames.release(&mut guest, gfn).unwrap();
            }
            assert!(guest.ours.is_empty());
        }
    }

    #[test]
    fn what_is_there_already_is_passed_over() {
        let mut guest = Guest::pvh(64);
        // A BAR of a device that was passed through, just where the search begins.
        guest.own.extend(5 * GIB..5 * GIB + 64);
        guest.last = 5 * GIB + 63;
        let mut frames = Frames::default();
        assert_eq!(frames.allocate(&mut guest).unwrap(), Gfn(6 * GIB));
        // And what the guest puts there later.
        guest.own.insert(6 * GIB + 1);
        assert_eq!(frames.allocate(&mut guest).unwrap(), Gfn(7 * GIB));
        frames.release(&mut guest, Gfn(6 * GIB)).unwrap();
        guest.own.insert(6 * GIB);
        assert_eq!(frames.allocate(&mut guest).unwrap(), Gfn(7 * GIB + 1));
    }

    #[test]
    fn the_same_numbers_serve_each_monitor() {
        let mut guest = Guest::pvh(64);
        for _ in 0..3 {
            let mut frames = Frames::default();
            assert_eq!(frames.allocate(&mut guest).unwrap(), Gfn(5 * GIB));
            frames.release(&mut guest, Gfn(5 * GIB)).unwrap();
        }
    }

    #[test]
    fn a_page_more_costs_the_same_calls_however_many_there_are() {
        let calls = |pages: u64| {
            let mut guest = Guest::pvh(64);
            let mut frames = Frames::default();
            for _ in 0..pages {
                frames.allocate(&mut guest).unwrap();
            }
            guest.calls.replace(0);
            let gfn = frames.allocate(&mut guest).unwrap();
            frames.release(&mut guest, gfn).unwrap();
            guest.calls.get()
        };
        assert_eq!(calls(10), calls(2000));
        assert!(calls(10) <= 8, "{}", calls(10));
    }

    #[test]
    fn a_domain_without_a_limit_and_one_without_room_are_told_apart() {
        assert_eq!(first(0xf_efff, u64::MAX), ABOVE_DEVICES);
        assert_eq!(first(9 * GIB + 5, u64::from(u32::MAX) << 8), 10 * GIB);
        let mut guest = Guest::pvh(64);
        guest.last = END - 1;
        guest.limit = u64::MAX;
        let error = Frames::default().allocate(&mut guest).unwrap_err();
        assert!(error.to_string().contains("no frame number is left"), "{error}");
    }

    #[test]
    fn the_limit_has_room_for_our_pages_and_is_put_back() {
        let mut guest = Guest::pvh(64);
        let found = guest.limit;
        let mut frames = Frames::default();
        let both = [frames.allocate(&mut guest).unwrap(), frames.allocate(&mut guest).unwrap()];
        assert_eq!(guest.limit, found + 2);
        both.into_iter().for_each(|gfn| frames.release(&mut guest, gfn).unwrap());
        assert_eq!(guest.limit, found);
    }

    #[test]
    fn a_limit_that_somebody_has_changed_is_theirs() {
        let mut guest = Guest::pvh(64);
        let mut frames = Frames::default();
        let one = frames.allocate(&mut guest).unwrap();
        guest.limit = 100_000;
        frames.release(&mut guest, one).unwrap();
        assert_eq!(guest.limit, 100_000);
        // Also if we have gone on with theirs.
        let one = frames.allocate(&mut guest).unwrap();
        guest.limit = 90_000;
        let two = frames.allocate(&mut guest).unwrap();
        assert_eq!(guest.limit, 90_002);
        [one, two].into_iter().for_each(|gfn| frames.release(&mut guest, gfn).unwrap());
        assert_eq!(guest.limit, 90_000);
    }

    #[test]
    fn a_page_that_is_refused_leaves_nothing() {
        let mut guest = Guest::pvh(64);
        guest.room = 0;
        let found = guest.limit;
        let mut frames = Frames::default();
        frames.allocate(&mut guest).unwrap_err();
        assert_eq!((guest.limit, frames.all()), (found, vec![]));
        guest.room = 1;
        assert_eq!(frames.allocate(&mut guest).unwrap(), Gfn(5 * GIB));
    }
}
