//! Writes that are no events: by devices, by other domains that map the guest's pages, by the device model. And what Xen
//! loses of what was set up.

use std::collections::BTreeMap;

use hyperbp::{
    Access, Accesses, Action, BreakpointId, Engine, Event, Gfn, Gpa, Int3, Mechanism, PAGE_SIZE, Placement, Reason,
    Registers, Reply, Rights, Step, VcpuId, Verdict, ViewId,
};

use crate::machine::{CODE, Machine};

const INT3: u8 = 0xcc;
/// `mov eax, ebx`.
const MOVE: Gpa = Gpa(0x7010);
/// `mov eax, imm32`, over the end of eight aligned bytes.
const IMMEDIATE: Gpa = Gpa(0x7026);
/// Where the guest reads and writes.
const DATA: Gpa = Gpa(0x7800);

/// A machine with breakpoints.
struct World {
    machine: Machine,
    engine: Engine,
    view: ViewId,
    ids: Vec<BreakpointId>,
}

impl World {
    fn new(mechanism: Mechanism, at: &[Gpa]) -> Self {
        Self::with_pages(mechanism, 1, at)
    }

    fn with_pages(mechanism: Mechanism, pages: u64, at: &[Gpa]) -> Self {
        let mut machine = Machine::new(pages);
        let mut engine = Engine::new(&machine);
        let view = engine.enter(&mut machine).unwrap();
        let ids = at.iter().map(|gpa| engine.insert(&mut machine, *gpa, mechanism).unwrap()).collect();
        Self { machine, engine, view, ids }
    }

    fn event(&mut self, rip: Gpa, view: ViewId, reason: Reason) -> (Reply, u32) {
        let mut registers = Registers::default().with(|new| {
            new.rip = rip.0;
            new.rflags = 2;
        });
        registers.gpr[..4].copy_from_slice(&[0xa, 0xc, 0xd, 0xb]);
        let (event, mut told) = (Event::new(VcpuId(0), view, registers, reason), 0);
        let reply = self.engine.handle(&mut self.machine, &event, &mut |_, _, _| {
            told += 1;
            Verdict::Keep
        });
        (reply, told)
    }

    fn hit(&mut self, at: Gpa) -> (Reply, u32) {
        self.event(at, self.view, Reason::Int3(Int3::new(at, 1)))
    }

    fn rewritten(&self) -> u64 {
        self.ids.iter().map(|id| self.engine.figures(*id).unwrap().rewritten).sum()
    }

    /// The copy is the page with the breakpoints in it, or the page has them.
    fn check_shown(&self, breakpoints: &[(Gpa, u8)]) {
        let mut own = *self.machine.pages[&CODE];
        for (gpa, original) in breakpoints {
            own[usize::from(gpa.offset())] = INT3;
            let byte = self.machine.pages[&CODE][usize::from(gpa.offset())];
            assert!([INT3, *original].contains(&byte), "{byte:#x} at {gpa}, not {original:#x}");
        }
        assert!(self.machine.executed(self.view, CODE.at(0)) == own, "what is executed is not what memory has");
        let guard = self.machine.entry(self.view, CODE).1;
        assert_eq!(guard, Rights::Execute);
    }
}

/// What the guest does after a hit, to be compared with `mov eax, ecx`.
fn moves_ecx(world: &World, reply: &Reply) {
    match &reply.action {
        Action::SetRegisters(registers) => {
            assert_eq!((registers.gpr[0], registers.rip), (0xc, MOVE.0 + 2));
        }
        Action::EmulateInstruction(bytes) => assert_eq!(bytes[..2], [0x89, 0xc8]),
        Action::Resume => {
            // It is stepped, on the guest's own bytes.
            let view = reply.view.unwrap_or(world.view);
            assert_ne!(reply.step, Step::Keep);
            assert_eq!(world.machine.executed(view, MOVE)[..2], [0x89, 0xc8]);
        }
        other => panic!("{other:?}"),
    }
}

/// A device writes the instruction under a breakpoint. With a shadow the breakpoint is still there.
#[test]
fn a_hit_runs_what_a_device_has_written_under_the_breakpoint() {
    for mechanism in Mechanism::all().filter(|mechanism| mechanism.placement() == Placement::Shadow) {
        let mut world = World::new(mechanism, &[MOVE, IMMEDIATE]);
        world.machine.device_writes(MOVE, &[0x89, 0xc8]);
        world.machine.device_writes(DATA, &[1, 2, 3]);
        let (reply, told) = world.hit(MOVE);
        assert_eq!((told, world.rewritten()), (1, 1), "{mechanism}");
        moves_ecx(&world, &reply);
        // The whole page is taken over, not only what was hit.
        world.check_shown(&[(MOVE, 0x89), (IMMEDIATE, 0xb8)]);
        assert_eq!(world.engine.counters().resynced, 1);
    }
}

