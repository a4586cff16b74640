//! What was once wrong, each as small as it gets, and what the model has no randomness for.

use hyperbp::{
    Access, Accesses, Engine, Error, Event, Gfn, Gpa, Int3, Mechanism, Placement, Reason, Registers, VcpuId, Verdict,
    ViewId,
};
use proptest::prelude::*;

use crate::guest::{Guest, Piece, Place, Recipe};
use crate::script::{Action, Script};
use crate::world::World;

/// How often each virtual CPU goes on.
const ROUNDS: usize = 60;

/// All virtual CPUs run and are answered by turns, with a breakpoint of this mechanism on every site that `on` names by
/// its number in the program.
fn by_turns(programs: &[&[Piece]], mechanism: Mechanism, on: impl Fn(usize) -> bool) {
    let recipe = Recipe::plain(programs);
    let Guest { sites, .. } = recipe.build();
    let sites: Vec<Gpa> = sites.into_iter().enumerate().filter(|(number, _)| on(*number)).map(|(_, gpa)| gpa).collect();
    let mut actions: Vec<_> = (0..sites.len() as u8).map(|site| Action::Insert(site, 0)).collect();
    for _ in 0..ROUNDS {
        (0..programs.len() as u8).for_each(|vcpu| actions.extend([Action::Run(vcpu), Action::Answer(vcpu, false)]));
    }
    Script::plain(recipe, &[mechanism], sites, actions).run();
}

/// The same with every mechanism, and a breakpoint everywhere.
fn everywhere(program: &[Piece]) {
    Mechanism::all().for_each(|mechanism| by_turns(&[program], mechanism, |_| true));
}

/// Every instruction, under every mechanism, with operands that set the flags one way and the other.
#[test]
fn every_instruction_does_what_it_does_without_a_breakpoint() {
    let arithmetic = |op| {
        let (left, right) = (Piece::MoveImmediate(1, -128), Piece::ArithmeticImmediate(op % 6, 1, 127));
        [Piece::Arithmetic(op, 0, 0), left, right, Piece::Arithmetic(op, 2, 1), Piece::JumpIf(op * 2, 1), Piece::Nop]
    };
    (0..7).for_each(|op| everywhere(&arithmetic(op)));
    everywhere(&[
        Piece::Push(8),
        Piece::Pop(3),
        Piece::WideNop,
        Piece::Endbr,
        Piece::Carry(0xf5),
        Piece::Lea(3, 5, -3),
    ]);
    everywhere(&[Piece::StoreStack(8, 4), Piece::LoadStack(8, 15), Piece::Hypercall, Piece::Jump(1), Piece::Int3]);
    let (data, end) = (Place::Data(8), Place::Data(0xffd));
    everywhere(&[Piece::Load(0, data), Piece::LoadByte(3, end), Piece::Compare(0, end), Piece::LoadRelative(1, end)]);
    everywhere(&[Piece::Store(4, end), Piece::StoreByte(0, data), Piece::AddTo(4, end), Piece::PushFrom(end)]);
    everywhere(&[
        Piece::JumpThrough(data),
        Piece::Nop,
        Piece::JumpThrough(end),
        Piece::JumpThrough(Place::Scratch(0, 0)),
    ]);
    everywhere(&[Piece::Load(0, Place::Absent(0)), Piece::LoadCode(0, 0xffe)]);
    everywhere(&[Piece::Store(0, Place::ReadOnly(0)), Piece::Nop]);
}

/// The instruction that writes the code is under a breakpoint itself, or runs in a step for another reason.
#[test]
fn code_that_is_written_by_a_stepped_instruction_is_followed() {
    everywhere(&[
        Piece::Cell(true, 0),
        Piece::Patch(0, 1),
        Piece::Cell(true, 2),
        Piece::Patch(1, 3),
        Piece::Patch(0, 2),
    ]);
    everywhere(&[
        Piece::LoadCode(0, 0x1234),
        Piece::PushFrom(Place::Scratch(1, 0)),
        Piece::Copy(Place::Scratch(1, 8), Place::Scratch(0, 0)),
    ]);
}

/// A breakpoint on the prefix: in its step the instruction is an INT3, and the virtual CPU must not stay in that view.
#[test]
fn the_guests_own_int3_ends_a_fast_step() {
    everywhere(&[Piece::Nop, Piece::PrefixedInt3, Piece::Nop]);
    for mechanism in Mechanism::all() {
        for number in 0..8 {
            by_turns(&[&[Piece::Nop, Piece::PrefixedInt3, Piece::Nop, Piece::Nop]], mechanism, |site| site == number);
        }
    }
}

/// The prefix is the last byte of a page, the breakpoint the first of the next.
#[test]
fn a_prefix_may_be_in_the_page_before() {
    let program = [Piece::LongNop, Piece::Nop, Piece::Nop];
    assert_eq!(Recipe::plain(&[&program]).build().sites[3].offset(), 0);
    for mechanism in Mechanism::all() {
        by_turns(&[&program], mechanism, |site| site == 3);
    }
}

