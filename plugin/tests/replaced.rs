//! Pages that the guest replaces, and views that Xen resets: no page is executed without its breakpoints.

use std::collections::HashMap;

use hyperbp::{
    Access, Accesses, Action, CodeMode, Engine, Event, Gfn, Gpa, Hypervisor, Int3, Mechanism, PAGE_SIZE, Reason,
    Registers, Reply, Rights, VcpuId, Verdict, ViewId,
};

const PAGE: Gfn = Gfn(7);
const AT: u16 = 0x40;
const PUSH: u8 = 0x55;
/// Our frames begin here.
const OURS: u64 = 100;

#[derive(Debug, thiserror::Error)]
#[error("there is no such page")]
struct NoPage;

/// Where a view leads: a machine frame, and what is permitted there.
type Entry = (usize, Rights);

/// Guest frame numbers, machine frames, and views, as Xen has them.
struct Xen {
    frames: Vec<[u8; PAGE_SIZE]>,
    host: HashMap<Gfn, Entry>,
    views: HashMap<ViewId, HashMap<Gfn, Entry>>,
    default: Rights,
}

impl Xen {
    fn new() -> Self {
        let mut xen = Self { frames: Vec::new(), host: HashMap::new(), views: HashMap::new(), default: Rights::All };
        xen.replace(PAGE, PUSH);
        xen
    }

    /// XENMEM_populate_physmap: another frame, and what was in the views is not (`p2m_altp2m_propagate_change`).
    fn replace(&mut self, gfn: Gfn, byte: u8) {
        self.frames.push([0x90; PAGE_SIZE]);
        let entry = (self.frames.len() - 1, self.default);
        self.frames[entry.0][usize::from(AT)] = byte;
        self.set_host(gfn, entry);
    }

    fn set_host(&mut self, gfn: Gfn, entry: Entry) {
        self.host.insert(gfn, entry);
        for view in self.views.values_mut() {
            view.entry(gfn).and_modify(|own| *own = entry);
        }
    }

    /// XENMEM_decrease_reservation of all pages of ours, which lie between those that views are remapped to.
    fn drop_ours(&mut self) {
        self.host.retain(|gfn, _| gfn.0 < OURS);
        self.reset_views();
    }

    /// XENMEM_decrease_reservation of a page that lies between ours (`p2m_reset_altp2m`).
    fn reset_views(&mut self) {
        self.views.values_mut().for_each(HashMap::clear);
    }

    fn entry(&self, view: ViewId, gfn: Gfn) -> Entry {
        let own = self.views.get(&view).and_then(|view| view.get(&gfn));
        *own.unwrap_or_else(|| &self.host[&gfn])
    }

    /// The view that virtual CPUs are in.
    fn exec(&self) -> ViewId {
        self.views.keys().min().copied().unwrap_or(ViewId::HOST)
    }

    fn is_executable(&self, gfn: Gfn) -> bool {
        matches!(self.entry(self.exec(), gfn).1, Rights::All | Rights::Execute | Rights::ReadExecute)
    }

    /// What is executed.
    fn shown(&self) -> u8 {
        self.frames[self.entry(self.exec(), PAGE).0][usize::from(AT)]
    }

    /// The guest's own.
    fn own(&self) -> u8 {
        self.frames[self.host[&PAGE].0][usize::from(AT)]
    }
}

impl Hypervisor for Xen {
    type Error = NoPage;

