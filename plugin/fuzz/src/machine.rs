//! A hypervisor that carries out what it is asked to, and refuses now and then; without a guest.

use std::collections::BTreeMap;

use hyperbp::{Action, Gfn, Gpa, Hypervisor, PAGE_SIZE, Reply, Rights, Step, VcpuId, ViewId};

/// Pages of the guest, from frame 0 on.
pub const PAGES: u64 = 4;
/// Frames from this one on are for shadows.
pub const SHADOWS: u64 = 100;
const INT3: u8 = 0xcc;
/// Where a virtual CPU is that has gone on.
const ELSEWHERE: u64 = 0x7fff_0000;
/// What there is room for.
const MOST_SHADOWS: u64 = 6;
const MOST_VIEWS: usize = 10;
/// Calls that one call of the engine may make: each breakpoint and each page costs a few.
const MOST_CALLS: u32 = 1500;

/// A virtual CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Where it runs.
    pub view: ViewId,
    /// A monitored step is on.
    pub stepping: bool,
    /// A fast step is on, and ends in this view.
    pub fast: Option<ViewId>,
    /// Where it was when it was answered with what is done only when it goes on: it has not gone on yet.
    pub held: Option<u64>,
    /// Its DR7, if that can be told.
    pub dr7: Option<u64>,
}

/// It refuses.
#[derive(Debug, thiserror::Error)]
#[error("refused")]
pub struct Refused;

/// The hypervisor.
pub struct Machine {
    pages: BTreeMap<Gfn, [u8; PAGE_SIZE]>,
    /// The guest's pages without anything of ours.
    truth: BTreeMap<Gfn, [u8; PAGE_SIZE]>,
    /// What is not as in the host view, or, in that, not as it was: what is shown there, and what is permitted.
    views: BTreeMap<ViewId, BTreeMap<Gfn, (Gfn, Rights)>>,
    /// The virtual CPUs.
    pub cpus: Vec<Cpu>,
    /// A bit for each page that somebody watches.
    pub watched: u8,
    /// The number of the view that was made last.
    pub newest_view: u16,
    pauses: u32,
    /// Calls until it refuses, and how many it refuses then.
    pub refuse: (u8, u8),
    /// Calls that it has refused since the engine was called.
    refusals: u32,
    /// It has also refused that something refused be undone: then something may be left behind.
    pub stubborn: bool,
    /// Calls since the engine was called.
    calls: u32,
}

impl Machine {
    /// One with so many virtual CPUs, and all of the guest's pages like this one.
    #[must_use]
    pub fn new(vcpus: usize, page: [u8; PAGE_SIZE]) -> Self {
        let pages: BTreeMap<_, _> = (0..PAGES).map(|gfn| (Gfn(gfn), page)).collect();
        Self {
            truth: pages.clone(),
            pages,
            views: BTreeMap::from([(ViewId::HOST, BTreeMap::new())]),
            cpus: vec![Cpu::default(); vcpus],
            watched: 0,
            newest_view: 0,
            pauses: 0,
            refuse: (0, 0),
            refusals: 0,
            stubborn: false,
            calls: 0,
        }
    }

    /// The engine is about to be called.
    pub fn begin(&mut self) {
        (self.calls, self.refusals) = (0, 0);
    }

    /// The engine has returned.
    pub fn end(&self) {
        assert_eq!(self.pauses, 0, "the domain stays paused");
    }

    /// Looks whether the engine has left anything behind.
    pub fn check_left(&self) {
        for (gfn, page) in &self.truth {
            assert!(self.pages[gfn] == *page, "bytes are left in {gfn}");
        }
        let host = &self.views[&ViewId::HOST];
        assert!(host.values().all(|(_, rights)| *rights == Rights::All), "guards are left: {host:?}");
        assert_eq!(self.pages.len(), self.truth.len(), "frames are left");
        assert_eq!(self.views.len(), 1, "views are left");
        // DR7 is the guest's.
        let idle = |cpu: &Cpu| Cpu { dr7: None, ..*cpu } == Cpu::default();
        assert!(self.cpus.iter().all(idle), "steps are left: {:?}", self.cpus);
    }

    /// Counts a call, and says whether it is carried out.
    fn call(&mut self) -> Result<(), Refused> {
        self.calls += 1;
        assert!(self.calls < MOST_CALLS, "endless work");
        let (wait, times) = &mut self.refuse;
        if *wait > 0 {
            *wait -= 1;
            return Ok(());
        }
        if *times == 0 {
            return Ok(());
        }
        *times -= 1;
        self.refusals += 1;
        self.stubborn |= self.refusals > 1;
        Err(Refused)
    }

