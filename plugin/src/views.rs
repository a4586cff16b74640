//! The two views that shadow pages need, and the frames the shadows are in.
//!
//! In the *execute* view, where virtual CPUs are but for single steps, a page with breakpoints shows its shadow. In the
//! *own* view every page is the guest's own, but writes to a page that has a shadow are events there, too: the shadow
//! follows them.
//!
//! A shadow page needs a frame number, and so a guest that looks through all of physical memory would find it there. So
//! each view shows a *sink* at these numbers: a page of 0xFF, which is what a frame without memory reads as. What a guest
//! writes there goes to the sink of the own view, and is gone after the instruction; only a virtual CPU that is stepped
//! at the same time could see it. (No virtual CPU is in the host view, which shows the shadows.)

use std::collections::HashSet;

use crate::{Gfn, Hypervisor, PAGE_SIZE, Rights, ViewId};

/// The views.
#[derive(Clone, Debug)]
pub(crate) struct Views {
    pub(crate) exec: ViewId,
    pub(crate) own: ViewId,
    exec_sink: Gfn,
    own_sink: Gfn,
    /// Frames with a page for a shadow that is not used at the moment. None is given back to the domain while there is a
    /// view: when a frame goes that lies between frames a view has remapped others to, Xen resets the whole view, and all
    /// breakpoints in it are gone (`p2m_altp2m_propagate_change`, xen/arch/x86/mm/p2m.c).
    free: Vec<Gfn>,
    /// All frames that are not the guest's.
    frames: HashSet<Gfn>,
    /// Those of the two views that have not been dropped.
    there: Vec<ViewId>,
}

impl Views {
    /// Makes the views. No virtual CPU is in one yet.
    pub(crate) fn create<H: Hypervisor>(hv: &mut H) -> Result<Self, H::Error> {
        let exec = hv.create_view()?;
        let made = (|| {
            let own = hv.create_view()?;
            let sinks = Self::add_sinks(hv).inspect_err(|_| drop(hv.drop_view(own)))?;
            Ok((own, sinks))
        })();
        // What failed is what the caller is to hear about, not that undoing it failed too.
        let (own, [exec_sink, own_sink]) = made.inspect_err(|_| drop(hv.drop_view(exec)))?;
        let (frames, there) = (HashSet::from([exec_sink, own_sink]), vec![exec, own]);
        let mut views = Self { exec, own, exec_sink, own_sink, free: Vec::new(), frames, there };
        match views.hide_sinks(hv) {
            Ok(()) => Ok(views),
            Err(error) => {
                let _ = views.destroy(hv);
                Err(error)
            }
        }
    }

    fn add_sinks<H: Hypervisor>(hv: &mut H) -> Result<[Gfn; 2], H::Error> {
        let first = hv.add_shadow_gfn()?;
        let second = hv.add_shadow_gfn().inspect_err(|_| drop(hv.drop_shadow_gfn(first)))?;
        Ok([first, second])
    }

    fn hide_sinks<H: Hypervisor>(&self, hv: &mut H) -> Result<(), H::Error> {
        hv.write(self.exec_sink.at(0), &[0xff; PAGE_SIZE])?;
        hv.remap(self.exec, self.own_sink, Some(self.exec_sink))?;
        hv.remap(self.own, self.exec_sink, Some(self.own_sink))?;
        self.seal(hv, self.exec_sink)?;
        self.seal(hv, self.own_sink)
    }

    /// Drops the views, which no virtual CPU may be in, and gives all frames back. What the hypervisor refuses is done when
    /// this is called again.
    pub(crate) fn destroy<H: Hypervisor>(&mut self, hv: &mut H) -> Result<(), H::Error> {
        let mut result = Ok(());
        let mut refused = |done: Result<(), H::Error>| done.map_err(|error| result = Err(error)).is_err();
        self.there.retain(|view| refused(hv.drop_view(*view)));
        self.frames.retain(|gfn| refused(hv.drop_shadow_gfn(*gfn)));
        result
    }

    /// A frame with a page for a shadow, with these bytes. No virtual CPU may run: until it is [shown](Self::show), the
    /// guest can see it where it is.
    pub(crate) fn take_frame<H: Hypervisor>(&mut self, hv: &mut H, bytes: &[u8; PAGE_SIZE]) -> Result<Gfn, H::Error> {
        let gfn = match self.free.pop() {
            Some(gfn) => gfn,
            None => hv.add_shadow_gfn()?,
        };
        // From here on it is ours, whatever happens.
        self.frames.insert(gfn);
        hv.write(gfn.at(0), bytes)?;
        Ok(gfn)
    }

    /// Takes such a frame back.
    pub(crate) fn give_frame(&mut self, gfn: Gfn) {
        self.free.push(gfn);
    }

    /// Lets the execute view show a shadow in place of a page, and nothing where the shadow is.
    pub(crate) fn show<H: Hypervisor>(&self, hv: &mut H, shadow: Gfn, at: Gfn) -> Result<(), H::Error> {
        // A view is remapped to what it shows itself at the other frame, not to what the host view shows there
        // (`p2m_change_altp2m_gfn`, xen/arch/x86/mm/p2m.c). So first it must show the shadow where that is.
        hv.remap(self.exec, shadow, None)?;
        hv.remap(self.exec, at, Some(shadow))?;
        hv.remap(self.exec, shadow, Some(self.exec_sink))?;
        hv.remap(self.own, shadow, Some(self.own_sink))?;
        self.seal(hv, shadow)
    }

    /// Whether the frame is not the guest's.
    pub(crate) fn hides(&self, gfn: Gfn) -> bool {
        self.frames.contains(&gfn)
    }

    /// Lets one instruction write to a frame of ours, or to a page that has a shadow, in the own view.
    pub(crate) fn permit_write<H: Hypervisor>(&self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        hv.set_rights(self.own, gfn, Rights::All)
    }

    /// Makes writes to a page that has a shadow events in the own view.
    pub(crate) fn deny_write<H: Hypervisor>(&self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        hv.set_rights(self.own, gfn, Rights::ReadExecute)
    }

    /// Makes a frame of ours look as if there was no memory.
    pub(crate) fn seal<H: Hypervisor>(&self, hv: &mut H, gfn: Gfn) -> Result<(), H::Error> {
        hv.set_rights(self.exec, gfn, Rights::ReadExecute)?;
        hv.set_rights(self.own, gfn, Rights::ReadExecute)?;
        // Last: until then another virtual CPU may have written there.
        hv.write(self.own_sink.at(0), &[0xff; PAGE_SIZE])
    }
}
