//! The other virtual CPUs. They are down, and cost nothing, but while there is work for all of them.

use core::arch::asm;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize};

use hyperbp_bench_abi::VCPUS_MAX;

use crate::page::{ForeignPage, PageAligned};
use crate::{exceptions, privilege, xen};

/// `VCPUOP_initialise` (Xen, public/vcpu.h).
const INITIALISE: u64 = 0;
/// `VCPUOP_up`.
const UP: u64 = 1;
/// `VCPUOP_down`.
const DOWN: u64 = 2;
/// `VCPU_HVM_MODE_64B` (Xen, public/hvm/hvm_vcpu.h).
const MODE_64: u32 = 1;

/// `struct vcpu_hvm_context` in 64-bit mode, whose segments are flat (Xen, public/hvm/hvm_vcpu.h).
#[repr(C)]
#[derive(Default)]
struct Context {
    mode: u32,
    _padding: u32,
    rax: u64,
    rcx: u64,
    rdx: u64,
    rbx: u64,
    rsp: u64,
    rbp: u64,
    rsi: u64,
    rdi: u64,
    rip: u64,
    rflags: u64,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
}

/// Stacks of all but the first.
#[unsafe(link_section = ".volatile")]
static STACKS: [PageAligned<ForeignPage>; VCPUS_MAX - 1] =
    [const { PageAligned(ForeignPage::new([0; hyperbp_bench_abi::PAGE_SIZE])) }; VCPUS_MAX - 1];

/// Numbers the times there was work for all.
#[unsafe(link_section = ".volatile")]
static ROUND: AtomicU32 = AtomicU32::new(0);
/// What the work is of.
#[unsafe(link_section = ".volatile")]
static COUNT: AtomicU64 = AtomicU64::new(0);
#[unsafe(link_section = ".volatile")]
static WORK: AtomicUsize = AtomicUsize::new(0);
/// The last round each has begun, and ended.
#[unsafe(link_section = ".volatile")]
static BEGUN: [AtomicU32; VCPUS_MAX] = [const { AtomicU32::new(0) }; VCPUS_MAX];
#[unsafe(link_section = ".volatile")]
static ENDED: [AtomicU32; VCPUS_MAX] = [const { AtomicU32::new(0) }; VCPUS_MAX];
/// How many there are.
static VCPUS: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" {
    /// In `boot.s`.
    fn vcpu_start();
}

/// How many there are, this one included. Initialises the others.
pub(crate) fn count() -> u32 {
    if VCPUS.load(Relaxed) == 0 {
        let others = (1..VCPUS_MAX).take_while(|vcpu| initialise(*vcpu)).count();
        VCPUS.store(1 + others as u32, Relaxed);
    }
    VCPUS.load(Relaxed)
}

/// Whether there is one with this number. It stays down.
fn initialise(vcpu: usize) -> bool {
    let (cr0, cr3, cr4): (u64, u64, u64);
    // SAFETY: reading control registers has no effect.
    unsafe { asm!("mov {}, cr0", "mov {}, cr3", "mov {}, cr4", out(reg) cr0, out(reg) cr3, out(reg) cr4) };
    let stack = STACKS[vcpu - 1].0.address() + hyperbp_bench_abi::PAGE_SIZE as u64;
    let context = Context {
        mode: MODE_64,
        rsp: stack,
        rdi: vcpu as u64,
        rip: vcpu_start as *const () as u64,
        rflags: 2,
        cr0,
        cr3,
        cr4,
        efer: 0x500, // LME and LMA
        ..Context::default()
    };
    // SAFETY: `main` has connected; the context is what the operation takes, for a vCPU that has not run.
    unsafe { xen::vcpu_op(INITIALISE, vcpu, &raw const context as u64) }
}

/// Work for a vCPU: it is told its number, and the count.
pub(crate) type Work = fn(usize, u64);

/// Has all of them do the same work, this one too, and waits for the last.
pub(crate) fn all(work: Work, count_each: u64) {
    WORK.store(work as usize, Relaxed);
    let others = 1..count() as usize;
    COUNT.store(count_each, Relaxed);
    let round = ROUND.load(Relaxed) + 1;
    ROUND.store(round, Release);
    for vcpu in others.clone() {
        // One that is just going down does not hear the first call.
        while BEGUN[vcpu].load(Acquire) != round {
            // SAFETY: connected; it takes no argument, and the vCPU is initialised.
            unsafe { xen::vcpu_op(UP, vcpu, 0) };
            xen::yield_cpu();
        }
    }
    work(0, count_each);
    for vcpu in others {
        while ENDED[vcpu].load(Acquire) != round {
            xen::yield_cpu();
        }
    }
}

/// Called by `boot.s` on each of the others.
pub(crate) extern "C" fn main(vcpu: usize) -> ! {
    exceptions::load();
    privilege::install(vcpu);
    let mut done = 0;
    loop {
        let round = ROUND.load(Acquire);
        if round != done {
            BEGUN[vcpu].store(round, Release);
            // SAFETY: `all` has stored a `Work` before it began the round.
            let work = unsafe { core::mem::transmute::<usize, Work>(WORK.load(Relaxed)) };
            work(vcpu, COUNT.load(Relaxed));
            done = round;
            ENDED[vcpu].store(round, Release);
        }
        // SAFETY: connected; it takes no argument.
        unsafe { xen::vcpu_op(DOWN, vcpu, 0) };
    }
}
