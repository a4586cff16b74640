//! Views (altp2m) and the rights they give.

use hyperbp::ledger::Note;
use hyperbp::{Gfn, Rights, ViewId};
use hyperbp_xen_sys as sys;

use super::{Domain, Error, check};

/// Xen's `INVALID_GFN`: a view shows the page of the host view again.
const INVALID_GFN: u64 = u64::MAX;

/// Views Xen has for a domain, the host view included (`MAX_ALTP2M`, xen/arch/x86/include/asm/domain.h).
pub(crate) const VIEWS: usize = 10;

/// How altp2m was before we needed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Altp2m {
    Off,
    /// Another tool's, and virtual CPUs were in this view.
    On(ViewId),
}

/// What to say when Xen makes no view more, `ours` being those there are of ours.
fn no_view_left(domain: u32, ours: usize) -> String {
    let others = (VIEWS - 1).saturating_sub(ours);
    format!(
        "Xen has no view left for domain {domain}: of its {VIEWS}, one is the host view, {ours} are this monitor's, and \
         {others} another tool's; end that, or have it use fewer"
    )
}

/// The modes of altp2m in which the guest may switch views itself, as a domain's configuration has them.
pub(super) fn guest_mode(parameter: u64) -> Option<&'static str> {
    let is = |mode: u32| parameter == u64::from(mode);
    match () {
        () if is(sys::XEN_ALTP2M_mixed) => Some("mixed"),
        () if is(sys::XEN_ALTP2M_limited) => Some("limited"),
        () => None,
    }
}

/// Xen's name for rights.
const fn access(rights: Rights) -> sys::xenmem_access_t {
    match rights {
        Rights::All => sys::XENMEM_access_rwx,
        Rights::Execute => sys::XENMEM_access_x,
        Rights::ReadWrite => sys::XENMEM_access_rw,
        Rights::ReadExecute => sys::XENMEM_access_rx,
        Rights::Read => sys::XENMEM_access_r,
        Rights::None => sys::XENMEM_access_n,
    }
}

impl Domain {
    /// How many views can be made. Only while there are none of ours.
    ///
    /// # Errors
    /// If views cannot be switched on, or not off again.
    pub(crate) fn free_views(&mut self) -> Result<usize, Error> {
        self.switch_altp2m_on()?;
        let mut views = Vec::new();
        while let Ok(view) = self.make_view() {
            views.push(view);
        }
        if views.is_empty() {
            self.put_altp2m_back()?;
        }
        let dropped: Result<Vec<()>, Error> = views.iter().map(|view| self.destroy_view(*view)).collect();
        dropped.map(|views| views.len())
    }

    /// Whether views are in use.
    ///
    /// # Errors
    /// If Xen does not tell.
    pub(crate) fn is_altp2m_on(&self) -> Result<bool, Error> {
        let mut on = false;
        // SAFETY: the handle is open and `on` outlives the call.
        let result = unsafe { sys::xc_altp2m_get_domain_state(self.xc.raw(), self.id, &mut on) };
        check("xc_altp2m_get_domain_state", result)?;
        Ok(on)
    }

