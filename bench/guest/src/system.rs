//! A page that holds code, and what the CPU reads and writes for itself: descriptors, gates, the TSS, a stack, a page table.
//!
//! Each case runs from the page, where it has a breakpoint, and from elsewhere. What it leaves in registers and in memory,
//! and the exceptions it raises, must not depend on breakpoints.

use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

use hyperbp_bench_abi::{
    FRESH, PAGE_SIZE, SYSTEM_CASES, SYSTEM_DATA, SYSTEM_ENTRY, SYSTEM_FAULT_STACK, SYSTEM_GDT, SYSTEM_GDT_BYTES,
    SYSTEM_HANDLER, SYSTEM_IDT, SYSTEM_PARTS, SYSTEM_SLOT, SYSTEM_STACK, SYSTEM_TSS, SYSTEM_WORDS, SystemCase, TASK,
    Value,
};
use hyperbp_bench_guest::interrupt_gate;

use crate::page::{ForeignPage, PageAligned, SAMPLES, read, write_byte, write_word};
use crate::{exceptions, page};

const PAGE: u64 = PAGE_SIZE as u64;
/// The page itself.
static SYSTEM: PageAligned<ForeignPage> = PageAligned(ForeignPage::new([0; PAGE_SIZE]));
/// The other copy of the code.
static ELSEWHERE: PageAligned<ForeignPage> = PageAligned(ForeignPage::new([0; PAGE_SIZE]));
/// What its entries map.
static MAPPED: PageAligned<ForeignPage> = PageAligned(ForeignPage::new([0; PAGE_SIZE]));
/// The page directory that has it as its first table.
static DIRECTORY: PageAligned<ForeignPage> = PageAligned(ForeignPage::new([0; PAGE_SIZE]));

/// The fifth GiB, where nothing is mapped otherwise.
const WINDOW: u64 = 4 << 30;
/// Entries of the page table that map something.
const WINDOWS: u64 = 2;
/// Present and writable; and accessed and dirty, too.
const FRESH_ENTRY: u64 = 0x3;
const ENTRY: u64 = 0x63;
/// Of CR3 and of entries: where the table is.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Descriptors: 64-bit code, and data, both marked as accessed; data that is not; the lower half of an available TSS.
const CODE: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const FRESH_DATA: u64 = 0x00cf_9200_0000_ffff;
const TASK_STATE: u64 = 0x0000_8900_0000_0067;
/// Selector of data.
const DATA_SELECTOR: u16 = 0x10;
/// Offsets in the TSS: the stack of ring 0, that of the first entry of the interrupt stack table, and the I/O bitmap's offset.
const RING_0: usize = 4;
const STACK_1: usize = 36;
const IO_BITMAP: usize = 100;
/// Page faults use the first entry of the interrupt stack table.
const PAGE_FAULT: usize = 14;
const UNDEFINED: usize = 6;
const DEBUG: u64 = 1;
/// RF of the flags that a single-step trap pushes is not compared. An EPT violation sets RF, and a CPU clears it when the
/// instruction has run after all. Bochs 3.0 leaves it set.
const RF: u64 = 1 << 16;
/// Gates of the IDT.
const GATES: usize = 32;

/// Registers before a case and after it, and what the exceptions were that it has raised.
#[repr(C)]
struct State {
    /// RAX, RCX, RDX, RBX, RSI, RDI.
    registers: [u64; 6],
    entry: u64,
    /// The stack pointer in the page.
    page_stack: u64,
    flags: u64,
    rsp: u64,
    ds: u64,
    es: u64,
    fs: u64,
    ss: u64,
    /// The stack of who called [`enter`].
    stack: u64,
    exceptions: u64,
    /// Of the last one: vector, error code, and what it has pushed.
    vector: u64,
    error: u64,
    frame: [u64; 5],
    /// While an exception is handled.
    scratch: u64,
}

#[repr(transparent)]
struct Shared(UnsafeCell<State>);

// SAFETY: only the first vCPU runs cases, and it takes no reference while one runs.
unsafe impl Sync for Shared {}

const NOTHING: State = State {
    registers: [0; 6],
    entry: 0,
    page_stack: 0,
    flags: 0,
    rsp: 0,
    ds: 0,
    es: 0,
    fs: 0,
    ss: 0,
    stack: 0,
    exceptions: 0,
    vector: 0,
    error: 0,
    frame: [0; 5],
    scratch: 0,
};

