//! Who makes an access: the instruction at RIP, for its operand, or the CPU for itself. Only the first is answered with data,
//! or emulated.

use std::collections::HashMap;
use std::convert::Infallible;

use hyperbp::{
    Access, Accesses, Action, CodeMode, Conceal, Engine, Event, Gfn, Gpa, Hypervisor, Int3, Mechanism, PAGE_SIZE,
    Placement, Reason, Registers, Reply, Rights, StepOver, VcpuId, Verdict, ViewId,
};

/// Where code is that accesses the page with breakpoints.
const CODE: Gfn = Gfn(2);
/// The page with breakpoints.
const PAGE: Gfn = Gfn(3);
const OTHER: Gfn = Gfn(4);
/// Tables of 4-KiB pages for one: the second is the user's, the third has never been accessed.
const TABLES: [Gfn; 2] = [Gfn(0x10), Gfn(0x11)];
const EXEC: ViewId = ViewId(1);

#[derive(Default)]
struct Machine {
    pages: HashMap<Gfn, Box<[u8; PAGE_SIZE]>>,
    views: u16,
}

impl Machine {
    fn new() -> Self {
        let mut machine = Self::default();
        for gfn in [CODE, PAGE, OTHER, TABLES[0], TABLES[1]] {
            machine.pages.insert(gfn, Box::new([0; PAGE_SIZE]));
        }
        let page = machine.pages.get_mut(&PAGE).unwrap();
        (0..PAGE_SIZE).for_each(|at| page[at] = at as u8);
        machine
    }

    fn put(&mut self, gpa: Gpa, bytes: &[u8]) {
        self.pages.get_mut(&gpa.gfn()).unwrap()[usize::from(gpa.offset())..][..bytes.len()].copy_from_slice(bytes);
    }
}

impl Hypervisor for Machine {
    type Error = Infallible;