/// Only bytes behind the 0xCC were written: the breakpoint is there with every placement.
#[test]
fn a_hit_runs_what_a_device_has_written_behind_the_breakpoint() {
    for mechanism in Mechanism::all() {
        let mut world = World::new(mechanism, &[MOVE, IMMEDIATE]);
        world.machine.device_writes(Gpa(MOVE.0 + 1), &[0xc8]);
        world.machine.device_writes(Gpa(IMMEDIATE.0 + 4), &[9]);
        let (reply, _) = world.hit(MOVE);
        moves_ecx(&world, &reply);
        if reply.step == Step::On {
            _ = world.event(Gpa(MOVE.0 + 2), reply.view.unwrap_or(world.view), Reason::Step);
        }
        world.check_shown(&[(MOVE, 0x89), (IMMEDIATE, 0xb8)]);
        assert_eq!(world.rewritten(), 2, "{mechanism}");
        world.machine.device_writes(Gpa(IMMEDIATE.0 + 4), &[8]);
        match world.hit(IMMEDIATE).0.action {
            Action::SetRegisters(registers) => assert_eq!(registers.gpr[0], 0x0803_0201, "{mechanism}"),
            Action::EmulateInstruction(bytes) => assert_eq!(bytes[..5], [0xb8, 1, 2, 3, 8], "{mechanism}"),
            _ => {}
        }
        assert_eq!(world.rewritten(), 3, "{mechanism}");
    }
}

/// What a device writes beside breakpoints, or over those in place, is found when the pages are compared, some at a time.
#[test]
fn a_round_of_verify_finds_what_devices_have_written() {
    const PAGES: u64 = 5;
    let at: Vec<Gpa> = (0..PAGES).map(|page| Gfn(CODE.0 + page).at(MOVE.offset())).collect();
    for mechanism in Mechanism::all() {
        let mut world = World::with_pages(mechanism, PAGES, &at);
        assert_eq!(world.engine.page_count(), PAGES as usize);
        for page in 0..PAGES {
            world.machine.device_writes(Gfn(CODE.0 + page).at(MOVE.offset()), &[0x89, 0xc8]);
            world.machine.device_writes(Gfn(CODE.0 + page).at(DATA.offset()), &[1, 2, 3]);
        }
        let calls = world.machine.calls;
        let found: Vec<usize> = [2; 3].map(|pages| world.engine.verify(&mut world.machine, pages).unwrap()).into();
        assert_eq!(found, [2, 2, 1], "{mechanism}: two of five at a time, and the first again");
        assert!(world.machine.calls - calls <= 3 * 6, "{mechanism}: {} calls", world.machine.calls - calls);
        assert_eq!((world.rewritten(), world.engine.counters().resynced), (PAGES, PAGES), "{mechanism}");
        for gpa in &at {
            assert_eq!(world.machine.executed(world.view, *gpa)[..2], [INT3, 0xc8], "{mechanism}");
            assert_eq!(world.machine.executed(world.view, gpa.gfn().at(DATA.offset()))[..3], [1, 2, 3]);
        }
        let (reply, told) = world.hit(MOVE);
        assert_eq!(told, 1);
        moves_ecx(&world, &reply);
        if reply.step == Step::On {
            _ = world.event(Gpa(MOVE.0 + 2), reply.view.unwrap_or(world.view), Reason::Step);
        }
        assert_eq!(world.engine.verify(&mut world.machine, 100).unwrap(), 0, "{mechanism}: nothing is new");
        assert_eq!(world.engine.verify(&mut world.machine, 0).unwrap(), 0);
    }
}

/// A breakpoint in place that a device has written over is not written over what the device has written.
#[test]
fn what_a_device_has_written_over_a_breakpoint_stays() {
    for mechanism in Mechanism::all() {
        let mut world = World::new(mechanism, &[MOVE, IMMEDIATE]);
        world.machine.device_writes(MOVE, &[0x31, 0xc0]);
        world.engine.remove(&mut world.machine, world.ids[0]).unwrap();
        assert_eq!(world.machine.executed(world.view, MOVE)[..2], [0x31, 0xc0], "{mechanism}: removed");
        assert_eq!(world.machine.pages[&CODE][0x10..0x12], [0x31, 0xc0]);

        // The guest writes to the page.
        world.machine.device_writes(IMMEDIATE, &[0xb9]);
        let access = Access::new(DATA, Accesses::WRITE);
        let (reply, _) = world.event(CODE.at(0x100), world.view, Reason::Access(access));
        assert_eq!(world.machine.pages[&CODE][0x26], 0xb9, "{mechanism}: lifted");
        let view = reply.view.unwrap_or(world.view);
        _ = world.event(CODE.at(0x102), view, Reason::Step);
        world.check_shown(&[(IMMEDIATE, 0xb9)]);
        world.engine.leave(&mut world.machine).unwrap();
        world.engine.finish(&mut world.machine).unwrap();
        assert_eq!(world.machine.pages[&CODE][0x26], 0xb9, "{mechanism}: left");
    }
}

