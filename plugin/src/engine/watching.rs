//! Watches pages.

use super::Engine;
use crate::error::Doing;
use crate::watch::{self, Watch};
use crate::{Accesses, Error, Gfn, Hypervisor, Rights};

impl Engine {
    /// Watches a page: these kinds of accesses are reported before they are made and, if `after`, when they have been made,
    /// too (which costs a second event). Replaces the watch that is there; [`Accesses::NONE`] ends it.
    ///
    /// An instruction is reported for the first watched page that it accesses. One that is stepped over a breakpoint is not
    /// reported, and one that has not read but written may be, to those who watch reads (EPT knows no right to write alone).
    ///
    /// # Errors
    /// If the page has breakpoints in place and what is executed there is to be watched, or if the hypervisor refuses: then
    /// the watch is as it was.
    pub fn watch<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn, accesses: Accesses, after: bool) -> Result<(), Error> {
        let before = self.registry.claims.watches().get(gfn);
        let result = match accesses {
            // Its rights are to be set once more.
            Accesses::NONE if before.is_none() => return Ok(()),
            Accesses::NONE => {
                self.registry.claims.watch(gfn, Watch { accesses, after });
                self.restrict(hv, gfn)
            }
            _ => {
                if self.leaving {
                    return Err(Error::Leaving);
                }
                if accesses.execute && self.registry.page(gfn).is_some_and(|page| page.shadow.is_none()) {
                    return Err(Error::WatchConflict(gfn));
                }
                self.enter_if_needed(hv)?;
                if self.views.as_ref().is_some_and(|views| views.hides(gfn)) {
                    return Err(Error::NoMemory(gfn.at(0)));
                }
                self.registry.claims.watch(gfn, Watch { accesses, after });
                self.restrict(hv, gfn)
            }
        };
        match (&result, before) {
            (Ok(()), _) if accesses == Accesses::NONE => self.registry.claims.unwatch(gfn),
            (Ok(()), _) => {}
            (Err(_), Some(before)) => self.registry.claims.watch(gfn, before),
            (Err(_), None) => self.registry.claims.unwatch(gfn),
        }
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.walks.forget());
        result.doing("watch the page")
    }

    /// Lets the execute view permit on a page what its breakpoints and whoever watches it leave.
    pub(super) fn restrict<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        let rights = match self.registry.page(gfn) {
            None => Rights::All,
            Some(page) if page.shadow.is_some() => Rights::Execute,
            // With breakpoints in place it is guarded in all views, against all that may be watched there.
            Some(_) => return Ok(()),
        };
        match (self.registry.claims.watches().get(gfn), &self.views) {
            (Some(Watch { accesses, .. }), Some(views)) => watch::apply(hv, views, gfn, accesses, rights),
            _ => Ok(()),
        }
    }
}
