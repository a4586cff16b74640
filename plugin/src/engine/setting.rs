//! Sets and removes breakpoints, and prepares and gives back the pages they are in.

use super::Engine;
use super::presence::paused;
use crate::breakpoint::Page;
use crate::error::Doing;
use crate::insn::Displaced;
use crate::{BreakpointId, Error, Gfn, Gpa, Hypervisor, Mechanism, PAGE_SIZE, Placement, Rights, StepOver, placement};

impl Engine {
    /// Sets a breakpoint on the instruction at a guest-physical address, or subscribes to the one that is there.
    ///
    /// # Errors
    /// If its page, or the breakpoint there, is used in another way, or if the hypervisor refuses: then there is no
    /// breakpoint. (What the hypervisor refuses to undo is undone at the next attempt, or by [`finish`](Self::finish).)
    pub fn insert<H: Hypervisor>(&mut self, hv: &mut H, gpa: Gpa, mechanism: Mechanism) -> Result<BreakpointId, Error> {
        if self.leaving {
            return Err(Error::Leaving);
        }
        self.catch_up(hv, gpa.gfn()).doing("settle the page")?;
        let other = |p: &Page| p.placement != mechanism.placement() || p.conceal != mechanism.conceal();
        if self.registry.page(gpa.gfn()).is_some_and(|page| page.breakpoints.is_empty() && other(page)) {
            if !self.is_settled(hv) {
                return Err(Error::NotGivenBack(gpa));
            }
            self.vacate(hv, gpa.gfn()).doing("prepare the page")?;
        }
        let page = self.registry.page(gpa.gfn());
        if page.is_some_and(other) {
            return Err(Error::PageConflict(gpa));
        }
        if let Some((_, breakpoint)) = self.registry.at(gpa) {
            if breakpoint.step_over != mechanism.step_over() {
                return Err(Error::StepOverConflict(gpa));
            }
            let displaced = breakpoint.displaced;
            return self.registry.subscribe(gpa, mechanism.step_over(), displaced).ok_or(Error::NoSuchBreakpoint);
        }
        let new = page.is_none();
        if new {
            let opened = self.open(hv, gpa.gfn(), mechanism);
            // Page tables may be in that page, or where the shadow's frame is now.
            self.vcpus.iter_mut().for_each(|vcpu| vcpu.walks.forget());
            opened?;
        }
        let armed = self.arm(hv, gpa, mechanism.step_over());
        if armed.is_err() && new {
            // What failed is what the caller is to hear about, not that undoing it failed too.
            let _ = self.give_back(hv, gpa.gfn());
        }
        armed
    }

