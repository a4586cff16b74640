//! Code at CPL 0 and at CPL 3, with every exception, interrupt and system call it takes reported to a handler.
//!
//! [`install`] gives each vCPU a GDT with user segments, a TSS and a [`Cpu`]. [`run`] then executes code at either privilege
//! level, from a given state of all registers:
//!
//! ```text
//! let cpu = privilege::cpu(0);
//! cpu.reset(Ring::User);
//! cpu.rip = code;                     // it ends with `int 0x40` ([`EXIT`]) or with SYSCALL
//! privilege::run(cpu, |cpu| match cpu.vector { EXIT => Flow::Stop, _ => Flow::Resume });
//! cpu.gpr[0]                          // its registers afterwards
//! ```
//!
//! All memory below 4 GiB that the guest maps is accessible at CPL 3: [`page_entry`] has the entry of a page that is not to be.

use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hyperbp_bench_abi::{PAGE_SIZE, VCPUS_MAX};
use hyperbp_bench_guest::{CODE_SELECTOR, interrupt_gate, tss_descriptor};

use crate::page::{ForeignPage, PageAligned};
use crate::{exceptions, xen};

/// `int 0x40` ends the code, at both privilege levels.
pub(crate) const EXIT: u64 = 0x40;
/// `int 0x41` is another interrupt that both may call.
pub(crate) const OPEN: u64 = 0x41;
/// An interrupt that other vCPUs send. `int 0x50` at CPL 3 is a #GP.
pub(crate) const IPI: u64 = 0x50;
/// What [`Cpu::vector`] is after SYSCALL.
pub(crate) const SYSCALL: u64 = 0x100;

/// Selectors. The order is that of SYSRET: user data, then user code.
pub(crate) const KERNEL_DATA: u64 = 0x10;
pub(crate) const USER_DATA: u64 = 0x1b;
pub(crate) const USER_CODE: u64 = 0x23;
pub(crate) const FIRST_TSS: u16 = 0x28;

/// RFLAGS: what is always set, and flags by name.
pub(crate) const FLAGS: u64 = 2;
pub(crate) const TF: u64 = 1 << 8;
pub(crate) const IF: u64 = 1 << 9;
pub(crate) const RF: u64 = 1 << 16;
/// DR6 without any breakpoint.
const DR6_CLEAR: u64 = 0xffff_0ff0;

/// MSRs.
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const FMASK: u32 = 0xc000_0084;
const GS_BASE: u32 = 0xc000_0101;

/// Numbers of registers in [`Cpu::gpr`].
pub(crate) const AX: usize = 0;
pub(crate) const CX: usize = 1;
pub(crate) const DX: usize = 2;
pub(crate) const SP: usize = 4;
pub(crate) const SI: usize = 6;
pub(crate) const DI: usize = 7;

/// Privilege levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ring {
    /// CPL 0.
    Kernel,
    /// CPL 3.
    User,
}

/// What a handler wants of the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// It goes on, with the registers as they are in [`Cpu`] now.
    Resume,
    /// It has ended.
    Stop,
}

/// Is told of each exception, interrupt and system call.
pub(crate) type Handler = fn(&mut Cpu) -> Flow;

/// What the code has in its registers, and why it was interrupted. GS points here, at both privilege levels.
#[repr(C, align(4096))]
pub(crate) struct Cpu {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub(crate) gpr: [u64; 16],
    /// XMM0: handlers may use it.
    xmm0: [u64; 2],
    pub(crate) rip: u64,
    pub(crate) cs: u64,
    pub(crate) flags: u64,
    pub(crate) ss: u64,
    /// Why it was interrupted: the vector, or [`SYSCALL`].
    pub(crate) vector: u64,
    /// The error code, 0 if there is none.
    pub(crate) error: u64,
    /// DR6, if it is a #DB.
    pub(crate) dr6: u64,
    /// CR2, if it is a #PF.
    pub(crate) cr2: u64,
    /// NMIs, which are counted and not reported.
    pub(crate) nmis: u64,
    /// Interruptions since [`run`].
    pub(crate) events: u64,
    /// Whatever the handler needs.
    pub(crate) scratch: [u64; 8],
    /// The stack of [`run`].
    host_stack: u64,
    /// 1 while the code runs.
    active: u64,
    /// Where this is.
    this: u64,
    handler: Option<Handler>,
}

/// Most interruptions of one [`run`]. Code that has more is stopped: it would never end.
pub(crate) const EVENTS_MAX: u64 = 2_000;

