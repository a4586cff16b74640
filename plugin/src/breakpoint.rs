//! The registry: which pages have breakpoints, and where, and which are watched. The only place that maps an address to a
//! breakpoint.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::ops::Bound::{Excluded, Unbounded};

use rustc_hash::FxBuildHasher;

use crate::insn::Displaced;
use crate::stats::Figures;
use crate::watch::{Watch, Watches};
use crate::{Conceal, Error, Gfn, Gpa, Placement, Registers, StepOver};

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

impl fmt::Display for BreakpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "breakpoint {} at {}", self.serial, self.gpa)
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
    /// The serial number of the subscriber that came first.
    first: u64,
    /// Those of the others, in the order they came.
    others: BTreeSet<u64>,
    /// The one that came last of all.
    last: u64,
}

impl Breakpoint {
    pub(crate) const fn offset(&self) -> u16 {
        self.gpa.offset()
    }

    const fn id(&self, serial: u64) -> BreakpointId {
        BreakpointId { gpa: self.gpa, serial }
    }

    /// The subscriber that came first, and the one that came last.
    #[inline]
    pub(crate) fn first_and_last(&self) -> (BreakpointId, BreakpointId) {
        (self.id(self.first), self.id(self.last))
    }

    /// Counts a hit that was stepped over.
    #[inline]
    pub(crate) fn count(&mut self, registers: &Registers, served: StepOver) {
        let fallback = self.is_fallback(registers, served);
        self.figures.served.count(served);
        self.figures.fallbacks += u64::from(fallback);
    }

    /// Whether what was chosen could not do the instruction.
    pub(crate) fn is_fallback(&self, registers: &Registers, served: StepOver) -> bool {
        match self.step_over {
            StepOver::Auto => {
                self.not_emulable || (served != StepOver::Interpret && self.displaced.op(registers.mode).is_some())
            }
            chosen => chosen != served,
        }
    }

    fn serials(&self) -> impl Iterator<Item = u64> {
        std::iter::once(self.first).chain(self.others.iter().copied())
    }

    /// The first subscriber that came after this one, but no later than `last`.
    pub(crate) fn next(&self, subscriber: BreakpointId, last: BreakpointId) -> Option<BreakpointId> {
        let next = match self.first > subscriber.serial {
            true => self.first,
            false => *self.others.range((Excluded(subscriber.serial), Unbounded)).next()?,
        };
        (next <= last.serial).then(|| self.id(next))
    }

    fn has(&self, serial: u64) -> bool {
        self.first == serial || self.others.contains(&serial)
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
    /// In no order.
    pub(crate) breakpoints: Vec<Breakpoint>,
    /// Virtual CPUs for which the breakpoints of this page, in place, are out for the moment.
    pub(crate) lifted: u16,
    /// Virtual CPUs that are to settle it after their step.
    pub(crate) owed: u16,
    /// It is among the pages that are to be given back, if there are no breakpoints in it then.
    pub(crate) vacant: bool,
    /// It is to be [settled](crate::placement::settle): what is known of its bytes may be wrong, and breakpoints may be out.
    pub(crate) unsettled: bool,
}

/// Where a breakpoint is in the registry, until that changes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Located {
    generation: u64,
    spot: Spot,
}

impl Located {
    /// The number of its page.
    pub(crate) const fn page(self) -> usize {
        self.spot.page as usize
    }
}

/// Where a breakpoint is in the registry.
#[derive(Clone, Copy, Debug)]
struct Spot {
    page: u32,
    breakpoint: u32,
}

/// All pages with breakpoints.
///
/// A hit is looked up once, by its address, however many breakpoints there are. The hash has no secret: where breakpoints are
/// is the host's choice. Where in physical memory that is may be the guest's, which could have them collide; then a look-up
/// goes through 16 at a time, in a dozen instructions: thousands of collisions cost it less than the event itself.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    pages: Vec<Page>,
    /// Where in them the breakpoints are.
    spots: HashMap<Gpa, Spot, FxBuildHasher>,
    pub(crate) claims: Claims,
    serial: u64,
    /// Changes whenever breakpoints or pages move.
    generation: u64,
}

