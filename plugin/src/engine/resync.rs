//! Writes that are no events: by devices, by other domains that map the guest's pages, by the device model. And what Xen has
//! lost: the guest got another page in place of one with breakpoints, or a view was reset.

use super::presence::paused;
use super::{Engine, VACANT};
use crate::breakpoint::{Located, Page};
use crate::error::Doing;
use crate::step::Vcpu;
use crate::views::Views;
use crate::{Counters, Error, Gpa, Hypervisor, Rights, placement};

impl Engine {
    /// Compares the next `pages` pages that have breakpoints with what is known of them, in turn: so all of them are
    /// compared in a round of [`page_count`](Self::page_count) pages. Where a page is not the same, the copy of it that the
    /// guest executes follows, each breakpoint whose bytes were changed is set on the new instruction
    /// ([`Figures::rewritten`](crate::Figures::rewritten) counts), and a breakpoint in place that is not there any more is
    /// set again. Returns how many were not the same; [`Counters::resynced`](crate::Counters::resynced) counts them, too.
    ///
    /// Writes of virtual CPUs are events, and their pages always the same. Those of devices, of other domains that map the
    /// page, and of the device model are none: until the page is compared, or the breakpoint on the bytes that were written
    /// is hit, the guest goes on to execute what was there before. So a host calls this when it has nothing else to do,
    /// and every so often while it has. A page costs two reads of 4 KiB. Nothing is allocated.
    ///
    /// # Errors
    /// If the hypervisor refuses something, as it does where the guest has no page any more: the first such error. The
    /// other pages have been compared.
    pub fn verify<H: Hypervisor>(&mut self, hv: &mut H, pages: usize) -> Result<usize, Error> {
        let (mut result, mut found) = (Ok(()), 0);
        for _ in 0..pages.min(self.registry.page_count()) {
            if self.verified >= self.registry.page_count() {
                self.verified = 0;
            }
            let number = self.verified;
            match self.resync_page(hv, number).and_then(|changed| Ok(self.rearm_if_lost(hv, number)? || changed)) {
                Ok(changed) => found += usize::from(changed),
                Err(error) => result = result.and(Err(error)),
            }
            self.verified += 1;
        }
        result.doing("compare a page with what is known of it").map(|()| found)
    }

    /// If the execute view does not show a page's shadow any more, and the hypervisor tells: sets its breakpoints again. Most
    /// often that is noticed when the page is executed; not so where a view that has lost a page permits everything (Xen
    /// from 4.19 on, when the guest drops a page and gets one there later).
    fn rearm_if_lost<H: Hypervisor>(&mut self, hv: &mut H, number: usize) -> Result<bool, H::Error> {
        let (Some(page), Some(views)) = (self.registry.nth_page_mut(number), &self.views) else { return Ok(false) };
        let gfn = page.gfn;
        if page.shadow.is_none() || self.registry.is_watched(gfn) {
            return Ok(false);
        }
        let lost = hv.rights(views.exec, gfn)?.is_some_and(|rights| rights != Rights::Execute);
        if lost {
            self.rearm(hv, gfn)?;
        }
        Ok(lost)
    }

    /// How many pages have breakpoints, or had until a moment ago.
    #[must_use]
    pub fn page_count(&self) -> usize {
        self.registry.page_count()
    }

    /// Sets up again all that was done to the domain: every page with breakpoints is read again, shown, guarded, and its
    /// breakpoints are set; watches, too. For a host that has learnt that the guest may have other pages now where it had
    /// those (it has given memory back to Xen, and got some again), or that Xen may have reset a view.
    ///
    /// Returns false if Xen still has to apply a reply, which it would do [too late](Self::is_settled): then all is set up
    /// after one of the next events.
    ///
    /// # Errors
    /// If the hypervisor refuses something: the first such error. The rest has been done.
    pub fn resync<H: Hypervisor>(&mut self, hv: &mut H) -> Result<bool, Error> {
        if !self.is_settled(hv) {
            self.resync_pending = true;
            self.count_chores();
            return Ok(false);
        }
        self.resync_now(hv).map(|()| true)
    }

    /// The same, with nothing that Xen has still to apply.
    pub(super) fn resync_now<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        self.resync_pending = false;
        self.count_chores();
        let unmappings = self.unmappings();
        let done = paused(hv, |hv| self.resync_paused(hv).doing("set up a page again"));
        self.note_unmappings(unmappings);
        done
    }

    fn resync_paused<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), H::Error> {
        let mut result = self.views.as_ref().map_or(Ok(()), |views| views.regain(hv).and_then(|_| views.restore(hv)));
        for number in 0..self.registry.page_count() {
            if let Some(page) = self.registry.nth_page_mut(number) {
                let restored = placement::restore(hv, self.views.as_mut(), page);
                let gfn = page.gfn;
                let restored = restored.and_then(|()| self.restrict(hv, gfn));
                result = result.and(restored).and(self.resync_page(hv, number).map(drop));
            }
        }
        for gfn in self.registry.claims.watches().gfns() {
            if self.registry.page(gfn).is_none() {
                result = result.and(self.restrict(hv, gfn));
            }
        }
        result
    }

    /// Compares a page with what is known of it.
    fn resync_page<H: Hypervisor>(&mut self, hv: &mut H, number: usize) -> Result<bool, H::Error> {
        let Some(found) = self.registry.nth_page_mut(number) else { return Ok(false) };
        page(hv, self.views.as_ref(), found, &self.vcpus, &mut self.counters)
    }

    /// If memory has not the instruction any more that a breakpoint has displaced, the page is compared.
    pub(super) fn check_current<H: Hypervisor>(&mut self, hv: &mut H, found: Located) -> Result<(), H::Error> {
        let (page, breakpoint) = self.registry.located(found);
        if placement::is_current(hv, page.placement, breakpoint) { Ok(()) } else { self.resync_found(hv, found) }
    }

    #[cold]
    #[inline(never)]
    pub(super) fn resync_found<H: Hypervisor>(&mut self, hv: &mut H, found: Located) -> Result<(), H::Error> {
        self.resync_page(hv, found.page()).map(drop)
    }

    /// What is to be done as soon as Xen has no reply to apply.
    pub(super) fn count_chores(&mut self) {
        self.chores = self.vacant.len() + if self.resync_pending { VACANT } else { 0 };
    }
}

/// Compares a page with what is known of it.
#[cold]
#[inline(never)]
pub(super) fn page<H: Hypervisor>(
    hv: &mut H,
    views: Option<&Views>,
    page: &mut Page,
    vcpus: &[Vcpu],
    counters: &mut Counters,
) -> Result<bool, H::Error> {
    let is_stepped = |gpa: Gpa| vcpus.iter().any(|vcpu| vcpu.is_over(gpa));
    let changed = placement::resync(hv, views, page, &is_stepped)?;
    counters.resynced += u64::from(changed);
    Ok(changed)
}
