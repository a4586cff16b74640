//! A domain's pages that are kept mapped, and how it is known that they still are the domain's.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hyperbp::Gfn;

use crate::{Frames, GuestPage, M2p, PageCache};

/// Most gfns that are searched for at once.
const WANTED: usize = 64;
/// Most gfns whose candidates are remembered.
const KNOWN: usize = 1 << 16;

/// What maps a domain's pages, and tells what they are.
pub trait Source {
    /// Keeps a page mapped.
    type Mapping;
    /// Keeps the machine-to-physical table mapped.
    type Table;
    /// Why it failed.
    type Error;

    /// Maps a page of the domain, whatever is at that number now.
    ///
    /// # Errors
    /// If there is no such page.
    fn map(&mut self, gfn: Gfn) -> Result<GuestPage<Self::Mapping>, Self::Error>;

    /// Whether a page is plain memory: readable and writable, and nobody keeps a record of what is written to it.
    ///
    /// # Errors
    /// If it cannot be said.
    fn is_ram(&mut self, gfn: Gfn) -> Result<bool, Self::Error>;
}

/// The pages of one domain that are kept mapped.
#[derive(Debug)]
pub struct Pages<S: Source> {
    source: S,
    cache: PageCache<Kept<S::Mapping>>,
    /// None if it cannot be mapped: then nothing is kept mapped.
    m2p: Option<M2p<S::Table>>,
    /// Our own frames. They stay mapped: what views show is the frame, whatever the guest has at its number.
    own: HashMap<Gfn, GuestPage<S::Mapping>>,
    /// None of them is below.
    first_own: Gfn,
    /// The machine frames that gfns may have.
    known: HashMap<Gfn, Frames>,
    /// What is to be searched for.
    wanted: Vec<Gfn>,
    /// How long a search of the table takes: an estimate before the first.
    search_takes: Duration,
    /// How long mapping pages took since the last search whose candidates were not known.
    mapping_took: Duration,
    /// How long the type of a page is taken for what it was, in the caller's unit of time. Xen has no notice when a toolstack
    /// or a device model changes it.
    type_age: u64,
    /// Pages that were written to as the guest's instructions do, since their type was last looked at.
    written: Vec<Gfn>,
}

/// A page of the guest.
#[derive(Debug)]
struct Kept<M> {
    page: GuestPage<M>,
    /// None are known: then the mapping is good for one access.
    frames: Frames,
    /// Whether it is plain memory, and when that was known.
    ram: Option<(bool, u64)>,
}

impl<S: Source> Pages<S> {
    /// None is mapped yet. Without the table, each access maps its page anew.
    #[must_use]
    pub fn new(source: S, m2p: Option<M2p<S::Table>>, type_age: u64) -> Self {
        let entries = m2p.as_ref().map_or(0, M2p::len) as u64;
        Self {
            source,
            cache: PageCache::default(),
            m2p,
            own: HashMap::new(),
            first_own: Gfn(u64::MAX),
            known: HashMap::new(),
            wanted: Vec::new(),
            search_takes: Duration::from_nanos(entries),
            mapping_took: Duration::ZERO,
            type_age,
            written: Vec::new(),
        }
    }

    /// What maps them.
    pub fn source(&mut self) -> &mut S {
        &mut self.source
    }

    /// How long the type of a page is taken for what it was.
    #[inline(always)]
    #[must_use]
    pub fn type_age(&self) -> u64 {
        self.type_age
    }

    /// The page that is at this number now.
    ///
    /// # Errors
    /// If there is none.
    #[inline(always)]
    pub fn get(&mut self, gfn: Gfn) -> Result<&GuestPage<S::Mapping>, S::Error> {
        if self.is_own(gfn) {
            return Ok(&self.own[&gfn]);
        }
        self.kept(gfn).map(|kept| &kept.page)
    }

