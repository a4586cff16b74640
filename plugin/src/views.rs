//! The three views that shadow pages need, and the frames the shadows are in.
//!
//! In the *execute* view, where virtual CPUs are but for single steps, a page with breakpoints shows its shadow. In the
//! *own* view every page is the guest's own, but writes to a page that has a shadow are events there, too. In the *write*
//! view they are permitted, while a virtual CPU is stepped over such a write; when the step is over, the shadow follows.
//!
//! A shadow page needs a frame number, and so a guest that looks through all of physical memory would find it there. So
//! all views show a *sink* at these numbers: a page of 0xFF, which is what a frame without memory reads as. What a guest
//! writes there goes to the sink of the write view, the *spill*, and is gone after the instruction; only a virtual CPU
//! that is stepped over another such write at the same time could see it. (No virtual CPU is in the host view, which
//! shows the shadows.)

use std::collections::HashSet;

use rustc_hash::FxBuildHasher;

use crate::{Gfn, Hypervisor, PAGE_SIZE, Rights, ViewId};

/// The views.
#[derive(Clone, Debug)]
pub(crate) struct Views {
    pub(crate) exec: ViewId,
    pub(crate) own: ViewId,
    pub(crate) write: ViewId,
    sink: Gfn,
    spill: Gfn,
    /// Frames with a page for a shadow that is not used at the moment. None is given back to the domain while there is a
    /// view: when a frame goes that lies between frames a view has remapped others to, Xen resets the whole view, and all
    /// breakpoints in it are gone (`p2m_altp2m_propagate_change`, xen/arch/x86/mm/p2m.c).
    /// For the same reason a host should have all frames beside each other and above all of the guest's: then what the
    /// guest itself gives back does not lie between them.
    free: Vec<Gfn>,
    /// All frames that are not the guest's.
    frames: HashSet<Gfn, FxBuildHasher>,
    /// None of them, at any time, was below this: most often they are above all of the guest's.
    lowest: Gfn,
    /// Those of the views that have not been dropped.
    there: Vec<ViewId>,
    /// Changes whenever a view lets go of a page.
    ///
    /// When Xen takes a page out of a view, it marks all virtual CPUs of the domain (`p2m_remove_entry`,
    /// xen/arch/x86/mm/p2m.c), and the next time each of them goes on, `hvm_do_resume` passes the mark on and returns before
    /// it comes to the registers of a response, its emulation, or an INT3 (xen/arch/x86/hvm/hvm.c,
    /// `vcpu_ioreq_handle_completion` in xen/common/ioreq.c). These it does the time after, whatever the guest is at then.
    /// Views and steps are not affected.
    pub(crate) unmappings: u64,
}

impl Views {
    /// Makes the views. No virtual CPU is in one yet.
    pub(crate) fn create<H: Hypervisor>(hv: &mut H) -> Result<Self, H::Error> {
        let (mut there, mut frames) = (Vec::new(), HashSet::default());
        let made = Self::make(hv, &mut there, &mut frames);
        // What failed is what the caller is to hear about, not that undoing it failed too.
        made.inspect_err(|_| drop(Self::unmake(hv, &mut there, &mut frames)))
    }

    fn make<H: Hypervisor>(
        hv: &mut H,
        there: &mut Vec<ViewId>,
        frames: &mut HashSet<Gfn, FxBuildHasher>,
    ) -> Result<Self, H::Error> {
        let mut view = |hv: &mut H| hv.create_view().inspect(|view| there.push(*view));
        let (exec, own, write) = (view(hv)?, view(hv)?, view(hv)?);
        let mut frame = |hv: &mut H| hv.add_shadow_gfn().inspect(|gfn| _ = frames.insert(*gfn));
        let (sink, spill) = (frame(hv)?, frame(hv)?);
        let (there, frames) = (there.clone(), frames.clone());
        let lowest = sink.min(spill);
        let views = Self { exec, own, write, sink, spill, free: Vec::new(), frames, lowest, there, unmappings: 0 };
        hv.write(sink.at(0), &[0xff; PAGE_SIZE])?;
        hv.remap(exec, spill, Some(sink))?;
        hv.remap(own, spill, Some(sink))?;
        hv.remap(write, sink, Some(spill))?;
        views.seal(hv, sink)?;
        views.seal(hv, spill)?;
        Ok(views)
    }

