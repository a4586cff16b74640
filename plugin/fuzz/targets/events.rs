//! The engine: any events in any order, from a hypervisor that refuses now and then, with breakpoints set and removed in
//! between and in the callbacks.
//!
//! No guest runs here. What is checked is what must hold whatever happens: no panic, bounded work, replies that can be
//! carried out, pauses that are undone, and after leaving nothing that is left behind.
#![no_main]

use std::collections::VecDeque;

use arbitrary::Arbitrary;
use hyperbp::{
    Access, Accesses, Engine, Error, Event, Gfn, Gpa, Hypervisor, Int3, Mechanism, PAGE_SIZE, Reason, Registers, Reply,
    VcpuId, Verdict, ViewId,
};
use hyperbp_fuzz::AnyRegisters;
use hyperbp_fuzz::machine::{Machine, PAGES, SHADOWS};
use libfuzzer_sys::fuzz_target;

const MOST_VCPUS: usize = 4;
/// Acts that are carried out of an input.
const MOST_ACTS: usize = 64;

#[derive(Arbitrary, Debug)]
struct Input {
    vcpus: u8,
    /// What the guest's pages are filled with, over and over.
    fill: [u8; 16],
    registers: [AnyRegisters; 2],
    acts: Vec<Act>,
    callbacks: VecDeque<Callback>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Act {
    Insert(Place, u8),
    Remove(u8),
    /// Watches a page: three bits for what, one for afterwards, too.
    Watch(Place, u8),
    /// A virtual CPU is of interest, or not.
    Monitor(u8, bool),
    MonitorAll(bool),
    Event(Occurrence),
    /// A virtual CPU gets to the end of an instruction.
    Through(u8),
    /// The guest writes, if it may.
    Write(u8, Place, [u8; 3]),
    /// The guest writes, and what comes of it is gone through to the end.
    Store(u8, Place, [u8; 3]),
    /// A device writes: no view is asked, and there is no event.
    DeviceWrite(Place, [u8; 3]),
    /// So many pages are compared with what is known of them.
    Verify(u8),
    /// Everything is set up again.
    Resync,
    /// So many calls from now the hypervisor begins to refuse, and so many it refuses.
    Refuse(u8, u8),
    Leave,
    Finish,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Occurrence {
    vcpu: u8,
    /// If it is in another view than it was switched to.
    view: Option<u8>,
    registers: bool,
    /// Paging is off, and RIP is where it happens.
    plain: bool,
    at: Place,
    what: What,
    /// Its current DR7, if that can be told.
    dr7: Option<u64>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum What {
    Int3(u8),
    Access {
        read: bool,
        write: bool,
        execute: bool,
        page_walk: bool,
    },
    EmulationFailed,
    /// Also when nobody asked for it.
    Step,
}

/// What a callback does.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Callback {
    Keep,
    RemoveThis,
    Remove(u8),
    Insert(Place, u8),
    Watch(Place, u8),
    /// The registers are changed; RIP, too, or not.
    Change(bool),
}

/// An address.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    /// Few of them, so that they meet.
    Any { page: u8, offset: u8 },
    /// Where a breakpoint is, if there are any, or so many bytes behind.
    Breakpoint { number: u8, behind: u8 },
}

impl Place {
    fn gpa(self, engine: &Engine) -> Gpa {
        let (page, offset) = match self {
            Self::Any { page, offset } => (page, offset),
            Self::Breakpoint { number, behind } => {
                if let Some(id) = nth(&engine.breakpoints(), number) {
                    return Gpa(id.gpa().0 + u64::from(behind) % 4);
                }
                (number, behind)
            }
        };
        let gfn = match u64::from(page) % (PAGES + 3) {
            page if page < PAGES => page,
            // A sink or a shadow, if there are any, or nothing.
            other => SHADOWS + other - PAGES,
        };
        // Near the start of the page, and near its end.
        let offset = u16::from(offset);
        Gfn(gfn).at(if offset < 0x80 { offset } else { 0xf00 + offset })
    }
}

struct World {
    machine: Machine,
    engine: Engine,
    registers: [Registers; 2],
    callbacks: VecDeque<Callback>,
    /// Where each virtual CPU was at its last event.
    rips: [u64; MOST_VCPUS],
    /// All events so far were such as a hypervisor sends, so that the engine knows what each virtual CPU does.
    possible: bool,
    left: bool,
}

impl World {
    fn act(&mut self, act: Act) {
        let Self { machine, engine, .. } = self;
        match act {
            Act::Insert(at, mechanism) => insert(engine, machine, at, mechanism),
            Act::Remove(number) => remove(engine, machine, number),
            Act::Watch(at, what) => watch(engine, machine, at, what),
            Act::Monitor(vcpu, monitored) => {
                let vcpu = usize::from(vcpu) % (machine.cpus.len() + 1);
                match (engine.monitor(machine, VcpuId(vcpu as u16), monitored), machine.cpus.get_mut(vcpu)) {
                    (Ok(view), Some(cpu)) => cpu.view = view,
                    (result, _) => assert!(result.is_err(), "there is no such virtual CPU"),
                }
            }
            Act::MonitorAll(monitored) => drop(engine.monitor_all(machine, monitored)),
            Act::Event(occurrence) => self.occur(&occurrence),
            Act::Through(vcpu) => self.through(usize::from(vcpu)),
            Act::Write(vcpu, at, bytes) => {
                machine.guest_writes(usize::from(vcpu) % machine.cpus.len(), at.gpa(engine), &bytes);
            }
            Act::Store(vcpu, at, bytes) => {
                let (gpa, vcpu) = (at.gpa(engine), vcpu % machine.vcpus() as u8);
                let what = What::Access { read: false, write: true, execute: false, page_walk: false };
                self.occur(&Occurrence { vcpu, view: None, registers: false, plain: true, at, what, dr7: None });
                self.machine.guest_writes(vcpu.into(), gpa, &bytes);
                self.machine.begin();
                self.through(vcpu.into());
            }
            Act::DeviceWrite(at, bytes) => machine.device_writes(at.gpa(engine), &bytes),
            Act::Verify(pages) => drop(engine.verify(machine, usize::from(pages) % 8)),
            Act::Resync => drop(engine.resync(machine)),
            Act::Refuse(after, times) => machine.refuse = (after, times % 8),
            Act::Leave => self.left = engine.leave(machine).is_ok(),
            // Not before.
            Act::Finish if self.left && engine.is_idle(machine) => drop(engine.finish(machine)),
            Act::Finish => {}
        }
    }

