//! The registry: which pages have breakpoints, and where, and which are watched. The only place that maps an address to a
//! breakpoint.

use std::collections::HashMap;

use rustc_hash::FxBuildHasher;

use crate::insn::Displaced;
use crate::stats::Figures;
use crate::watch::Watches;
use crate::{Conceal, Error, Gfn, Gpa, Placement, StepOver};

/// The name of a breakpoint: one subscriber's interest in one instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BreakpointId {
    gpa: Gpa,
    serial: u64,
}

impl BreakpointId {
    /// Where it is.
    #[must_use]
    pub const fn gpa(self) -> Gpa {
        self.gpa
    }
}

/// A 0xCC, and everybody who wants to hear of it.
#[derive(Clone, Debug)]
pub(crate) struct Breakpoint {
    pub(crate) gpa: Gpa,
    pub(crate) step_over: StepOver,
    /// What the guest has there.
    pub(crate) displaced: Displaced,
    /// Xen's emulator has said that it cannot do this instruction.
    pub(crate) not_emulable: bool,
    pub(crate) figures: Figures,
    /// Serial numbers, ascending: in the order they came.
    subscribers: Vec<u64>,
}

impl Breakpoint {
    pub(crate) const fn offset(&self) -> u16 {
        self.gpa.offset()
    }

    /// The first subscriber that came after this one, but no later than `last`.
    fn subscriber_after(&self, serial: u64, last: u64) -> Option<BreakpointId> {
        let next = self.subscribers.iter().find(|next| **next > serial).filter(|next| **next <= last)?;
        Some(BreakpointId { gpa: self.gpa, serial: *next })
    }
}

/// A page with at least one breakpoint.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) gfn: Gfn,
    pub(crate) placement: Placement,
    pub(crate) conceal: Conceal,
    /// The copy that shows the breakpoints, with [`Placement::Shadow`].
    pub(crate) shadow: Option<Gfn>,
    /// Sorted by offset.
    pub(crate) breakpoints: Vec<Breakpoint>,
    /// Virtual CPUs for which the breakpoints of this page, in place, are out for the moment.
    pub(crate) lifted: u16,
    /// It is to be [settled](crate::placement::settle): what is known of its bytes may be wrong, and breakpoints may be out.
    pub(crate) unsettled: bool,
}

impl Page {
    pub(crate) fn index(&self, offset: u16) -> Result<usize, usize> {
        self.breakpoints.binary_search_by_key(&offset, Breakpoint::offset)
    }

    pub(crate) fn at(&self, offset: u16) -> Option<&Breakpoint> {
        self.index(offset).ok().map(|index| &self.breakpoints[index])
    }
}

/// Where a breakpoint is in the registry, until that changes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Located {
    generation: u64,
    page: usize,
    breakpoint: usize,
}

/// All pages with breakpoints.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    pages: Vec<Page>,
    /// Where in `pages` they are. Hashed without a secret: which pages these are is the host's choice, not the guest's.
    index: HashMap<Gfn, usize, FxBuildHasher>,
    /// Pages whose accesses somebody wants to hear of.
    pub(crate) watches: Watches,
    /// How many of them have their breakpoints in place.
    in_place: usize,
    serial: u64,
    /// Changes whenever breakpoints or pages move.
    generation: u64,
}

impl Registry {
    /// Whether it must be the guest that accesses a page, for somebody wants to hear of it.
    pub(crate) fn is_watched(&self, gfn: Gfn) -> bool {
        self.watches.get(gfn).is_some()
    }

    pub(crate) fn page(&self, gfn: Gfn) -> Option<&Page> {
        self.index.get(&gfn).map(|index| &self.pages[*index])
    }

    pub(crate) fn page_mut(&mut self, gfn: Gfn) -> Option<&mut Page> {
        self.index.get(&gfn).map(|index| &mut self.pages[*index])
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter()
    }

    /// Where the breakpoint at `gpa` is now, that was there a moment ago.
    pub(crate) fn locate_again(&self, gpa: Gpa, before: Located) -> Option<Located> {
        if before.generation == self.generation { Some(before) } else { self.locate(gpa) }
    }

    /// Where the breakpoint at `gpa` is, until something is inserted or removed.
    pub(crate) fn locate(&self, gpa: Gpa) -> Option<Located> {
        let page = *self.index.get(&gpa.gfn())?;
        let breakpoint = self.pages[page].index(gpa.offset()).ok()?;
        Some(Located { generation: self.generation, page, breakpoint })
    }