    /// Drops the views, which no virtual CPU may be in, and gives all frames back. What the hypervisor refuses is done when
    /// this is called again.
    pub(crate) fn destroy<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), H::Error> {
        Self::unmake(hv, &mut self.there, &mut self.frames)
    }

    fn unmake<H: Hypervisor>(
        hv: &mut H,
        there: &mut Vec<ViewId>,
        frames: &mut HashSet<Gfn, FxBuildHasher>,
    ) -> Result<(), H::Error> {
        let mut result = Ok(());
        let mut refused = |done: Result<(), H::Error>| done.map_err(|error| result = Err(error)).is_err();
        there.retain(|view| refused(hv.drop_view(*view)));
        frames.retain(|gfn| refused(hv.drop_shadow_gfn(*gfn)));
        result
    }

    /// Where a virtual CPU is but for single steps.
    pub(crate) const fn home(&self, monitored: bool) -> ViewId {
        if monitored { self.exec } else { self.own }
    }

    /// All of them.
    pub(crate) const fn all(&self) -> [ViewId; 3] {
        [self.exec, self.own, self.write]
    }

    /// A frame with a page for a shadow, with these bytes, that the execute view shows where it is. No virtual CPU may run:
    /// until it is [shown](Self::show) elsewhere, the guest can see it there.
    pub(crate) fn take_frame<H: Hypervisor>(&mut self, hv: &mut H, bytes: &[u8; PAGE_SIZE]) -> Result<Gfn, H::Error> {
        let gfn = match self.free.pop() {
            Some(gfn) => gfn,
            None => hv.add_shadow_gfn()?,
        };
        // From here on it is ours, whatever happens.
        self.frames.insert(gfn);
        self.lowest = self.lowest.min(gfn);
        hv.write(gfn.at(0), bytes)?;
        Ok(gfn)
    }

    /// Takes such a frame back, which no view shows elsewhere any more. From here on the execute view shows it where it is,
    /// so that nothing has to be unmapped when it is needed again; and it looks as if there was no memory.
    pub(crate) fn give_frame<H: Hypervisor>(&mut self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        hv.write(gfn.at(0), &[0xff; PAGE_SIZE])?;
        self.unmappings += 1;
        hv.remap(self.exec, gfn, None)?;
        hv.set_rights(self.exec, gfn, Rights::ReadExecute)?;
        // Between these two another virtual CPU may have written there.
        hv.write(gfn.at(0), &[0xff; PAGE_SIZE])?;
        self.free.push(gfn);
        Ok(())
    }

    /// Lets the execute view show a shadow in place of a page, guards the page in all of them, and shows nothing where the
    /// shadow is.
    ///
    /// The host view does not let the page be executed. No virtual CPU is in that view; but when Xen puts another page
    /// there, or resets a view (`p2m_altp2m_propagate_change`, `p2m_reset_altp2m`), the views have what the host view has:
    /// then the next execution is an event, and the page is [shown again](crate::placement::rearm).
    pub(crate) fn show<H: Hypervisor>(&self, hv: &mut H, shadow: Gfn, at: Gfn) -> Result<(), H::Error> {
        // First: Xen carries a change of the host view into the others.
        hv.set_rights(ViewId::HOST, at, Rights::ReadWrite)?;
        // A view is remapped to what it shows itself at the other frame, not to what the host view shows there
        // (`p2m_change_altp2m_gfn`, xen/arch/x86/mm/p2m.c). So it is only now that the shadow is hidden in it.
        hv.remap(self.exec, at, Some(shadow))?;
        hv.remap(self.exec, shadow, Some(self.sink))?;
        hv.remap(self.own, shadow, Some(self.sink))?;
        hv.remap(self.write, shadow, Some(self.spill))?;
        self.seal(hv, shadow)?;
        hv.set_rights(self.exec, at, Rights::Execute)?;
        hv.set_rights(self.own, at, Rights::ReadExecute)?;
        hv.set_rights(self.write, at, Rights::ReadExecute)
    }

    /// The same where it was shown before, whatever is left of that. A view lets go of a page, and until this returns the
    /// guest could see the shadow: no virtual CPU may run.
    pub(crate) fn show_again<H: Hypervisor>(&mut self, hv: &mut H, shadow: Gfn, at: Gfn) -> Result<(), H::Error> {
        self.unmappings += 1;
        hv.restore_shadow_gfn(shadow)?;
        // Where the execute view shows the sink, nothing can be remapped to the shadow.
        hv.remap(self.exec, shadow, None)?;
        self.show(hv, shadow, at)
    }

    /// Lets all views show again what they are to show at our own frames, which are [all there](Self::regain), apart from those
    /// of shadows in use.
    pub(crate) fn restore<H: Hypervisor>(&self, hv: &mut H) -> Result<(), H::Error> {
        hv.write(self.sink.at(0), &[0xff; PAGE_SIZE])?;
        hv.remap(self.exec, self.spill, Some(self.sink))?;
        hv.remap(self.own, self.spill, Some(self.sink))?;
        hv.remap(self.write, self.sink, Some(self.spill))?;
        self.seal(hv, self.sink)?;
        self.seal(hv, self.spill)?;
        for gfn in &self.free {
            hv.remap(self.own, *gfn, Some(self.sink))?;
            hv.remap(self.write, *gfn, Some(self.spill))?;
            self.seal(hv, *gfn)?;
        }
        Ok(())
    }

    /// Adds the pages of frames of ours again that the guest has given back, apart from those of shadows in use. Whether there
    /// were any: then all views are to be [restored](Self::restore).
    pub(crate) fn regain<H: Hypervisor>(&self, hv: &mut H) -> Result<bool, H::Error> {
        let mut all = [self.sink, self.spill].into_iter().chain(self.free.iter().copied());
        all.try_fold(false, |any, gfn| Ok(hv.restore_shadow_gfn(gfn)? || any))
    }

    /// Lets all views show the page itself again.
    pub(crate) fn unshow<H: Hypervisor>(&mut self, hv: &mut H, at: Gfn) -> Result<(), H::Error> {
        self.unmappings += 1;
        // The execute view lets go of the shadow. No view may let go of the page itself: Xen would forget where its frame
        // is (`set_gpfn_from_mfn` in `p2m_remove_entry`), and so would we.
        hv.remap(self.exec, at, None)?;
        [ViewId::HOST, self.own, self.write].into_iter().try_for_each(|view| hv.set_rights(view, at, Rights::All))
    }

    /// Whether the frame is not the guest's.
    #[inline(always)]
    pub(crate) fn hides(&self, gfn: Gfn) -> bool {
        gfn >= self.lowest && self.frames.contains(&gfn)
    }

    /// Lets instructions write, in the write view, to a page that has a shadow, or to a frame of ours.
    pub(crate) fn permit_write<H: Hypervisor>(&self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        hv.set_rights(self.write, gfn, Rights::All)
    }

    /// Makes writes there events again.
    pub(crate) fn deny_write<H: Hypervisor>(&self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        hv.set_rights(self.write, gfn, Rights::ReadExecute)
    }

    /// Makes a frame of ours look as if there was no memory.
    pub(crate) fn seal<H: Hypervisor>(&self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        self.all().into_iter().try_for_each(|view| hv.set_rights(view, gfn, Rights::ReadExecute))?;
        // Last: until then another virtual CPU may have written there.
        hv.write(self.spill.at(0), &[0xff; PAGE_SIZE])
    }
}