    fn vcpus(&self) -> u16 {
        1
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Infallible> {
        into.copy_from_slice(&self.pages[&gpa.gfn()][usize::from(gpa.offset())..][..into.len()]);
        Ok(())
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Infallible> {
        self.put(gpa, bytes);
        Ok(())
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

    fn debug_control(&mut self, _: VcpuId) -> Result<Option<u64>, Infallible> {
        Ok(Some(0))
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

/// Registers of flat 32-bit code without paging: linear addresses are guest-physical ones. EBX is where it reads.
fn registers(ebx: Gpa) -> Registers {
    let mut registers = Registers::default().with(|new| {
        new.rip = CODE.at(0x10).0;
        new.rflags = 2;
        new.cr0 = 1;
        new.mode = CodeMode::Bits32;
        new.flat = true;
    });
    registers.gpr[3] = ebx.0;
    registers
}

/// The answer to a read at `at`, with this code at RIP.
fn answer(mechanism: Mechanism, code: &[u8], registers: Registers, at: Gpa) -> Reply {
    let mut machine = Machine::new();
    machine.put(CODE.at(0x10), code);
    answer_in(&mut machine, mechanism, registers, at)
}

fn answer_in(machine: &mut Machine, mechanism: Mechanism, registers: Registers, at: Gpa) -> Reply {
    let mut engine = Engine::new(machine);
    engine.insert(machine, PAGE.at(0x800), mechanism).unwrap();
    let view = if mechanism.placement() == Placement::Shadow { EXEC } else { ViewId::HOST };
    let read = Access::new(at, Accesses::READ);
    let event = Event::new(VcpuId(0), view, registers, Reason::Access(read));
    engine.handle(machine, &event, &mut |_, _, _| Verdict::Keep)
}

/// Whether the instruction at RIP is emulated.
fn emulates(reply: &Reply) -> bool {
    matches!(reply.action, Action::Emulate | Action::EmulateRead(_) | Action::EmulateInstruction(_))
}

/// With these, some reads are answered at once.
fn emulating() -> impl Iterator<Item = Mechanism> {
    Mechanism::all().filter(|mechanism| matches!(mechanism.conceal(), Conceal::Emulate | Conceal::Data))
}

/// `mov eax, [ebx]`
const LOAD: &[u8] = &[0x8b, 0x03];

#[test]
fn a_read_of_the_operand_is_answered_at_once() {
    for mechanism in emulating() {
        let reply = answer(mechanism, LOAD, registers(PAGE.at(0x170)), PAGE.at(0x170));
        match (mechanism.conceal(), reply.action) {
            (Conceal::Data, Action::EmulateRead(data)) => assert_eq!(data.as_slice(), [0x70, 0x71, 0x72, 0x73]),
            (Conceal::Emulate, Action::Emulate) => {}
            (_, action) => panic!("{mechanism}: {action:?}"),
        }
    }
}

/// The instruction reads another page, and that faults. The gate of the page fault is in the page with the breakpoint.
#[test]
fn a_gate_that_is_read_to_deliver_an_exception_is_not_the_operand() {
    for mechanism in Mechanism::all() {
        let reply = answer(mechanism, LOAD, registers(OTHER.at(0)), PAGE.at(0x170));
        assert!(!emulates(&reply), "{mechanism}: {reply:?}");
    }
}

/// The descriptor is in the page, whatever the selector is read from.
#[test]
fn an_instruction_that_loads_a_segment_is_stepped() {
    // mov ds, [ebx]; pop ds; les eax, [ebx]; lss esp, [ebx]; jmp far [ebx]; call far [ebx]; retf; iretd; lar eax, [ebx];
    // lsl eax, [ebx]; verr [ebx]; verw [ebx]; ltr [ebx]; lldt [ebx]; mov ds, eax; int 0x80
    let all: [&[u8]; 16] = [
        &[0x8e, 0x1b],
        &[0x1f],
        &[0xc4, 0x03],
        &[0x0f, 0xb2, 0x23],
        &[0xff, 0x2b],
        &[0xff, 0x1b],
        &[0xcb],
        &[0xcf],
        &[0x0f, 0x02, 0x03],
        &[0x0f, 0x03, 0x03],
        &[0x0f, 0x00, 0x23],
        &[0x0f, 0x00, 0x2b],
        &[0x0f, 0x00, 0x1b],
        &[0x0f, 0x00, 0x13],
        &[0x8e, 0xd8],
        &[0xcd, 0x80],
    ];
    for (code, mechanism) in all.into_iter().flat_map(|code| emulating().map(move |mechanism| (code, mechanism))) {
        let mut registers = registers(PAGE.at(0x170));
        registers.gpr[4] = PAGE.at(0x170).0;
        let reply = answer(mechanism, code, registers, PAGE.at(0x170));
        assert!(!emulates(&reply), "{code:x?} under {mechanism}: {reply:?}");
    }
}

/// The operand is where the access is, but the instruction may raise an exception whose gate that is, too.
#[test]
fn an_instruction_that_may_fault_at_its_operand_is_stepped() {
    let at = PAGE.at(0x174);
    // jmp [ebx]; ldmxcsr [ebx]; lgdt [ebx]; bound eax, [ebx]; div [ebx]; movaps xmm0, [ebx] where it is not aligned; popfd
    let all: [&[u8]; 7] = [
        &[0xff, 0x23],
        &[0x0f, 0xae, 0x13],
        &[0x0f, 0x01, 0x13],
        &[0x62, 0x03],
        &[0xf7, 0x33],
        &[0x0f, 0x28, 0x03],
        &[0x9d],
    ];
    for (code, mechanism) in all.into_iter().flat_map(|code| emulating().map(move |mechanism| (code, mechanism))) {
        let mut registers = registers(at);
        registers.gpr[4] = at.0;
        let reply = answer(mechanism, code, registers, at);
        assert!(!emulates(&reply), "{code:x?} under {mechanism}: {reply:?}");
    }
}

#[test]
fn nothing_is_emulated_where_a_trap_may_be_delivered() {
    const TF: u64 = 1 << 8;
    let at = PAGE.at(0x170);
    let usual = registers(at);
    let unusual = [
        usual.with(|new| new.rflags = usual.rflags | TF),
        usual.with(|new| new.dr7 = 1),
        // Alignment checks.
        usual.with(|new| {
            new.rflags = usual.rflags | 1 << 18;
            new.cr0 = usual.cr0 | 1 << 18;
            new.cpl = 3;
        }),
        // Segments that may begin anywhere.
        usual.with(|new| new.flat = false),
    ];
    for mechanism in emulating() {
        assert!(emulates(&answer(mechanism, LOAD, usual, at)), "{mechanism}");
        for registers in unusual {
            let reply = answer(mechanism, LOAD, registers, at);
            assert!(!emulates(&reply), "{mechanism}, {registers:x?}: {reply:?}");
        }
        // mov eax, fs:[ebx]: nobody knows where FS begins.
        let reply = answer(mechanism, &[0x64, 0x8b, 0x03], usual, at);
        assert!(!emulates(&reply), "{mechanism}: {reply:?}");
    }
}

/// The read of the operand itself is a page fault, and the gate is where the operand is.
#[test]
fn an_operand_that_the_page_tables_forbid_is_not_read() {
    const PRESENT: u32 = 1;
    const USER: u32 = 4;
    const ACCESSED: u32 = 0x20;
    let table = |flags: u32| {
        let mut machine = Machine::new();
        machine.put(CODE.at(0x10), LOAD);
        let directory = (TABLES[1].at(0).0 as u32) | PRESENT | USER | ACCESSED;
        machine.put(TABLES[0].at(0), &directory.to_le_bytes());
        for gfn in [CODE, PAGE] {
            let flags = if gfn == PAGE { flags } else { PRESENT | USER | ACCESSED };
            machine.put(TABLES[1].at(gfn.0 as u16 * 4), &((gfn.at(0).0 as u32) | flags).to_le_bytes());
        }
        machine
    };
    let at = PAGE.at(0x170);
    let user = registers(at).with(|new| {
        new.cr0 = 1 << 31 | 1;
        new.cr3 = TABLES[0].at(0).0;
        new.cpl = 3;
    });
    for mechanism in emulating() {
        let emulated = |flags| emulates(&answer_in(&mut table(flags), mechanism, user, at));
        assert!(emulated(PRESENT | USER | ACCESSED), "{mechanism}");
        assert!(!emulated(PRESENT | ACCESSED), "{mechanism}: the supervisor's");
        assert!(!emulated(PRESENT | USER), "{mechanism}: the walk writes, too");
        assert!(!emulated(USER | ACCESSED), "{mechanism}: not there");
    }
}

/// The operand reaches into the page from the one before, or out of it.
#[test]
fn an_operand_in_two_pages_is_not_read_at_once() {
    for mechanism in emulating() {
        let (first, last) = (PAGE.at(0), PAGE.at(0xffe));
        assert!(!emulates(&answer(mechanism, LOAD, registers(Gpa(first.0 - 2)), first)), "{mechanism}");
        assert!(!emulates(&answer(mechanism, LOAD, registers(last), last)), "{mechanism}");
        assert!(emulates(&answer(mechanism, LOAD, registers(first), first)), "{mechanism}");
    }
}

/// An instruction under a breakpoint that loads a segment is not emulated: Xen's emulator reads the descriptor, and marks it
/// as accessed, past every guard.
#[test]
fn an_instruction_under_a_breakpoint_that_loads_a_segment_is_stepped() {
    // mov ds, eax; pop ds; les eax, [ebx]; retf; lar eax, ecx; verr cx; ltr ax; int 0x80
    let all: [&[u8]; 8] = [
        &[0x8e, 0xd8],
        &[0x1f],
        &[0xc4, 0x03],
        &[0xcb],
        &[0x0f, 0x02, 0xc1],
        &[0x0f, 0x00, 0xe1],
        &[0x0f, 0x00, 0xd8],
        &[0xcd, 0x80],
    ];
    for (code, mechanism) in all.into_iter().flat_map(|code| Mechanism::all().map(move |mechanism| (code, mechanism))) {
        let mut machine = Machine::new();
        machine.put(PAGE.at(0x800), code);
        let mut engine = Engine::new(&machine);
        let id = engine.insert(&mut machine, PAGE.at(0x800), mechanism).unwrap();
        let view = if mechanism.placement() == Placement::Shadow { EXEC } else { ViewId::HOST };
        let registers = registers(OTHER.at(0)).with(|new| new.rip = PAGE.at(0x800).0);
        let reason = Reason::Int3(Int3::new(PAGE.at(0x800), 1));
        let event = Event::new(VcpuId(0), view, registers, reason);
        let reply = engine.handle(&mut machine, &event, &mut |_, _, _| Verdict::Keep);
        assert!(!emulates(&reply), "{code:x?} under {mechanism}: {reply:?}");
        let served = engine.figures(id).unwrap().served;
        assert_eq!(served.emulate + served.interpret, 0, "{code:x?} under {mechanism}");
        assert!(matches!(mechanism.step_over(), StepOver::Repair) || served.total() == 1);
    }
}