impl Cpu {
    const fn new() -> Self {
        Self {
            gpr: [0; 16],
            xmm0: [0; 2],
            rip: 0,
            cs: 0,
            flags: 0,
            ss: 0,
            vector: 0,
            error: 0,
            dr6: 0,
            cr2: 0,
            nmis: 0,
            events: 0,
            scratch: [0; 8],
            host_stack: 0,
            active: 0,
            this: 0,
            handler: None,
        }
    }

    /// A state to begin with: nothing in the registers, an empty stack, and the segments and flags of this privilege level.
    pub(crate) fn reset(&mut self, ring: Ring) {
        let stacks = &STACKS.0[self.number()];
        self.gpr = [0; 16];
        (self.rip, self.flags, self.scratch) = (0, FLAGS, [0; 8]);
        (self.cs, self.ss, self.gpr[SP]) = match ring {
            Ring::Kernel => (u64::from(CODE_SELECTOR), KERNEL_DATA, stacks.kernel.end()),
            Ring::User => (USER_CODE, USER_DATA, stacks.user.end()),
        };
        (self.vector, self.error, self.dr6, self.cr2, self.events) = (0, 0, 0, 0, 0);
    }

    /// Of which vCPU it is.
    fn number(&self) -> usize {
        (self.this - CPUS.0.0.get() as u64) as usize / size_of::<Self>()
    }
}

#[repr(transparent)]
struct Cpus(UnsafeCell<[Cpu; VCPUS_MAX]>);

// SAFETY: each vCPU uses its own element.
unsafe impl Sync for Cpus {}

#[unsafe(link_section = ".volatile")]
static CPUS: PageAligned<Cpus> = PageAligned(Cpus(UnsafeCell::new([const { Cpu::new() }; VCPUS_MAX])));

/// A stack.
struct Stack(PageAligned<ForeignPage>);

impl Stack {
    const fn new() -> Self {
        Self(PageAligned(ForeignPage::new([0; PAGE_SIZE])))
    }

    fn end(&self) -> u64 {
        self.0.0.address() + PAGE_SIZE as u64
    }
}

struct Stacks {
    /// Of code at CPL 0, and at CPL 3.
    kernel: Stack,
    user: Stack,
    /// For what interrupts CPL 3 (RSP0).
    entry: Stack,
    /// For #DF (IST 1), and for NMIs (IST 2).
    fault: Stack,
    nmi: Stack,
}

#[unsafe(link_section = ".volatile")]
static STACKS: PageAligned<[Stacks; VCPUS_MAX]> = PageAligned(
    [const {
        Stacks { kernel: Stack::new(), user: Stack::new(), entry: Stack::new(), fault: Stack::new(), nmi: Stack::new() }
    }; VCPUS_MAX],
);

/// Words of a TSS (Intel SDM vol. 3, 8.7): 104 bytes, and room.
type Tss = [AtomicU64; 16];

#[unsafe(link_section = ".volatile")]
static TSS: PageAligned<[Tss; VCPUS_MAX]> = PageAligned([const { [const { AtomicU64::new(0) }; 16] }; VCPUS_MAX]);

const SEGMENTS: usize = FIRST_TSS as usize / 8 + 2 * VCPUS_MAX;

/// Null, kernel code and data as `boot.s` has them, user data and code, and a TSS for each vCPU. All are accessed.
static GDT: PageAligned<[AtomicU64; SEGMENTS]> = {
    let mut gdt = [const { AtomicU64::new(0) }; SEGMENTS];
    gdt[1] = AtomicU64::new(0x00af_9b00_0000_ffff);
    gdt[2] = AtomicU64::new(0x00cf_9300_0000_ffff);
    gdt[3] = AtomicU64::new(0x00cf_f300_0000_ffff);
    gdt[4] = AtomicU64::new(0x00af_fb00_0000_ffff);
    PageAligned(gdt)
};

static IDT: PageAligned<[[AtomicU64; 2]; 256]> = PageAligned([const { [const { AtomicU64::new(0) }; 2] }; 256]);

/// What LIDT and LGDT load.
#[repr(C, packed)]
pub(crate) struct TableRegister {
    pub(crate) limit: u16,
    pub(crate) base: u64,
}

type Entry = unsafe extern "C" fn() -> !;

macro_rules! entries {
    ($($vector:literal)*) => { [$(($vector, entry::<$vector> as Entry)),*] };
}