    pub(crate) fn located(&self, at: Located) -> (&Page, &Breakpoint) {
        let page = &self.pages[at.page];
        (page, &page.breakpoints[at.breakpoint])
    }

    pub(crate) fn located_mut(&mut self, at: Located) -> &mut Breakpoint {
        &mut self.pages[at.page].breakpoints[at.breakpoint]
    }

    pub(crate) fn at(&self, gpa: Gpa) -> Option<(&Page, &Breakpoint)> {
        self.locate(gpa).map(|at| self.located(at))
    }

    pub(crate) fn at_mut(&mut self, gpa: Gpa) -> Option<&mut Breakpoint> {
        self.locate(gpa).map(|at| self.located_mut(at))
    }

    /// The breakpoint a subscriber has subscribed to.
    pub(crate) fn get(&self, id: BreakpointId) -> Result<(&Page, &Breakpoint), Error> {
        let found = self.at(id.gpa).filter(|(_, breakpoint)| breakpoint.subscribers.contains(&id.serial));
        found.ok_or(Error::NoSuchBreakpoint)
    }

    /// The subscribers at `gpa`, one after another: the first that came after `last`, but before [`now`](Self::now) was
    /// `until`. Between two calls anything may be inserted and removed.
    pub(crate) fn next_subscriber(&self, gpa: Gpa, last: Option<BreakpointId>, until: u64) -> Option<BreakpointId> {
        self.at(gpa)?.1.subscriber_after(last.map_or(0, |id| id.serial), until)
    }

    /// The serial number of the newest subscriber.
    pub(crate) fn now(&self) -> u64 {
        self.serial
    }

    pub(crate) fn add_page(&mut self, page: Page) {
        self.in_place += usize::from(page.placement == Placement::InPlace);
        self.generation += 1;
        self.index.insert(page.gfn, self.pages.len());
        self.pages.push(page);
    }

    /// Adds a subscriber at `gpa`, whose page there must be, with what the guest has there if it is the first one.
    pub(crate) fn subscribe(&mut self, gpa: Gpa, step_over: StepOver, displaced: Displaced) -> Option<BreakpointId> {
        self.serial += 1;
        self.generation += 1;
        let serial = self.serial;
        let page = self.page_mut(gpa.gfn())?;
        let index = page.index(gpa.offset()).unwrap_or_else(|at| {
            let (figures, subscribers) = (Figures::default(), Vec::new());
            let new = Breakpoint { gpa, step_over, displaced, not_emulable: false, figures, subscribers };
            page.breakpoints.insert(at, new);
            at
        });
        page.breakpoints[index].subscribers.push(serial);
        Some(BreakpointId { gpa, serial })
    }

    /// Takes a subscriber out, and its breakpoint if it was the last one there. Returns the page if it has none then.
    pub(crate) fn unsubscribe(&mut self, id: BreakpointId) -> Option<&Page> {
        self.generation += 1;
        let page = self.page_mut(id.gpa.gfn())?;
        let index = page.index(id.gpa.offset()).ok()?;
        page.breakpoints[index].subscribers.retain(|serial| *serial != id.serial);
        if page.breakpoints[index].subscribers.is_empty() {
            page.breakpoints.remove(index);
        }
        page.breakpoints.is_empty().then_some(&*page)
    }

    pub(crate) fn remove_page(&mut self, gfn: Gfn) -> Option<Page> {
        self.generation += 1;
        let index = self.index.remove(&gfn)?;
        let page = self.pages.swap_remove(index);
        if let Some(moved) = self.pages.get(index) {
            self.index.insert(moved.gfn, index);
        }
        self.in_place -= usize::from(page.placement == Placement::InPlace);
        Some(page)
    }

    /// Whether a page has breakpoints in place, where everything that does not know of them sees them.
    pub(crate) fn has_in_place(&self) -> bool {
        self.in_place > 0
    }

    /// Whether a subscriber is the only one at its address.
    pub(crate) fn is_last(&self, id: BreakpointId) -> bool {
        self.at(id.gpa).is_some_and(|(_, breakpoint)| breakpoint.subscribers == [id.serial])
    }

    pub(crate) fn ids(&self) -> Vec<BreakpointId> {
        let of = |breakpoint: &Breakpoint| -> Vec<_> {
            let gpa = breakpoint.gpa;
            breakpoint.subscribers.iter().map(|&serial| BreakpointId { gpa, serial }).collect()
        };
        let mut ids: Vec<_> = self.pages.iter().flat_map(|page| page.breakpoints.iter().flat_map(of)).collect();
        ids.sort_by_key(|id| (id.gpa, id.serial));
        ids
    }
}