    /// Whether there is such a view.
    #[must_use]
    pub fn has(&self, view: ViewId) -> bool {
        self.views.contains_key(&view)
    }

    /// What a view shows at a page, and permits.
    fn lookup(&self, view: ViewId, gfn: Gfn) -> (Gfn, Rights) {
        let in_view = |view| self.views.get(&view).and_then(|view| view.get(&gfn)).copied();
        in_view(view).or_else(|| in_view(ViewId::HOST)).unwrap_or((gfn, Rights::All))
    }

    fn bytes(&mut self, gpa: Gpa, length: usize) -> Result<&mut [u8], Refused> {
        let at = usize::from(gpa.offset());
        assert!(at + length <= PAGE_SIZE, "an access crosses a page");
        let page = self.pages.get_mut(&gpa.gfn()).ok_or(Refused)?;
        Ok(&mut page[at..at + length])
    }

    /// The guest's own bytes, with nothing of ours.
    fn own(&mut self, gpa: Gpa, length: usize) -> Option<&mut [u8]> {
        let at = usize::from(gpa.offset());
        self.truth.get_mut(&gpa.gfn()).map(|page| &mut page[at..at + length])
    }

    /// The guest writes in the view that a virtual CPU is in, if nothing keeps it from that.
    pub fn guest_writes(&mut self, vcpu: usize, gpa: Gpa, bytes: &[u8]) {
        let (shown, rights) = self.lookup(self.cpus[vcpu].view, gpa.gfn());
        let bytes = &bytes[..bytes.len().min(PAGE_SIZE - usize::from(gpa.offset()))];
        if !matches!(rights, Rights::All | Rights::ReadWrite) || shown != gpa.gfn() || gpa.gfn().0 >= PAGES {
            return;
        }
        if let Some(own) = self.own(gpa, bytes.len()) {
            own.copy_from_slice(bytes);
        }
        if let Ok(page) = self.bytes(gpa, bytes.len()) {
            page.copy_from_slice(bytes);
        }
    }

    /// A device writes to the guest's memory, whatever views permit. The engine cannot know of a 0xCC over its own 0xCC, so there
    /// is none.
    pub fn device_writes(&mut self, gpa: Gpa, bytes: &[u8]) {
        let (Some(page), Some(own)) = (self.pages.get_mut(&gpa.gfn()), self.truth.get_mut(&gpa.gfn())) else { return };
        for (at, byte) in (usize::from(gpa.offset())..PAGE_SIZE).zip(bytes) {
            if page[at] != INT3 || *byte != INT3 {
                (page[at], own[at]) = (*byte, *byte);
            }
        }
    }

    /// A virtual CPU carries out a reply. Whether it is asked for what it already does is only known if all events
    /// so far were possible.
    pub fn carry_out(&mut self, vcpu: usize, rip: u64, reply: &Reply, possible: bool) {
        assert!(reply.view.is_none_or(|view| self.has(view)), "a switch to a view that is not there");
        if let Step::Fast(back) = reply.step {
            assert!(self.has(back), "a fast step back to a view that is not there");
        }
        let cpu = &mut self.cpus[vcpu];
        cpu.held = (!matches!(reply.action, Action::Resume)).then_some(rip);
        match reply.step {
            Step::Keep => {}
            Step::On => {
                assert!(!possible || !cpu.stepping, "stepping is on already");
                cpu.stepping = true;
            }
            Step::Off => {
                assert!(!possible || cpu.stepping, "stepping is off already");
                cpu.stepping = false;
            }
            Step::Fast(back) => {
                assert!(!possible || !cpu.stepping, "a fast step in the middle of a step");
                cpu.fast = Some(back);
            }
        }
        cpu.view = reply.view.unwrap_or(cpu.view);
    }
}

impl Hypervisor for Machine {
    type Error = Refused;