    /// Settles a page, if that was refused when it was to be done.
    fn catch_up<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        match self.registry.page_mut(gfn) {
            Some(page) => placement::catch_up(hv, self.views.as_ref(), page),
            None => Ok(()),
        }
    }

    /// Prepares a page for breakpoints.
    fn open<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn, mechanism: Mechanism) -> Result<(), Error> {
        let placement = mechanism.placement();
        let watch = self.registry.claims.watches().get(gfn);
        if placement == Placement::InPlace && watch.is_some_and(|watch| watch.accesses.execute) {
            return Err(Error::WatchConflict(gfn));
        }
        if self.unclosed.contains_key(&gfn) {
            if !self.is_settled(hv) {
                return Err(Error::NotGivenBack(gfn.at(0)));
            }
            self.close_again(hv, gfn).doing("prepare the page")?;
        }
        // Nobody is to write to the page while we look at it, nor to run between two of the steps.
        paused(hv, |hv| {
            if placement == Placement::Shadow {
                self.ensure_views(hv)?;
            }
            // It may be one since a moment ago.
            if self.views.as_ref().is_some_and(|views| views.hides(gfn)) {
                return Err(Error::NoMemory(gfn.at(0)));
            }
            if !self.traps_new_pages {
                hv.set_default_rights(Rights::ReadWrite).doing("watch new pages")?;
                self.traps_new_pages = true;
            }
            let shadow = placement::prepare(hv, self.views.as_mut(), gfn, placement).doing("prepare the page")?;
            let (breakpoints, conceal) = (Vec::new(), mechanism.conceal());
            self.registry.add_page(Page {
                gfn,
                placement,
                conceal,
                shadow,
                breakpoints,
                lifted: 0,
                owed: 0,
                vacant: false,
                unsettled: false,
            });
            let opened = placement::open(hv, self.views.as_ref(), gfn, shadow).doing("prepare the page");
            if opened.is_err() && shadow.is_none() {
                self.registry.remove_page(gfn);
            }
            opened.and_then(|()| self.restrict(hv, gfn).doing("watch the page")).inspect_err(|_| {
                // Before anybody runs, who might write to a copy that is not guarded yet. What failed is what the caller is
                // to hear about, not that undoing it failed too.
                let _ = self.give_back(hv, gfn);
            })
        })
    }

    /// Sets a breakpoint in a page that is prepared.
    fn arm<H: Hypervisor>(&mut self, hv: &mut H, gpa: Gpa, step_over: StepOver) -> Result<BreakpointId, Error> {
        let displaced = self.displaced(hv, gpa)?;
        let id = self.registry.subscribe(gpa, step_over, displaced).ok_or(Error::NoSuchBreakpoint)?;
        // While the page is lifted for a virtual CPU, its settling will arm this breakpoint too.
        if let Some(page) = self.registry.page(gpa.gfn()).filter(|page| page.lifted == 0)
            && let Err(error) = placement::arm(hv, page, gpa, displaced.byte())
        {
            self.registry.unsubscribe(id);
            return Err(error).doing("write the breakpoint");
        }
        Ok(id)
    }

    /// The guest's own instruction at an address, without the breakpoints around it.
    fn displaced<H: Hypervisor>(&self, hv: &mut H, gpa: Gpa) -> Result<Displaced, Error> {
        let mut bytes = [0; PAGE_SIZE];
        hv.read(gpa.gfn().at(0), &mut bytes).doing("read the page")?;
        if let Some(page) = self.registry.page(gpa.gfn()).filter(|p| p.placement == Placement::InPlace && p.lifted == 0)
        {
            for breakpoint in &page.breakpoints {
                let byte = &mut bytes[usize::from(breakpoint.offset())];
                *byte = placement::guests_byte(*byte, breakpoint.displaced.byte());
            }
        }
        Ok(Displaced::of(&bytes, gpa.offset()))
    }

    /// Removes a breakpoint. If nobody else has subscribed to it, the guest's own byte is back when this returns.
    ///
    /// # Errors
    /// If there is no such breakpoint, or if the hypervisor refuses.
    pub fn remove<H: Hypervisor>(&mut self, hv: &mut H, id: BreakpointId) -> Result<(), Error> {
        self.catch_up(hv, id.gpa().gfn()).doing("settle the page")?;
        self.registry.get(id)?;
        if let Some(found) = self.registry.locate(id.gpa()) {
            // What is put back is to be what the guest has there now.
            self.check_current(hv, found).doing("settle the page")?;
        }
        let (page, breakpoint) = self.registry.get(id)?;
        if page.lifted == 0 && self.registry.is_last(id) {
            let disarmed = placement::disarm(hv, page, breakpoint.gpa, breakpoint.displaced.byte());
            disarmed.doing("write the original byte back")?;
        }
        let Some(page) = self.registry.unsubscribe(id) else { return Ok(()) };
        let gfn = page.gfn;
        self.give_back(hv, gfn).doing("give the page back")
    }

    /// Makes a page without breakpoints the guest's own again: as soon as no answer is on its way that Xen would be late
    /// with. Until then it is one without breakpoints.
    fn give_back<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        let shadowed = self.registry.page(gfn).is_some_and(|page| page.shadow.is_some());
        if shadowed && (self.telling || !self.is_settled(hv)) {
            if let Some(page) = self.registry.page_mut(gfn).filter(|page| !page.vacant) {
                page.vacant = true;
                self.vacant.push(gfn);
                self.count_chores();
            }
            return Ok(());
        }
        self.vacate(hv, gfn)
    }

    /// Makes a page without breakpoints the guest's own again.
    fn vacate<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        let Some(page) = self.registry.remove_page(gfn) else { return Ok(()) };
        // If there are breakpoints in it again before a step is over, that is another page.
        if page.owed > 0 {
            self.vcpus.iter_mut().for_each(|vcpu| vcpu.forget(gfn));
        }
        self.close(hv, page)
    }

    /// The same with all that were kept until now.
    #[cold]
    pub(super) fn vacate_all<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), H::Error> {
        let mut result = Ok(());
        let vacant = std::mem::take(&mut self.vacant);
        self.count_chores();
        for gfn in vacant {
            let Some(page) = self.registry.page_mut(gfn) else { continue };
            page.vacant = false;
            if page.breakpoints.is_empty() {
                result = result.and(self.vacate(hv, gfn));
            }
        }
        result
    }

    /// Makes a page whose last breakpoint is gone the guest's own again, or remembers that it is not yet.
    fn close<H: Hypervisor>(&mut self, hv: &mut H, page: Page) -> Result<(), H::Error> {
        let unmappings = self.unmappings();
        let closed = placement::close(hv, self.views.as_mut(), &page);
        self.note_unmappings(unmappings);
        let closed = closed.and_then(|()| self.restrict(hv, page.gfn));
        if closed.is_err() {
            self.unclosed.insert(page.gfn, page);
        }
        closed
    }

    pub(super) fn unmappings(&self) -> u64 {
        self.views.as_ref().map_or(0, |views| views.unmappings)
    }

    /// If a view has let go of a page since there were so many, Xen would be late with the registers or the emulation of each
    /// virtual CPU's next response ([`Views::unmappings`](crate::views::Views::unmappings)).
    pub(super) fn note_unmappings(&mut self, before: u64) {
        if self.unmappings() != before {
            self.unmappings_noted += 1;
        }
    }

    /// The same with one of which that was refused before.
    fn close_again<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        self.unclosed.remove(&gfn).map_or(Ok(()), |page| self.close(hv, page))
    }

    /// The same with all of them.
    pub(super) fn close_all_again<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), H::Error> {
        let mut result = Ok(());
        for page in std::mem::take(&mut self.unclosed).into_values() {
            result = result.and(self.close(hv, page));
        }
        result
    }
}
