//! The guest's side of the control page.

use core::cell::UnsafeCell;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64};

use hyperbp_bench_abi::{Control, MAGIC, VERSION};
use hyperbp_bench_guest::{Request, expected_at};

use crate::page::{PAGE_UNDER_TEST, SAMPLES};
use crate::{balloon, snippet, storm, system};

/// The control page itself; the linker script puts it where the runner looks for it.
#[repr(C, align(4096))]
pub(crate) struct ControlPage(UnsafeCell<Control>);

// SAFETY: the fields are only ever accessed atomically, through `field!`, or by the INT3 handler's locked increment.
unsafe impl Sync for ControlPage {}

#[unsafe(link_section = ".control")]
pub(crate) static CONTROL: ControlPage = ControlPage(UnsafeCell::new(Control {
    magic: 0,
    version: 0,
    vcpus: 0,
    target_gpa: 0,
    samples_gpa: 0,
    request: 0,
    workload: 0,
    count: 0,
    completed: 0,
    executions: 0,
    own_int3s: 0,
    mismatches: 0,
    mismatch_offset: 0,
    mismatch_seen: 0,
    storm_gpa: 0,
    snippets_gpa: 0,
    scan_gpa: 0,
    alive: 0,
    process: 0,
    tag: 0,
    balloon_gpa: 0,
    system_gpa: 0,
}));

/// A field of the control page as an atomic: the runner accesses it at the same time.
macro_rules! field {
    ($atomic:ident, $field:ident) => {{
        // SAFETY: CONTROL is a static, so the pointer is in bounds for ever.
        let field = unsafe { &raw mut (*CONTROL.0.get()).$field };
        // SAFETY: `Control` keeps its fields aligned, and nobody accesses them other than atomically.
        unsafe { $atomic::from_ptr(field) }
    }};
}

/// Tells the runner that the guest is up, and where things are.
pub(crate) fn announce(vcpus: u32) {
    field!(AtomicU32, version).store(VERSION, Relaxed);
    field!(AtomicU32, vcpus).store(vcpus, Relaxed);
    field!(AtomicU64, target_gpa).store(PAGE_UNDER_TEST.0.address(), Relaxed);
    field!(AtomicU64, samples_gpa).store(SAMPLES.0.as_ptr() as u64, Relaxed);
    field!(AtomicU64, storm_gpa).store(storm::address(), Relaxed);
    field!(AtomicU64, snippets_gpa).store(snippet::pages(), Relaxed);
    field!(AtomicU64, balloon_gpa).store(balloon::code(), Relaxed);
    field!(AtomicU64, system_gpa).store(system::page(), Relaxed);
    field!(AtomicU64, magic).store(MAGIC, Release);
}

/// The next request's number and what it asks for (`None` if that makes no sense), once there is one.
pub(crate) fn next_request() -> Option<(u32, Option<Request>)> {
    let number = field!(AtomicU32, request).load(Acquire);
    if number == field!(AtomicU32, completed).load(Relaxed) {
        return None;
    }
    let workload = field!(AtomicU32, workload).load(Relaxed);
    let count = field!(AtomicU32, count).load(Relaxed);
    Some((number, Request::from_wire(workload, count)))
}

/// Tells the runner that a request is done; its samples and counts are visible before that.
pub(crate) fn complete(number: u32) {
    field!(AtomicU32, completed).store(number, Release);
}

/// Where the runner wants frames to be looked at.
pub(crate) fn scan_gpa() -> u64 {
    field!(AtomicU64, scan_gpa).load(Relaxed)
}

/// Counts one execution of the breakpointed instruction.
pub(crate) fn count_execution() {
    field!(AtomicU64, executions).fetch_add(1, Relaxed);
}

/// Compares what eight bytes of the page under test read as with what they must, and counts a difference.
pub(crate) fn check_read(offset: usize, seen: u64) {
    if seen == expected_at(offset) {
        return;
    }
    if field!(AtomicU64, mismatches).load(Relaxed) == 0 {
        field!(AtomicU64, mismatch_offset).store(offset as u64, Relaxed);
        field!(AtomicU64, mismatch_seen).store(seen, Relaxed);
    }
    field!(AtomicU64, mismatches).fetch_add(1, Relaxed);
}