static STATE: Shared = Shared(UnsafeCell::new(NOTHING));

/// What LGDT and LIDT load, and SGDT stores.
#[repr(C, packed)]
struct TableRegister {
    limit: u16,
    base: u64,
}

/// Where the page is.
pub(crate) fn page() -> u64 {
    SYSTEM.0.address()
}

fn at(offset: usize) -> u64 {
    page() + offset as u64
}

/// The workload.
pub(crate) fn run() {
    prepare();
    let mut gdt = TableRegister { limit: 0, base: 0 };
    // SAFETY: it stores 10 bytes.
    unsafe { asm!("sgdt [{}]", in(reg) &raw mut gdt, options(nostack, preserves_flags)) };
    let mut samples = SAMPLES.0.iter();
    let mut sample = |value: u64| {
        if let Some(sample) = samples.next() {
            sample.store(value, Relaxed);
        }
    };
    for base in [page(), ELSEWHERE.0.address()] {
        reset();
        load(at(SYSTEM_GDT), SYSTEM_GDT_BYTES, at(SYSTEM_IDT), GATES * 16);
        // SAFETY: its descriptor is that of an available TSS, and the TSS is complete.
        unsafe { asm!("ltr {:x}", in(reg) TASK, options(nostack, preserves_flags)) };
        // It is to be available again.
        reset();
        for (slot, case) in SYSTEM_CASES.iter().enumerate() {
            call(base + (slot * SYSTEM_SLOT) as u64, case).into_iter().for_each(&mut sample);
        }
        load_segments();
        // SAFETY: it is what was loaded before.
        unsafe { asm!("lgdt [{}]", in(reg) &raw const gdt, options(readonly, nostack, preserves_flags)) };
        exceptions::load();
        let parts = SYSTEM_PARTS.into_iter().flat_map(|(begin, end)| (begin..end).step_by(8)).map(at);
        parts.chain([MAPPED.0.address()]).for_each(|at| sample(read(at)));
    }
}

/// What stays the same: code, gates, the TSS, and the tables that lead to the page.
fn prepare() {
    for (slot, case) in SYSTEM_CASES.iter().enumerate() {
        for base in [page(), ELSEWHERE.0.address()] {
            for (byte, value) in (base + (slot * SYSTEM_SLOT) as u64..).zip(case.code) {
                write(byte, *value);
            }
        }
    }
    let handlers = handlers();
    let jump = at(SYSTEM_HANDLER * SYSTEM_SLOT);
    // All of the image is within 2 GiB.
    let distance = (handlers[UNDEFINED] as usize as u64).wrapping_sub(jump + 5) as u32;
    write(jump, 0xe9);
    (jump + 1..).zip(distance.to_le_bytes()).for_each(|(at, value)| write(at, value));
    for (vector, handler) in handlers.into_iter().enumerate() {
        let handler = if vector == UNDEFINED { jump } else { handler as usize as u64 };
        let [low, high] = interrupt_gate(handler);
        let stack = if vector == PAGE_FAULT { 1 << 32 } else { 0 };
        set(at(SYSTEM_IDT + vector * 16), low | stack);
        set(at(SYSTEM_IDT + vector * 16 + 8), high);
    }
    for (offset, value) in [(RING_0, SYSTEM_STACK), (STACK_1, SYSTEM_FAULT_STACK)] {
        set(at(SYSTEM_TSS + offset), at(value));
    }
    // Beyond the limit: there is none.
    write(at(SYSTEM_TSS + IO_BITMAP + 2), 104);
    set(DIRECTORY.0.address(), page() | ENTRY);
    let cr3: u64;
    // SAFETY: reading CR3 has no effect.
    unsafe { asm!("mov {}, cr3", out(reg) cr3, options(nomem, nostack, preserves_flags)) };
    let pointers = page::read(cr3 & ADDRESS) & ADDRESS;
    set(pointers + (WINDOW >> 30) * 8, DIRECTORY.0.address() | ENTRY);
}

