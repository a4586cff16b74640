//! Memory alone, and views as Xen has them. Nothing runs in it.

use std::collections::BTreeMap;

use hyperbp::{Gfn, Gpa, Hypervisor, PAGE_SIZE, Rights, VcpuId, ViewId};

/// The first page of code.
pub(crate) const CODE: Gfn = Gfn(7);

/// There is no such page.
#[derive(Debug, thiserror::Error)]
#[error("there is no such page")]
pub(crate) struct NoPage;

/// Memory, and views as Xen has them.
#[derive(Default)]
pub(crate) struct Machine {
    pub(crate) pages: BTreeMap<Gfn, Box<[u8; PAGE_SIZE]>>,
    pub(crate) views: BTreeMap<ViewId, BTreeMap<Gfn, (Gfn, Rights)>>,
    pub(crate) vcpus: u16,
    pub(crate) rips: BTreeMap<VcpuId, u64>,
    pub(crate) pauses: u32,
    /// There are pages everywhere, of NOPs, and what is written is lost: the next frame for a shadow.
    pub(crate) endless: Option<u64>,
    pub(crate) calls: u64,
}

impl Machine {
    pub(crate) fn new(pages: u64) -> Self {
        let mut machine = Self { vcpus: 2, ..Self::default() };
        for gfn in 0..pages {
            let mut page = Box::new([0x90; PAGE_SIZE]);
            page[0x10..0x12].copy_from_slice(&[0x89, 0xd8]);
            page[0x26..0x2b].copy_from_slice(&[0xb8, 1, 2, 3, 4]);
            machine.pages.insert(Gfn(CODE.0 + gfn), page);
        }
        machine.views.insert(ViewId::HOST, BTreeMap::new());
        machine
    }

    /// A device writes: no view is asked, and nobody is told.
    pub(crate) fn device_writes(&mut self, gpa: Gpa, bytes: &[u8]) {
        let page = self.pages.get_mut(&gpa.gfn()).unwrap();
        page[usize::from(gpa.offset())..][..bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn entry(&self, view: ViewId, gfn: Gfn) -> (Gfn, Rights) {
        let of = |view| self.views.get(&view).and_then(|entries| entries.get(&gfn)).copied();
        of(view).or_else(|| of(ViewId::HOST)).unwrap_or((gfn, Rights::All))
    }

    /// What is executed there in a view.
    pub(crate) fn executed(&self, view: ViewId, gpa: Gpa) -> &[u8] {
        &self.pages[&self.entry(view, gpa.gfn()).0][usize::from(gpa.offset())..]
    }

    /// What each view shows at each frame, and permits there.
    pub(crate) fn all(&self) -> Vec<(ViewId, Gfn, (Gfn, Rights))> {
        let of = |view: ViewId| self.pages.keys().map(move |gfn| (view, *gfn, self.entry(view, *gfn)));
        self.views.keys().flat_map(|view| of(*view)).collect()
    }
}

impl Hypervisor for Machine {
    type Error = NoPage;

    fn vcpus(&self) -> u16 {
        self.vcpus
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), NoPage> {
        self.calls += 1;
        if self.endless.is_some() {
            into.fill(0x90);
            return Ok(());
        }
        let page = self.pages.get(&gpa.gfn()).ok_or(NoPage)?;
        into.copy_from_slice(&page[usize::from(gpa.offset())..][..into.len()]);
        Ok(())
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), NoPage> {
        self.calls += 1;
        if self.endless.is_some() {
            return Ok(());
        }
        let page = self.pages.get_mut(&gpa.gfn()).ok_or(NoPage)?;
        page[usize::from(gpa.offset())..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn now(&self) -> u64 {
        0
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, NoPage> {
        self.calls += 1;
        if let Some(next) = &mut self.endless {
            *next += 1;
            return Ok(Gfn(*next));
        }
        let gfn = (0x10_0000..).map(Gfn).find(|gfn| !self.pages.contains_key(gfn)).unwrap();
        self.pages.insert(gfn, Box::new([0; PAGE_SIZE]));
        Ok(gfn)
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), NoPage> {
        self.pages.remove(&gfn).map(drop).ok_or(NoPage)
    }

    fn create_view(&mut self) -> Result<ViewId, NoPage> {
        let view = ViewId(self.views.len() as u16);
        self.views.insert(view, BTreeMap::new());
        Ok(view)
    }

    fn switch_view(&mut self, _: ViewId) -> Result<(), NoPage> {
        Ok(())
    }

    fn drop_view(&mut self, view: ViewId) -> Result<(), NoPage> {
        self.views.remove(&view).map(drop).ok_or(NoPage)
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), NoPage> {
        self.calls += 1;
        match to {
            // It becomes what the view itself shows at the other one.
            Some(to) => {
                let entry = self.entry(view, to);
                self.views.get_mut(&view).unwrap().insert(gfn, entry);
            }
            None => drop(self.views.get_mut(&view).unwrap().remove(&gfn)),
        }
        Ok(())
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), NoPage> {
        self.calls += 1;
        let (page, _) = self.entry(view, gfn);
        self.views.get_mut(&view).unwrap().insert(gfn, (page, rights));
        Ok(())
    }

    fn rip(&mut self, vcpu: VcpuId) -> Result<u64, NoPage> {
        Ok(self.rips.get(&vcpu).copied().unwrap_or(0))
    }

    fn stop_step(&mut self, _: VcpuId) -> Result<(), NoPage> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), NoPage> {
        self.pauses += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), NoPage> {
        self.pauses -= 1;
        Ok(())
    }
}
