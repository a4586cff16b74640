//! The engine against a small machine: one page of NOPs, and virtual CPUs that execute, read and write it at random.
//!
//! The machine follows Xen: accesses are checked in the view, then carried out on what the view maps; a monitored step
//! ends in an event, a fast one in a switch of the view; emulation goes through the host view.

use std::collections::HashMap;
use std::convert::Infallible;

use hyperbp::{
    Access, Action, CodeMode, Engine, Event, Gfn, Gpa, Hypervisor, Int3, Mechanism, PAGE_SIZE, Placement, Reason,
    Registers, Reply, Rights, Step, VcpuId, Verdict, ViewId,
};
use proptest::prelude::*;

const PAGE: Gfn = Gfn(7);
const NOP: u8 = 0x90;
const INT3: u8 = 0xcc;
/// The instruction with which a guest reads or writes: `mov al, [rsi]`, in a page of its own.
const MOV_PAGE: Gfn = Gfn(8);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cpu {
    view: ViewId,
    stepping: bool,
    fast: Option<ViewId>,
}

/// The machine, and the hypervisor in it.
#[derive(Debug)]
struct Machine {
    pages: HashMap<Gfn, [u8; PAGE_SIZE]>,
    views: HashMap<ViewId, HashMap<Gfn, (Gfn, Rights)>>,
    cpus: Vec<Cpu>,
    next: u64,
    pauses: u32,
}

impl Machine {
    fn new(cpus: usize) -> Self {
        let mut mov = [NOP; PAGE_SIZE];
        mov[..2].copy_from_slice(&[0x8a, 0x06]);
        Self {
            pages: HashMap::from([(PAGE, [NOP; PAGE_SIZE]), (MOV_PAGE, mov)]),
            views: HashMap::from([(ViewId::HOST, HashMap::new())]),
            cpus: vec![Cpu::default(); cpus],
            next: 100,
            pauses: 0,
        }
    }

    /// What a view shows at a page, and permits.
    fn lookup(&self, view: ViewId, gfn: Gfn) -> (Gfn, Rights) {
        let host = self.views[&ViewId::HOST].get(&gfn).copied().unwrap_or((gfn, Rights::All));
        self.views[&view].get(&gfn).copied().unwrap_or(host)
    }

    fn byte(&self, view: ViewId, gpa: Gpa) -> u8 {
        self.pages[&self.lookup(view, gpa.gfn()).0][usize::from(gpa.offset())]
    }
}

impl Hypervisor for Machine {
    type Error = Infallible;

