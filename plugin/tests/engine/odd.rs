//! Events that come when they are not expected, and as many virtual CPUs as there can be.

use hyperbp::{Action, Engine, Event, Gpa, Int3, Mechanism, Reason, Registers, Reply, Step, VcpuId, Verdict, ViewId};

use crate::machine::{CODE, Machine};

const AT: Gpa = Gpa(CODE.0 << 12 | 0x10);
const OTHER: Gpa = Gpa(CODE.0 << 12 | 0x26);

fn answer(engine: &mut Engine, machine: &mut Machine, vcpu: u16, view: ViewId, rip: u64, reason: Reason) -> Reply {
    let registers = Registers::default().with(|new| {
        new.rip = rip;
        new.rflags = 2;
    });
    let event = Event::new(VcpuId(vcpu), view, registers, reason);
    engine.handle(machine, &event, &mut |_, _, _| Verdict::Keep)
}

fn hit(engine: &mut Engine, machine: &mut Machine, vcpu: u16, view: ViewId) -> Reply {
    answer(engine, machine, vcpu, view, AT.0, Reason::Int3(Int3::new(AT, 1)))
}

/// Numbers of virtual CPUs have 16 bits, and so has how many there are.
#[test]
fn there_may_be_as_many_virtual_cpus_as_there_are_numbers() {
    let mut machine = Machine::new(1);
    machine.vcpus = u16::MAX;
    let mut engine = Engine::new(&machine);
    let view = engine.enter(&mut machine).unwrap();
    engine.insert(&mut machine, AT, Mechanism::AUTO).unwrap();
    engine.monitor_all(&mut machine, true).unwrap();
    let last = u16::MAX - 1;
    assert!(matches!(hit(&mut engine, &mut machine, last, view).action, Action::SetRegisters(_)));
    assert_eq!(hit(&mut engine, &mut machine, u16::MAX, view), Reply::default(), "there is no such one");
    assert!(engine.is_settled(&mut machine));
    engine.leave(&mut machine).unwrap();
    assert!(engine.is_idle(&mut machine));
    engine.finish(&mut machine).unwrap();
}

/// Xen has dropped an emulation, and the next thing that it reports is a failed one: of somewhere else.
#[test]
fn a_failed_emulation_is_only_that_of_the_same_instruction() {
    let mut machine = Machine::new(1);
    let mut engine = Engine::new(&machine);
    let view = engine.enter(&mut machine).unwrap();
    let id = engine.insert(&mut machine, AT, Mechanism::EMULATE).unwrap();
    let emulated = hit(&mut engine, &mut machine, 0, view);
    assert!(matches!(emulated.action, Action::EmulateInstruction(_)));
    let reply = answer(&mut engine, &mut machine, 0, view, OTHER.0, Reason::EmulationFailed);
    assert_eq!(reply, Reply::default());
    assert_eq!((engine.counters().emulation_failures, engine.counters().unexplained), (0, 1));
    // It is still emulated, and what fails at the instruction itself is ours.
    assert_eq!(hit(&mut engine, &mut machine, 0, view), emulated);
    let reply = answer(&mut engine, &mut machine, 0, view, AT.0, Reason::EmulationFailed);
    assert_ne!(reply.step, Step::Keep);
    assert_eq!((engine.counters().emulation_failures, engine.figures(id).unwrap().served.emulate), (1, 1));
}

/// Xen would be late with the emulation, so the virtual CPU tries again: nothing is emulated.
#[test]
fn what_is_not_to_be_emulated_after_all_has_not_failed() {
    let mut machine = Machine::new(2);
    let mut engine = Engine::new(&machine);
    let view = engine.enter(&mut machine).unwrap();
    engine.insert(&mut machine, AT, Mechanism::EMULATE).unwrap();
    // Told, a host changes the registers, and so it is stepped.
    let registers = Registers::default().with(|new| {
        new.rip = AT.0;
        new.rflags = 2;
    });
    let reason = Reason::Int3(Int3::new(AT, 1));
    let event = Event::new(VcpuId(0), view, registers, reason);
    let mut reply = Reply::default();
    let observed = engine.begin(&mut machine, &event, &mut reply);
    let changed = registers.with(|new| new.gpr = [5; 16]);
    engine.end(&mut machine, &event, &observed, Some(&changed), &mut reply);
    assert!(matches!((&reply.action, reply.step), (Action::SetRegisters(_), Step::Fast(_))), "{reply:?}");
    let failed = answer(&mut engine, &mut machine, 0, view, AT.0, Reason::EmulationFailed);
    assert_eq!((failed.action, engine.counters().emulation_failures), (Action::Resume, 0));
}