    #[inline(always)]
    fn kept(&mut self, gfn: Gfn) -> Result<&mut Kept<S::Mapping>, S::Error> {
        let Self { source, cache, m2p, known, wanted, mapping_took, .. } = self;
        let is_there = |kept: &Kept<S::Mapping>| m2p.as_ref().is_some_and(|m2p| m2p.is_at(&kept.frames, gfn));
        cache.get_if(gfn, is_there, || {
            // The candidates are of before, and none has moved: so what is mapped is one of them.
            let before = known.get(&gfn).copied();
            let start = Instant::now();
            let page = source.map(gfn)?;
            let frames = before.filter(|frames| m2p.as_ref().is_some_and(|m2p| m2p.is_at(frames, gfn)));
            if frames.is_none() {
                *mapping_took += start.elapsed();
                if wanted.len() < WANTED && !wanted.contains(&gfn) {
                    wanted.push(gfn);
                }
            }
            Ok(Kept { page, frames: frames.unwrap_or(Frames::NONE), ram: None })
        })
    }

    /// Whether the table is to be [searched](Self::search) now: as soon as mapping pages again and again has taken as long as a
    /// search. So both together take at most twice what the better of them would have taken, whatever the guest does.
    #[inline(always)]
    #[must_use]
    pub fn wants_search(&self) -> bool {
        self.m2p.is_some() && !self.wanted.is_empty() && self.mapping_took >= self.search_takes
    }

    /// Searches the table. The domain must not run.
    pub fn search(&mut self) {
        let Some(m2p) = &self.m2p else { return };
        let start = Instant::now();
        if self.known.len() + self.wanted.len() > KNOWN {
            self.known.clear();
        }
        let found = m2p.find(&self.wanted);
        self.known.extend(self.wanted.drain(..).zip(found));
        (self.search_takes, self.mapping_took) = (start.elapsed(), Duration::ZERO);
    }

    /// Keeps a frame of ours mapped.
    ///
    /// # Errors
    /// If it cannot be mapped.
    pub fn add_own(&mut self, gfn: Gfn) -> Result<(), S::Error> {
        self.own.insert(gfn, self.source.map(gfn)?);
        self.first_own = self.first_own.min(gfn);
        Ok(())
    }

    /// Whether a frame is one of ours.
    #[inline(always)]
    #[must_use]
    pub fn is_own(&self, gfn: Gfn) -> bool {
        gfn >= self.first_own && self.own.contains_key(&gfn)
    }

    /// Unmaps a page that is about to go.
    pub fn forget(&mut self, gfn: Gfn) {
        self.own.remove(&gfn);
        self.cache.forget(gfn);
    }

    /// Whether a page is plain memory: readable and writable, and nobody keeps a record of what is written to it.
    ///
    /// # Errors
    /// If there is no such page, or it cannot be said.
    pub fn is_ram(&mut self, gfn: Gfn, now: u64) -> Result<bool, S::Error> {
        let age = self.type_age;
        let known = self.kept(gfn)?.ram;
        match known {
            Some((ram, at)) if now.wrapping_sub(at) < age => Ok(ram),
            _ => self.look_at_type(gfn, now),
        }
    }

    #[cold]
    fn look_at_type(&mut self, gfn: Gfn, now: u64) -> Result<bool, S::Error> {
        let ram = self.source.is_ram(gfn)?;
        self.kept(gfn)?.ram = Some((ram, now));
        if ram && !self.written.contains(&gfn) {
            self.written.push(gfn);
        }
        Ok(ram)
    }