    fn vcpus(&self) -> u16 {
        self.cpus.len() as u16
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Infallible> {
        let at = usize::from(gpa.offset());
        into.copy_from_slice(&self.pages[&gpa.gfn()][at..at + into.len()]);
        Ok(())
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Infallible> {
        let at = usize::from(gpa.offset());
        self.pages.get_mut(&gpa.gfn()).unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn now(&self) -> u64 {
        0
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Infallible> {
        self.next += 1;
        self.pages.insert(Gfn(self.next), [0; PAGE_SIZE]);
        Ok(Gfn(self.next))
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), Infallible> {
        assert!(self.views.values().all(|view| view.values().all(|(to, _)| *to != gfn)), "a view still shows it");
        self.pages.remove(&gfn).expect("it exists");
        Ok(())
    }

    fn create_view(&mut self) -> Result<ViewId, Infallible> {
        self.next += 1;
        self.views.insert(ViewId(self.next as u16), HashMap::new());
        Ok(ViewId(self.next as u16))
    }

    fn switch_view(&mut self, view: ViewId) -> Result<(), Infallible> {
        assert!(self.views.contains_key(&view));
        self.cpus.iter_mut().for_each(|cpu| cpu.view = view);
        Ok(())
    }

    fn drop_view(&mut self, view: ViewId) -> Result<(), Infallible> {
        assert!(view != ViewId::HOST && self.cpus.iter().all(|cpu| cpu.view != view));
        self.views.remove(&view).expect("it exists");
        Ok(())
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), Infallible> {
        let view = self.views.get_mut(&view).unwrap();
        match to {
            Some(to) => view.insert(gfn, (to, Rights::All)),
            None => view.remove(&gfn),
        };
        Ok(())
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), Infallible> {
        let to = self.lookup(view, gfn).0;
        self.views.get_mut(&view).unwrap().insert(gfn, (to, rights));
        Ok(())
    }

    fn stop_step(&mut self, vcpu: VcpuId) -> Result<(), Infallible> {
        let cpu = &mut self.cpus[usize::from(vcpu.0)];
        (cpu.stepping, cpu.fast) = (false, None);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Infallible> {
        self.pauses += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Infallible> {
        self.pauses -= 1;
        Ok(())
    }
}

/// What a virtual CPU does.
#[derive(Clone, Copy, Debug)]
enum Op {
    Execute(u16),
    Read(u16),
    Write(u16, u8),
}

/// A virtual CPU in the middle of an operation: it waits for the answer to this event.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    op: Op,
    event: Event,
}

struct World {
    machine: Machine,
    engine: Engine,
    waiting: Vec<Option<Waiting>>,
    /// The page as the guest wrote it.
    truth: [u8; PAGE_SIZE],
    hits: HashMap<u16, u64>,
    delivered: u64,
}

impl World {
    fn new(cpus: usize) -> Self {
        let machine = Machine::new(cpus);
        let engine = Engine::new(&machine);
        let (truth, hits) = ([NOP; PAGE_SIZE], HashMap::new());
        Self { machine, engine, waiting: vec![None; cpus], truth, hits, delivered: 0 }
    }

    fn event(&self, cpu: usize, gpa: Gpa, reason: Reason) -> Event {
        let registers = Registers { rip: gpa.0, mode: CodeMode::Bits64, ..Registers::default() };
        Event { vcpu: VcpuId(cpu as u16), view: self.machine.cpus[cpu].view, registers, reason }
    }

    /// Lets a virtual CPU do what it does, until it is through or waits for an answer.
    fn run(&mut self, cpu: usize, op: Op) {
        let view = self.machine.cpus[cpu].view;
        let (offset, access) = match op {
            Op::Execute(offset) if matches!(self.machine.lookup(view, PAGE).1, Rights::ReadWrite | Rights::None) => {
                let access =
                    Access { gpa: PAGE.at(offset), read: false, write: false, execute: true, page_walk: false };
                let event = self.event(cpu, PAGE.at(offset), Reason::Access(access));
                self.waiting[cpu] = Some(Waiting { op, event });
                return;
            }
            Op::Execute(offset) => {
                if self.machine.byte(view, PAGE.at(offset)) == INT3 {
                    let gpa = PAGE.at(offset);
                    let event = self.event(cpu, gpa, Reason::Int3(Int3 { gpa, length: 1 }));
                    self.waiting[cpu] = Some(Waiting { op, event });
                } else {
                    self.through(cpu, op);
                }
                return;
            }
            Op::Read(offset) => (offset, false),
            Op::Write(offset, _) => (offset, true),
        };
        let (page, rights) = self.machine.lookup(view, PAGE);
        if matches!(rights, Rights::Execute | Rights::None) {
            let gpa = PAGE.at(offset);
            let access = Access { gpa, read: !access, write: access, execute: false, page_walk: false };
            let event = self.event(cpu, MOV_PAGE.at(0), Reason::Access(access));
            self.waiting[cpu] = Some(Waiting { op, event });
            return;
        }
        match op {
            Op::Write(_, byte) => {
                self.machine.pages.get_mut(&page).unwrap()[usize::from(offset)] = byte;
                self.truth[usize::from(offset)] = byte;
            }
            _ => self.seen(offset, self.machine.pages[&page][usize::from(offset)]),
        }
        self.through(cpu, op);
    }

    fn seen(&self, offset: u16, byte: u8) {
        assert_eq!(byte, self.truth[usize::from(offset)], "the guest reads a byte that is not its own at {offset:#x}");
    }

    /// The instruction is over: a step ends.
    fn through(&mut self, cpu: usize, op: Op) {
        let state = &mut self.machine.cpus[cpu];
        if let Some(view) = state.fast.take() {
            state.view = view;
        } else if state.stepping {
            let event = self.event(cpu, PAGE.at(0), Reason::Step);
            self.waiting[cpu] = Some(Waiting { op, event });
        }
    }

    /// Answers the event a virtual CPU waits for.
    fn answer(&mut self, cpu: usize) {
        let Some(Waiting { op, event }) = self.waiting[cpu].take() else { return };
        let hits = &mut self.hits;
        let reply: Reply = self.engine.handle(&mut self.machine, &event, &mut |_, _, hit| {
            *hits.entry(hit.breakpoint.gpa().offset()).or_default() += 1;
            Verdict::Keep
        });
        let state = &mut self.machine.cpus[cpu];
        match reply.step {
            Step::Keep => {}
            Step::On => assert!(!std::mem::replace(&mut state.stepping, true), "stepping was on"),
            Step::Off => assert!(std::mem::replace(&mut state.stepping, false), "stepping was off"),
            Step::Fast(back) => {
                assert!(!state.stepping, "a fast step during a step");
                state.fast = Some(back);
            }
        }
        if let Some(view) = reply.view {
            assert!(self.machine.views.contains_key(&view));
            state.view = view;
        }
        if event.reason == Reason::Step {
            return;
        }
        match (reply.action, op) {
            (Action::Resume, _) => self.run(cpu, op),
            (Action::Reinject, _) => {
                self.delivered += 1;
                self.through(cpu, op);
            }
            (Action::SetRegisters(registers), Op::Execute(offset)) => {
                assert_eq!(registers.rip, PAGE.at(offset).0 + 1);
                self.through(cpu, op);
            }
            (Action::EmulateInstruction(bytes), Op::Execute(offset)) => {
                assert_eq!(bytes[0], self.truth[usize::from(offset)]);
                self.through(cpu, op);
            }
            (Action::EmulateRead(data), Op::Read(offset)) => {
                self.seen(offset, data.as_slice()[0]);
                self.through(cpu, op);
            }
            (Action::Emulate, Op::Read(offset)) => {
                self.seen(offset, self.machine.pages[&PAGE][usize::from(offset)]);
                self.through(cpu, op);
            }
            (action, op) => panic!("{action:?} does not answer {op:?}"),
        }
    }

    fn settle(&mut self) {
        for cpu in 0..self.waiting.len() {
            while self.waiting[cpu].is_some() {
                self.answer(cpu);
            }
        }
    }
}

/// Offsets close together, so that breakpoints, reads and writes meet.
fn offset() -> impl Strategy<Value = u16> {
    0xff0_u16..0x1000
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => offset().prop_map(Op::Execute),
        2 => offset().prop_map(Op::Read),
        1 => (offset(), prop_oneof![Just(NOP), Just(0xf8_u8), Just(INT3)]).prop_map(|(at, byte)| Op::Write(at, byte)),
    ]
}

proptest! {
    /// One virtual CPU, every combination: hits are executions, reads show the guest's own bytes, its own INT3s arrive,
    /// and after leaving the page and the views are as they were.
    #[test]
    fn one_virtual_cpu_never_notices(
        mechanism in proptest::sample::select(Mechanism::all().collect::<Vec<_>>()),
        breakpoints in proptest::collection::btree_set(offset(), 1..4),
        ops in proptest::collection::vec(op(), 1..60),
    ) {
        let mut world = World::new(1);
        for at in &breakpoints {
            world.engine.insert(&mut world.machine, PAGE.at(*at), mechanism).unwrap();
        }
        let (mut executed, mut own) = (HashMap::new(), 0);
        for op in ops {
            if let Op::Execute(at) = op {
                if breakpoints.contains(&at) {
                    *executed.entry(at).or_insert(0) += 1;
                }
                own += u64::from(world.truth[usize::from(at)] == INT3);
            }
            world.run(0, op);
            world.settle();
        }
        prop_assert_eq!(&world.hits, &executed);
        prop_assert_eq!(world.delivered, own);
        finish(world)?;
    }

    /// Several, on shadow pages: no hit is lost or doubled however they interleave.
    #[test]
    fn no_hit_is_lost_on_several_virtual_cpus(
        mechanism in proptest::sample::select(
            Mechanism::all().filter(|m| m.placement() == Placement::Shadow).collect::<Vec<_>>()),
        script in proptest::collection::vec((0_usize..3, offset(), any::<bool>()), 1..80),
    ) {
        let mut world = World::new(3);
        let at = 0xff4;
        world.engine.insert(&mut world.machine, PAGE.at(at), mechanism).unwrap();
        let mut executed = 0;
        for (cpu, offset, execute) in script {
            if world.waiting[cpu].is_some() {
                world.answer(cpu);
            } else if execute {
                executed += 1;
                world.run(cpu, Op::Execute(at));
            } else {
                world.run(cpu, Op::Read(offset));
            }
        }
        world.settle();
        prop_assert_eq!(world.hits.get(&at).copied().unwrap_or(0), executed);
        finish(world)?;
    }

    /// Events that nothing explains, from virtual CPUs and views that do not exist: no panic, and no endless denial.
    #[test]
    fn nothing_a_guest_sends_makes_the_engine_panic(
        events in proptest::collection::vec((any::<u16>(), any::<u16>(), 0_u64..9, any::<u16>(), any::<u8>(), 0_u8..4), 1..40),
    ) {
        let mut world = World::new(1);
        world.engine.insert(&mut world.machine, PAGE.at(0xff4), Mechanism::EMULATE).unwrap();
        for (vcpu, view, gfn, offset, length, kind) in events {
            let gpa = Gfn(7 + gfn % 2).at(offset);
            let access = Access { gpa, read: length & 1 != 0, write: length & 2 != 0, execute: false, page_walk: length & 4 != 0 };
            let reason = match kind {
                0 => Reason::Int3(Int3 { gpa, length }),
                1 => Reason::Step,
                _ => Reason::Access(access),
            };
            let registers = Registers { rip: gpa.0, ..Registers::default() };
            let event = Event { vcpu: VcpuId(vcpu % 2), view: ViewId(view % 200), registers, reason };
            world.engine.handle(&mut world.machine, &event, &mut |_, _, _| Verdict::Keep);
        }
    }
}

/// Leaves the domain, and looks whether anything is left.
fn finish(mut world: World) -> Result<(), TestCaseError> {
    world.engine.leave(&mut world.machine).unwrap();
    world.settle();
    prop_assert!(world.engine.is_idle());
    world.engine.finish(&mut world.machine).unwrap();
    let machine = world.machine;
    prop_assert_eq!(&machine.pages[&PAGE][..], &world.truth[..]);
    prop_assert_eq!(machine.pages.len(), 2);
    prop_assert_eq!(machine.views.len(), 1);
    prop_assert!(machine.views[&ViewId::HOST].values().all(|(_, rights)| *rights == Rights::All));
    prop_assert!(machine.cpus.iter().all(|cpu| *cpu == Cpu::default()));
    prop_assert_eq!(machine.pauses, 0);
    Ok(())
}

#[test]
fn what_cannot_work_is_refused_and_changes_nothing() {
    let mut machine = Machine::new(1);
    let mut engine = Engine::new(&machine);
    let id = engine.insert(&mut machine, PAGE.at(1), Mechanism::EMULATE).unwrap();
    let other = engine.insert(&mut machine, PAGE.at(1), Mechanism::AUTO);
    assert!(other.unwrap_err().to_string().contains("another step-over"));
    assert!(engine.insert(&mut machine, PAGE.at(2), Mechanism::REPAIR).is_err());
    engine.remove(&mut machine, id).unwrap();
    assert!(engine.remove(&mut machine, id).is_err());
    engine.insert(&mut machine, PAGE.at(2), Mechanism::REPAIR).unwrap();
    assert_eq!(machine.pages[&PAGE][2], INT3);
}
