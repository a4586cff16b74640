//! A guest that gives pages back to Xen and gets others in their place, between any two instructions that have breakpoints:
//! the stack, the page tables, an operand, and the page with the breakpoints itself.

use core::arch::asm;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use hyperbp_bench_abi::{BALLOON_CODE, BALLOON_OFFSET, PAGE_SIZE};
use hyperbp_bench_guest::Random;

use crate::page::{ForeignPage, PageAligned, SAMPLES, read, write_byte, write_word};
use crate::{control, vcpu, xen};

const PAGE: u64 = PAGE_SIZE as u64;
/// Present, writable, accessed and dirty.
const ENTRY: u64 = 0x63;
/// The GiB of virtual addresses that `boot.s` leaves to us.
const VIRTUAL: u64 = 2 << 30;

/// Where hyperbp's runner has its first frames in a guest of this size: the sinks and the shadow.
const MONITORS: u64 = 0x14_0000;
const MONITORS_FRAMES: u64 = 3;

const fn page() -> PageAligned<ForeignPage> {
    PageAligned(ForeignPage::new([0; PAGE_SIZE]))
}

/// Where the instructions are.
static CODE: PageAligned<ForeignPage> = page();
static STACKS: [PageAligned<ForeignPage>; 2] = [page(), page()];
static OPERAND: PageAligned<ForeignPage> = page();
/// A page of [`VIRTUAL`] addresses: its table, and the directory above.
static TABLE: PageAligned<ForeignPage> = page();
static DIRECTORY: PageAligned<ForeignPage> = page();
/// A page that is moved to where another one was.
static SPARE: PageAligned<ForeignPage> = page();

/// What another virtual CPU is to replace: a page, and in its lowest bits how. 0: nothing.
static ORDER: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    /// In `boot.s`.
    static page_directory_pointers: u8;
}

/// Where the instructions are.
pub(crate) fn code() -> u64 {
    CODE.0.address()
}

/// Puts the instructions into their page.
pub(crate) fn prepare() {
    BALLOON_CODE.iter().zip(code() + BALLOON_OFFSET as u64..).for_each(|(byte, at)| write_byte(at, *byte));
}

/// What went wrong. The numbers are of the samples.
#[derive(Clone, Copy)]
enum Wrong {
    Popped = 0,
    PoppedThroughTables = 1,
    Loaded = 2,
    Code = 3,
    Refused = 4,
}

fn count(wrong: Wrong) {
    SAMPLES.0[wrong as usize].fetch_add(1, Relaxed);
}

/// The workload: replaces each of the pages `count` times, and runs the code after each.
pub(crate) fn run(count: u64) {
    SAMPLES.0[..5].iter().for_each(|sample| sample.store(0, Relaxed));
    let directories = &raw const page_directory_pointers as u64;
    write_word(directories + 2 * 8, DIRECTORY.0.address() + ENTRY);
    write_word(DIRECTORY.0.address(), TABLE.0.address() + ENTRY);
    ORDER.store(0, Release);
    vcpu::all(work, count);
}

fn work(vcpu: usize, count: u64) {
    match vcpu {
        0 => lead(count),
        1 => help(),
        _ => {}
    }
}

/// The first virtual CPU's part.
fn lead(count: u64) {
    let mut random = Random::new(count);
    for round in 0..count {
        let replace = |page: &PageAligned<ForeignPage>| replace(page.0.address(), round);
        replace(&STACKS[0]);
        execute(&mut random, STACKS[0].0.address(), Wrong::Popped);
        replace(&OPERAND);
        execute(&mut random, STACKS[0].0.address(), Wrong::Popped);
        // A table that says something else than the one that was there.
        replace(&TABLE);
        let stack = &STACKS[round as usize % 2];
        write_word(TABLE.0.address(), stack.0.address() + ENTRY);
        flush();
        execute(&mut random, VIRTUAL, Wrong::PoppedThroughTables);
        replace(&CODE);
        prepare();
        execute(&mut random, STACKS[1].0.address(), Wrong::Popped);
        // What the guest does not know of: a monitor's frames, another one each time. Xen resets views then.
        xen::give_back(MONITORS + round % MONITORS_FRAMES);
        execute(&mut random, STACKS[1].0.address(), Wrong::Popped);
    }
    ORDER.store(u64::MAX, Release);
}

/// The second's: replaces what it is told.
fn help() {
    loop {
        match ORDER.load(Acquire) {
            0 => xen::yield_cpu(),
            u64::MAX => return,
            order => {
                replace_here(order & !(PAGE - 1), order & (PAGE - 1));
                ORDER.store(0, Release);
            }
        }
    }
}

/// Gives a page another frame. With several virtual CPUs, another one does it every other time.
fn replace(page: u64, round: u64) {
    if vcpu::count() > 1 && round / 3 % 2 == 1 {
        ORDER.store(page + round % 3, Release);
        while ORDER.load(Acquire) != 0 {
            xen::yield_cpu();
        }
    } else {
        replace_here(page, round % 3);
    }
}

fn replace_here(page: u64, how: u64) {
    let done = match how {
        // As a balloon driver does it.
        0 => xen::give_back(page / PAGE) == 1 && xen::take(page / PAGE) == 1,
        // Xen takes the old page away itself.
        1 => xen::take(page / PAGE) == 1,
        _ => xen::move_page(SPARE.0.address(), page) && xen::take(SPARE.0.address() / PAGE) == 1,
    };
    if !done {
        count(Wrong::Refused);
    }
}

fn flush() {
    // SAFETY: the same tables as before.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags)) };
}

/// Runs the code on a stack, and looks whether it does what it says.
fn execute(random: &mut Random, stack: u64, popped: Wrong) {
    let (pushed, operand) = (random.next(), random.next());
    write_word(OPERAND.0.address(), operand);
    let (back, loaded): (u64, u64);
    // SAFETY: the code loads RAX, pushes and pops RBP, and returns. Its stack is a page of ours.
    unsafe {
        asm!(
            "mov r12, rsp",
            "mov r13, rbp",
            "mov rsp, {top}",
            "mov rbp, {pushed}",
            "call {code}",
            "mov {back}, rbp",
            "mov rbp, r13",
            "mov rsp, r12",
            top = in(reg) stack + PAGE,
            pushed = in(reg) pushed,
            code = in(reg) code() + BALLOON_OFFSET as u64,
            back = lateout(reg) back,
            in("rdi") OPERAND.0.address(),
            out("rax") loaded,
            out("r12") _,
            out("r13") _,
        );
    }
    control::count_execution();
    if back != pushed {
        count(popped);
    }
    if loaded != operand {
        count(Wrong::Loaded);
    }
    let seen = (0..BALLOON_CODE.len() as u64).all(|n| {
        let at = code() + BALLOON_OFFSET as u64 + n;
        read(at) as u8 == BALLOON_CODE[n as usize]
    });
    if !seen {
        count(Wrong::Code);
    }
}
