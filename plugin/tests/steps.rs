//! Steps that do not end where they should.

use std::convert::Infallible;

use hyperbp::{
    Action, CodeMode, Engine, Event, Gfn, Gpa, Hypervisor, Int3, Mechanism, PAGE_SIZE, Reason, Registers, Reply,
    Rights, Step, VcpuId, Verdict, ViewId,
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
