//! Views (altp2m) and the rights they give.

use hyperbp::ledger::Note;
use hyperbp::{Gfn, Rights, ViewId};
use hyperbp_xen_sys as sys;

use super::{Domain, Error, check};

/// Xen's `INVALID_GFN`: a view shows the page of the host view again.
const INVALID_GFN: u64 = u64::MAX;

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
    /// How many views can be made. Only while there are none.
    ///
    /// # Errors
    /// If views cannot be switched on, or not off again.
    pub(crate) fn free_views(&mut self) -> Result<usize, Error> {
        self.set_altp2m(true)?;
        let mut views = Vec::new();
        while let Ok(view) = self.make_view() {
            views.push(view);
        }
        if views.is_empty() {
            self.set_altp2m(false)?;
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

    pub(crate) fn set_altp2m(&mut self, on: bool) -> Result<(), Error> {
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_altp2m_set_domain_state(self.xc.raw(), self.id, on) };
        check("xc_altp2m_set_domain_state", result)?;
        self.altp2m_on = on;
        Ok(())
    }

    pub(super) fn destroy(&self, view: ViewId) -> Result<(), Error> {
        // SAFETY: the handle is open.
        check("xc_altp2m_destroy_view", unsafe { sys::xc_altp2m_destroy_view(self.xc.raw(), self.id, view.0) })
    }

    pub(super) fn make_view(&mut self) -> Result<ViewId, Error> {
        if !self.altp2m_on {
            self.set_altp2m(true)?;
        }
        let mut view = 0;
        // Never XENMEM_access_default: its number differs between Xen's versions.
        let access = sys::XENMEM_access_rwx;
        // SAFETY: the handle is open and `view` outlives the call.
        let result = unsafe { sys::xc_altp2m_create_view(self.xc.raw(), self.id, access, &mut view) };
        check("xc_altp2m_create_view", result)?;
        self.views.push(ViewId(view));
        Ok(ViewId(view))
    }

    pub(super) fn switch_all_to(&mut self, view: ViewId) -> Result<(), Error> {
        if view == ViewId::HOST && !self.altp2m_on {
            return Ok(()); // There is no other.
        }
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_altp2m_switch_to_view(self.xc.raw(), self.id, view.0) };
        check("xc_altp2m_switch_to_view", result)
    }

    pub(super) fn destroy_view(&mut self, view: ViewId) -> Result<(), Error> {
        self.destroy(view)?;
        self.views.retain(|other| *other != view);
        // With altp2m on, Xen carries every change of the host view into others.
        if self.views.is_empty() { self.set_altp2m(false) } else { Ok(()) }
    }

    pub(super) fn change_gfn(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), Error> {
        let to = to.map_or(INVALID_GFN, |gfn| gfn.0);
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_altp2m_change_gfn(self.xc.raw(), self.id, view.0, gfn.0, to) };
        check("xc_altp2m_change_gfn", result)
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
            return check("xc_altp2m_set_mem_access", result);
        }
        if rights != Rights::All {
            self.note(Note::Guard(gfn))?;
        }
        // SAFETY: the handle is open.
        check("xc_set_mem_access", unsafe { sys::xc_set_mem_access(self.xc.raw(), self.id, access, gfn.0, 1) })?;
        self.guarded.retain(|guarded| *guarded != gfn);
        match rights {
            Rights::All => self.erase(Note::Guard(gfn)),
            _ => self.guarded.push(gfn),
        }
        Ok(())
    }
}