/// What the cases change.
fn reset() {
    set(at(SYSTEM_GDT + 8), CODE);
    set(at(SYSTEM_GDT + usize::from(DATA_SELECTOR)), DATA);
    FRESH.into_iter().for_each(|selector| set(at(SYSTEM_GDT + usize::from(selector)), FRESH_DATA));
    // The base of a system descriptor is in three parts, and all of the image is within 4 GiB.
    let base = at(SYSTEM_TSS);
    let base = (base & 0xff_ffff) << 16 | (base & 0xff00_0000) << 32;
    set(at(SYSTEM_GDT + usize::from(TASK)), TASK_STATE | base);
    for window in 0..WINDOWS {
        set(at((SYSTEM_ENTRY + window as usize) * 8), MAPPED.0.address() | FRESH_ENTRY);
        // SAFETY: it only forgets a translation.
        unsafe { asm!("invlpg [{}]", in(reg) address(window), options(nostack, preserves_flags)) };
    }
    let [_, es, _, fs] = FRESH.map(u64::from);
    let data = [0x1122_3344_5566_7788, 0, 0, 0, es, 0x1357 | fs << 32, 0];
    (SYSTEM_DATA..).step_by(8).zip(data).for_each(|(offset, word)| set(at(offset), word));
    set(MAPPED.0.address(), 0x8877_6655_4433_2211);
}

/// The linear address of a window.
fn address(window: u64) -> u64 {
    WINDOW + (SYSTEM_ENTRY as u64 + window) * PAGE
}

/// Writes eight bytes, if they are others: a write is dear where there are breakpoints.
fn set(at: u64, word: u64) {
    if read(at) != word {
        write_word(at, word);
    }
}

/// The same with a byte.
fn write(at: u64, value: u8) {
    if read(at & !7).to_le_bytes()[(at & 7) as usize] != value {
        write_byte(at, value);
    }
}

fn load(gdt: u64, gdt_bytes: usize, idt: u64, idt_bytes: usize) {
    let gdt = TableRegister { limit: (gdt_bytes - 1) as u16, base: gdt };
    let idt = TableRegister { limit: (idt_bytes - 1) as u16, base: idt };
    // SAFETY: the segments that are loaded have the same descriptors there.
    unsafe { asm!("lgdt [{}]", in(reg) &raw const gdt, options(readonly, nostack, preserves_flags)) };
    // SAFETY: there is a handler for each exception.
    unsafe { asm!("lidt [{}]", in(reg) &raw const idt, options(readonly, nostack, preserves_flags)) };
}

/// Loads the data segments as they are always.
fn load_segments() {
    // SAFETY: all of them are flat.
    unsafe {
        asm!(
            "mov ds, {0:e}",
            "mov es, {0:e}",
            "mov ss, {0:e}",
            "mov fs, {1:e}",
            in(reg) u32::from(DATA_SELECTOR),
            in(reg) 0_u32,
            options(nostack, preserves_flags)
        )
    };
}

/// Calls a case, and returns what it has left.
fn call(entry: u64, case: &SystemCase) -> [u64; SYSTEM_WORDS.len()] {
    let registers = case.registers.map(|value| match value {
        Value::Number(number) => number,
        Value::Page(offset) => at(offset),
        Value::Window(window) => address(window),
        Value::Unmapped => address(WINDOWS),
        Value::Return => give_back as *const () as usize as u64,
    });
    let before = State { registers, entry, page_stack: at(SYSTEM_STACK), ..NOTHING };
    // SAFETY: nobody else uses it.
    unsafe { STATE.0.get().write_volatile(before) };
    // SAFETY: the state is complete, and the case leaves alone what is not its own.
    unsafe { enter() };
    // SAFETY: nobody else uses it any more.
    let after = unsafe { STATE.0.get().read_volatile() };
    let State { registers, flags, rsp, ds, es, fs, ss, exceptions, vector, error, frame, .. } = after;
    let [ax, cx, dx, bx, si, di] = registers;
    let [rip, cs, pushed_flags, pushed_rsp, pushed_ss] = frame;
    let pushed_flags = if vector == DEBUG { pushed_flags & !RF } else { pushed_flags };
    [
        ax,
        cx,
        dx,
        bx,
        si,
        di,
        flags,
        rsp,
        ds,
        es,
        fs,
        ss,
        exceptions,
        vector,
        error,
        rip,
        cs,
        pushed_flags,
        pushed_rsp,
        pushed_ss,
    ]
}

