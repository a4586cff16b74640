//! Single instructions, from random states of all registers: what they leave behind must not depend on a breakpoint.

use core::arch::x86_64::{__cpuid, __cpuid_count};
use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

use hyperbp_bench_abi::{JUMP, Needs, PAGE_SIZE, SNIPPET_PAGES, SNIPPET_RUNS, SNIPPETS, Snippet, snippet_offset};
use hyperbp_bench_guest::{Digest, LARGE_PAGES, Random};

use crate::page::{ForeignPage, PageAligned, SAMPLES, read, write_byte, write_word};

/// Instructions with their jumps.
static CODE: [PageAligned<ForeignPage>; SNIPPET_PAGES] =
    [const { PageAligned(ForeignPage::new([0; PAGE_SIZE])) }; SNIPPET_PAGES];

/// What instructions read and write: bytes on both sides of the page end in the middle.
static DATA: [PageAligned<ForeignPage>; 2] = [const { PageAligned(ForeignPage::new([0; PAGE_SIZE])) }; 2];

/// Words on each side that are filled before an instruction and digested after it.
const WORDS: u64 = 32;
/// How far from the middle a pointer is at most. An operand is at a displacement from it, or an exception's frame below.
const REACH: u64 = 128;
/// Bytes of the legacy region of extended state, before the header (Intel SDM volume 1, section 13.4).
const LEGACY_STATE: u64 = 512;
/// And words of the header.
const HEADER: u64 = 8;

/// CF, PF, AF, ZF, SF, DF and OF.
const FREE_FLAGS: u64 = 0xcd5;
/// The flag that is always set.
const FLAGS: u64 = 2;
/// Numbers of registers.
const AX: usize = 0;
const DX: usize = 2;
const SP: usize = 4;
const DI: usize = 7;
/// RSP, RBP, RSI, RDI, R12, R13.
const POINTERS: [usize; 6] = [SP, 5, 6, DI, 12, 13];
/// R9 and R14.
const INDICES: [usize; 2] = [9, 14];

/// `__HYPERVISOR_xen_version` (Xen, public/xen.h).
const XEN_VERSION: u64 = 17;
/// `XENVER_version` (Xen, public/version.h).
const VERSION: u64 = 0;

/// The registers before an instruction, and after it.
#[repr(C)]
struct State {
    gpr: [u64; 16],
    flags: u64,
    /// Where it begins.
    entry: u64,
    /// Which of the jumps it came out of.
    exit: u64,
    /// The stack of who called [`enter`].
    stack: u64,
}

#[repr(transparent)]
struct Shared(UnsafeCell<State>);

// SAFETY: only the first vCPU runs snippets, and it takes no reference while one runs.
unsafe impl Sync for Shared {}

static STATE: Shared = Shared(UnsafeCell::new(State { gpr: [0; 16], flags: 0, entry: 0, exit: 0, stack: 0 }));

/// Lays the instructions out.
pub(crate) fn prepare() {
    for (index, snippet) in SNIPPETS.iter().enumerate() {
        let start = address(index);
        let end = start + snippet.bytes().len() as u64;
        for (n, byte) in snippet.bytes().iter().enumerate() {
            write_byte(start + n as u64, *byte);
        }
        if snippet.needs == Needs::Import {
            let distance = import().wrapping_sub(end) as u32;
            for (at, byte) in (end - 4..).zip(distance.to_le_bytes()) {
                write_byte(at, byte);
            }
        }
        let jumps: [(u64, unsafe extern "C" fn() -> !); 3] =
            [(start - JUMP as u64, exit::<0>), (end, exit::<1>), (end + JUMP as u64, exit::<2>)];
        for (at, to) in jumps {
            // All of the image is within 2 GiB.
            let distance = (to as usize as u64).wrapping_sub(at + JUMP as u64) as u32;
            write_byte(at, 0xe9);
            for (n, byte) in (1..).zip(distance.to_le_bytes()) {
                write_byte(at + n, byte);
            }
        }
    }
}

/// The last word of the data: what [`Needs::Import`] reads.
fn import() -> u64 {
    DATA[1].0.address() + (WORDS - 1) * 8
}

/// Where the first snippet page is.
pub(crate) fn pages() -> u64 {
    CODE[0].0.address()
}

fn address(index: usize) -> u64 {
    pages() + snippet_offset(index) as u64
}

/// The workload: leaves a digest of each.
pub(crate) fn run(seed: u32) {
    let extended_state = enable_extended_state();
    for (index, (snippet, sample)) in SNIPPETS.iter().zip(&SAMPLES.0).enumerate() {
        let can = snippet.needs != Needs::ExtendedState || extended_state;
        sample.store(if can { digest(index, snippet, seed) } else { 0 }, Relaxed);
    }
}

/// Whether there is XSAVE, with XSAVEOPT. There is nothing in the x87 to be saved then.
fn enable_extended_state() -> bool {
    // Newer versions of Rust have these functions safe.
    #[allow(unused_unsafe)]
    // SAFETY: every CPU with long mode has CPUID.
    let xsave = unsafe { __cpuid(1) }.ecx & 1 << 26 != 0;
    #[allow(unused_unsafe)]
    // SAFETY: as above.
    if !xsave || unsafe { __cpuid_count(0xd, 1) }.eax & 1 == 0 {
        return false;
    }
    // SAFETY: there is XSAVE, and CR4.OSXSAVE changes nothing else. The x87 is used by nobody.
    unsafe { asm!("mov {0}, cr4", "or {0}, 0x40000", "mov cr4, {0}", "fninit", out(reg) _, options(nostack)) };
    true
}