    fn occur(&mut self, what: &Occurrence) {
        // Also from one that there is not.
        let vcpu = usize::from(what.vcpu) % (self.machine.cpus.len() + 1);
        let gpa = what.at.gpa(&self.engine);
        let mut registers = self.registers[usize::from(what.registers)];
        if what.plain {
            (registers.cr0, registers.cs_base, registers.rip) = (0, 0, gpa.0);
            (registers.rflags, registers.dr7, registers.cr4, registers.flat) = (2, 0, 0, true);
        }
        // Only the instruction that a fast step is of can raise an event before that is over.
        if let Some(cpu) = self.machine.cpus.get_mut(vcpu)
            && registers.rip != self.rips[vcpu]
        {
            cpu.view = cpu.fast.take().unwrap_or(cpu.view);
            self.rips[vcpu] = registers.rip;
        }
        if let Some(cpu) = self.machine.cpus.get_mut(vcpu) {
            cpu.held = None;
            cpu.dr7 = what.dr7;
        }
        let cpu = self.machine.cpus.get(vcpu).copied().unwrap_or_default();
        let reason = match what.what {
            What::Int3(length) => Reason::Int3(Int3::new(gpa, length)),
            What::Access { read, write, execute, page_walk } => {
                Reason::Access(Access::new(gpa, Accesses { read, write, execute }).with_page_walk(page_walk))
            }
            What::EmulationFailed => Reason::EmulationFailed,
            What::Step => Reason::Step,
        };
        let view = what.view.map_or(cpu.view, |view| ViewId(u16::from(view) % (self.machine.newest_view + 2)));
        self.possible &= view == cpu.view && (reason != Reason::Step || cpu.stepping);
        self.handle(vcpu, &Event::new(VcpuId(vcpu as u16), view, registers, reason));
    }

    /// An instruction is over, and what was to happen then does.
    fn through(&mut self, vcpu: usize) {
        let vcpu = vcpu % self.machine.cpus.len();
        let cpu = &mut self.machine.cpus[vcpu];
        cpu.held = None;
        if let Some(back) = cpu.fast.take() {
            cpu.view = back;
            assert!(self.machine.has(back), "a fast step goes back to a view that is not there");
        } else if cpu.stepping {
            let view = cpu.view;
            let event = Event::new(VcpuId(vcpu as u16), view, self.registers[0], Reason::Step);
            self.handle(vcpu, &event);
            assert!(!self.machine.cpus[vcpu].stepping, "stepping does not end");
        }
    }

