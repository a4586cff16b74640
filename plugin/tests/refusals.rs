//! A hypervisor that refuses a single call, whichever it is: the guest goes on, and in the end nothing is left behind. And
//! what the event fuzzer has found besides.

#[path = "../fuzz/src/machine.rs"]
#[allow(dead_code, unreachable_pub, reason = "it is the fuzz targets', which use more of it")]
mod machine;

use hyperbp::{
    Access, Accesses, CodeMode, Engine, Event, Gfn, Gpa, Int3, Mechanism, PAGE_SIZE, Reason, Registers, VcpuId, Verdict,
};
use machine::Machine;

/// Calls in the life of a breakpoint, at least.
const CALLS: u8 = 100;
/// A page with breakpoints, where the guest writes.
const AT: Gpa = Gfn(1).at(0x10);

struct Life {
    machine: Machine,
    engine: Engine,
}

impl Life {
    fn call<T>(&mut self, work: impl FnOnce(&mut Engine, &mut Machine) -> T) -> T {
        self.machine.begin();
        let done = work(&mut self.engine, &mut self.machine);
        self.machine.end();
        done
    }

    fn event(&mut self, vcpu: u16, rip: Gpa, reason: Reason) {
        let view = self.machine.cpus[usize::from(vcpu)].view;
        let registers = Registers::default().with(|new| {
            new.rip = rip.0;
            new.mode = CodeMode::Bits64;
        });
        let event = Event::new(VcpuId(vcpu), view, registers, reason);
        let reply = self.call(|engine, machine| engine.handle(machine, &event, &mut |_, _, _| Verdict::Keep));
        self.machine.carry_out(vcpu.into(), rip.0, &reply, true);
    }

    fn through(&mut self, vcpu: u16) {
        let cpu = &mut self.machine.cpus[usize::from(vcpu)];
        cpu.held = None;
        match cpu.fast.take() {
            Some(back) => cpu.view = back,
            None if cpu.stepping => self.event(vcpu, AT, Reason::Step),
            None => {}
        }
    }

    /// Two virtual CPUs meet at two breakpoints, and one writes over the first.
    fn live(&mut self, mechanism: Mechanism) {
        let other = Gfn(1).at(0x20);
        for at in [AT, other] {
            // Refused, perhaps: then there is one breakpoint less.
            let _ = self.call(|engine, machine| engine.insert(machine, at, mechanism));
        }
        let access = Access::new(AT, Accesses::WRITE);
        self.event(0, other, Reason::Int3(Int3::new(other, 1)));
        self.through(0);
        for vcpu in 0..2 {
            self.event(vcpu, Gfn(2).at(0), Reason::Access(access));
        }
        self.machine.guest_writes(0, AT, &[0xf8]);
        self.through(0);
        self.through(1);
        self.event(1, AT, Reason::Access(Access::new(AT, Accesses::READ)));
        self.through(1);
        for id in self.engine.breakpoints() {
            let _ = self.call(|engine, machine| engine.remove(machine, id));
        }
        let _ = self.call(|engine, machine| engine.insert(machine, AT, mechanism));
    }
}

#[test]
fn a_single_refusal_leaves_nothing_behind() {
    for mechanism in Mechanism::all() {
        for refused in 0..CALLS {
            let machine = Machine::new(2, [0x90; PAGE_SIZE]);
            let engine = Engine::new(&machine);
            let mut life = Life { machine, engine };
            life.machine.refuse = (refused, 1);
            life.live(mechanism);
            if life.call(|engine, machine| engine.leave(machine)).is_ok() && life.engine.is_idle(&mut life.machine) {
                let _ = life.call(|engine, machine| engine.finish(machine));
            }
            life.machine.refuse = (0, 0);
            life.call(|engine, machine| engine.leave(machine)).unwrap();
            (0..2).for_each(|vcpu| life.through(vcpu));
            life.call(|engine, machine| engine.leave(machine)).unwrap();
            assert!(life.engine.is_idle(&mut life.machine));
            life.call(|engine, machine| engine.finish(machine)).unwrap();
            assert!(life.engine.breakpoints().is_empty());
            life.machine.check_left();
        }
    }
}

#[test]
fn where_the_guest_has_no_memory_there_is_no_breakpoint() {
    for mechanism in Mechanism::all() {
        let mut machine = Machine::new(1, [0x90; PAGE_SIZE]);
        let mut engine = Engine::new(&machine);
        // The engine's own frames begin there. At first there are none.
        for frame in [machine::SHADOWS, machine::SHADOWS + 1, machine::SHADOWS] {
            assert!(engine.insert(&mut machine, Gfn(frame).at(0), mechanism).is_err());
            let _ = engine.insert(&mut machine, AT, mechanism);
        }
        engine.leave(&mut machine).unwrap();
        engine.finish(&mut machine).unwrap();
        machine.check_left();
    }
}

#[test]
fn what_one_virtual_cpu_has_written_is_kept_when_another_accesses_the_page() {
    for mechanism in Mechanism::all() {
        let machine = Machine::new(2, [0x90; PAGE_SIZE]);
        let engine = Engine::new(&machine);
        let mut life = Life { machine, engine };
        life.call(|engine, machine| engine.insert(machine, AT, mechanism)).unwrap();
        let access = Access::new(AT, Accesses::WRITE);
        life.event(0, Gfn(2).at(0), Reason::Access(access));
        life.machine.guest_writes(0, AT, &[0xf8]);
        life.event(1, Gfn(2).at(0), Reason::Access(access));
        life.through(0);
        life.through(1);
        life.call(|engine, machine| engine.leave(machine)).unwrap();
        life.call(|engine, machine| engine.finish(machine)).unwrap();
        life.machine.check_left();
    }
}