/// Which pages are not for the guest alone.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    /// Pages with breakpoints, and where in the registry they are.
    index: HashMap<Gfn, usize, FxBuildHasher>,
    /// How many of them have their breakpoints in place.
    in_place: usize,
    /// Pages whose accesses somebody wants to hear of.
    watches: Watches,
    /// None of either was at any time below the first or above the last. Most often what an instruction accesses is.
    bounds: Option<(Gfn, Gfn)>,
}

impl Claims {
    /// Whether a page has no breakpoints, and nobody wants to hear of its accesses.
    #[inline(always)]
    pub(crate) fn spare(&self, gfn: Gfn) -> bool {
        let within = self.bounds.is_some_and(|(first, last)| first <= gfn && gfn <= last);
        !within || !(self.index.contains_key(&gfn) || self.watches.get(gfn).is_some())
    }

    fn extend(&mut self, gfn: Gfn) {
        let (first, last) = self.bounds.unwrap_or((gfn, gfn));
        self.bounds = Some((first.min(gfn), last.max(gfn)));
    }

    /// What somebody wants to hear of.
    pub(crate) const fn watches(&self) -> &Watches {
        &self.watches
    }

    /// Watches a page, in place of what was to be heard of it.
    pub(crate) fn watch(&mut self, gfn: Gfn, watch: Watch) {
        self.extend(gfn);
        self.watches.set(gfn, watch);
    }

    /// Watches a page no more.
    pub(crate) fn unwatch(&mut self, gfn: Gfn) {
        self.watches.remove(gfn);
    }

    /// Whether a page has breakpoints in place, where everything that does not know of them sees them.
    pub(crate) const fn has_in_place(&self) -> bool {
        self.in_place > 0
    }
}

impl Registry {
    /// Whether it must be the guest that accesses a page, for somebody wants to hear of it.
    pub(crate) fn is_watched(&self, gfn: Gfn) -> bool {
        self.claims.watches.get(gfn).is_some()
    }

    pub(crate) fn page(&self, gfn: Gfn) -> Option<&Page> {
        self.claims.index.get(&gfn).map(|index| &self.pages[*index])
    }

    pub(crate) fn page_mut(&mut self, gfn: Gfn) -> Option<&mut Page> {
        self.claims.index.get(&gfn).map(|index| &mut self.pages[*index])
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter()
    }

    /// How many pages there are.
    pub(crate) fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// A page by its number, from 0 to their count. It changes when a page is removed.
    pub(crate) fn nth_page_mut(&mut self, number: usize) -> Option<&mut Page> {
        self.pages.get_mut(number)
    }

    /// Whether a breakpoint is still where it was.
    #[inline]
    pub(crate) const fn is_there(&self, at: Located) -> bool {
        at.generation == self.generation
    }

    /// Where the breakpoint at `gpa` is, until something is inserted or removed.
    #[inline]
    pub(crate) fn locate(&self, gpa: Gpa) -> Option<Located> {
        self.spots.get(&gpa).map(|spot| Located { generation: self.generation, spot: *spot })
    }

    /// The breakpoint at `gpa`, if it `is_met` in its page.
    #[inline]
    pub(crate) fn met(&mut self, gpa: Gpa, is_met: impl FnOnce(&Page) -> bool) -> Option<(Located, &mut Breakpoint)> {
        let at = self.locate(gpa)?;
        let page = &mut self.pages[at.spot.page as usize];
        is_met(page).then(|| (at, &mut page.breakpoints[at.spot.breakpoint as usize]))
    }

    #[inline]
    pub(crate) fn located(&self, at: Located) -> (&Page, &Breakpoint) {
        let page = &self.pages[at.spot.page as usize];
        (page, &page.breakpoints[at.spot.breakpoint as usize])
    }

    #[inline]
    pub(crate) fn located_mut(&mut self, at: Located) -> &mut Breakpoint {
        &mut self.pages[at.spot.page as usize].breakpoints[at.spot.breakpoint as usize]
    }

    /// The page of a breakpoint, where in it that is, and what else must be known to step over it.
    #[inline]
    pub(crate) fn parts(&mut self, at: Located) -> (&mut Page, usize, &Claims) {
        (&mut self.pages[at.spot.page as usize], at.spot.breakpoint as usize, &self.claims)
    }

    pub(crate) fn at(&self, gpa: Gpa) -> Option<(&Page, &Breakpoint)> {
        self.locate(gpa).map(|at| self.located(at))
    }

    pub(crate) fn at_mut(&mut self, gpa: Gpa) -> Option<&mut Breakpoint> {
        self.locate(gpa).map(|at| self.located_mut(at))
    }