    fn vcpus(&self) -> u16 {
        self.cpus.len() as u16
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Refused> {
        self.call()?;
        into.copy_from_slice(self.bytes(gpa, into.len())?);
        Ok(())
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Refused> {
        self.call()?;
        self.bytes(gpa, bytes.len())?.copy_from_slice(bytes);
        // An instruction was interpreted.
        let watched = gpa.gfn().0 < PAGES && self.watched >> gpa.gfn().0 & 1 != 0;
        if let Some(own) = self.own(gpa, bytes.len()) {
            assert!(!watched, "a page that somebody watches was written to");
            own.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Refused> {
        self.write(gpa, bytes).map(|()| true)
    }

    fn displace(&mut self, gpa: Gpa, original: u8) -> Result<(), Refused> {
        self.call()?;
        let own = self.own(gpa, 1).ok_or(Refused)?[0];
        assert!(own == original || self.stubborn, "the byte that is displaced at {gpa} is not the guest's");
        self.bytes(gpa, 1)?[0] = INT3;
        Ok(())
    }

    fn replace(&mut self, gpa: Gpa, original: u8) -> Result<(), Refused> {
        self.call()?;
        let own = self.own(gpa, 1).ok_or(Refused)?[0];
        assert!(own == original || self.stubborn, "the byte that is replaced at {gpa} is not the guest's");
        self.bytes(gpa, 1)?[0] = original;
        Ok(())
    }

    fn now(&self) -> u64 {
        self.calls.into()
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Refused> {
        self.call()?;
        let free = (SHADOWS..SHADOWS + MOST_SHADOWS).map(Gfn).find(|gfn| !self.pages.contains_key(gfn));
        let gfn = free.ok_or(Refused)?;
        self.pages.insert(gfn, [0; PAGE_SIZE]);
        Ok(gfn)
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), Refused> {
        self.call()?;
        let shown = self.views.values().any(|view| view.iter().any(|(at, (to, _))| *to == gfn && *at != gfn));
        assert!(gfn.0 >= SHADOWS, "a page of the guest's is dropped");
        if shown {
            return Err(Refused);
        }
        self.pages.remove(&gfn).map(drop).ok_or(Refused)
    }

    fn create_view(&mut self) -> Result<ViewId, Refused> {
        self.call()?;
        if self.views.len() == MOST_VIEWS {
            return Err(Refused);
        }
        self.newest_view += 1;
        self.views.insert(ViewId(self.newest_view), BTreeMap::new());
        Ok(ViewId(self.newest_view))
    }

    fn switch_view(&mut self, view: ViewId) -> Result<(), Refused> {
        self.call()?;
        self.views.get(&view).ok_or(Refused)?;
        self.cpus.iter_mut().for_each(|cpu| cpu.view = view);
        Ok(())
    }

    fn drop_view(&mut self, view: ViewId) -> Result<(), Refused> {
        self.call()?;
        if view == ViewId::HOST || self.cpus.iter().any(|cpu| cpu.view == view) {
            return Err(Refused);
        }
        self.views.remove(&view).map(drop).ok_or(Refused)
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), Refused> {
        self.call()?;
        assert_ne!(view, ViewId::HOST, "the host view is not remapped");
        let view = self.views.get_mut(&view).ok_or(Refused)?;
        match to {
            Some(to) => view.insert(gfn, (to, Rights::All)),
            None => {
                let late = self.cpus.iter().find(|cpu| cpu.held.is_some());
                assert!(late.is_none() || self.stubborn, "Xen would be late with the last answer: {late:?}");
                view.remove(&gfn)
            }
        };
        Ok(())
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), Refused> {
        self.call()?;
        self.pages.get(&gfn).ok_or(Refused)?;
        let to = self.lookup(view, gfn).0;
        self.views.get_mut(&view).ok_or(Refused)?.insert(gfn, (to, rights));
        Ok(())
    }

    fn rip(&mut self, vcpu: VcpuId) -> Result<u64, Refused> {
        self.call()?;
        let cpu = self.cpus.get(usize::from(vcpu.0)).ok_or(Refused)?;
        Ok(cpu.held.unwrap_or(ELSEWHERE))
    }

    /// That of the event may be another one.
    fn debug_control(&mut self, vcpu: VcpuId) -> Result<Option<u64>, Refused> {
        self.call()?;
        self.cpus.get(usize::from(vcpu.0)).map(|cpu| cpu.dr7).ok_or(Refused)
    }

    fn stop_step(&mut self, vcpu: VcpuId) -> Result<(), Refused> {
        self.call()?;
        let cpu = self.cpus.get_mut(usize::from(vcpu.0)).ok_or(Refused)?;
        (cpu.stepping, cpu.fast) = (false, None);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Refused> {
        self.call()?;
        self.pauses += 1;
        Ok(())
    }

    /// It is refused if the domain is gone only, and then nothing matters.
    fn resume(&mut self) -> Result<(), Refused> {
        self.calls += 1;
        assert!(self.pauses > 0, "a resume without a pause");
        self.pauses -= 1;
        Ok(())
    }
}