fn digest(index: usize, snippet: &Snippet, seed: u32) -> u64 {
    let mut random = Random::new(u64::from(seed) << 32 | index as u64);
    let mut digest = Digest::new();
    let middle = DATA[1].0.address();
    let words = || (middle - WORDS * 8..middle + WORDS * 8).step_by(8);
    for run in 0..SNIPPET_RUNS {
        if let Some((byte, values)) = snippet.rewrite {
            write_byte(address(index) + byte as u64, values[run % 2]);
        }
        let window = if run % 2 == 0 { 0 } else { LARGE_PAGES };
        words().for_each(|at| write_word(at, random.next()));
        let gpr = registers(&mut random, index, snippet, window);
        let flags = FLAGS | random.next() & FREE_FLAGS;
        let before = State { gpr, flags, entry: window + address(index), exit: 0, stack: 0 };
        // SAFETY: nobody else uses it.
        unsafe { STATE.0.get().write_volatile(before) };
        // SAFETY: the state is complete, and the instruction leaves alone what is not its own.
        unsafe { enter() };
        // SAFETY: nobody else uses it any more.
        let after = unsafe { STATE.0.get().read_volatile() };
        after.gpr.into_iter().chain([after.flags, after.exit]).for_each(|word| digest.add(word));
        words().for_each(|at| digest.add(read(at)));
    }
    digest.value()
}

/// Numbers for the registers, and the data that goes with them.
fn registers(random: &mut Random, index: usize, snippet: &Snippet, window: u64) -> [u64; 16] {
    let middle = DATA[1].0.address();
    let mut gpr: [u64; 16] = core::array::from_fn(|_| random.number());
    for register in POINTERS {
        let aligned = if random.next().is_multiple_of(2) { !7 } else { !0 };
        gpr[register] = window + middle - REACH + ((random.next() % (2 * REACH)) & aligned);
    }
    for register in INDICES {
        gpr[register] = random.next() % 16;
    }
    let last_jump = window + address(index) + (snippet.bytes().len() + JUMP) as u64;
    match snippet.needs {
        Needs::Nothing => {}
        Needs::Target => gpr[AX] = last_jump,
        Needs::Return => write_word(gpr[SP] - window, last_jump),
        Needs::Import => write_word(import(), last_jump),
        Needs::ExtendedState => {
            (gpr[AX], gpr[DX], gpr[DI]) = (1, 0, window + middle - LEGACY_STATE);
            (0..HEADER).for_each(|word| write_word(middle + word * 8, 0));
        }
        Needs::Hypercall => (gpr[AX], gpr[DI]) = (XEN_VERSION, VERSION),
    }
    gpr
}

/// Loads all registers, and jumps to the entry.
///
/// # Safety
/// [`STATE`] is complete. What is at its entry ends in one of [`exit`]'s.
#[unsafe(naked)]
unsafe extern "C" fn enter() {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rip + {state} + {stack}], rsp",
        "push qword ptr [rip + {state} + {flags}]",
        "popfq",
        "mov rax, [rip + {state}]",
        "mov rcx, [rip + {state} + 8]",
        "mov rdx, [rip + {state} + 16]",
        "mov rbx, [rip + {state} + 24]",
        "mov rsp, [rip + {state} + 32]",
        "mov rbp, [rip + {state} + 40]",
        "mov rsi, [rip + {state} + 48]",
        "mov rdi, [rip + {state} + 56]",
        "mov r8, [rip + {state} + 64]",
        "mov r9, [rip + {state} + 72]",
        "mov r10, [rip + {state} + 80]",
        "mov r11, [rip + {state} + 88]",
        "mov r12, [rip + {state} + 96]",
        "mov r13, [rip + {state} + 104]",
        "mov r14, [rip + {state} + 112]",
        "mov r15, [rip + {state} + 120]",
        "jmp [rip + {state} + {entry}]",
        state = sym STATE,
        stack = const offset_of!(State, stack),
        flags = const offset_of!(State, flags),
        entry = const offset_of!(State, entry),
    )
}

/// Where the jumps of a slot lead: notes which one it was.
#[unsafe(naked)]
unsafe extern "C" fn exit<const NUMBER: u32>() -> ! {
    naked_asm!(
        "mov qword ptr [rip + {state} + {exit}], {number}",
        "jmp {leave}",
        state = sym STATE,
        exit = const offset_of!(State, exit),
        number = const NUMBER,
        leave = sym leave,
    )
}

/// Stores all registers, and returns from [`enter`].
#[unsafe(naked)]
unsafe extern "C" fn leave() -> ! {
    naked_asm!(
        "mov [rip + {state}], rax",
        "mov [rip + {state} + 8], rcx",
        "mov [rip + {state} + 16], rdx",
        "mov [rip + {state} + 24], rbx",
        "mov [rip + {state} + 32], rsp",
        "mov [rip + {state} + 40], rbp",
        "mov [rip + {state} + 48], rsi",
        "mov [rip + {state} + 56], rdi",
        "mov [rip + {state} + 64], r8",
        "mov [rip + {state} + 72], r9",
        "mov [rip + {state} + 80], r10",
        "mov [rip + {state} + 88], r11",
        "mov [rip + {state} + 96], r12",
        "mov [rip + {state} + 104], r13",
        "mov [rip + {state} + 112], r14",
        "mov [rip + {state} + 120], r15",
        "mov rsp, [rip + {state} + {stack}]",
        "pushfq",
        "pop qword ptr [rip + {state} + {flags}]",
        "cld",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        state = sym STATE,
        stack = const offset_of!(State, stack),
        flags = const offset_of!(State, flags),
    )
}
