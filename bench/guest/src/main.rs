//! The benchmark guest: a freestanding 64-bit PVH guest for Xen that does nothing but run bpbench's workloads, one
//! request at a time (see [`hyperbp_bench_abi`] for what it is told and what it answers).
//!
//! It has no interrupts, no scheduler and no devices, so between two time stamps nothing runs but the measured code and
//! what the breakpoint brings with it.
#![no_std]
#![no_main]

mod balloon;
mod control;
mod exceptions;
mod hostile;
mod page;
mod privilege;
mod scan;
mod snippet;
mod storm;
mod system;
mod vcpu;
mod workload;
mod xen;

use core::arch::global_asm;
use core::panic::PanicInfo;

use hyperbp_bench_abi::Workload;
use hyperbp_bench_guest::{CODE_SELECTOR, Request};

global_asm!(
    include_str!("boot.s"),
    code = const CODE_SELECTOR,
    data = const 0x10,
    stack_size = const STACK_SIZE,
    main = sym main,
    other = sym vcpu::main,
);

/// Bytes of the first vCPU's stack.
const STACK_SIZE: u64 = 0x4000;

/// Called by `boot.s`, once, in long mode with paging, SSE and a stack, interrupts disabled.
extern "C" fn main() -> ! {
    if xen::connect().is_err() {
        xen::print(format_args!("guest: no Xen here\n"));
        xen::stop();
    }
    exceptions::install();
    privilege::install(0);
    snippet::prepare();
    balloon::prepare();
    control::announce(vcpu::count());
    loop {
        let Some((number, request)) = control::next_request() else {
            // One CPU may have to do for both of us: let dom0 have it. Only here, never while a workload runs.
            xen::yield_cpu();
            continue;
        };
        match request {
            Some(Request { workload: Workload::Shutdown, .. }) => {
                control::complete(number);
                xen::power_off();
            }
            Some(Request { workload: Workload::Storm, count }) => storm::run(count as u64),
            Some(Request { workload: Workload::Snippets, count }) => snippet::run(count as u32),
            Some(Request { workload: Workload::Scan, count }) => scan::run(count as u64),
            Some(Request { workload: Workload::Hostile, count }) => hostile::run(count as u32),
            Some(Request { workload: Workload::Balloon, count }) => balloon::run(count as u64),
            Some(Request { workload: Workload::SystemPage, .. }) => system::run(),
            Some(request) => workload::run(request),
            None => {}
        }
        control::complete(number);
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    xen::print(format_args!("guest: {info}\n"));
    xen::crash();
}

/// The prebuilt `core` names an unwinder's personality routine. Panics abort here, so nobody ever calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