    /// Looks whether pages that were written to are plain memory no more, and tells which are not: log-dirty mode was switched
    /// on for a migration, and counted on nobody to write past it.
    pub fn report_written(&mut self, now: u64, mut report: impl FnMut(&mut S, Gfn)) {
        for gfn in std::mem::take(&mut self.written) {
            let at = self.cache.peek(gfn).and_then(|kept| kept.ram).map(|(_, at)| at);
            if at.is_some_and(|at| now.wrapping_sub(at) < self.type_age) {
                self.written.push(gfn);
                continue;
            }
            if !matches!(self.source.is_ram(gfn), Ok(true)) {
                report(&mut self.source, gfn);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::ptr::NonNull;
    use std::rc::Rc;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use super::*;
    use hyperbp::PAGE_SIZE;

    #[repr(align(4096))]
    struct Memory([u8; PAGE_SIZE]);

    /// A domain with as many frames as gfns, and what it lets be seen.
    #[derive(Clone)]
    struct Domain(Rc<Inner>);

    struct Inner {
        /// The machine frame that a gfn has now.
        at: RefCell<HashMap<Gfn, u64>>,
        mapped: RefCell<Vec<Gfn>>,
        ram: RefCell<bool>,
    }

    impl Source for Domain {
        type Mapping = Box<Memory>;
        type Table = ();
        type Error = &'static str;

        /// A copy: its first byte is the machine frame.
        fn map(&mut self, gfn: Gfn) -> Result<GuestPage<Box<Memory>>, &'static str> {
            let mfn = *self.0.at.borrow().get(&gfn).ok_or("no page")?;
            self.0.mapped.borrow_mut().push(gfn);
            let mut memory = Box::new(Memory([mfn as u8; PAGE_SIZE]));
            let address = NonNull::from(&mut memory.0).cast();
            // SAFETY: the box has one aligned page, which moves with nothing and that nothing else refers to.
            Ok(unsafe { GuestPage::new(address, memory) })
        }

        fn is_ram(&mut self, _: Gfn) -> Result<bool, &'static str> {
            Ok(*self.0.ram.borrow())
        }
    }

    fn domain() -> Domain {
        let at = RefCell::new(HashMap::from([(Gfn(7), 1)]));
        Domain(Rc::new(Inner { at, mapped: RefCell::default(), ram: RefCell::new(true) }))
    }

    fn first_byte(pages: &mut Pages<Domain>, gfn: u64) -> Result<u8, &'static str> {
        if pages.wants_search() {
            pages.search();
        }
        let mut byte = [0];
        pages.get(Gfn(gfn))?.read(0, &mut byte);
        Ok(byte[0])
    }

    #[test]
    fn a_page_that_the_guest_replaces_is_never_read_through_its_old_mapping() {
        let domain = domain();
        let table: Vec<AtomicU64> = [u64::MAX, 7, u64::MAX].into_iter().map(AtomicU64::new).collect();
        // SAFETY: `table` outlives `pages`, and is changed by atomics alone.
        let m2p = unsafe { M2p::new(NonNull::from(&table[0]).cast(), table.len(), ()) };
        let mut pages = Pages::new(domain.clone(), Some(m2p), 1);
        for _ in 0..10 {
            assert_eq!(first_byte(&mut pages, 7), Ok(1));
        }
        let mapped = domain.0.mapped.borrow().len();
        assert!(mapped <= 2, "it is kept mapped: {mapped}");
        // The guest gets another frame at this number.
        domain.0.at.borrow_mut().insert(Gfn(7), 2);
        table[1].store(u64::MAX, Relaxed);
        table[2].store(7, Relaxed);
        assert_eq!(first_byte(&mut pages, 7), Ok(2));
        // And then none.
        domain.0.at.borrow_mut().remove(&Gfn(7));
        table[2].store(u64::MAX, Relaxed);
        assert_eq!(first_byte(&mut pages, 7), Err("no page"));
    }

    #[test]
    fn without_the_table_nothing_is_kept_mapped_but_what_is_ours() {
        let domain = domain();
        let mut pages = Pages::new(domain.clone(), None, 1);
        assert_eq!(first_byte(&mut pages, 7), Ok(1));
        domain.0.at.borrow_mut().insert(Gfn(7), 2);
        assert_eq!(first_byte(&mut pages, 7), Ok(2));
        pages.add_own(Gfn(7)).unwrap();
        domain.0.at.borrow_mut().insert(Gfn(7), 3);
        assert_eq!(first_byte(&mut pages, 7), Ok(2), "views show the frame that was added");
        pages.forget(Gfn(7));
        assert_eq!(first_byte(&mut pages, 7), Ok(3));
    }

    #[test]
    fn what_was_written_to_before_log_dirty_mode_is_reported() {
        let domain = domain();
        let mut pages = Pages::new(domain.clone(), None, 100);
        assert_eq!(pages.is_ram(Gfn(7), 0), Ok(true));
        domain.0.ram.replace(false);
        let mut reported = Vec::new();
        pages.report_written(50, |_, gfn| reported.push(gfn));
        assert_eq!(reported, [], "its type was looked at a moment ago");
        pages.report_written(150, |_, gfn| reported.push(gfn));
        pages.report_written(300, |_, gfn| reported.push(gfn));
        assert_eq!(reported, [Gfn(7)]);
        assert_eq!(pages.is_ram(Gfn(7), 400), Ok(false));
    }
}