/// An access was denied in the host view. When it is answered, the page is guarded in another way, and the instruction
/// itself has got a breakpoint in place, which the emulator would see.
#[test]
fn what_was_queued_in_another_view_is_tried_again() {
    let recipe = Recipe::plain(&[&[Piece::Store(0, Place::Data(8))]]);
    let all = recipe.build().sites;
    let sites = vec![Gfn(0x28).at(0xffc), all[2]];
    let (run, answer) = (Action::Run(0), Action::Answer(0, false));
    let mut actions = vec![Action::Insert(0, 0), run.clone(), run.clone(), Action::Remove(0), Action::Insert(0, 1)];
    actions.push(Action::Insert(1, 0));
    (0..8).for_each(|_| actions.extend([answer.clone(), run.clone()]));
    Script::plain(recipe, &[Mechanism::REPAIR, Mechanism::AUTO], sites, actions).run();
}

/// Where the engine keeps its shadows there is no memory, also for the emulator.
#[test]
fn an_emulated_read_finds_no_shadow() {
    everywhere(&[
        Piece::Load(0, Place::Hidden(0, 0)),
        Piece::LoadRelative(1, Place::Hidden(1, 0)),
        Piece::Copy(Place::Hidden(2, 0), Place::Data(0)),
        Piece::AddTo(1, Place::Hidden(2, 8)),
    ]);
}

/// One virtual CPU writes where there is no memory, another one reads there.
#[test]
fn what_is_written_to_no_memory_is_seen_by_nobody() {
    let (write, read) = (Piece::Store(0, Place::Hidden(0, 0)), Piece::Load(0, Place::Hidden(0, 0)));
    for mechanism in Mechanism::all().filter(|mechanism| mechanism.placement() == Placement::Shadow) {
        by_turns(&[&[write], &[read]], mechanism, |site| site == 0);
    }
}

/// The last breakpoint of a page is removed, and one is set again, while a virtual CPU is in the middle of an access.
#[test]
fn a_page_that_is_opened_again_is_another_one() {
    let recipe = Recipe::plain(&[&[Piece::Store(0, Place::Scratch(0, 0)), Piece::Nop]]);
    let site = recipe.build().sites[0];
    for mechanism in Mechanism::all() {
        let mut actions = vec![Action::Run(0), Action::Insert(0, 0), Action::Run(0), Action::Answer(0, false)];
        actions.extend([Action::Run(0), Action::Remove(0), Action::Insert(0, 0)]);
        actions.extend([Action::Answer(0, false), Action::Run(0), Action::Answer(0, false)]);
        Script::plain(recipe.clone(), &[mechanism], vec![Gfn(site.gfn().0).at(0x909)], actions).run();
    }
}

/// One virtual CPU is stepped over a breakpoint, and another one's access sets it again before the step is over: that is
/// no second hit.
#[test]
fn a_breakpoint_that_is_set_again_in_the_middle_of_a_step_is_hit_once() {
    let recipe = Recipe::plain(&[&[Piece::Nop], &[Piece::Store(0, Place::Scratch(0, 0))]]);
    // After the one in data, the first instruction.
    let site = recipe.build().sites[1];
    let (run, answer) = (Action::Run, |vcpu| Action::Answer(vcpu, false));
    let actions = vec![
        Action::Insert(0, 0),
        run(0),
        answer(0),
        run(1),
        run(1),
        answer(1),
        run(1),
        answer(1),
        run(0),
        answer(0),
        run(0),
        answer(0),
    ];
    Script::plain(recipe, &[Mechanism::REPAIR], vec![site], actions).run();
}

/// Two virtual CPUs write to a page with breakpoints in place at once: what the first has written stays.
#[test]
fn a_page_that_is_lifted_twice_keeps_what_was_written() {
    let write = Piece::Store(0, Place::Scratch(0, 0));
    let recipe = Recipe::plain(&[&[write], &[write]]);
    let site = Gfn(recipe.build().sites[0].gfn().0).at(0x904);
    let mut actions = vec![Action::Insert(0, 0)];
    actions.extend([0, 1, 0, 1].map(Action::Run));
    actions.extend([Action::Answer(0, false), Action::Run(0), Action::Answer(1, false), Action::Run(1)]);
    Script::plain(recipe, &[Mechanism::REPAIR], vec![site], actions).run();
}

/// What the CPU reads and writes to deliver an exception is in a page with breakpoints. The INT3, which is not delivered
/// again but executed again, is under one, too, or not.
#[test]
fn exceptions_arrive_whose_gates_are_guarded() {
    let program = [Piece::Int3, Piece::Load(0, Place::Absent(0))];
    for (mechanism, on_int3) in Mechanism::all().flat_map(|mechanism| [false, true].map(|on| (mechanism, on))) {
        let Guest { machine, sites } = Recipe::plain(&[&program]).build();
        let mut world = World::new(machine, Vec::new());
        let mut engine = Engine::new(&world);
        // The first one is in the page of the gates and of the stack, but in no code.
        let places = if on_int3 { &sites[..3] } else { &sites[..1] };
        for place in places {
            let id = engine.insert(&mut world, *place, mechanism).unwrap();
            world.subscribed(id, mechanism.placement());
        }
        for _ in 0..ROUNDS {
            world.run(0);
            let Some(event) = world.machine.vcpus[0].waiting else { continue };
            let reply = engine.handle(&mut world, &event, &mut |_, world, hit| {
                world.told(hit.vcpu, hit.breakpoint);
                Verdict::Keep
            });
            if world.machine.answer(0, &reply, false) {
                world.through(0);
            }
            world.check();
        }
        let exceptions = world.machine.vcpus[0].exceptions;
        assert!(exceptions > 4, "{mechanism}: {exceptions} exceptions were delivered");
    }
}

