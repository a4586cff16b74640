//! What happens while a virtual CPU waits allocates no memory, whatever the mechanism: a hit, the step after it, a
//! concealed read, and a write of the guest's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::HashMap;
use std::convert::Infallible;

use hyperbp::{
    Access, Accesses, Action, Engine, Event, Gfn, Gpa, Hypervisor, Int3, Mechanism, PAGE_SIZE, Placement, Reason,
    Registers, Reply, Rights, Step, VcpuId, Verdict, ViewId,
};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, and a counter for each thread.
struct Counting;

// SAFETY: all is left to the system's allocator; the counter needs no memory of its own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CODE: Gfn = Gfn(7);
const DATA: Gfn = Gfn(8);
/// `nop`, which everything can do; `mov al, [rsi]`; `mov [rsi], al`; and `cpuid`, which has to be stepped or emulated.
const NOP_AT: u16 = 0x10;
const READ_AT: u16 = 0x20;
const WRITE_AT: u16 = 0x30;
const CPUID_AT: u16 = 0x40;

/// Memory alone: views and steps are only noted by the engine.
struct Memory {
    pages: HashMap<Gfn, Box<[u8; PAGE_SIZE]>>,
    next: u16,
}

impl Memory {
    fn new() -> Self {
        let (mut code, data) = (Box::new([0x90; PAGE_SIZE]), Box::new([0x90; PAGE_SIZE]));
        for (at, bytes) in [(READ_AT, [0x8a, 0x06]), (WRITE_AT, [0x88, 0x06]), (CPUID_AT, [0x0f, 0xa2])] {
            code[usize::from(at)..][..2].copy_from_slice(&bytes);
        }
        Self { pages: HashMap::from([(CODE, code), (DATA, data)]), next: 100 }
    }

    fn number(&mut self) -> u16 {
        self.next += 1;
        self.next
    }
}

impl Hypervisor for Memory {
    type Error = Infallible;

    fn vcpus(&self) -> u16 {
        1
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Infallible> {
        into.copy_from_slice(&self.pages[&gpa.gfn()][gpa.offset().into()..][..into.len()]);
        Ok(())
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Infallible> {
        let page = self.pages.get_mut(&gpa.gfn()).expect("the page exists");
        page[gpa.offset().into()..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Infallible> {
        self.write(gpa, bytes).map(|()| true)
    }

    fn now(&self) -> u64 {
        self.next.into()
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Infallible> {
        let gfn = Gfn(self.number().into());
        self.pages.insert(gfn, Box::new([0; PAGE_SIZE]));
        Ok(gfn)
    }

    fn drop_shadow_gfn(&mut self, _: Gfn) -> Result<(), Infallible> {
        Ok(())
    }

    fn create_view(&mut self) -> Result<ViewId, Infallible> {
        Ok(ViewId(self.number()))
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

/// A virtual CPU at an instruction of the code page, in the view where breakpoints are.
struct Vcpu {
    memory: Memory,
    engine: Engine,
    view: ViewId,
    hits: u64,
}

impl Vcpu {
    fn new(mechanism: Mechanism) -> Self {
        let mut memory = Memory::new();
        let mut engine = Engine::new(&memory);
        for gpa in [CODE.at(NOP_AT), CODE.at(CPUID_AT), DATA.at(0x18)] {
            engine.insert(&mut memory, gpa, mechanism).expect("it can be set");
        }
        // The first view that is made, after the two pages.
        let view = if mechanism.placement() == Placement::Shadow { ViewId(101) } else { ViewId::HOST };
        Self { memory, engine, view, hits: 0 }
    }

    /// Everything that happens to it until the instruction at this place of the code page is through.
    fn go(&mut self, at: u16, reason: Reason) {
        let reply = self.handle(self.view, at, reason);
        let stepped = reply.view.unwrap_or(self.view);
        if reply.step == Step::On {
            let reply = self.handle(stepped, at + 2, Reason::Step);
            assert_eq!(reply.step, Step::Off);
        } else if matches!(reply.action, Action::Emulate | Action::EmulateRead(_) | Action::EmulateInstruction(_)) {
            // Xen's emulator may not be able to.
            let reply = self.handle(self.view, at, Reason::EmulationFailed);
            if reply.step == Step::On {
                _ = self.handle(reply.view.unwrap_or(self.view), at + 2, Reason::Step);
            }
        }
    }

    fn handle(&mut self, view: ViewId, at: u16, reason: Reason) -> Reply {
        let event = Event::new(VcpuId(0), view, registers(at), reason);
        let (engine, hits) = (&mut self.engine, &mut self.hits);
        engine.handle(&mut self.memory, &event, &mut |_, _, _| {
            *hits += 1;
            Verdict::Keep
        })
    }

    fn all(&mut self) {
        for at in [NOP_AT, CPUID_AT] {
            self.go(at, Reason::Int3(Int3::new(CODE.at(at), 1)));
        }
        // The guest's own, which nobody has set a breakpoint on.
        _ = self.handle(self.view, 0x50, Reason::Int3(Int3::new(CODE.at(0x50), 1)));
        for (at, write) in [(READ_AT, false), (WRITE_AT, true)] {
            let access = Access::new(DATA.at(0x18), Accesses { read: !write, write, execute: false });
            self.go(at, Reason::Access(access));
        }
    }
}

fn registers(at: u16) -> Registers {
    let mut registers = Registers::default().with(|new| {
        new.rip = CODE.at(at).0;
        new.rflags = 2;
    });
    registers.gpr[6] = DATA.at(0x18).0;
    registers
}

#[test]
fn what_a_virtual_cpu_waits_for_allocates_nothing() {
    for mechanism in Mechanism::all() {
        let mut vcpu = Vcpu::new(mechanism);
        vcpu.all();
        let before = ALLOCATIONS.get();
        vcpu.all();
        let allocated = ALLOCATIONS.get() - before;
        assert_eq!(vcpu.hits, 4, "{mechanism}: it was not handled");
        assert_eq!((vcpu.engine.counters().reads, vcpu.engine.counters().writes), (2, 2), "{mechanism}");
        assert_eq!(allocated, 0, "{mechanism}");
    }
}
