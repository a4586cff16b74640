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
    let registers = Registers { rip: PAGE.at(offset).0, mode: CodeMode::Bits64, ..Registers::default() };
    let event = Event { vcpu: VcpuId(0), view: ViewId::HOST, registers, reason };
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
    let int3 = |offset| Reason::Int3(Int3 { gpa: PAGE.at(offset), length: 1 });
    let first = handle(&mut engine, &mut page, 0, int3(0));
    assert_eq!((first.step, first.action, page.0[..3].to_vec()), (Step::On, Action::Resume, vec![0x0f, 0xa2, 0xcc]));
    let second = handle(&mut engine, &mut page, 2, int3(2));
    assert_eq!((second.step, page.0[..3].to_vec()), (Step::Keep, vec![0xcc, 0xa2, 0x90]));
    let third = handle(&mut engine, &mut page, 3, Reason::Step);
    assert_eq!((third.step, page.0[..3].to_vec()), (Step::Off, vec![0xcc, 0xa2, 0xcc]));
    engine.leave(&mut page).unwrap();
    assert!(engine.is_idle());
    engine.finish(&mut page).unwrap();
    assert_eq!(page.0, original);
}