    fn vcpus(&self) -> u16 {
        1
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), NoPage> {
        let (frame, _) = self.host.get(&gpa.gfn()).ok_or(NoPage)?;
        into.copy_from_slice(&self.frames[*frame][usize::from(gpa.offset())..][..into.len()]);
        Ok(())
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), NoPage> {
        let (frame, _) = self.host.get(&gpa.gfn()).ok_or(NoPage)?;
        self.frames[*frame][usize::from(gpa.offset())..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn now(&self) -> u64 {
        0
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, NoPage> {
        let gfn = Gfn(OURS + self.frames.len() as u64);
        self.replace(gfn, 0);
        Ok(gfn)
    }

    fn restore_shadow_gfn(&mut self, gfn: Gfn) -> Result<bool, NoPage> {
        assert!(gfn.0 >= OURS);
        let lost = !self.host.contains_key(&gfn);
        if lost {
            self.replace(gfn, 0);
        }
        Ok(lost)
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), NoPage> {
        self.host.remove(&gfn).map(drop).ok_or(NoPage)
    }

    fn create_view(&mut self) -> Result<ViewId, NoPage> {
        let view = ViewId(1 + self.views.len() as u16);
        self.views.insert(view, HashMap::new());
        Ok(view)
    }

    fn switch_view(&mut self, _: ViewId) -> Result<(), NoPage> {
        Ok(())
    }

    fn drop_view(&mut self, view: ViewId) -> Result<(), NoPage> {
        self.views.remove(&view).map(drop).ok_or(NoPage)
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), NoPage> {
        if to.is_some_and(|to| !self.host.contains_key(&to)) || !self.host.contains_key(&gfn) {
            return Err(NoPage);
        }
        let entry = to.map(|to| self.entry(view, to));
        let view = self.views.get_mut(&view).ok_or(NoPage)?;
        match entry {
            Some(entry) => view.insert(gfn, entry),
            None => view.remove(&gfn),
        };
        Ok(())
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), NoPage> {
        let (frame, _) = self.entry(view, gfn);
        match self.views.get_mut(&view) {
            Some(view) => _ = view.insert(gfn, (frame, rights)),
            None => self.set_host(gfn, (frame, rights)),
        }
        Ok(())
    }

    fn rights(&mut self, view: ViewId, gfn: Gfn) -> Result<Option<Rights>, NoPage> {
        Ok(Some(self.entry(view, gfn).1))
    }

    fn set_default_rights(&mut self, rights: Rights) -> Result<(), NoPage> {
        self.default = rights;
        Ok(())
    }

    fn rip(&mut self, _: VcpuId) -> Result<u64, NoPage> {
        Ok(0)
    }

    fn stop_step(&mut self, _: VcpuId) -> Result<(), NoPage> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), NoPage> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), NoPage> {
        Ok(())
    }
}

fn handle(engine: &mut Engine, xen: &mut Xen, reason: Reason) -> Reply {
    let registers = Registers::default().with(|new| {
        new.rip = PAGE.at(AT).0;
        new.mode = CodeMode::Bits64;
    });
    let event = Event::new(VcpuId(0), xen.exec(), registers, reason);
    engine.handle(xen, &event, &mut |_, _, _| Verdict::Keep)
}

fn fetch(gfn: Gfn) -> Reason {
    let gpa = gfn.at(AT);
    Reason::Access(Access::new(gpa, Accesses::EXECUTE))
}

#[test]
fn a_replaced_page_and_a_reset_view_are_not_executed_without_breakpoints() {
    for mechanism in Mechanism::all() {
        let mut xen = Xen::new();
        let mut engine = Engine::new(&xen);
        let id = engine.insert(&mut xen, PAGE.at(AT), mechanism).unwrap();
        let is_shadow = !xen.views.is_empty();
        for (time, byte) in (1..).zip([0x53, 0x51, 0xcc]) {
            match byte {
                0x51 if is_shadow => xen.reset_views(),
                _ => xen.replace(PAGE, byte),
            }
            let byte = xen.own();
            assert_ne!((xen.shown(), xen.is_executable(PAGE)), (byte, true), "{mechanism}: it is executed");
            let reply = handle(&mut engine, &mut xen, fetch(PAGE));
            assert_eq!(reply.action, Action::Resume, "{mechanism}: it tries again");
            assert_eq!((xen.shown(), xen.is_executable(PAGE)), (0xcc, true), "{mechanism}: and meets the breakpoint");
            assert_eq!(xen.own(), if is_shadow { byte } else { 0xcc }, "{mechanism}");
            // In place, one that has our byte where the breakpoint is looks as if nothing had been replaced.
            assert_eq!(engine.counters().rearmed, if byte == 0xcc && !is_shadow { time - 1 } else { time });
            _ = handle(&mut engine, &mut xen, Reason::Int3(Int3::new(PAGE.at(AT), 1)));
            assert_eq!(engine.figures(id).unwrap().hits, time, "{mechanism}");
            // The step, if there is one, ends.
            _ = handle(&mut engine, &mut xen, Reason::Step);
        }
        engine.leave(&mut xen).unwrap();
        engine.finish(&mut xen).unwrap();
        assert_eq!((xen.default, xen.host[&PAGE].1), (Rights::All, Rights::All), "{mechanism}: nothing is left");
    }
}

/// A guest that may make hypercalls finds the frames of shadows, and gives them back.
#[test]
fn frames_that_the_guest_gives_back_are_added_again() {
    let mut xen = Xen::new();
    let mut engine = Engine::new(&xen);
    let pages = [PAGE, Gfn(9)];
    xen.replace(Gfn(9), PUSH);
    for page in pages {
        engine.insert(&mut xen, page.at(AT), Mechanism::AUTO).unwrap();
    }
    for time in 1..4 {
        xen.drop_ours();
        assert!(pages.iter().all(|page| !xen.is_executable(*page)));
        assert_eq!(handle(&mut engine, &mut xen, fetch(pages[1])).action, Action::Resume);
        // With one page, all are set up again.
        for page in pages {
            assert!(xen.is_executable(page));
            let (frame, _) = xen.entry(xen.exec(), page);
            assert_eq!((xen.frames[frame][usize::from(AT)], xen.own()), (0xcc, PUSH), "time {time}");
        }
        // Nobody sees a frame of ours.
        for gfn in xen.host.keys().filter(|gfn| gfn.0 >= OURS) {
            let (frame, _) = xen.entry(xen.exec(), *gfn);
            assert_eq!(xen.frames[frame], [0xff; PAGE_SIZE], "{gfn}");
        }
        assert_eq!(engine.counters().failures, 0);
    }
    engine.leave(&mut xen).unwrap();
    engine.finish(&mut xen).unwrap();
}

#[test]
fn verify_finds_a_view_that_permits_everything() {
    let mut xen = Xen::new();
    let mut engine = Engine::new(&xen);
    engine.insert(&mut xen, PAGE.at(AT), Mechanism::AUTO).unwrap();
    assert_eq!(engine.verify(&mut xen, 1).unwrap(), 0);
    xen.replace(PAGE, PUSH);
    xen.set_rights(xen.exec(), PAGE, Rights::All).unwrap();
    assert_eq!(xen.shown(), PUSH);
    assert_eq!(engine.verify(&mut xen, 1).unwrap(), 1);
    assert_eq!((xen.shown(), xen.own()), (0xcc, PUSH));
}

#[test]
fn a_page_that_the_guest_gets_is_executed_after_one_event() {
    let mut xen = Xen::new();
    let mut engine = Engine::new(&xen);
    engine.insert(&mut xen, PAGE.at(AT), Mechanism::AUTO).unwrap();
    xen.replace(Gfn(9), PUSH);
    assert!(!xen.is_executable(Gfn(9)));
    assert_eq!(handle(&mut engine, &mut xen, fetch(Gfn(9))).action, Action::Resume);
    assert!(xen.is_executable(Gfn(9)));
    assert_eq!(engine.counters().unexplained, 0);
}
