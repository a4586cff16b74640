//! What may happen between the two halves of an event: breakpoints and watches come and go, registers change.

use std::collections::HashMap;
use std::convert::Infallible;

use hyperbp::{
    Access, Accesses, Action, BreakpointId, CodeMode, Conceal, Engine, Error, Event, Gfn, Gpa, Hypervisor, Int3,
    Mechanism, Observed, PAGE_SIZE, Placement, Reason, Registers, Reply, Rights, Step, StepOver, VcpuId, ViewId,
};

const CODE: Gfn = Gfn(7);
const DATA: Gfn = Gfn(8);
/// `mov eax, ebx`, which everything can do.
const MOVE: Gpa = Gpa(0x7010);
const EXEC: ViewId = ViewId(1);
const OWN: ViewId = ViewId(2);
const WRITE: ViewId = ViewId(3);
/// RFLAGS.RF.
const RF: u64 = 1 << 16;

/// Pages, and what the views permit on them.
#[derive(Default)]
struct Machine {
    pages: HashMap<Gfn, Box<[u8; PAGE_SIZE]>>,
    rights: HashMap<(ViewId, Gfn), Rights>,
    views: u16,
    current: ViewId,
    /// Where all virtual CPUs are.
    rip: u64,
    /// Their DR7, if it can be told.
    dr7: Option<u64>,
}

impl Machine {
    fn new() -> Self {
        let mut machine = Self { dr7: Some(0x400), ..Self::default() };
        for gfn in [CODE, DATA] {
            machine.pages.insert(gfn, Box::new([0x90; PAGE_SIZE]));
        }
        machine.pages.get_mut(&CODE).unwrap()[0x10..0x12].copy_from_slice(&[0x89, 0xd8]);
        machine
    }

    fn rights(&self, gfn: Gfn) -> Rights {
        self.rights.get(&(EXEC, gfn)).copied().unwrap_or(Rights::All)
    }
}

impl Hypervisor for Machine {
    type Error = Infallible;

