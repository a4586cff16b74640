//! Enters a domain, and leaves it: the views, and which virtual CPUs run in them.

use super::Engine;
use crate::error::Doing;
use crate::views::Views;
use crate::{Accesses, Error, Hypervisor, Placement, Rights, VcpuId, ViewId, step};

impl Engine {
    /// Makes the views, which are otherwise made with the first shadow or watch, and lets all virtual CPUs run in the execute
    /// view. Returns that.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    pub fn enter<H: Hypervisor>(&mut self, hv: &mut H) -> Result<ViewId, Error> {
        paused(hv, |hv| self.ensure_views(hv))?;
        Ok(self.views.as_ref().map_or(ViewId::HOST, |views| views.exec))
    }

    pub(super) fn enter_if_needed<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        if self.views.is_none() { self.enter(hv).map(drop) } else { Ok(()) }
    }

    pub(super) fn ensure_views<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        if self.views.is_some() {
            return Ok(());
        }
        let mut views = Views::create(hv).doing("create the views")?;
        let mut in_place = self.registry.pages().filter(|page| page.placement == Placement::InPlace);
        let entered = in_place
            .try_for_each(|page| {
                views.all().into_iter().try_for_each(|view| hv.set_rights(view, page.gfn, Rights::Execute))
            })
            .and_then(|()| hv.switch_view(views.exec));
        if let Err(error) = entered {
            let _ = views.destroy(hv);
            return Err(error).doing("enter the view");
        }
        self.views = Some(views);
        Ok(())
    }

    /// Whether a virtual CPU is to meet breakpoints in shadows, and watches: for a host that is interested in some of what
    /// it runs only. If not, it runs on the guest's own pages; what it writes to a page that has a shadow goes there, too.
    ///
    /// It is the caller who lets it enter the view that is returned: with the response to the event at hand.
    ///
    /// # Errors
    /// If there is no such virtual CPU, or the views have to be made and the hypervisor refuses.
    pub fn monitor<H: Hypervisor>(&mut self, hv: &mut H, vcpu: VcpuId, monitored: bool) -> Result<ViewId, Error> {
        self.enter_if_needed(hv)?;
        let slot = self.vcpus.get_mut(usize::from(vcpu.0)).ok_or(Error::NoSuchVcpu(vcpu.0))?;
        if slot.monitored != monitored && slot.fast.take().is_some() {
            // It may not be over, and would take it back to where it was at home.
            hv.stop_step(vcpu).doing("end a single-step")?;
        }
        slot.monitored = monitored;
        let view = |views: &Views| if slot.stepping { step::view_of(slot, views) } else { views.home(monitored) };
        Ok(self.views.as_ref().map_or(ViewId::HOST, view))
    }

    /// The same for all virtual CPUs at once, which are switched here.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    pub fn monitor_all<H: Hypervisor>(&mut self, hv: &mut H, monitored: bool) -> Result<(), Error> {
        self.enter_if_needed(hv)?;
        let Some(views) = &self.views else { return Ok(()) };
        paused(hv, |hv| {
            for (vcpu, slot) in (0..=u16::MAX).map(VcpuId).zip(&mut self.vcpus) {
                // A fast step would take it back to where it was at home.
                if slot.fast.take().is_some() {
                    hv.stop_step(vcpu).doing("end a single-step")?;
                }
                slot.monitored = monitored;
            }
            hv.switch_view(views.home(monitored)).doing("enter the view")
        })
    }

    /// Removes every breakpoint, and gives their pages back, or does so when it is called again, if now it
    /// [cannot](Self::is_settled). Events may still be queued, and virtual CPUs stay in our views until
    /// [`finish`](Self::finish): in the host view they could see the shadows' frames.
    ///
    /// # Errors
    /// If the hypervisor refuses; the rest has been undone nevertheless, and it may be called again.
    pub fn leave<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        self.leaving = true;
        let mut result = Ok(());
        for gfn in self.registry.claims.watches().gfns() {
            result = result.and(self.watch(hv, gfn, Accesses::NONE, false));
        }
        for id in self.registry.ids() {
            result = result.and(self.remove(hv, id));
        }
        if self.is_settled(hv) {
            result = result.and(self.vacate_all(hv).doing("give a page back"));
            result = result.and(self.close_all_again(hv).doing("give a page back"));
        }
        result
    }

    /// No virtual CPU is in the middle of a monitored step, none has [still to go on](Self::is_settled), and no page is
    /// still to be given back.
    #[must_use]
    pub fn is_idle<H: Hypervisor>(&mut self, hv: &mut H) -> bool {
        self.vcpus.iter().all(|vcpu| !vcpu.stepping)
            && self.vacant.is_empty()
            && self.unclosed.is_empty()
            && self.is_settled(hv)
    }

    /// After [`leave`](Self::leave), when the engine [is idle](Self::is_idle) and no event is queued: ends fast steps,
    /// drops the views and gives the shadows' memory back. Nothing of the engine is left in the domain.
    ///
    /// If the engine is not idle, that is done all the same. It harms no virtual CPU that was in the middle of a step; but
    /// one that has still to go on with an answer may do that too late, if the domain is not paused until nobody monitors
    /// it any more: then Xen forgets the answer (`vm_event_cleanup_domain`, xen/arch/x86/vm_event.c), unless that is an INT3
    /// to be delivered.
    ///
    /// # Errors
    /// If the hypervisor refuses; it may be called again.
    pub fn finish<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), Error> {
        if std::mem::take(&mut self.traps_new_pages)
            && let Err(error) = hv.set_default_rights(Rights::All)
        {
            self.traps_new_pages = true;
            return Err(error).doing("watch new pages no more");
        }
        let Some(views) = &mut self.views else { return Ok(()) };
        paused(hv, |hv| {
            for vcpu in 0..hv.vcpus() {
                hv.stop_step(VcpuId(vcpu)).doing("end the single-steps")?;
            }
            hv.switch_view(ViewId::HOST).doing("leave the view")?;
            views.destroy(hv).doing("drop the views")
        })?;
        self.views = None;
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.unmappings = self.unmappings_noted);
        // What could not be given back until now went with the views.
        for gfn in std::mem::take(&mut self.vacant) {
            self.registry.remove_page(gfn);
        }
        self.resync_pending = false;
        self.count_chores();
        self.unclosed.retain(|_, page| page.shadow.is_none());
        Ok(())
    }
}

/// Does something while the domain is paused.
pub(super) fn paused<H: Hypervisor, T>(hv: &mut H, work: impl FnOnce(&mut H) -> Result<T, Error>) -> Result<T, Error> {
    hv.pause().doing("pause the domain")?;
    let done = work(hv);
    hv.resume().doing("resume the domain")?;
    done
}
