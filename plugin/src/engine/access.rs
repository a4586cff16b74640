//! An access was denied: somebody watches the page, or it has breakpoints.

use super::{Engine, Observed};
use crate::breakpoint::{Located, Page};
use crate::dr7::Dr7;
use crate::insn::paging;
use crate::step::Over;
use crate::views::Views;
use crate::{Access, Action, Event, Gfn, Gpa, Hypervisor, Registers, Reply, Rights, ViewId, conceal, placement, step};

impl Engine {
    pub(super) fn on_access<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        access: &Access,
        reply: &mut Reply,
    ) -> Result<Observed, H::Error> {
        if access.execute && !access.read && !access.write && !access.page_walk {
            return self.on_fetch(hv, index, event, access, reply);
        }
        self.on_other_access(hv, index, event, access, reply)
    }

    fn on_other_access<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        access: &Access,
        reply: &mut Reply,
    ) -> Result<Observed, H::Error> {
        let gfn = access.gpa.gfn();
        let exec = self.views.as_ref().map(|views| views.exec);
        if let Some(at) = self.walked_in_place(hv, index, event, access) {
            self.count_hit(hv, at.found);
            // Its own INT3, if it is one, is that hit.
            self.vcpus[index].over = Some(at);
            return Ok(Observed::Hit(at.at));
        }
        if Some(event.view) != exec {
            return reply.answered(self.on_guarded(hv, index, event, access));
        }
        let watched = self.registry.claims.watches().get(gfn).is_some_and(|watch| watch.accesses.include(access));
        let stepped = self.registry.is_watched(gfn) || self.registry.page(gfn).is_some();
        let breakpoint = if stepped { self.fetched(hv, event, access) } else { None };
        // It may have been told of before: then it is still the same hit.
        let breakpoint = breakpoint.filter(|at| !self.vcpus[index].has_hit(*at));
        if let Some(found) = breakpoint.and_then(|at| self.registry.locate(at)) {
            self.count_hit(hv, found);
        }
        match (watched, breakpoint) {
            (true, breakpoint) => Ok(Observed::Access { access: *access, breakpoint }),
            (false, Some(at)) => Ok(Observed::Hit(at)),
            // Denied with what is watched: a write, where nobody wants to hear but of reads.
            (false, None) if self.registry.is_watched(gfn) && self.registry.page(gfn).is_none() => {
                reply.answered(self.step_in_own_view(index, &event.registers))
            }
            (false, None) => reply.answered(self.on_guarded(hv, index, event, access)),
        }
    }

    /// Counts the hit of a breakpoint whose INT3 is not executed.
    fn count_hit<H: Hypervisor>(&mut self, hv: &H, found: Located) {
        self.counters.hits += 1;
        self.hit_at = hv.now();
        self.registry.located_mut(found).figures.hits += 1;
    }

    /// An instruction was to be fetched from a page that does not permit it.
    #[cold]
    fn on_fetch<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        access: &Access,
        reply: &mut Reply,
    ) -> Result<Observed, H::Error> {
        let gfn = access.gpa.gfn();
        let ours = |views: &Views| views.all().contains(&event.view) || event.view == ViewId::HOST;
        let watched = self.registry.claims.watches().get(gfn).is_some_and(|watch| watch.accesses.execute);
        let hidden = self.views.as_ref().is_some_and(|views| views.hides(gfn));
        // An event of an earlier view of ours is queued.
        if watched || hidden || !self.views.as_ref().map_or(event.view == ViewId::HOST, ours) {
            return self.on_other_access(hv, index, event, access, reply);
        }
        *reply = Reply::default();
        if event.view == ViewId::HOST
            && let Some(views) = self.views.as_ref().filter(|_| !self.leaving)
        {
            // It was not there when the others were switched.
            reply.view = Some(views.home(self.vcpus[index].monitored));
        }
        match self.registry.page(gfn) {
            // Others try again until nobody accesses it any more.
            Some(page) if page.lifted > 0 => return self.on_other_access(hv, index, event, access, reply),
            Some(_) => self.rearm(hv, gfn)?,
            // A page that the guest has got meanwhile.
            None => {
                hv.set_rights(ViewId::HOST, gfn, Rights::All)?;
                self.restrict(hv, gfn)?;
            }
        }
        Ok(Observed::Answered)
    }

    /// Sets the breakpoints of a page again that was executed without them, or would have been.
    pub(super) fn rearm<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        let (Some(page), views) = (self.registry.page_mut(gfn), self.views.as_ref()) else { return Ok(()) };
        hv.pause()?;
        let lost = placement::regain(hv, views, page);
        let rearmed = lost.and_then(|lost| {
            // What else has gone with a frame of ours, views show again soon.
            self.resync_pending |= lost;
            placement::rearm(hv, views, page)
        });
        let rearmed = rearmed.and_then(|gone| self.restrict(hv, gfn).map(|()| gone));
        self.count_chores();
        hv.resume()?;
        if rearmed? {
            self.counters.rearmed += 1;
            if self.counters.rearmed == 1 {
                log::warn!("another page is at {gfn}, or the views were reset: its breakpoints are set again");
            }
        } else {
            self.counters.held += 1;
        }
        Ok(())
    }

    /// The breakpoint whose instruction an access is to fetch. That instruction is stepped in another view now, and so its
    /// breakpoint, in a shadow, will not be met.
    fn fetched<H: Hypervisor>(&self, hv: &mut H, event: &Event, access: &Access) -> Option<Gpa> {
        let lifts = self.registry.page(access.gpa.gfn()).is_some_and(|page| page.shadow.is_none());
        if lifts || !(access.execute || access.page_walk) {
            return None;
        }
        let at = paging::translate_rip(hv, &event.registers)?;
        self.registry.at(at).filter(|(page, _)| page.shadow.is_some()).map(|_| at)
    }

    /// The breakpoint in place whose instruction is to be fetched by way of a page table in the same page. The breakpoints of
    /// that page are out while the CPU walks, and so is this one.
    #[inline(always)]
    fn walked_in_place<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        access: &Access,
    ) -> Option<Over> {
        if !access.page_walk {
            return None;
        }
        let page = self.registry.page(access.gpa.gfn()).filter(|page| page.shadow.is_none() && page.lifted == 0)?;
        let gfn = page.gfn;
        let at = paging::translate_rip(hv, &event.registers)?;
        let found = self.registry.locate(at).filter(|_| at.gfn() == gfn)?;
        (!self.vcpus[index].has_hit(at)).then_some(Over { at, found })
    }

    /// Lets an access that was reported, or whose instruction was the `hit` of a breakpoint, be made: by the guest itself, for
    /// Xen emulates only what is still denied.
    pub(super) fn permit<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        access: &Access,
        hit: Option<Gpa>,
        changed: Option<&Registers>,
    ) -> Result<Reply, H::Error> {
        let registers = changed.unwrap_or(&event.registers);
        // A fast step would run one iteration, and the next one would be a hit.
        let repeated = hit.filter(|at| self.repeated_at(*at, registers).is_some());
        if let Some(at) = repeated {
            self.vcpus[index].repeat(at, registers);
        }
        let gfn = access.gpa.gfn();
        let watch = self.registry.claims.watches().get(gfn).filter(|watch| watch.accesses.include(access));
        let after = watch.is_some_and(|watch| watch.after);
        self.vcpus[index].accessing = after.then_some(*access);
        let after = after || repeated.is_some();
        let monitored = after || self.vcpus[index].stepping || self.vcpus[index].interrupted.is_some();
        let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
        match (self.registry.page_mut(gfn), views) {
            (Some(page), views) if monitored || changed.is_some() => {
                placement::catch_up(hv, views, page)?;
                conceal::on_own_bytes(hv, views, vcpu, page, registers, access.write)
            }
            (Some(page), Some(views)) if page.shadow.is_some() && !access.read && !access.write => {
                Ok(step::fast_step_in_own_view(vcpu, views, registers.rip))
            }
            (Some(_), _) => self.on_guarded(hv, index, event, access),
            // It is not watched any more. But what would try again is not to be hit again.
            (None, _) if watch.is_none() && hit.is_none() => Ok(self.tried_again(index, Action::Resume)),
            (None, Some(views)) if after => Ok(step::step_on_own_pages(vcpu, views)),
            (None, _) => self.step_in_own_view(index, registers),
        }
    }

    /// Lets an access be tried again. If an INT3 may be executed again for it, that is the same hit, and so it is to be known
    /// when that is through.
    fn tried_again(&mut self, index: usize, action: Action) -> Reply {
        let vcpu = &mut self.vcpus[index];
        match vcpu.interrupted {
            Some(_) if !vcpu.stepping => Reply { step: vcpu.step(), ..Reply::default() },
            _ => Reply { action, ..Reply::default() },
        }
    }

    /// Lets the instruction at RIP run on the guest's own pages.
    fn step_in_own_view<E>(&mut self, index: usize, registers: &Registers) -> Result<Reply, E> {
        let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
        Ok(match views {
            Some(views) if vcpu.stepping || vcpu.interrupted.is_some() => step::step_on_own_pages(vcpu, views),
            Some(views) => step::fast_step_in_own_view(vcpu, views, registers.rip),
            None => Reply::default(),
        })
    }

    /// Answers an access that nobody wants to hear of.
    fn on_guarded<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
        access: &Access,
    ) -> Result<Reply, H::Error> {
        let (vcpu, views, gfn) = (&mut self.vcpus[index], self.views.as_ref(), access.gpa.gfn());
        let guarded = |page: &&mut Page| {
            let shadowed =
                |views: &Views| event.view == views.exec || (views.all().contains(&event.view) && access.write);
            page.shadow.is_none() || views.is_some_and(shadowed)
        };
        let Some(page) = self.registry.page_mut(gfn).filter(guarded) else {
            if let Some(views) = views.filter(|views| access.write && views.hides(gfn))
                && vcpu.owe(gfn)
            {
                self.counters.discarded += 1;
                views.permit_write(hv, gfn)?;
                return Ok(step::step_on_own_pages(vcpu, views));
            }
            self.counters.unexplained += 1;
            if self.leaving || views.is_some_and(|views| !views.all().contains(&event.view)) {
                // It was queued when the virtual CPU was in another view, or when the page was ours.
                return Ok(self.tried_again(index, Action::Resume));
            }
            // Not ours, or not any more. Xen emulates only if the access is still denied, so the guest goes on.
            return Ok(self.tried_again(index, Action::Emulate));
        };
        placement::catch_up(hv, views, page)?;
        if access.execute && !access.write && !access.read {
            // The page is lifted, or was a moment ago. Whoever it is not lifted for tries again until it is over.
            match vcpu.owes(gfn) && page.lifted > 0 {
                true => placement::uncover(hv, views, gfn)?,
                false => self.counters.held += 1,
            }
            return Ok(Reply::default());
        }
        match access.write {
            true => self.counters.writes += 1,
            false => self.counters.reads += 1,
        }
        let dr7 = Dr7 { vcpu: event.vcpu, trust_event: self.trust_event_dr7, ask: true };
        conceal::begin(hv, views, vcpu, &mut self.factory, page, event, dr7)
    }
}