/// Vectors that are reported, besides NMI and SYSCALL.
static ENTRIES: [(usize, Entry); 34] = entries![0 1 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28
    29 30 31 0x40 0x41 0x50];

/// Those that code at CPL 3 may call: #BP, #OF, and two of ours.
const FOR_USER: [usize; 4] = [3, 4, EXIT as usize, OPEN as usize];

/// Bits of an interrupt gate: DPL 3, and the number of its stack.
const GATE_DPL3: u64 = 3 << 45;
const GATE_IST: u64 = 1 << 32;

/// The `Cpu` of a vCPU. Only that vCPU itself may use it, and one of its callers at a time.
pub(crate) fn cpu(vcpu: usize) -> &'static mut Cpu {
    // SAFETY: in bounds or a panic; by this function's contract nobody else uses it.
    unsafe { &mut (*CPUS.0.0.get())[vcpu] }
}

/// Prepares this vCPU.
pub(crate) fn install(vcpu: usize) {
    for (vector, entry) in ENTRIES {
        let [low, high] = interrupt_gate(entry as usize as u64);
        let dpl = if FOR_USER.contains(&vector) { GATE_DPL3 } else { 0 };
        let stack = if vector == 8 { GATE_IST } else { 0 };
        IDT.0[vector][0].store(low | dpl | stack, Relaxed);
        IDT.0[vector][1].store(high, Relaxed);
    }
    let [low, high] = interrupt_gate(nmi as unsafe extern "C" fn() -> ! as usize as u64);
    IDT.0[2][0].store(low | (2 * GATE_IST), Relaxed);
    IDT.0[2][1].store(high, Relaxed);

    let (tss, stacks) = (&TSS.0[vcpu], &STACKS.0[vcpu]);
    // RSP0 is at byte 4, IST 1 at byte 36, IST 2 at byte 44; the I/O map's offset at byte 102 says that there is none.
    for (byte, value) in [(4, stacks.entry.end()), (36, stacks.fault.end()), (44, stacks.nmi.end())] {
        tss[byte / 8].store(tss[byte / 8].load(Relaxed) & 0xffff_ffff | value << 32, Relaxed);
        tss[byte / 8 + 1].store(tss[byte / 8 + 1].load(Relaxed) & !0xffff_ffff | value >> 32, Relaxed);
    }
    tss[12].store(104 << 48, Relaxed);
    let selector = FIRST_TSS + 16 * vcpu as u16;
    let descriptor = tss_descriptor(tss.as_ptr() as u64, 103);
    let entry = usize::from(selector / 8);
    GDT.0[entry].store(descriptor[0], Relaxed);
    GDT.0[entry + 1].store(descriptor[1], Relaxed);
    load_gdt(GDT.0.as_ptr() as u64);
    // SAFETY: the descriptor is of an available TSS.
    unsafe { asm!("ltr {:x}", in(reg) selector, options(nostack, preserves_flags)) };

    let cpu = cpu(vcpu);
    cpu.this = &raw const *cpu as u64;
    write_msr(GS_BASE, cpu.this);
    write_msr(EFER, read_msr(EFER) | 1); // SCE
    write_msr(STAR, (KERNEL_DATA | 3) << 48 | u64::from(CODE_SELECTOR) << 32);
    write_msr(LSTAR, syscall as unsafe extern "C" fn() -> ! as usize as u64);
    write_msr(FMASK, TF | IF | 1 << 10);
}

/// Loads a GDT: the one of all vCPUs, or a copy of it.
pub(crate) fn load_gdt(base: u64) {
    let register = TableRegister { limit: (size_of_val(&GDT.0) - 1) as u16, base };
    // SAFETY: the segments that are in use are the same in it.
    unsafe { asm!("lgdt [{}]", in(reg) &register, options(readonly, nostack, preserves_flags)) };
}

/// Loads this module's IDT.
pub(crate) fn load_own_idt() {
    load_idt(IDT.0.as_ptr() as u64);
}

/// Loads an IDT: this module's, or a copy of it.
pub(crate) fn load_idt(base: u64) {
    let register = TableRegister { limit: (size_of_val(&IDT.0) - 1) as u16, base };
    // SAFETY: its entries are gates to handlers of this module.
    unsafe { asm!("lidt [{}]", in(reg) &register, options(readonly, nostack, preserves_flags)) };
}

/// Where the GDT is, and where the IDT is.
pub(crate) fn tables() -> (&'static [AtomicU64], &'static [[AtomicU64; 2]]) {
    (&GDT.0, &IDT.0)
}