    pub(crate) fn set_altp2m(&self, on: bool) -> Result<(), Error> {
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_altp2m_set_domain_state(self.xc.raw(), self.id, on) };
        check("xc_altp2m_set_domain_state", result).map_err(|error| self.about_page_tables(error))
    }

    /// Notes how altp2m is, and switches it on.
    fn switch_altp2m_on(&mut self) -> Result<(), Error> {
        if self.altp2m_found.is_some() {
            return Ok(());
        }
        let on = self.is_altp2m_on()?;
        let found = if on { Altp2m::On(self.first_view()?) } else { Altp2m::Off };
        if !on {
            self.note(Note::Altp2m)?;
            self.set_altp2m(true)?;
        }
        self.altp2m_found = Some(found);
        Ok(())
    }

    /// Leaves altp2m as it was found: when it was on, there are another tool's views.
    pub(super) fn put_altp2m_back(&mut self) -> Result<(), Error> {
        if self.altp2m_found == Some(Altp2m::Off) {
            self.set_altp2m(false)?;
            self.erase(Note::Altp2m);
        }
        self.altp2m_found = None;
        Ok(())
    }

    /// The view of the first virtual CPU.
    ///
    /// # Errors
    /// If altp2m is off.
    pub(crate) fn first_view(&self) -> Result<ViewId, Error> {
        let mut view = 0;
        // SAFETY: the handle is open and `view` outlives the call.
        let result = unsafe { sys::xc_altp2m_get_vcpu_p2m_idx(self.xc.raw(), self.id, 0, &mut view) };
        check("xc_altp2m_get_vcpu_p2m_idx", result).map(|()| ViewId(view))
    }

    /// Whether the guest itself may switch to a view: with VMFUNC, where it may execute that at all.
    fn set_visible(&self, view: ViewId, visible: bool) -> Result<(), Error> {
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_altp2m_set_visibility(self.xc.raw(), self.id, view.0, visible) };
        check("xc_altp2m_set_visibility", result)
    }

    pub(crate) fn destroy(&mut self, view: ViewId) -> Result<(), Error> {
        // SAFETY: the handle is open.
        check("xc_altp2m_destroy_view", unsafe { sys::xc_altp2m_destroy_view(self.xc.raw(), self.id, view.0) })?;
        self.erase(Note::View(view));
        Ok(())
    }

    pub(super) fn make_view(&mut self) -> Result<ViewId, Error> {
        self.switch_altp2m_on()?;
        let mut view = 0;
        // Never XENMEM_access_default: its number differs between Xen's versions.
        let access = sys::XENMEM_access_rwx;
        // SAFETY: the handle is open and `view` outlives the call.
        let result = unsafe { sys::xc_altp2m_create_view(self.xc.raw(), self.id, access, &mut view) };
        let made = check("xc_altp2m_create_view", result).map(|()| ViewId(view));
        let view = made.map_err(|error| match error.is(libc::EINVAL) {
            true => Error::invalid(error.call(), no_view_left(self.id, self.views.len())),
            false => self.about_page_tables(error),
        });
        if view.is_err() && self.views.is_empty() {
            self.put_altp2m_back()?;
        }
        let view = view?;
        self.note(Note::View(view))?;
        self.views.push(view);
        self.set_visible(view, false)?;
        Ok(view)
    }

    /// Switches all virtual CPUs. The host view stands for the one that they were found in.
    pub(super) fn switch_all_to(&mut self, view: ViewId) -> Result<(), Error> {
        if view != ViewId::HOST {
            return self.switch_to_invisible(view);
        }
        match self.altp2m_found {
            None => Ok(()), // There is no other.
            // Its tool may have dropped it meanwhile.
            Some(Altp2m::On(found)) => self
                .switch_to(found)
                .or_else(|_| self.switch_to_invisible(found))
                .or_else(|_| self.switch_to(ViewId::HOST)),
            Some(Altp2m::Off) => self.switch_to(ViewId::HOST),
        }
    }

    /// Xen switches a whole domain only to what its guest could switch to.
    fn switch_to_invisible(&self, view: ViewId) -> Result<(), Error> {
        self.set_visible(view, true)?;
        let switched = self.switch_to(view);
        self.set_visible(view, false)?;
        switched
    }

    fn switch_to(&self, view: ViewId) -> Result<(), Error> {
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_altp2m_switch_to_view(self.xc.raw(), self.id, view.0) };
        check("xc_altp2m_switch_to_view", result)
    }

    /// Has all virtual CPUs leave views that may be anybody's.
    ///
    /// # Errors
    /// If Xen refuses.
    pub(crate) fn switch_to_host_view(&self) -> Result<(), Error> {
        self.switch_to(ViewId::HOST)
    }

    pub(super) fn destroy_view(&mut self, view: ViewId) -> Result<(), Error> {
        self.destroy(view)?;
        self.views.retain(|other| *other != view);
        // With altp2m on, Xen carries every change of the host view into others.
        if self.views.is_empty() { self.put_altp2m_back() } else { Ok(()) }
    }

    pub(super) fn change_gfn(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), Error> {
        let to = to.map_or(INVALID_GFN, |gfn| gfn.0);
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_altp2m_change_gfn(self.xc.raw(), self.id, view.0, gfn.0, to) };
        check("xc_altp2m_change_gfn", result).map_err(|error| self.about_page_tables(error))
    }

    /// Sets the rights that pages of the host view have that come from now on.
    ///
    /// # Errors
    /// If Xen refuses, which it does without a monitor.
    pub(crate) fn set_default_access(&mut self, rights: Rights) -> Result<(), Error> {
        // The default is changed in place of a page's.
        let gfn = INVALID_GFN;
        // SAFETY: the handle is open.
        check("xc_set_mem_access", unsafe { sys::xc_set_mem_access(self.xc.raw(), self.id, access(rights), gfn, 1) })?;
        self.has_default_access = rights == Rights::All;
        Ok(())
    }

    pub(super) fn mem_access(&self, view: ViewId, gfn: Gfn) -> Result<Option<Rights>, Error> {
        let mut found = 0;
        // SAFETY: the handle is open, and `found` outlives the call.
        let result = unsafe { sys::xc_altp2m_get_mem_access(self.xc.raw(), self.id, view.0, gfn.0, &mut found) };
        check("xc_altp2m_get_mem_access", result)?;
        let all = [Rights::All, Rights::Execute, Rights::ReadWrite, Rights::ReadExecute, Rights::Read, Rights::None];
        Ok(all.into_iter().find(|rights| access(*rights) == found))
    }

    pub(super) fn set_mem_access(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), Error> {
        let access = access(rights);
        if view != ViewId::HOST {
            // SAFETY: the handle is open.
            let result = unsafe { sys::xc_altp2m_set_mem_access(self.xc.raw(), self.id, view.0, gfn.0, access) };
            return check("xc_altp2m_set_mem_access", result).map_err(|error| self.about_page_tables(error));
        }
        if rights != Rights::All {
            self.note(Note::Guard(gfn))?;
        }
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_set_mem_access(self.xc.raw(), self.id, access, gfn.0, 1) };
        check("xc_set_mem_access", result).map_err(|error| self.about_page_tables(error))?;
        match rights {
            Rights::All => {
                self.guarded.remove(&gfn);
                self.erase(Note::Guard(gfn));
            }
            _ => drop(self.guarded.insert(gfn)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_out_of_views_says_how_many_there_are_and_whose() {
        let said = no_view_left(3, 2);
        assert!(said.contains("of its 10, one is the host view, 2 are this monitor's, and 7 another tool's"), "{said}");
    }

    #[test]
    fn only_external_altp2m_keeps_the_guest_from_views() {
        assert_eq!(guest_mode(sys::XEN_ALTP2M_external.into()), None);
        assert_eq!(guest_mode(sys::XEN_ALTP2M_disabled.into()), None);
        assert_eq!(guest_mode(sys::XEN_ALTP2M_mixed.into()), Some("mixed"));
        assert_eq!(guest_mode(sys::XEN_ALTP2M_limited.into()), Some("limited"));
    }
}