/// A breakpoint is out while it is stepped over, and a device writes there.
#[test]
fn what_a_device_writes_during_a_repair_is_what_the_breakpoint_is_set_on() {
    let mut world = World::new(Mechanism::REPAIR, &[MOVE]);
    let (reply, _) = world.hit(MOVE);
    assert_eq!(reply.step, Step::On);
    // It is not there, and it is not to be.
    assert_eq!(world.engine.verify(&mut world.machine, 1).unwrap(), 0);
    assert_eq!(world.machine.pages[&CODE][0x10], 0x89);
    world.machine.device_writes(MOVE, &[0x31, 0xc0]);
    _ = world.event(Gpa(MOVE.0 + 2), world.view, Reason::Step);
    assert_eq!((world.machine.pages[&CODE][0x10], world.rewritten()), (INT3, 1));
    world.engine.remove(&mut world.machine, world.ids[0]).unwrap();
    assert_eq!(world.machine.pages[&CODE][0x10..0x12], [0x31, 0xc0]);
}

/// A page that is gone is an error, and the others are compared all the same.
#[test]
fn a_page_that_is_gone_keeps_none_from_being_compared() {
    for mechanism in Mechanism::all() {
        let at = [MOVE, Gpa(MOVE.0 + 0x1000)];
        let mut world = World::with_pages(mechanism, 2, &at);
        world.machine.pages.remove(&CODE);
        world.machine.device_writes(Gpa(DATA.0 + 0x1000), &[1]);
        world.engine.verify(&mut world.machine, 2).unwrap_err();
        assert_eq!(world.machine.executed(world.view, Gpa(DATA.0 + 0x1000))[0], 1, "{mechanism}");
    }
}

/// Xen resets a view when a frame goes, and the guest gets another page in place of one with breakpoints.
#[test]
fn resync_sets_up_everything_again() {
    for mechanism in Mechanism::all() {
        let other = CODE.0 + 1;
        let mut world = World::with_pages(mechanism, 3, &[MOVE, IMMEDIATE, Gfn(other).at(0x10)]);
        // A shadow's frame that is in no use.
        let spare = world.engine.insert(&mut world.machine, Gfn(CODE.0 + 2).at(0x10), mechanism).unwrap();
        world.engine.remove(&mut world.machine, spare).unwrap();
        let accesses = hyperbp::Accesses { write: true, ..hyperbp::Accesses::NONE };
        world.engine.watch(&mut world.machine, Gfn(CODE.0 + 2), accesses, false).unwrap();
        let before = world.machine.all();
        world.machine.views.values_mut().for_each(BTreeMap::clear);
        let mut page = Box::new([0xf8; PAGE_SIZE]);
        page[0x26..0x2b].copy_from_slice(&[0xb8, 5, 6, 7, 8]);
        world.machine.pages.insert(CODE, page);
        assert!(world.engine.resync(&mut world.machine).unwrap(), "no reply is pending");
        assert_eq!(world.machine.all(), before, "{mechanism}");
        world.check_shown(&[(MOVE, 0xf8), (IMMEDIATE, 0xb8)]);
        assert_eq!((world.machine.pauses, world.rewritten()), (0, 2), "{mechanism}");
        // Once more, with nothing lost.
        assert!(world.engine.resync(&mut world.machine).unwrap());
        assert_eq!((world.machine.all(), world.rewritten()), (before, 2), "{mechanism}");
        world.engine.leave(&mut world.machine).unwrap();
        world.engine.finish(&mut world.machine).unwrap();
        assert!(world.machine.pages[&CODE][0x10] == 0xf8 && !world.machine.pages[&CODE].contains(&INT3));
        assert!(world.machine.views[&ViewId::HOST].values().all(|(_, rights)| *rights == Rights::All));
    }
}

/// Xen would be late with a reply that it has still to apply, if a view let go of a page now.
#[test]
fn resync_waits_for_pending_replies() {
    let mut world = World::new(Mechanism::INTERPRET, &[MOVE]);
    let (reply, _) = world.hit(MOVE);
    assert!(matches!(reply.action, Action::SetRegisters(_)));
    world.machine.rips.insert(VcpuId(0), MOVE.0);
    let before = world.machine.all();
    world.machine.views.values_mut().for_each(BTreeMap::clear);
    assert!(!world.engine.resync(&mut world.machine).unwrap());
    assert_ne!(world.machine.all(), before);
    // Its next hit is stepped, and everything is set up with that.
    let (reply, told) = world.hit(MOVE);
    assert_eq!((told, reply.action), (1, Action::Resume));
    assert_eq!(world.machine.all(), before);
    let (reply, _) = world.hit(MOVE);
    assert!(matches!(reply.action, Action::SetRegisters(_)), "that reply has taken the mark with it");
}