proptest! {
    /// Events that nothing explains, from virtual CPUs and views that do not exist: no panic.
    #[test]
    fn nothing_a_guest_sends_makes_the_engine_panic(
        mechanism in prop::sample::select(Mechanism::all().collect::<Vec<_>>()),
        events in prop::collection::vec((0..2_u16, 0..5_u16, 0..3_usize, any::<u16>(), any::<u8>(), 0..5_u8), 1..40),
    ) {
        let Guest { machine, sites } = Recipe::plain(&[&[Piece::Nop]]).build();
        let mut world = World::new(machine, Vec::new());
        let mut engine = Engine::new(&world);
        engine.insert(&mut world, sites[0], Mechanism::EMULATE).unwrap();
        engine.insert(&mut world, sites[sites.len() - 1], mechanism).unwrap();
        for (vcpu, view, site, offset, bits, kind) in events {
            let gpa = [sites[0], sites[sites.len() - 1].gfn().at(offset), Gfn(0x100).at(offset)][site];
            let has = |bit: u8| bits & bit != 0;
            let access = Access::new(gpa, Accesses { read: has(1), write: has(2), execute: has(4) }).with_page_walk(has(8));
            let reason = match kind {
                0 => Reason::Int3(Int3::new(gpa, bits)),
                1 => Reason::Step,
                2 => Reason::EmulationFailed,
                _ => Reason::Access(access),
            };
            let registers = Registers::default().with(|new| new.rip = gpa.0);
            let event = Event::new(VcpuId(vcpu), ViewId(view), registers, reason);
            _ = engine.handle(&mut world, &event, &mut |_, _, _| Verdict::Keep);
        }
    }
}

#[test]
fn what_cannot_work_is_refused_and_changes_nothing() {
    let Guest { machine, sites } = Recipe::plain(&[&[Piece::Nop]]).build();
    let mut world = World::new(machine, Vec::new());
    let mut engine = Engine::new(&world);
    let at = |offset| sites[0].gfn().at(offset);
    let id = engine.insert(&mut world, at(0x900), Mechanism::EMULATE).unwrap();
    assert!(matches!(engine.insert(&mut world, at(0x900), Mechanism::AUTO), Err(Error::StepOverConflict(_))));
    assert!(matches!(engine.insert(&mut world, at(0x901), Mechanism::REPAIR), Err(Error::PageConflict(_))));
    assert_eq!(engine.breakpoints(), [id]);
    engine.remove(&mut world, id).unwrap();
    assert!(matches!(engine.remove(&mut world, id), Err(Error::NoSuchBreakpoint)));
    engine.insert(&mut world, at(0x901), Mechanism::REPAIR).unwrap();
    engine.leave(&mut world).unwrap();
    engine.finish(&mut world).unwrap();
    world.check_left();
}

/// With a breakpoint on each instruction, and none in the data or the stack, whose pages would be guarded.
fn in_code_only(program: &[Piece]) {
    let data = Gfn(0x28);
    let code = Recipe::plain(&[program]).build().sites.iter().filter(|site| site.gfn() < data).count();
    Mechanism::all().for_each(|mechanism| by_turns(&[program], mechanism, |site| site < code));
}

/// The guest switches its own breakpoints on, and meets one of ours before Xen switches the virtual CPU out: the event shows
/// an older DR7.
#[test]
fn no_debug_exception_of_the_guests_is_lost_or_doubled() {
    let data = Place::Data(8);
    for which in [2, 5] {
        let (on, off) = (Piece::DebugControl(which), Piece::DebugControl(0));
        in_code_only(&[on, Piece::Push(0), Piece::Pop(1), off, Piece::Nop, on, Piece::Load(2, data), off]);
        in_code_only(&[on, Piece::Store(1, data), Piece::PushFrom(data), off, on, Piece::Pop(1), off, Piece::Nop]);
        everywhere(&[on, Piece::Push(0), Piece::Pop(1), off, Piece::Nop, on, Piece::Load(2, data), off]);
        everywhere(&[on, Piece::Store(1, data), Piece::AddTo(1, data), Piece::PushFrom(data), off, Piece::Nop]);
        everywhere(&[on, Piece::LoadCode(0, 0xffe), Piece::LoadCode(0, 0x1234), off, Piece::Carry(0xf5)]);
        everywhere(&[on, Piece::Nop, Piece::Hypercall, Piece::PrefixedInt3, Piece::Int3, off, Piece::Nop]);
        everywhere(&[on, Piece::Cell(true, 0), Piece::Patch(0, 1), off, Piece::StoreByte(0, Place::Scratch(1, 8))]);
    }
}
