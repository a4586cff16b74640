//! A record of what has been done to a domain, kept beside the engine: so that it can be undone without it.

use std::collections::{HashMap, HashSet};

use hyperbp::{Gfn, Gpa, Hypervisor, Rights, VcpuId, ViewId};
use rustc_hash::FxBuildHasher;

/// INT3.
const INT3: u8 = 0xcc;

/// A hypervisor, and what has been done to its domain through it.
pub(crate) struct Recorded<H> {
    inner: H,
    views: Vec<ViewId>,
    frames: Vec<Gfn>,
    /// Pages of the host view whose rights are not [`Rights::All`].
    guarded: HashSet<Gfn, FxBuildHasher>,
    /// Bytes of the guest's own pages that are 0xCC, and what they were. `repair` changes this twice a hit. The host chooses
    /// what is in it, not the guest.
    displaced: HashMap<Gpa, u8, FxBuildHasher>,
    /// New pages of the host view are restricted.
    restricts_new: bool,
    /// Calls of `pause` without their `resume`.
    pauses: u32,
}

impl<H: Hypervisor> Recorded<H> {
    /// Nothing has been done yet.
    pub(crate) fn new(inner: H) -> Self {
        Self {
            inner,
            views: Vec::new(),
            frames: Vec::new(),
            guarded: HashSet::default(),
            displaced: HashMap::default(),
            restricts_new: false,
            pauses: 0,
        }
    }

    /// The hypervisor itself.
    pub(crate) const fn inner(&self) -> &H {
        &self.inner
    }

    /// The same, to do with it what leaves nothing to undo.
    pub(crate) const fn inner_mut(&mut self) -> &mut H {
        &mut self.inner
    }

    /// Whether nothing is left to [undo](Self::undo).
    pub(crate) fn is_clean(&self) -> bool {
        let Self { views, frames, guarded, displaced, restricts_new, pauses, .. } = self;
        let bare = !restricts_new && *pauses == 0;
        bare && views.is_empty() && frames.is_empty() && guarded.is_empty() && displaced.is_empty()
    }

    /// Undoes everything: the guest runs on as if nobody had been there. It may be paused or not.
    ///
    /// # Errors
    /// The first time the hypervisor refused something. The rest has been undone; it may be called again.
    pub(crate) fn undo(&mut self) -> Result<(), H::Error> {
        if self.is_clean() {
            return Ok(());
        }
        // If it cannot be paused, the rest is still to be tried.
        let paused = self.pause();
        let undone = self.undo_paused();
        let mut resumed = Ok(());
        while self.pauses > 0 {
            if let Err(error) = self.resume() {
                self.pauses = 0;
                resumed = Err(error);
            }
        }
        paused.and(undone).and(resumed)
    }

    fn undo_paused(&mut self) -> Result<(), H::Error> {
        let mut result = Ok(());
        let mut first = |done: Result<(), H::Error>| done.map_err(|error| result = Err(error)).is_ok();
        let Self { inner, views, frames, guarded, displaced, restricts_new, .. } = self;
        displaced.retain(|gpa, original| !first(put_back(inner, *gpa, *original)));
        for vcpu in 0..inner.vcpus() {
            first(inner.stop_step(VcpuId(vcpu)));
        }
        // No virtual CPU may be in a view that goes, nor a view show a page that goes.
        if !views.is_empty() {
            first(inner.switch_view(ViewId::HOST));
        }
        views.retain(|view| !first(inner.drop_view(*view)));
        *restricts_new = *restricts_new && !first(inner.set_default_rights(Rights::All));
        guarded.retain(|gfn| !first(inner.set_rights(ViewId::HOST, *gfn, Rights::All)));
        frames.retain(|gfn| !first(inner.drop_shadow_gfn(*gfn)));
        result
    }
}

/// Puts the guest's byte back, unless the guest has written another one there meanwhile.
fn put_back<H: Hypervisor>(hv: &mut H, gpa: Gpa, original: u8) -> Result<(), H::Error> {
    let mut byte = [0];
    hv.read(gpa, &mut byte)?;
    if byte == [INT3] { hv.write(gpa, &[original]) } else { Ok(()) }
}

impl<H: Hypervisor> Hypervisor for Recorded<H> {
    type Error = H::Error;

    fn vcpus(&self) -> u16 {
        self.inner.vcpus()
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), H::Error> {
        self.inner.read(gpa, into)
    }

    fn read_word(&mut self, gpa: Gpa) -> Result<u64, H::Error> {
        self.inner.read_word(gpa)
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), H::Error> {
        self.inner.write(gpa, bytes)
    }

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, H::Error> {
        self.inner.write_ram(gpa, bytes)
    }

    fn displace(&mut self, gpa: Gpa, original: u8) -> Result<(), H::Error> {
        // Before it is done: it may be done and nevertheless fail.
        self.displaced.insert(gpa, original);
        self.inner.displace(gpa, original)
    }

    fn replace(&mut self, gpa: Gpa, original: u8) -> Result<(), H::Error> {
        self.inner.replace(gpa, original)?;
        self.displaced.remove(&gpa);
        Ok(())
    }

    fn now(&self) -> u64 {
        self.inner.now()
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, H::Error> {
        self.inner.add_shadow_gfn().inspect(|gfn| self.frames.push(*gfn))
    }

    fn restore_shadow_gfn(&mut self, gfn: Gfn) -> Result<bool, H::Error> {
        self.inner.restore_shadow_gfn(gfn)
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), H::Error> {
        self.inner.drop_shadow_gfn(gfn)?;
        self.frames.retain(|other| *other != gfn);
        Ok(())
    }

    fn create_view(&mut self) -> Result<ViewId, H::Error> {
        self.inner.create_view().inspect(|view| self.views.push(*view))
    }

    fn switch_view(&mut self, view: ViewId) -> Result<(), H::Error> {
        self.inner.switch_view(view)
    }

    fn drop_view(&mut self, view: ViewId) -> Result<(), H::Error> {
        self.inner.drop_view(view)?;
        self.views.retain(|other| *other != view);
        Ok(())
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), H::Error> {
        self.inner.remap(view, gfn, to)
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), H::Error> {
        if view == ViewId::HOST && rights != Rights::All {
            self.guarded.insert(gfn);
        }
        self.inner.set_rights(view, gfn, rights)?;
        if view == ViewId::HOST && rights == Rights::All {
            self.guarded.remove(&gfn);
        }
        Ok(())
    }

    fn rights(&mut self, view: ViewId, gfn: Gfn) -> Result<Option<Rights>, H::Error> {
        self.inner.rights(view, gfn)
    }

    fn set_default_rights(&mut self, rights: Rights) -> Result<(), H::Error> {
        // Before it is done: it may be done and nevertheless fail.
        self.restricts_new |= rights != Rights::All;
        self.inner.set_default_rights(rights)?;
        self.restricts_new = rights != Rights::All;
        Ok(())
    }

    fn debug_control(&mut self, vcpu: VcpuId) -> Result<Option<u64>, H::Error> {
        self.inner.debug_control(vcpu)
    }

    fn rip(&mut self, vcpu: VcpuId) -> Result<u64, H::Error> {
        self.inner.rip(vcpu)
    }

    fn stop_step(&mut self, vcpu: VcpuId) -> Result<(), H::Error> {
        self.inner.stop_step(vcpu)
    }

    fn pause(&mut self) -> Result<(), H::Error> {
        self.inner.pause()?;
        self.pauses += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), H::Error> {
        self.inner.resume()?;
        self.pauses = self.pauses.saturating_sub(1);
        Ok(())
    }
}