/// Loads registers, calls the entry on the stack in the page, and stores them.
///
/// # Safety
/// [`STATE`] is complete. What is at its entry returns, and leaves the registers alone that are not in it.
#[unsafe(naked)]
unsafe extern "C" fn enter() {
    naked_asm!(
        "push rbx",
        "mov [rip + {state} + {stack}], rsp",
        "mov rax, [rip + {state}]",
        "mov rcx, [rip + {state} + 8]",
        "mov rdx, [rip + {state} + 16]",
        "mov rbx, [rip + {state} + 24]",
        "mov rsi, [rip + {state} + 32]",
        "mov rdi, [rip + {state} + 40]",
        "mov rsp, [rip + {state} + {page_stack}]",
        "call [rip + {state} + {entry}]",
        "mov [rip + {state} + {rsp}], rsp",
        "mov rsp, [rip + {state} + {stack}]",
        "pushfq",
        "pop qword ptr [rip + {state} + {flags}]",
        "mov [rip + {state}], rax",
        "mov [rip + {state} + 8], rcx",
        "mov [rip + {state} + 16], rdx",
        "mov [rip + {state} + 24], rbx",
        "mov [rip + {state} + 32], rsi",
        "mov [rip + {state} + 40], rdi",
        "mov word ptr [rip + {state} + {ds}], ds",
        "mov word ptr [rip + {state} + {es}], es",
        "mov word ptr [rip + {state} + {fs}], fs",
        "mov word ptr [rip + {state} + {ss}], ss",
        "pop rbx",
        "ret",
        state = sym STATE,
        stack = const offset_of!(State, stack),
        page_stack = const offset_of!(State, page_stack),
        entry = const offset_of!(State, entry),
        rsp = const offset_of!(State, rsp),
        flags = const offset_of!(State, flags),
        ds = const offset_of!(State, ds),
        es = const offset_of!(State, es),
        fs = const offset_of!(State, fs),
        ss = const offset_of!(State, ss),
    )
}

/// A return, for who is told to go on there.
#[unsafe(naked)]
unsafe extern "C" fn give_back() {
    naked_asm!("ret")
}

type Handler = unsafe extern "C" fn() -> !;

macro_rules! handlers {
    ($($vector:literal)*) => { [$(handle::<$vector> as Handler),*] };
}

fn handlers() -> [Handler; GATES] {
    handlers![0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31]
}

/// Notes an exception. The case goes on with its return, or, after a single step, where it was.
#[unsafe(naked)]
unsafe extern "C" fn handle<const VECTOR: u32>() -> ! {
    naked_asm!(
        "mov [rip + {state} + {scratch}], rax",
        "mov qword ptr [rip + {state} + {vector_at}], {vector}",
        "inc qword ptr [rip + {state} + {exceptions}]",
        ".if ({with_error_code} >> {vector}) & 1",
        "pop rax",
        "mov [rip + {state} + {error}], rax",
        ".endif",
        "mov rax, [rsp]",
        "mov [rip + {state} + {frame}], rax",
        "mov rax, [rsp + 8]",
        "mov [rip + {state} + {frame} + 8], rax",
        "mov rax, [rsp + 16]",
        "mov [rip + {state} + {frame} + 16], rax",
        "mov rax, [rsp + 24]",
        "mov [rip + {state} + {frame} + 24], rax",
        "mov rax, [rsp + 32]",
        "mov [rip + {state} + {frame} + 32], rax",
        ".if {vector} == 1",
        "and qword ptr [rsp + 16], ~0x100",
        ".else",
        "lea rax, [rip + {give_back}]",
        "mov [rsp], rax",
        ".endif",
        "mov rax, [rip + {state} + {scratch}]",
        "iretq",
        state = sym STATE,
        give_back = sym give_back,
        with_error_code = const exceptions::WITH_ERROR_CODE,
        vector = const VECTOR,
        scratch = const offset_of!(State, scratch),
        vector_at = const offset_of!(State, vector),
        exceptions = const offset_of!(State, exceptions),
        error = const offset_of!(State, error),
        frame = const offset_of!(State, frame),
    )
}
