//! Steps that do not end where they should.

use std::convert::Infallible;

use hyperbp::{
    Access, Accesses, Action, CodeMode, Engine, Event, Gfn, Gpa, Hypervisor, Int3, Mechanism, PAGE_SIZE, Reason,
    Registers, Reply, Rights, Step, VcpuId, Verdict, ViewId,
};

const PAGE: Gfn = Gfn(7);

/// One page, in which nothing but the engine writes.
struct Page([u8; PAGE_SIZE]);

impl Hypervisor for Page {
    type Error = Infallible;

    fn vcpus(&self) -> u16 {
        1
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Infallible> {
        into.copy_from_slice(&self.0[usize::from(gpa.offset())..][..into.len()]);
        Ok(())
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Infallible> {
        self.0[usize::from(gpa.offset())..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Infallible> {
        self.write(gpa, bytes).map(|()| true)
    }

    fn now(&self) -> u64 {
        0
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Infallible> {
        unreachable!("breakpoints are in place")
    }

    fn drop_shadow_gfn(&mut self, _: Gfn) -> Result<(), Infallible> {
        unreachable!("breakpoints are in place")
    }

    fn create_view(&mut self) -> Result<ViewId, Infallible> {
        unreachable!("breakpoints are in place")
    }

    fn switch_view(&mut self, _: ViewId) -> Result<(), Infallible> {
        Ok(())
    }

    fn drop_view(&mut self, _: ViewId) -> Result<(), Infallible> {
        Ok(())
    }

    fn remap(&mut self, _: ViewId, _: Gfn, _: Option<Gfn>) -> Result<(), Infallible> {
        Ok(())
    }

    fn set_rights(&mut self, _: ViewId, _: Gfn, _: Rights) -> Result<(), Infallible> {
        Ok(())
    }

    fn rip(&mut self, _: VcpuId) -> Result<u64, Infallible> {
        Ok(0)
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

fn handle(engine: &mut Engine, page: &mut Page, offset: u16, reason: Reason) -> Reply {
    let registers = Registers::default().with(|new| {
        new.rip = PAGE.at(offset).0;
        new.mode = CodeMode::Bits64;
    });
    let event = Event::new(VcpuId(0), ViewId::HOST, registers, reason);
    engine.handle(page, &event, &mut |_, _, _| Verdict::Keep)
}

/// CPUID exits to Xen, which goes on behind it: the step ends with the instruction after it, or with that one's breakpoint.
#[test]
fn a_step_that_runs_into_the_next_breakpoint_sets_the_first_again() {
    let mut page = Page([0x90; PAGE_SIZE]);
    page.0[..3].copy_from_slice(&[0x0f, 0xa2, 0x90]);
    let original = page.0;
    let mut engine = Engine::new(&page);
    for offset in [0, 2] {
        engine.insert(&mut page, PAGE.at(offset), Mechanism::REPAIR).unwrap();
    }
    let int3 = |offset| Reason::Int3(Int3::new(PAGE.at(offset), 1));
    let first = handle(&mut engine, &mut page, 0, int3(0));
    assert_eq!((first.step, first.action, page.0[..3].to_vec()), (Step::On, Action::Resume, vec![0x0f, 0xa2, 0xcc]));
    let second = handle(&mut engine, &mut page, 2, int3(2));
    assert_eq!((second.step, page.0[..3].to_vec()), (Step::Keep, vec![0xcc, 0xa2, 0x90]));
    let third = handle(&mut engine, &mut page, 3, Reason::Step);
    assert_eq!((third.step, page.0[..3].to_vec()), (Step::Off, vec![0xcc, 0xa2, 0xcc]));
    engine.leave(&mut page).unwrap();
    assert!(engine.is_idle(&mut page));
    engine.finish(&mut page).unwrap();
    assert_eq!(page.0, original);
}

/// What is emulated in vain and stepped then is one hit, and fell back once.
#[test]
fn a_hit_that_the_emulator_gives_back_falls_back_once() {
    let mut page = Page([0x90; PAGE_SIZE]);
    page.0[8..11].copy_from_slice(&[0x0f, 0x01, 0xc1]); // vmcall
    for mechanism in ["in-place+emulate+data", "in-place+interpret+data", "in-place+auto+data"] {
        let mut engine = Engine::new(&page);
        let id = engine.insert(&mut page, PAGE.at(8), mechanism.parse().unwrap()).unwrap();
        for hit in 1..3 {
            let int3 = Reason::Int3(Int3::new(PAGE.at(8), 1));
            let mut reply = handle(&mut engine, &mut page, 8, int3);
            if hit == 1 {
                assert!(matches!(reply.action, Action::EmulateInstruction(_)), "{mechanism}: {reply:?}");
                reply = handle(&mut engine, &mut page, 8, Reason::EmulationFailed);
            }
            assert_eq!(reply.step, Step::On, "{mechanism}");
            _ = handle(&mut engine, &mut page, 11, Reason::Step);
            let figures = engine.figures(id).unwrap();
            let counts = (figures.hits, figures.served.repair, figures.served.total(), figures.fallbacks);
            assert_eq!(counts, (hit, hit, hit, hit), "{mechanism}");
        }
        assert_eq!(engine.counters().emulation_failures, 1);
        engine.leave(&mut page).unwrap();
    }
}

/// What is before it is in another page: its linear address tells which.
#[test]
fn an_instruction_at_the_start_of_a_page_is_interpreted_unless_it_may_be_in_an_interrupt_shadow() {
    for (before, interpreted) in [([0x90, 0x90], true), ([0x90, 0xfb], false), ([0x8e, 0xd0], false)] {
        // Every page reads the same here, the one before, too.
        let mut page = Page([0x90; PAGE_SIZE]);
        page.0[PAGE_SIZE - 2..].copy_from_slice(&before);
        let mut engine = Engine::new(&page);
        let id = engine.insert(&mut page, PAGE.at(0), "in-place+interpret+data".parse().unwrap()).unwrap();
        let reply = handle(&mut engine, &mut page, 0, Reason::Int3(Int3::new(PAGE.at(0), 1)));
        assert_eq!(matches!(reply.action, Action::SetRegisters(_)), interpreted, "{before:x?}: {reply:?}");
        assert_eq!(engine.figures(id).unwrap().served.interpret, u64::from(interpreted));
    }
}

/// The registers of a vCPU at a repeated instruction, with so many iterations to come.
fn repeated(offset: u16, left: u64) -> Registers {
    Registers::default().with(|new| {
        (new.rip, new.mode, new.rflags) = (PAGE.at(offset).0, CodeMode::Bits64, 2);
        (new.gpr[1], new.gpr[6], new.gpr[7]) = (left, 0x2000 - left, 0x4000 - left);
    })
}

/// A step runs one iteration of `rep movsb`: RIP stays, and the breakpoint must not be hit again. Xen lets no interrupt in while
/// it steps, so a long one is left to itself every so often.
#[test]
fn a_repeated_instruction_is_one_hit() {
    const LENGTH: u64 = 3500;
    let mut page = Page([0x90; PAGE_SIZE]);
    page.0[8..10].copy_from_slice(&[0xf3, 0xa4]);
    for mechanism in Mechanism::all().filter(|mechanism| mechanism.placement() == hyperbp::Placement::InPlace) {
        let mut engine = Engine::new(&page);
        let id = engine.insert(&mut page, PAGE.at(8), mechanism).unwrap();
        let int3 = Reason::Int3(Int3::new(PAGE.at(8), 1));
        for execution in 1..3 {
            let (mut left, mut breaks) = (LENGTH, 0);
            let mut event = |page: &mut Page, registers, reason| {
                let event = Event::new(VcpuId(0), ViewId::HOST, registers, reason);
                engine.handle(page, &event, &mut |_, _, _| Verdict::Keep).step
            };
            assert_eq!(event(&mut page, repeated(8, left), int3), Step::On, "{mechanism}");
            while left > 0 {
                assert_eq!(page.0[8], 0xf3, "{mechanism}: the guest's own byte");
                left -= 1;
                let registers = repeated(if left > 0 { 8 } else { 10 }, left);
                match event(&mut page, registers, Reason::Step) {
                    Step::Keep => {}
                    step => {
                        assert_eq!((step, page.0[8]), (Step::Off, 0xcc), "{mechanism}");
                        breaks += 1;
                        if left > 0 {
                            // An interrupt comes, and when its handler returns the INT3 is executed.
                            assert_eq!(event(&mut page, registers, int3), Step::On, "{mechanism}");
                        }
                    }
                }
            }
            assert_eq!((breaks, engine.figures(id).unwrap().hits), (4, execution), "{mechanism}");
        }
        engine.leave(&mut page).unwrap();
        assert!(engine.is_idle(&mut page));
        engine.finish(&mut page).unwrap();
    }
}

/// An exception, or a single-step trap of the guest's, comes between two iterations: when its handler returns, that is the same
/// execution. One that begins anew is another, although all registers are those of before.
#[test]
fn a_repeated_instruction_that_is_interrupted_is_one_hit() {
    let mut page = Page([0x90; PAGE_SIZE]);
    page.0[8..10].copy_from_slice(&[0xf3, 0xaa]);
    let mut engine = Engine::new(&page);
    let id = engine.insert(&mut page, PAGE.at(8), Mechanism::REPAIR).unwrap();
    let int3 = Reason::Int3(Int3::new(PAGE.at(8), 1));
    let (behind, handler) = (10, 0x123);
    for (reason, rip, left, step, hits) in [
        (int3, 8, 1, Step::On, 1),
        (Reason::Step, behind, 0, Step::Off, 1),
        (int3, 8, 1, Step::On, 2),
        (Reason::Step, handler, 1, Step::Off, 2),
        (int3, 8, 1, Step::On, 2),
        (Reason::Step, behind, 0, Step::Off, 2),
        (int3, 8, 3, Step::On, 3),
        (Reason::Step, 8, 2, Step::Keep, 3),
        (Reason::Step, handler, 1, Step::Off, 3),
        (int3, 8, 2, Step::On, 4),
    ] {
        let event = Event::new(VcpuId(0), ViewId::HOST, repeated(rip, left), reason);
        let reply = engine.handle(&mut page, &event, &mut |_, _, _| Verdict::Keep);
        assert_eq!((reply.step, engine.figures(id).unwrap().hits), (step, hits), "{rip:#x}, {left} left");
    }
}

/// The page table that maps the code is in the page with the code. The CPU walks it to fetch the instruction under a breakpoint,
/// and the breakpoint is out while it does.
#[test]
fn an_instruction_that_is_fetched_by_way_of_its_own_page_is_a_hit() {
    for displaced in [0x90, 0xcc] {
        for mechanism in Mechanism::all().filter(|mechanism| mechanism.placement() == hyperbp::Placement::InPlace) {
            let mut page = Page([0x90; PAGE_SIZE]);
            page.0[8] = displaced;
            let mut engine = Engine::new(&page);
            let id = engine.insert(&mut page, PAGE.at(8), mechanism).unwrap();
            let walk = Access::new(PAGE.at(0x800), Accesses::READ).with_page_walk(true);
            for hits in 1..3 {
                assert_eq!(handle(&mut engine, &mut page, 8, Reason::Access(walk)).step, Step::On, "{mechanism}");
                assert_eq!(page.0[8], displaced, "{mechanism}: the guest's own byte");
                assert_eq!(engine.figures(id).unwrap().hits, hits, "{mechanism}");
                if displaced == 0xcc {
                    let own = handle(&mut engine, &mut page, 8, Reason::Int3(Int3::new(PAGE.at(8), 1)));
                    assert_eq!(own.action, Action::Reinject, "{mechanism}");
                }
                // And what is walked for the instruction after it is no hit.
                assert_eq!(handle(&mut engine, &mut page, 9, Reason::Step).step, Step::Off, "{mechanism}");
                assert_eq!(page.0[8], 0xcc, "{mechanism}");
                assert_eq!(handle(&mut engine, &mut page, 9, Reason::Access(walk)).step, Step::On, "{mechanism}");
                assert_eq!(handle(&mut engine, &mut page, 10, Reason::Step).step, Step::Off, "{mechanism}");
                assert_eq!(engine.figures(id).unwrap().hits, hits, "{mechanism}");
            }
            engine.leave(&mut page).unwrap();
            assert!(engine.is_idle(&mut page));
        }
    }
}