    fn vcpus(&self) -> u16 {
        2
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Infallible> {
        into.copy_from_slice(&self.pages[&gpa.gfn()][usize::from(gpa.offset())..][..into.len()]);
        Ok(())
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Infallible> {
        let page = self.pages.get_mut(&gpa.gfn()).unwrap();
        page[usize::from(gpa.offset())..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Infallible> {
        self.write(gpa, bytes).map(|()| true)
    }

    fn now(&self) -> u64 {
        0
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Infallible> {
        let gfn = Gfn(0x100 + self.pages.len() as u64);
        self.pages.insert(gfn, Box::new([0; PAGE_SIZE]));
        Ok(gfn)
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), Infallible> {
        self.pages.remove(&gfn);
        Ok(())
    }

    fn create_view(&mut self) -> Result<ViewId, Infallible> {
        self.views += 1;
        Ok(ViewId(self.views))
    }

    fn switch_view(&mut self, view: ViewId) -> Result<(), Infallible> {
        self.current = view;
        Ok(())
    }

    fn drop_view(&mut self, _: ViewId) -> Result<(), Infallible> {
        Ok(())
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, _: Option<Gfn>) -> Result<(), Infallible> {
        self.rights.remove(&(view, gfn));
        Ok(())
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), Infallible> {
        self.rights.insert((view, gfn), rights);
        Ok(())
    }

    fn rip(&mut self, _: VcpuId) -> Result<u64, Infallible> {
        Ok(self.rip)
    }

    fn debug_control(&mut self, _: VcpuId) -> Result<Option<u64>, Infallible> {
        Ok(self.dr7)
    }

    fn stop_step(&mut self, _: VcpuId) -> Result<(), Infallible> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

fn event(view: ViewId, rip: u64, reason: Reason) -> Event {
    // Without paging: linear addresses are guest-physical ones.
    let registers = Registers::default().with(|new| {
        new.rip = rip;
        new.rflags = 2;
        new.mode = CodeMode::Bits32;
        new.flat = true;
    });
    Event::new(VcpuId(0), view, registers, reason)
}

fn hit(at: Gpa) -> Event {
    event(EXEC, at.0, Reason::Int3(Int3::new(at, 1)))
}

fn access(view: ViewId, rip: u64, gpa: Gpa, accesses: Accesses) -> Event {
    let Accesses { read, write, execute } = accesses;
    event(view, rip, Reason::Access(Access::new(gpa, Accesses { read, write, execute })))
}

const READ: Accesses = Accesses { read: true, write: false, execute: false };
const WRITES: Accesses = Accesses { read: false, write: true, execute: false };
const EXECUTE: Accesses = Accesses { read: false, write: false, execute: true };

/// The whole of an event, with nobody told.
fn through(engine: &mut Engine, machine: &mut Machine, event: &Event) -> Reply {
    let mut reply = Reply::default();
    let observed = engine.begin(machine, event, &mut reply);
    engine.end(machine, event, &observed, None, &mut reply);
    reply
}

fn begin(engine: &mut Engine, machine: &mut Machine, event: &Event) -> Observed {
    engine.begin(machine, event, &mut Reply::default())
}

fn end(
    engine: &mut Engine,
    machine: &mut Machine,
    event: &Event,
    observed: &Observed,
    changed: Option<&Registers>,
) -> Reply {
    let mut reply = Reply::default();
    engine.end(machine, event, observed, changed, &mut reply);
    reply
}

#[test]
fn whoever_moves_rip_has_done_the_instruction() {
    for mechanism in Mechanism::all() {
        let (mut machine, mut event) = (Machine::new(), hit(MOVE));
        let mut engine = Engine::new(&machine);
        engine.insert(&mut machine, MOVE, mechanism).unwrap();
        event.view = if mechanism.placement() == Placement::Shadow { EXEC } else { ViewId::HOST };
        let observed = begin(&mut engine, &mut machine, &event);
        assert_eq!(observed, Observed::Hit(MOVE));
        let registers = event.registers.with(|new| {
            new.rip = 0x1234;
            new.gpr = [5; 16];
        });
        let reply = end(&mut engine, &mut machine, &event, &observed, Some(&registers));
        assert_eq!(reply, Reply { action: Action::SetRegisters(registers), ..Reply::default() }, "{mechanism}");
        assert!(engine.is_idle(&mut machine));
    }
}

#[test]
fn with_other_registers_the_instruction_runs_on_these() {
    for mechanism in Mechanism::all() {
        let (mut machine, mut event) = (Machine::new(), hit(MOVE));
        let mut engine = Engine::new(&machine);
        engine.insert(&mut machine, MOVE, mechanism).unwrap();
        event.view = if mechanism.placement() == Placement::Shadow { EXEC } else { ViewId::HOST };
        let observed = begin(&mut engine, &mut machine, &event);
        let mut registers = event.registers;
        registers.gpr[3] = 99;
        let reply = end(&mut engine, &mut machine, &event, &observed, Some(&registers));
        let Action::SetRegisters(set) = reply.action else { panic!("{mechanism}: {reply:?}") };
        match mechanism.step_over() {
            StepOver::Interpret | StepOver::Auto => {
                assert_eq!((set.rip, set.gpr[0], reply.step), (event.registers.rip + 2, 99, Step::Keep), "{mechanism}");
            }
            // Emulated it cannot be: a response has no room for both.
            _ => {
                let rf = if mechanism.step_over() == StepOver::Emulate { RF } else { 0 };
                assert_eq!(set, registers.with(|new| new.rflags = rf | 2), "{mechanism}");
                assert_ne!(reply.step, Step::Keep, "{mechanism}");
            }
        }
    }
}

#[test]
fn what_is_removed_between_the_halves_is_not_stepped_over() {
    let mut machine = Machine::new();
    let mut engine = Engine::new(&machine);
    let id = engine.insert(&mut machine, MOVE, Mechanism::VIEW_STEP).unwrap();
    let observed = begin(&mut engine, &mut machine, &hit(MOVE));
    engine.remove(&mut machine, id).unwrap();
    let reply = end(&mut engine, &mut machine, &hit(MOVE), &observed, None);
    assert_eq!(reply, Reply::default());
}

#[test]
fn an_access_is_reported_before_and_after_it_is_made() {
    let mut machine = Machine::new();
    let mut engine = Engine::new(&machine);
    engine.watch(&mut machine, DATA, WRITES, true).unwrap();
    assert_eq!((machine.current, machine.rights(DATA)), (EXEC, Rights::ReadExecute));
    let write = access(EXEC, 0x7020, DATA.at(8), WRITES);
    let Reason::Access(made) = write.reason else { unreachable!() };
    let observed = begin(&mut engine, &mut machine, &write);
    assert_eq!(observed, Observed::Access { access: made, breakpoint: None });
    let reply = end(&mut engine, &mut machine, &write, &observed, None);
    assert_eq!(reply, Reply { view: Some(OWN), step: Step::On, action: Action::Resume });
    let step = event(OWN, 0x7022, Reason::Step);
    let observed = begin(&mut engine, &mut machine, &step);
    assert_eq!(observed, Observed::Accessed(made));
    let reply = end(&mut engine, &mut machine, &step, &observed, None);
    assert_eq!(reply, Reply { view: Some(EXEC), step: Step::Off, action: Action::Resume });
}

#[test]
fn an_access_that_is_reported_before_only_costs_one_event() {
    let mut machine = Machine::new();
    let mut engine = Engine::new(&machine);
    engine.watch(&mut machine, DATA, READ, false).unwrap();
    // EPT knows no right to write without one to read.
    assert_eq!(machine.rights(DATA), Rights::Execute);
    let reply = through(&mut engine, &mut machine, &access(EXEC, 0x7020, DATA.at(8), READ));
    assert_eq!(reply, Reply { view: Some(OWN), step: Step::Fast(EXEC), action: Action::Resume });
    let write = access(EXEC, 0x7020, DATA.at(8), WRITES);
    let mut answer = Reply::default();
    assert_eq!(engine.begin(&mut machine, &write, &mut answer), Observed::Answered, "nobody wants to hear of writes");
    assert_eq!(answer, reply);
}

#[test]
fn a_watch_goes_with_the_breakpoints_of_its_page() {
    let mut machine = Machine::new();
    let mut engine = Engine::new(&machine);
    let id = engine.insert(&mut machine, MOVE, Mechanism::AUTO).unwrap();
    assert_eq!(machine.rights(CODE), Rights::Execute);
    engine.watch(&mut machine, CODE, EXECUTE, false).unwrap();
    assert_eq!(machine.rights(CODE), Rights::None);
    let fetch = access(EXEC, MOVE.0, MOVE, EXECUTE);
    let Reason::Access(made) = fetch.reason else { unreachable!() };
    let observed = begin(&mut engine, &mut machine, &fetch);
    assert_eq!(observed, Observed::Access { access: made, breakpoint: Some(MOVE) });
    assert_eq!(engine.figures(id).unwrap().hits, 1);
    engine.remove(&mut machine, id).unwrap();
    let reply = end(&mut engine, &mut machine, &fetch, &observed, None);
    assert_eq!(reply.view, Some(OWN), "once told, it must not be met again");
    assert_eq!(machine.rights(CODE), Rights::ReadWrite);
    engine.insert(&mut machine, MOVE, Mechanism::AUTO).unwrap();
    assert_eq!(machine.rights(CODE), Rights::None);
    engine.watch(&mut machine, CODE, Accesses::NONE, false).unwrap();
    assert_eq!(machine.rights(CODE), Rights::Execute);
}

#[test]
fn what_is_executed_cannot_be_watched_with_breakpoints_in_place() {
    let mut machine = Machine::new();
    let mut engine = Engine::new(&machine);
    let id = engine.insert(&mut machine, MOVE, Mechanism::REPAIR).unwrap();
    let refused = engine.watch(&mut machine, CODE, EXECUTE, false);
    assert!(matches!(refused, Err(Error::WatchConflict(CODE))), "{refused:?}");
    engine.watch(&mut machine, CODE, WRITES, true).unwrap();
    engine.watch(&mut machine, DATA, EXECUTE, true).unwrap();
    let refused = engine.insert(&mut machine, DATA.at(0), Mechanism::REPAIR);
    assert!(matches!(refused, Err(Error::WatchConflict(DATA))), "{refused:?}");
    engine.insert(&mut machine, DATA.at(0), Mechanism::AUTO).unwrap();
    engine.remove(&mut machine, id).unwrap();
    assert_eq!(machine.rights(CODE), Rights::ReadExecute, "the guard goes, the watch stays");
}

#[test]
fn leaving_ends_watches() {
    let mut machine = Machine::new();
    let mut engine = Engine::new(&machine);
    engine.watch(&mut machine, DATA, Accesses::ALL, true).unwrap();
    engine.leave(&mut machine).unwrap();
    assert_eq!(machine.rights(DATA), Rights::All);
    assert!(matches!(engine.watch(&mut machine, DATA, READ, false), Err(Error::Leaving)));
    engine.finish(&mut machine).unwrap();
    assert_eq!(machine.current, ViewId::HOST);
}

#[test]
fn a_virtual_cpu_of_no_interest_meets_nothing_and_is_followed_when_it_writes() {
    let mut machine = Machine::new();
    let mut engine = Engine::new(&machine);
    let mechanism = Mechanism::new(Placement::Shadow, StepOver::Auto, Conceal::ViewFastStep).unwrap();
    engine.insert(&mut machine, MOVE, mechanism).unwrap();
    assert_eq!(engine.monitor(&mut machine, VcpuId(0), false).unwrap(), OWN);
    assert!(matches!(engine.monitor(&mut machine, VcpuId(2), false), Err(Error::NoSuchVcpu(2))));
    // It has an INT3 of its own there.
    machine.pages.get_mut(&CODE).unwrap()[0x50] = 0xcc;
    let own = event(OWN, CODE.at(0x50).0, Reason::Int3(Int3::new(CODE.at(0x50), 1)));
    assert_eq!(through(&mut engine, &mut machine, &own).action, Action::Reinject);
    // It writes to the page, and goes back to where it was.
    let write = access(OWN, 0x8000, MOVE, WRITES);
    assert_eq!(through(&mut engine, &mut machine, &write).view, Some(WRITE));
    machine.pages.get_mut(&CODE).unwrap()[0x10] = 0x90;
    let step = event(WRITE, 0x8002, Reason::Step);
    assert_eq!(
        through(&mut engine, &mut machine, &step),
        Reply { view: Some(OWN), step: Step::Off, ..Reply::default() }
    );
    // Breakpoints are in what it has written.
    let id = engine.breakpoints()[0];
    assert_eq!(engine.figures(id).unwrap().rewritten, 1);
    assert_eq!(engine.monitor(&mut machine, VcpuId(0), true).unwrap(), EXEC);
    engine.monitor_all(&mut machine, false).unwrap();
    assert_eq!(machine.current, OWN);
    engine.monitor_all(&mut machine, true).unwrap();
    assert_eq!(machine.current, EXEC);
}

const AT_ONCE: [Mechanism; 3] = [Mechanism::AUTO, Mechanism::INTERPRET, Mechanism::EMULATE];

/// A breakpoint in a page of its own.
fn other(engine: &mut Engine, machine: &mut Machine, mechanism: Mechanism) -> BreakpointId {
    engine.insert(machine, DATA.at(0), mechanism).unwrap()
}

#[test]
fn what_xen_would_be_late_with_is_not_asked_of_it() {
    for mechanism in AT_ONCE {
        let mut machine = Machine::new();
        let mut engine = Engine::new(&machine);
        let id = engine.insert(&mut machine, MOVE, mechanism).unwrap();
        assert_ne!(through(&mut engine, &mut machine, &hit(MOVE)).action, Action::Resume, "{mechanism}");
        let gone = other(&mut engine, &mut machine, mechanism);
        engine.remove(&mut machine, gone).unwrap();
        let reply = through(&mut engine, &mut machine, &hit(MOVE));
        assert_eq!(reply, Reply { view: Some(OWN), step: Step::Fast(EXEC), action: Action::Resume }, "{mechanism}");
        assert_ne!(through(&mut engine, &mut machine, &hit(MOVE)).action, Action::Resume, "{mechanism}");
        let figures = engine.figures(id).unwrap();
        assert_eq!((figures.hits, figures.fallbacks), (3, 1), "{mechanism}");
    }
}

#[test]
fn the_registers_of_an_int3_of_the_guests_own_are_left_alone_when_xen_would_be_late() {
    for mechanism in AT_ONCE {
        let mut machine = Machine::new();
        let mut engine = Engine::new(&machine);
        machine.pages.get_mut(&CODE).unwrap()[0x30] = 0xcc;
        let at = CODE.at(0x30);
        engine.insert(&mut machine, at, mechanism).unwrap();
        let gone = other(&mut engine, &mut machine, mechanism);
        engine.remove(&mut machine, gone).unwrap();
        let mut changed = hit(at).registers;
        changed.gpr[0] = 5;
        let observed = begin(&mut engine, &mut machine, &hit(at));
        let reply = end(&mut engine, &mut machine, &hit(at), &observed, Some(&changed));
        assert_eq!(reply, Reply { step: Step::On, ..Reply::default() }, "{mechanism}");
        // The same hit, of which nobody is told again.
        let reply = through(&mut engine, &mut machine, &hit(at));
        assert_eq!(reply, Reply { action: Action::Reinject, ..Reply::default() }, "{mechanism}");
        assert_eq!(engine.counters().hits, 1, "{mechanism}");
    }
}

#[test]
fn registers_that_xen_would_be_late_with_are_set_when_the_breakpoint_is_met_again() {
    for (mechanism, rip) in AT_ONCE.into_iter().flat_map(|mechanism| [(mechanism, MOVE.0), (mechanism, 0x1234)]) {
        let mut machine = Machine::new();
        let mut engine = Engine::new(&machine);
        engine.insert(&mut machine, MOVE, mechanism).unwrap();
        let gone = other(&mut engine, &mut machine, mechanism);
        engine.remove(&mut machine, gone).unwrap();
        let mut changed = hit(MOVE).registers.with(|new| new.rip = rip);
        changed.gpr[0] = 5;
        let observed = begin(&mut engine, &mut machine, &hit(MOVE));
        let reply = end(&mut engine, &mut machine, &hit(MOVE), &observed, Some(&changed));
        assert_eq!(reply, Reply { step: Step::On, ..Reply::default() }, "{mechanism}");
        let reply = through(&mut engine, &mut machine, &hit(MOVE));
        let (view, rf) = if rip == MOVE.0 { (Some(OWN), RF) } else { (None, 0) };
        let set = changed.with(|new| new.rflags = rf | 2);
        assert_eq!(reply, Reply { view, step: Step::Keep, action: Action::SetRegisters(set) }, "{mechanism}");
        let view = (rip == MOVE.0).then_some(EXEC);
        let reply = through(&mut engine, &mut machine, &event(view.map_or(EXEC, |_| OWN), rip, Reason::Step));
        assert_eq!(reply, Reply { view, step: Step::Off, ..Reply::default() }, "{mechanism}");
        assert_eq!(engine.counters().hits, 1, "{mechanism}");
    }
}

/// What an event says of DR7 may be old. Memory is accessed without the CPU only if the real one has no breakpoint on data.
#[test]
fn memory_is_accessed_without_the_cpu_only_if_the_guest_has_no_data_breakpoint_on() {
    const OFF: u64 = 0x400;
    const EXECUTE: u64 = 0x401;
    const WRITE: u64 = 0x1_0401;
    const ACCESS: u64 = 0x30_0404;
    // mov [ebx], eax; and mov eax, [ebx].
    let at_once = |bytes: &[u8], mechanism: Mechanism, event_dr7, dr7, trust| {
        let mut machine = Machine::new();
        machine.pages.get_mut(&CODE).unwrap()[0x20..0x22].copy_from_slice(bytes);
        machine.dr7 = dr7;
        let mut engine = Engine::new(&machine);
        engine.trust_event_dr7(trust);
        engine.insert(&mut machine, CODE.at(0x20), mechanism).unwrap();
        let mut hit = hit(CODE.at(0x20));
        (hit.registers.gpr[3], hit.registers.dr7) = (DATA.at(0x80).0, event_dr7);
        hit.view = if mechanism.placement() == Placement::Shadow { EXEC } else { ViewId::HOST };
        let reply = through(&mut engine, &mut machine, &hit);
        match reply.step {
            Step::Keep => true,
            _ => {
                // It is the same instruction that goes on: the guest's breakpoint on it is not met again.
                let rf = if trust && event_dr7 & 0xff == 0 {
                    Action::Resume
                } else {
                    let registers = hit.registers;
                    Action::SetRegisters(registers.with(|new| new.rflags = registers.rflags | RF))
                };
                assert_eq!(reply.action, rf, "{mechanism}");
                false
            }
        }
    };
    for mechanism in Mechanism::all()
        .filter(|mechanism| matches!(mechanism.step_over(), StepOver::Interpret | StepOver::Emulate | StepOver::Auto))
    {
        for bytes in [[0x89, 0x03], [0x8b, 0x03]] {
            let on = |event, real, trust| at_once(&bytes, mechanism, event, real, trust);
            for (event, real, trust, expected) in [
                (OFF, Some(OFF), false, true),
                (OFF, Some(EXECUTE), false, true),
                (EXECUTE, Some(EXECUTE), false, true),
                (OFF, Some(WRITE), false, false),
                (OFF, Some(ACCESS), false, false),
                (OFF, None, false, false),
                (ACCESS, Some(OFF), false, false),
                (OFF, Some(ACCESS), true, true),
                (OFF, None, true, true),
                (ACCESS, None, true, false),
            ] {
                // There a fast step is cheaper than asking.
                let asks = mechanism.step_over() != StepOver::Auto || mechanism.placement() == Placement::InPlace;
                let expected = expected && (trust || asks);
                assert_eq!(on(event, real, trust), expected, "{mechanism}: {bytes:x?} {event:#x} {real:x?} {trust}");
            }
        }
        assert!(at_once(&[0x89, 0xd8], mechanism, ACCESS, None, false), "{mechanism}: no memory");
    }
}

#[test]
fn a_read_is_answered_by_emulation_only_if_the_guest_has_no_data_breakpoint_on() {
    for mechanism in Mechanism::all().filter(|all| matches!(all.conceal(), Conceal::Emulate | Conceal::Data)) {
        for (dr7, trust, emulated) in [
            (Some(0x400), false, true),
            (Some(0x401), false, true),
            (Some(0x3_0401), false, false),
            (None, false, false),
            (None, true, true),
        ] {
            let mut machine = Machine::new();
            machine.dr7 = dr7;
            machine.pages.get_mut(&DATA).unwrap()[0x20..0x22].copy_from_slice(&[0x8b, 0x03]);
            let mut engine = Engine::new(&machine);
            engine.trust_event_dr7(trust);
            engine.insert(&mut machine, MOVE, mechanism).unwrap();
            let shadow = mechanism.placement() == Placement::Shadow;
            let mut read = access(if shadow { EXEC } else { ViewId::HOST }, DATA.at(0x20).0, MOVE, READ);
            read.registers.gpr[3] = MOVE.0;
            let reply = through(&mut engine, &mut machine, &read);
            let is_emulated = matches!(reply.action, Action::Emulate | Action::EmulateRead(_));
            assert_eq!(is_emulated, emulated, "{mechanism} {dr7:x?} {trust}: {reply:?}");
        }
    }
}

#[test]
fn an_access_that_xen_would_be_late_to_emulate_is_tried_again() {
    let mechanism = Mechanism::new(Placement::Shadow, StepOver::Auto, Conceal::Emulate).unwrap();
    let mut machine = Machine::new();
    let mut engine = Engine::new(&machine);
    engine.insert(&mut machine, MOVE, mechanism).unwrap();
    // mov eax, [ebx], at which the machine is.
    machine.pages.get_mut(&DATA).unwrap()[0x20..0x22].copy_from_slice(&[0x8b, 0x03]);
    let mut read = access(EXEC, DATA.at(0x20).0, MOVE, READ);
    read.registers.gpr[3] = MOVE.0;
    assert_eq!(through(&mut engine, &mut machine, &read).action, Action::Emulate);
    let gone = engine.insert(&mut machine, DATA.at(0), mechanism).unwrap();
    engine.remove(&mut machine, gone).unwrap();
    assert_eq!(through(&mut engine, &mut machine, &read), Reply::default());
    assert_eq!(through(&mut engine, &mut machine, &read).action, Action::Emulate);
}

/// What was not asked of Xen cannot have failed: this is an instruction of somebody else's.
#[test]
fn an_emulation_that_is_dropped_is_forgotten() {
    let mechanism = Mechanism::new(Placement::Shadow, StepOver::Auto, Conceal::Emulate).unwrap();
    let mut machine = Machine::new();
    let mut engine = Engine::new(&machine);
    engine.insert(&mut machine, MOVE, mechanism).unwrap();
    machine.pages.get_mut(&DATA).unwrap()[0x20..0x22].copy_from_slice(&[0x8b, 0x03]);
    let gone = engine.insert(&mut machine, DATA.at(0), mechanism).unwrap();
    engine.remove(&mut machine, gone).unwrap();
    let mut read = access(EXEC, DATA.at(0x20).0, MOVE, READ);
    read.registers.gpr[3] = MOVE.0;
    assert_eq!(through(&mut engine, &mut machine, &read), Reply::default());
    let failed = event(EXEC, DATA.at(0x30).0, Reason::EmulationFailed);
    assert_eq!(through(&mut engine, &mut machine, &failed), Reply::default());
    let counters = engine.counters();
    assert_eq!((counters.emulation_failures, counters.unexplained), (0, 1));
}

#[test]
fn a_page_that_loses_its_breakpoints_between_the_halves_is_given_back_when_xen_cannot_be_late() {
    for mechanism in AT_ONCE {
        let mut machine = Machine::new();
        let mut engine = Engine::new(&machine);
        let id = engine.insert(&mut machine, MOVE, mechanism).unwrap();
        let gone = other(&mut engine, &mut machine, mechanism);
        let observed = begin(&mut engine, &mut machine, &hit(MOVE));
        engine.remove(&mut machine, gone).unwrap();
        assert!(engine.figures(gone).is_err());
        let changed = hit(MOVE).registers.with(|new| new.rip = 0x1234);
        let reply = end(&mut engine, &mut machine, &hit(MOVE), &observed, Some(&changed));
        assert_eq!(reply.action, Action::SetRegisters(changed), "{mechanism}");
        assert_eq!(machine.rights(DATA), Rights::Execute, "{mechanism}: not yet");
        // It may be used again as it is.
        let gone = other(&mut engine, &mut machine, mechanism);
        let observed = begin(&mut engine, &mut machine, &hit(MOVE));
        engine.remove(&mut machine, gone).unwrap();
        assert_ne!(end(&mut engine, &mut machine, &hit(MOVE), &observed, None).action, Action::Resume, "{mechanism}");
        let observed = begin(&mut engine, &mut machine, &hit(MOVE));
        engine.remove(&mut machine, id).unwrap();
        assert_eq!(end(&mut engine, &mut machine, &hit(MOVE), &observed, None), Reply::default(), "{mechanism}");
        assert_eq!((machine.rights(DATA), machine.rights(CODE)), (Rights::All, Rights::All), "{mechanism}");
    }
}

#[test]
fn a_virtual_cpu_has_gone_on_when_it_has_moved_or_raised_another_event() {
    let mut machine = Machine::new();
    let mut engine = Engine::new(&machine);
    let id = engine.insert(&mut machine, MOVE, Mechanism::AUTO).unwrap();
    _ = through(&mut engine, &mut machine, &hit(MOVE));
    machine.rip = MOVE.0;
    engine.remove(&mut machine, id).unwrap();
    assert_eq!(machine.rights(CODE), Rights::Execute, "not yet");
    engine.leave(&mut machine).unwrap();
    assert!(!engine.is_settled(&mut machine) && !engine.is_idle(&mut machine));
    // It is there again, and its event is not for the engine.
    engine.has_gone_on(VcpuId(0));
    assert!(engine.is_settled(&mut machine));
    engine.leave(&mut machine).unwrap();
    assert_eq!(machine.rights(CODE), Rights::All);
    assert!(engine.is_idle(&mut machine));
}

#[test]
fn a_page_without_breakpoints_can_be_used_in_another_way() {
    let mut machine = Machine::new();
    let mut engine = Engine::new(&machine);
    engine.insert(&mut machine, MOVE, Mechanism::AUTO).unwrap();
    let gone = other(&mut engine, &mut machine, Mechanism::AUTO);
    let observed = begin(&mut engine, &mut machine, &hit(MOVE));
    engine.remove(&mut machine, gone).unwrap();
    other(&mut engine, &mut machine, Mechanism::REPAIR);
    // Its frame was let go of in the execute view.
    assert_eq!(end(&mut engine, &mut machine, &hit(MOVE), &observed, None).step, Step::Fast(EXEC));
    assert!(matches!(engine.insert(&mut machine, DATA.at(1), Mechanism::AUTO), Err(Error::PageConflict(_))));
}

#[test]
fn pages_without_breakpoints_do_not_pile_up() {
    const PAGES: u64 = 40;
    let mut machine = Machine::new();
    for page in 0..PAGES {
        machine.pages.insert(Gfn(0x20 + page), Box::new([0x90; PAGE_SIZE]));
    }
    let mut engine = Engine::new(&machine);
    engine.insert(&mut machine, MOVE, Mechanism::AUTO).unwrap();
    let mut most = 0;
    for page in 0..PAGES {
        let gfn = Gfn(0x20 + page);
        let id = engine.insert(&mut machine, gfn.at(0), Mechanism::AUTO).unwrap();
        let observed = begin(&mut engine, &mut machine, &hit(MOVE));
        engine.remove(&mut machine, id).unwrap();
        _ = end(&mut engine, &mut machine, &hit(MOVE), &observed, None);
        let guarded = (0..PAGES).filter(|page| machine.rights(Gfn(0x20 + page)) != Rights::All).count();
        most = most.max(guarded);
    }
    assert_eq!(most, 15);
    engine.leave(&mut machine).unwrap();
    assert!((0..PAGES).all(|page| machine.rights(Gfn(0x20 + page)) == Rights::All));
}