/// Where the TSS of a vCPU is.
pub(crate) fn tss(vcpu: usize) -> &'static [AtomicU64] {
    &TSS.0[vcpu]
}

/// Has what interrupts CPL 3 use another stack. Returns the one before.
pub(crate) fn set_entry_stack(vcpu: usize, end: u64) -> u64 {
    let tss = &TSS.0[vcpu];
    let before = tss[0].load(Relaxed) >> 32 | tss[1].load(Relaxed) << 32;
    tss[0].store(tss[0].load(Relaxed) & 0xffff_ffff | end << 32, Relaxed);
    tss[1].store(tss[1].load(Relaxed) & !0xffff_ffff | end >> 32, Relaxed);
    before
}

pub(crate) fn read_msr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading an MSR that there is has no effect.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

pub(crate) fn write_msr(msr: u32, value: u64) {
    // SAFETY: the callers write what the MSR takes, and nothing that the compiled code depends on.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
    }
}

unsafe extern "C" {
    /// In `boot.s`: the entries of the first 4 MiB.
    static page_tables: ForeignPage;
}

/// Where the page-table entry of an address below 4 MiB is.
pub(crate) fn page_entry(address: u64) -> u64 {
    &raw const page_tables as u64 + (address >> 12 & 0x3ff) * 8
}

/// Forgets the translation of an address.
pub(crate) fn invalidate(address: u64) {
    // SAFETY: a translation that is forgotten is looked up again.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}

/// Executes code: from the state in `cpu` until `handler` says to stop. `cpu` has its state then.
pub(crate) fn run(cpu: &mut Cpu, handler: Handler) {
    load_own_idt();
    run_in(cpu, handler);
    exceptions::load();
}

/// The same with the IDT that is loaded, a copy of this module's.
pub(crate) fn run_in(cpu: &mut Cpu, handler: Handler) {
    cpu.handler = Some(handler);
    cpu.events = 0;
    // SAFETY: the state is complete, and GS points to it on the vCPU that it is of.
    unsafe { enter(cpu) };
}

/// Called by [`common`]. Whether the code goes on.
extern "C" fn dispatch(cpu: &mut Cpu) -> u64 {
    if cpu.vector == 1 {
        // SAFETY: reading DR6 and clearing it has no effect but that.
        unsafe {
            asm!("mov {0}, dr6", "mov dr6, {1}", out(reg) cpu.dr6, in(reg) DR6_CLEAR, options(nostack, preserves_flags));
        }
    }
    if cpu.vector == 14 {
        // SAFETY: reading CR2 has no effect.
        unsafe { asm!("mov {}, cr2", out(reg) cpu.cr2, options(nomem, nostack, preserves_flags)) };
    }
    cpu.events += 1;
    let flow = cpu.handler.map_or(Flow::Stop, |handler| handler(cpu));
    u64::from(flow == Flow::Resume && cpu.events < EVENTS_MAX)
}

/// An interruption in code that is not [`run`]'s.
extern "C" fn broken(cpu: &Cpu) -> ! {
    // Not with the words of a panic: the lab stops at these, and here the runner goes on with the next probe.
    xen::print(format_args!("hostile: interruption {} at {:#x} outside of a probe\n", cpu.vector, cpu.rip));
    xen::crash();
}

/// # Safety
/// `_cpu` is complete, and GS points to it.
#[unsafe(naked)]
unsafe extern "C" fn enter(_cpu: *mut Cpu) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, 8",
        "mov gs:[{host_stack}], rsp",
        "jmp {resume}",
        host_stack = const offset_of!(Cpu, host_stack),
        resume = sym resume,
    )
}

#[unsafe(naked)]
unsafe extern "C" fn resume() -> ! {
    naked_asm!(
        "push qword ptr gs:[{ss}]",
        "push qword ptr gs:[32]",
        "push qword ptr gs:[{flags}]",
        "push qword ptr gs:[{cs}]",
        "push qword ptr gs:[{rip}]",
        "mov rax, gs:[0]",
        "mov rcx, gs:[8]",
        "mov rdx, gs:[16]",
        "mov rbx, gs:[24]",
        "mov rbp, gs:[40]",
        "mov rsi, gs:[48]",
        "mov rdi, gs:[56]",
        "mov r8, gs:[64]",
        "mov r9, gs:[72]",
        "mov r10, gs:[80]",
        "mov r11, gs:[88]",
        "mov r12, gs:[96]",
        "mov r13, gs:[104]",
        "mov r14, gs:[112]",
        "mov r15, gs:[120]",
        "movups xmm0, gs:[128]",
        "mov qword ptr gs:[{active}], 1",
        "iretq",
        rip = const offset_of!(Cpu, rip),
        cs = const offset_of!(Cpu, cs),
        flags = const offset_of!(Cpu, flags),
        ss = const offset_of!(Cpu, ss),
        active = const offset_of!(Cpu, active),
    )
}

