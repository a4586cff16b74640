//! All virtual CPUs in the page under test at once.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::hint;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use hyperbp_bench_abi::{PAGE_SIZE, REWRITTEN_OFFSET, SITES, Storm, StormCounts, TARGET, VCPUS_MAX};
use hyperbp_bench_guest::{Hash, expected_hash};

use crate::page::{PAGE_UNDER_TEST, PageAligned, read};
use crate::vcpu;

/// Reads of the page between two calls: few, so that calls and hashes mix.
const READS: usize = 8;

/// The counts, for the runner to see.
#[repr(transparent)]
struct Counts(UnsafeCell<Storm>);

// SAFETY: the fields are only ever accessed atomically, through `count`.
unsafe impl Sync for Counts {}

#[unsafe(link_section = ".volatile")]
static STORM: PageAligned<Counts> = PageAligned(Counts(UnsafeCell::new(Storm {
    vcpus: [StormCounts {
        executions: [0; SITES.len()],
        hashes: 0,
        hash_mismatches: 0,
        rewrites: 0,
        rewrite_mismatches: 0,
    }; VCPUS_MAX],
})));

/// Virtual CPUs that still have calls to make.
#[unsafe(link_section = ".volatile")]
static HAMMERING: AtomicU64 = AtomicU64::new(0);

/// Where the counts are.
pub(crate) fn address() -> u64 {
    STORM.0.0.get() as u64
}

/// A count of this vCPU as an atomic: the runner reads it at the same time.
macro_rules! count {
    ($vcpu:expr, $($field:tt)+) => {{
        // SAFETY: STORM is a static, and the index is checked, so the pointer is in bounds for ever.
        let field = unsafe { &raw mut (*STORM.0.0.get()).vcpus[$vcpu].$($field)+ };
        // SAFETY: the fields are aligned, and nobody accesses them other than atomically.
        unsafe { AtomicU64::from_ptr(field) }.fetch_add(1, Relaxed);
    }};
}

/// Who does what: with four vCPUs, one only hashes and one writes besides; with fewer they share the work.
struct Role {
    hammers: bool,
    hashes: bool,
    rewrites: bool,
}

impl Role {
    fn of(vcpu: usize, vcpus: usize) -> Self {
        let hasher = vcpus.saturating_sub(2);
        Self { hammers: vcpus < 3 || vcpu != hasher, hashes: vcpu == hasher, rewrites: vcpu == vcpus - 1 }
    }
}

/// The workload: every vCPU that executes makes `calls` of them.
pub(crate) fn run(calls: u64) {
    let vcpus = vcpu::count() as usize;
    let hammering = (0..vcpus).filter(|vcpu| Role::of(*vcpu, vcpus).hammers).count();
    HAMMERING.store(hammering as u64, Release);
    vcpu::all(hammer, calls);
}

/// One vCPU's part.
fn hammer(vcpu: usize, calls: u64) {
    let role = Role::of(vcpu, vcpu::count() as usize);
    let page = PAGE_UNDER_TEST.0.address();
    let (mut hash, mut offset, mut value, mut called) = (Hash::new(), 0, 0_u8, 0);
    while HAMMERING.load(Acquire) > 0 {
        if role.hammers && called < calls {
            let entry = SITES[called as usize % SITES.len()];
            call(page + entry as u64);
            for (site, at) in SITES.iter().enumerate() {
                if *at >= entry {
                    count!(vcpu, executions[site]);
                }
            }
            called += 1;
            if called == calls {
                HAMMERING.fetch_sub(1, AcqRel);
            }
        } else {
            hint::spin_loop();
        }
        if role.hashes {
            for _ in 0..READS {
                hash.add(offset, read(page + offset as u64));
                offset += 8;
                if offset == PAGE_SIZE {
                    count!(vcpu, hashes);
                    if hash.value() != expected_hash() {
                        count!(vcpu, hash_mismatches);
                    }
                    (hash, offset) = (Hash::new(), 0);
                }
            }
        }
        if role.rewrites {
            value = value.wrapping_add(0x35);
            rewrite(vcpu, page, value);
        }
    }
    if role.rewrites {
        rewrite(vcpu, page, TARGET[REWRITTEN_OFFSET]);
    }
}

fn rewrite(vcpu: usize, page: u64, value: u8) {
    let seen: u8;
    // SAFETY: writes and reads the byte of the page under test that is there for it, and is not a Rust object.
    unsafe {
        asm!(
            "mov byte ptr [{address}], {value}",
            "mov {seen}, byte ptr [{address}]",
            address = in(reg) page + REWRITTEN_OFFSET as u64,
            value = in(reg_byte) value,
            seen = out(reg_byte) seen,
            options(nostack, preserves_flags)
        )
    };
    count!(vcpu, rewrites);
    if seen != value {
        count!(vcpu, rewrite_mismatches);
    }
}

fn call(entry: u64) {
    // SAFETY: from any entry the page changes nothing, and returns. The block may push, so the compiler keeps nothing below
    // the stack pointer.
    unsafe { asm!("call {}", in(reg) entry) };
}