    fn handle(&mut self, vcpu: usize, event: &Event) {
        let Self { machine, engine, callbacks, .. } = self;
        let mut hits = engine.breakpoints().len();
        let reply = if let Some(Callback::Change(rip)) = callbacks.front().copied() {
            callbacks.pop_front();
            let mut reply = Reply::default();
            let observed = engine.begin(machine, event, &mut reply);
            let mut registers = event.registers;
            registers.gpr[0] ^= 1;
            registers.rip ^= u64::from(rip);
            engine.end(machine, event, &observed, Some(&registers), &mut reply);
            reply
        } else {
            engine.handle(machine, event, &mut |engine, machine, hit| {
                hits = hits.checked_sub(1).expect("no more hits than there are subscribers");
                assert!(engine.figures(hit.breakpoint).is_ok(), "a hit of a breakpoint that is not there");
                match callbacks.pop_front() {
                    None | Some(Callback::Keep | Callback::Change(_)) => {}
                    Some(Callback::RemoveThis) => return Verdict::Remove,
                    Some(Callback::Remove(number)) => remove(engine, machine, number),
                    Some(Callback::Insert(at, mechanism)) => insert(engine, machine, at, mechanism),
                    Some(Callback::Watch(at, what)) => watch(engine, machine, at, what),
                }
                Verdict::Keep
            })
        };
        if vcpu < self.machine.cpus.len() {
            self.machine.carry_out(vcpu, event.registers.rip, &reply, self.possible);
        } else {
            assert_eq!(reply, Reply::default(), "there is no such virtual CPU");
        }
    }

    /// Leaves the domain, now that nothing is refused any more, and looks whether anything is left.
    fn finish(&mut self) {
        self.machine.refuse = (0, 0);
        let left = self.called(|world| world.engine.leave(&mut world.machine));
        assert!(left.is_ok() || self.machine.stubborn, "leaving fails, and nothing is refused: {left:?}");
        for vcpu in 0..self.machine.cpus.len() {
            // A fast step that could not be stopped, and one that is monitored.
            self.called(|world| world.through(vcpu));
            self.called(|world| world.through(vcpu));
        }
        let left = self.called(|world| world.engine.leave(&mut world.machine));
        assert!(left.is_ok() || self.machine.stubborn, "leaving fails, and nothing is refused: {left:?}");
        let idle = self.called(|world| world.engine.is_idle(&mut world.machine));
        assert!(idle || !self.possible || self.machine.stubborn, "a step is in flight that nobody makes");
        let finished = self.called(|world| world.engine.finish(&mut world.machine));
        let machine = &self.machine;
        if machine.stubborn {
            return;
        }
        assert!(finished.is_ok(), "finishing fails, and nothing is refused: {finished:?}");
        assert!(self.engine.breakpoints().is_empty(), "breakpoints are left");
        machine.check_left();
    }

    /// Calls the engine, and looks at what must hold afterwards.
    fn called<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        self.machine.begin();
        let done = work(self);
        self.machine.end();
        done
    }
}

/// One of them, if there are any.
fn nth<T: Copy>(all: &[T], number: u8) -> Option<T> {
    all.get(usize::from(number) % all.len().max(1)).copied()
}

/// Sets a breakpoint. It may be refused for many reasons.
fn insert(engine: &mut Engine, machine: &mut Machine, at: Place, mechanism: u8) {
    let gpa = at.gpa(engine);
    let all: Vec<_> = Mechanism::all().collect();
    let mechanism = nth(&all, mechanism).unwrap_or_default();
    let inserted = engine.insert(machine, gpa, mechanism);
    let there = gpa.gfn().0 < PAGES || machine.stubborn;
    assert!(inserted.is_err() || there, "a breakpoint where the guest has no memory");
}

/// Watches a page, or does not any more.
fn watch(engine: &mut Engine, machine: &mut Machine, at: Place, what: u8) {
    let gfn = at.gpa(engine).gfn();
    let [read, write, execute, after] = [1, 2, 4, 8].map(|bit| what & bit != 0);
    let accesses = Accesses { read, write, execute };
    if engine.watch(machine, gfn, accesses, after).is_ok() && gfn.0 < PAGES {
        let bit = 1 << gfn.0;
        machine.watched = if accesses == Accesses::NONE { machine.watched & !bit } else { machine.watched | bit };
    }
}

/// Removes a breakpoint, if there are any.
fn remove(engine: &mut Engine, machine: &mut Machine, number: u8) {
    if let Some(id) = nth(&engine.breakpoints(), number) {
        let removed = engine.remove(machine, id);
        assert!(!matches!(removed, Err(Error::NoSuchBreakpoint)), "a breakpoint that is listed is not there");
    }
}

fuzz_target!(|input: Input| {
    let mut page = [0; PAGE_SIZE];
    page.iter_mut().zip(input.fill.iter().cycle()).for_each(|(byte, fill)| *byte = *fill);
    let machine = Machine::new(usize::from(input.vcpus) % MOST_VCPUS + 1, page);
    let engine = Engine::new(&machine);
    let registers = input.registers.map(Registers::from);
    let mut world = World {
        machine,
        engine,
        registers,
        callbacks: input.callbacks,
        rips: [0; MOST_VCPUS],
        possible: true,
        left: false,
    };
    for act in input.acts.iter().take(MOST_ACTS) {
        world.called(|world| world.act(*act));
    }
    world.finish();
});
