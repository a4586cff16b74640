//! Pages that stay mapped.

use hyperbp::Gfn;

/// Sets, a power of two: a page can be in one of them only.
const SETS: usize = 512;
/// Pages in a set.
const WAYS: usize = 4;

/// Pages that stay mapped, at most 2048 of them: a benchmark guest touches two or three, a kernel some hundreds. Looking
/// one up takes a few instructions, whatever the guest does.
///
/// The guest can give a frame number another page at any time (ballooning, for one). A mapping is that of the old page then:
/// whether it [is still there](Self::get_if) is for the caller to say, at each access ([`M2p`](crate::M2p) tells).
#[derive(Debug)]
pub struct PageCache<P> {
    sets: Box<[Set<P>]>,
}

#[derive(Debug)]
struct Set<P> {
    pages: [Option<(Gfn, P)>; WAYS],
    /// Whose turn it is to go.
    next: u8,
}

impl<P> Default for PageCache<P> {
    fn default() -> Self {
        let empty = || Set { pages: [const { None }; WAYS], next: 0 };
        Self { sets: std::iter::repeat_with(empty).take(SETS).collect() }
    }
}

impl<P> PageCache<P> {
    /// The page at a frame number, mapped with `map` if it is not yet.
    ///
    /// # Errors
    /// Those of `map`.
    pub fn get<E>(&mut self, gfn: Gfn, map: impl FnOnce() -> Result<P, E>) -> Result<&mut P, E> {
        self.get_if(gfn, |_| true, map)
    }

    /// The same, but a page that is mapped is unmapped, and mapped anew, unless it `is_there` still.
    ///
    /// # Errors
    /// Those of `map`.
    #[inline(always)]
    pub fn get_if<E>(
        &mut self,
        gfn: Gfn,
        is_there: impl FnOnce(&P) -> bool,
        map: impl FnOnce() -> Result<P, E>,
    ) -> Result<&mut P, E> {
        let set = self.set(gfn);
        let at = match set.index(gfn) {
            Some(at) if set.pages[at].as_ref().is_some_and(|(_, page)| is_there(page)) => at,
            Some(at) => set.put(at, gfn, map)?,
            None => {
                let free = set.pages.iter().position(Option::is_none);
                let at = free.unwrap_or(usize::from(set.next));
                let at = set.put(at, gfn, map)?;
                set.next = (at + 1) as u8 % WAYS as u8;
                at
            }
        };
        match &mut set.pages[at] {
            Some((_, page)) => Ok(page),
            None => unreachable!("it was found, or put, there"),
        }
    }

    /// The page at a frame number, if it is mapped, still there or not.
    #[must_use]
    pub fn peek(&self, gfn: Gfn) -> Option<&P> {
        let set = &self.sets[gfn.0 as usize % SETS];
        set.index(gfn).and_then(|at| set.pages[at].as_ref()).map(|(_, page)| page)
    }

    /// Unmaps a page: it is about to go.
    pub fn forget(&mut self, gfn: Gfn) {
        let set = self.set(gfn);
        if let Some(at) = set.index(gfn) {
            set.pages[at] = None;
        }
    }

    fn set(&mut self, gfn: Gfn) -> &mut Set<P> {
        &mut self.sets[gfn.0 as usize % SETS]
    }
}

impl<P> Set<P> {
    /// Maps a page, in place of the one at `at`: that is unmapped first.
    #[cold]
    fn put<E>(&mut self, at: usize, gfn: Gfn, map: impl FnOnce() -> Result<P, E>) -> Result<usize, E> {
        self.pages[at] = None;
        self.pages[at] = Some((gfn, map()?));
        Ok(at)
    }

    fn index(&self, gfn: Gfn) -> Option<usize> {
        self.pages.iter().position(|page| page.as_ref().is_some_and(|(known, _)| *known == gfn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::convert::Infallible;

    #[test]
    fn a_page_is_mapped_once_until_it_is_forgotten() {
        let mapped = Cell::new(0);
        let mut cache = PageCache::default();
        let get = |cache: &mut PageCache<u64>, gfn: u64| {
            let map = || {
                mapped.set(mapped.get() + 1);
                Ok::<_, Infallible>(gfn)
            };
            assert_eq!(*cache.get(Gfn(gfn), map).unwrap(), gfn);
            mapped.get()
        };
        assert_eq!(get(&mut cache, 7), 1);
        assert_eq!(get(&mut cache, 7), 1);
        // In the same set.
        let other = 7 + SETS as u64;
        assert_eq!(get(&mut cache, other), 2);
        cache.forget(Gfn(7));
        assert_eq!(get(&mut cache, other), 2);
        assert_eq!(get(&mut cache, 7), 3);
    }

    #[test]
    fn a_page_that_is_not_there_any_more_is_mapped_anew() {
        let mut cache = PageCache::default();
        let map = |page: u8| move || Ok::<_, &str>(page);
        assert_eq!(cache.get_if(Gfn(7), |_| false, map(1)), Ok(&mut 1), "it was mapped a moment ago");
        assert_eq!(cache.get_if(Gfn(7), |page| *page == 1, map(2)), Ok(&mut 1));
        assert_eq!(cache.get_if(Gfn(7), |_| false, map(2)), Ok(&mut 2));
        assert_eq!(cache.get_if(Gfn(7), |_| false, || Err("gone")), Err("gone"));
        assert_eq!(cache.peek(Gfn(7)), None, "its mapping is gone, too");
    }

    #[test]
    fn there_are_never_more_than_its_bound() {
        struct Counted<'a>(&'a Cell<usize>);
        impl Drop for Counted<'_> {
            fn drop(&mut self) {
                self.0.set(self.0.get() - 1);
            }
        }
        let mapped = Cell::new(0);
        let mut cache = PageCache::default();
        for gfn in 0..10 * (SETS * WAYS) as u64 {
            let map = || {
                mapped.set(mapped.get() + 1);
                Ok::<_, Infallible>(Counted(&mapped))
            };
            assert!(cache.get(Gfn(gfn), map).is_ok());
            assert!(mapped.get() <= SETS * WAYS);
        }
        assert_eq!(mapped.get(), SETS * WAYS);
    }

    #[test]
    fn what_cannot_be_mapped_is_not_there() {
        let mut cache = PageCache::<u8>::default();
        assert_eq!(cache.get(Gfn(1), || Err("no such page")), Err("no such page"));
        assert_eq!(cache.get(Gfn(1), || Ok::<_, &str>(3)), Ok(&mut 3));
    }
}
