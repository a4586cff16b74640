//! The registry: which pages have breakpoints, and where. The only place that maps an address to a breakpoint.

use std::collections::HashMap;

use crate::{Conceal, Error, Gfn, Gpa, INSTRUCTION_BYTES, Placement, StepOver};

/// The name of a breakpoint.
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

/// A breakpoint.
#[derive(Clone, Debug)]
pub(crate) struct Breakpoint {
    pub(crate) id: BreakpointId,
    pub(crate) step_over: StepOver,
    /// The byte that 0xCC displaces.
    pub(crate) original: u8,
    /// The instruction as the guest wrote it, if it ends within the page.
    pub(crate) instruction: Option<[u8; INSTRUCTION_BYTES]>,
    pub(crate) hits: u64,
}

impl Breakpoint {
    pub(crate) const fn offset(&self) -> u16 {
        self.id.gpa.offset()
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
}

impl Page {
    pub(crate) fn index(&self, offset: u16) -> Result<usize, usize> {
        self.breakpoints.binary_search_by_key(&offset, Breakpoint::offset)
    }
}

/// All pages with breakpoints.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    pages: HashMap<Gfn, Page>,
    serial: u64,
}

impl Registry {
    pub(crate) fn page(&self, gfn: Gfn) -> Option<&Page> {
        self.pages.get(&gfn)
    }

    pub(crate) fn page_mut(&mut self, gfn: Gfn) -> Option<&mut Page> {
        self.pages.get_mut(&gfn)
    }

    pub(crate) fn at(&self, gpa: Gpa) -> Option<(&Page, &Breakpoint)> {
        let page = self.pages.get(&gpa.gfn())?;
        let index = page.index(gpa.offset()).ok()?;
        Some((page, &page.breakpoints[index]))
    }

    /// Counts a hit at an address, and tells which breakpoint it is of.
    pub(crate) fn hit(&mut self, gpa: Gpa) -> Option<BreakpointId> {
        let page = self.pages.get_mut(&gpa.gfn())?;
        let index = page.index(gpa.offset()).ok()?;
        let breakpoint = &mut page.breakpoints[index];
        breakpoint.hits += 1;
        Some(breakpoint.id)
    }

    pub(crate) fn get(&self, id: BreakpointId) -> Result<&Breakpoint, Error> {
        let page = self.pages.get(&id.gpa.gfn()).ok_or(Error::NoSuchBreakpoint)?;
        let index = page.index(id.gpa.offset()).map_err(|_| Error::NoSuchBreakpoint)?;
        Some(&page.breakpoints[index]).filter(|breakpoint| breakpoint.id == id).ok_or(Error::NoSuchBreakpoint)
    }

    pub(crate) fn next_id(&mut self, gpa: Gpa) -> BreakpointId {
        self.serial += 1;
        BreakpointId { gpa, serial: self.serial }
    }

    pub(crate) fn add_page(&mut self, page: Page) {
        self.pages.insert(page.gfn, page);
    }

    /// Takes a breakpoint out, and its page too if it was the last.
    pub(crate) fn remove(&mut self, id: BreakpointId) -> Result<(Breakpoint, Option<Page>), Error> {
        self.get(id)?;
        let page = self.pages.get_mut(&id.gpa.gfn()).ok_or(Error::NoSuchBreakpoint)?;
        let index = page.index(id.gpa.offset()).map_err(|_| Error::NoSuchBreakpoint)?;
        let breakpoint = page.breakpoints.remove(index);
        let empty = page.breakpoints.is_empty();
        Ok((breakpoint, empty.then(|| self.pages.remove(&id.gpa.gfn())).flatten()))
    }

    pub(crate) fn ids(&self) -> Vec<BreakpointId> {
        let mut ids: Vec<_> = self.pages.values().flat_map(|p| p.breakpoints.iter().map(|b| b.id)).collect();
        ids.sort_by_key(|id| id.gpa);
        ids
    }
}