/// The entry of a vector. It pushes nothing, for the stack is the code's own.
#[unsafe(naked)]
unsafe extern "C" fn entry<const VECTOR: u32>() -> ! {
    naked_asm!(
        "mov qword ptr gs:[{to}], {vector}",
        ".if {vector} < 32",
        ".if ({with_error_code} >> {vector}) & 1",
        "pop qword ptr gs:[{error}]",
        ".else",
        "mov qword ptr gs:[{error}], 0",
        ".endif",
        ".else",
        "mov qword ptr gs:[{error}], 0",
        ".endif",
        "jmp {common}",
        to = const offset_of!(Cpu, vector),
        error = const offset_of!(Cpu, error),
        vector = const VECTOR,
        with_error_code = const exceptions::WITH_ERROR_CODE,
        common = sym common,
    )
}

#[unsafe(naked)]
unsafe extern "C" fn common() -> ! {
    naked_asm!(
        "pop qword ptr gs:[{rip}]",
        "pop qword ptr gs:[{cs}]",
        "pop qword ptr gs:[{flags}]",
        "pop qword ptr gs:[32]",
        "pop qword ptr gs:[{ss}]",
        "jmp {store}",
        rip = const offset_of!(Cpu, rip),
        cs = const offset_of!(Cpu, cs),
        flags = const offset_of!(Cpu, flags),
        ss = const offset_of!(Cpu, ss),
        store = sym store,
    )
}

/// Stores the registers that are not yet, and calls the handler.
#[unsafe(naked)]
unsafe extern "C" fn store() -> ! {
    naked_asm!(
        "mov gs:[0], rax",
        "mov gs:[8], rcx",
        "mov gs:[16], rdx",
        "mov gs:[24], rbx",
        "mov gs:[40], rbp",
        "mov gs:[48], rsi",
        "mov gs:[56], rdi",
        "mov gs:[64], r8",
        "mov gs:[72], r9",
        "mov gs:[80], r10",
        "mov gs:[88], r11",
        "mov gs:[96], r12",
        "mov gs:[104], r13",
        "mov gs:[112], r14",
        "mov gs:[120], r15",
        "movups gs:[128], xmm0",
        "mov rsp, gs:[{host_stack}]",
        "mov rdi, gs:[{this}]",
        "cld",
        "cmp qword ptr gs:[{active}], 0",
        "je {broken}",
        "mov qword ptr gs:[{active}], 0",
        "call {dispatch}",
        "test rax, rax",
        "jne {resume}",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        host_stack = const offset_of!(Cpu, host_stack),
        this = const offset_of!(Cpu, this),
        active = const offset_of!(Cpu, active),
        broken = sym broken,
        dispatch = sym dispatch,
        resume = sym resume,
    )
}

/// SYSCALL: RCX and R11 have what is in a frame else. Code at CPL 0 may execute it, too, and is taken for code at CPL 3.
#[unsafe(naked)]
unsafe extern "C" fn syscall() -> ! {
    naked_asm!(
        "mov qword ptr gs:[{vector}], {syscall}",
        "mov qword ptr gs:[{error}], 0",
        "mov gs:[{rip}], rcx",
        "mov gs:[{flags}], r11",
        "mov gs:[32], rsp",
        "mov qword ptr gs:[{cs}], {user_code}",
        "mov qword ptr gs:[{ss}], {user_data}",
        "jmp {store}",
        vector = const offset_of!(Cpu, vector),
        error = const offset_of!(Cpu, error),
        rip = const offset_of!(Cpu, rip),
        flags = const offset_of!(Cpu, flags),
        cs = const offset_of!(Cpu, cs),
        ss = const offset_of!(Cpu, ss),
        syscall = const SYSCALL,
        user_code = const USER_CODE,
        user_data = const USER_DATA,
        store = sym store,
    )
}

/// An NMI is counted. It may come at any time, also while a handler runs.
#[unsafe(naked)]
unsafe extern "C" fn nmi() -> ! {
    naked_asm!("lock inc qword ptr gs:[{nmis}]", "iretq", nmis = const offset_of!(Cpu, nmis))
}