    /// The breakpoint a subscriber has subscribed to.
    pub(crate) fn get(&self, id: BreakpointId) -> Result<(&Page, &Breakpoint), Error> {
        let found = self.at(id.gpa).filter(|(_, breakpoint)| breakpoint.has(id.serial));
        found.ok_or(Error::NoSuchBreakpoint)
    }

    pub(crate) fn add_page(&mut self, page: Page) {
        self.claims.in_place += usize::from(page.placement == Placement::InPlace);
        self.generation += 1;
        self.claims.extend(page.gfn);
        self.claims.index.insert(page.gfn, self.pages.len());
        self.pages.push(page);
    }

    /// Adds a subscriber at `gpa`, whose page there must be, with what the guest has there if it is the first one.
    pub(crate) fn subscribe(&mut self, gpa: Gpa, step_over: StepOver, displaced: Displaced) -> Option<BreakpointId> {
        self.serial += 1;
        self.generation += 1;
        let serial = self.serial;
        let page = *self.claims.index.get(&gpa.gfn())?;
        let breakpoints = &mut self.pages[page].breakpoints;
        let page = u32::try_from(page).ok()?;
        match self.spots.entry(gpa) {
            Entry::Occupied(spot) => {
                let breakpoint = &mut breakpoints[spot.get().breakpoint as usize];
                breakpoint.others.insert(serial);
                breakpoint.last = serial;
            }
            Entry::Vacant(spot) => {
                spot.insert(Spot { page, breakpoint: breakpoints.len() as u32 });
                let (figures, others) = (Figures::default(), BTreeSet::new());
                let not_emulable = false;
                breakpoints.push(Breakpoint {
                    gpa,
                    step_over,
                    displaced,
                    not_emulable,
                    figures,
                    first: serial,
                    others,
                    last: serial,
                });
            }
        }
        Some(BreakpointId { gpa, serial })
    }

    /// Takes a subscriber out, and its breakpoint if it was the last one there. Returns the page if it has none then.
    pub(crate) fn unsubscribe(&mut self, id: BreakpointId) -> Option<&Page> {
        self.generation += 1;
        let spot = *self.spots.get(&id.gpa)?;
        let (page, at) = (&mut self.pages[spot.page as usize], spot.breakpoint as usize);
        let Breakpoint { first, others, last, .. } = &mut page.breakpoints[at];
        if *first != id.serial {
            others.remove(&id.serial);
            *last = *others.last().unwrap_or(first);
        } else if let Some(next) = others.pop_first() {
            *first = next;
        } else {
            page.breakpoints.swap_remove(at);
            self.spots.remove(&id.gpa);
            if let Some(moved) = page.breakpoints.get(at) {
                self.spots.insert(moved.gpa, spot);
            }
        }
        page.breakpoints.is_empty().then_some(&*page)
    }

    pub(crate) fn remove_page(&mut self, gfn: Gfn) -> Option<Page> {
        self.generation += 1;
        let index = self.claims.index.remove(&gfn)?;
        let page = self.pages.swap_remove(index);
        for breakpoint in &page.breakpoints {
            self.spots.remove(&breakpoint.gpa);
        }
        if let Some(moved) = self.pages.get(index) {
            self.claims.index.insert(moved.gfn, index);
            let spots = (0..).map(|breakpoint| Spot { page: index as u32, breakpoint });
            self.spots.extend(moved.breakpoints.iter().map(|breakpoint| breakpoint.gpa).zip(spots));
        }
        self.claims.in_place -= usize::from(page.placement == Placement::InPlace);
        Some(page)
    }

    /// Whether a subscriber is the only one at its address.
    pub(crate) fn is_last(&self, id: BreakpointId) -> bool {
        self.at(id.gpa).is_some_and(|(_, breakpoint)| breakpoint.first == id.serial && breakpoint.others.is_empty())
    }

    pub(crate) fn ids(&self) -> Vec<BreakpointId> {
        let all = self.pages.iter().flat_map(|page| &page.breakpoints);
        let mut ids = Vec::with_capacity(self.spots.len());
        ids.extend(all.flat_map(|breakpoint| breakpoint.serials().map(|serial| breakpoint.id(serial))));
        ids.sort_unstable_by_key(|id| (id.gpa, id.serial));
        ids
    }
}
