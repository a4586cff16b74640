//! What the guest needs of Xen: hypercalls, and the debug port.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, CpuidResult};
use core::fmt::{self, Write};
use core::hint;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use hyperbp_bench_abi::PAGE_SIZE;

use crate::page::{ForeignPage, PageAligned};

/// `__HYPERVISOR_sched_op` (Xen, public/xen.h).
const SCHED_OP: u64 = 29;
/// `__HYPERVISOR_vcpu_op`.
const VCPU_OP: u64 = 24;
/// `__HYPERVISOR_memory_op`.
const MEMORY_OP: u64 = 12;
/// `XENMEM_add_to_physmap`.
const ADD_TO_PHYSMAP: u64 = 7;
/// `XENMAPSPACE_gmfn`: a page of the guest's own.
const SPACE_GMFN: u32 = 2;
/// `XENMEM_memory_map`.
const MEMORY_MAP: u64 = 9;
/// What the map calls memory.
const RAM: u32 = 1;
/// `XENMEM_decrease_reservation`.
const DECREASE_RESERVATION: u64 = 1;
/// `XENMEM_populate_physmap`.
const POPULATE_PHYSMAP: u64 = 6;
/// `XENMEM_maximum_gpfn`.
const MAXIMUM_GPFN: u64 = 14;
/// `DOMID_SELF`.
const DOMID_SELF: u16 = 0x7ff0;
/// `__HYPERVISOR_hvm_op`.
const HVM_OP: u64 = 34;
/// `HVMOP_get_mem_type` (Xen, public/hvm/hvm_op.h).
const GET_MEM_TYPE: u64 = 15;
/// `HVMOP_altp2m`.
const ALTP2M: u64 = 25;
/// `SCHEDOP_yield` (Xen, public/sched.h).
const SCHEDOP_YIELD: u64 = 0;
/// `SCHEDOP_shutdown`.
const SCHEDOP_SHUTDOWN: u64 = 2;
/// `SHUTDOWN_poweroff`.
const POWER_OFF: u32 = 0;
/// `SHUTDOWN_crash`.
const CRASH: u32 = 3;

/// Bytes of the hypercall page for each hypercall.
const STUB_SIZE: u64 = 32;

/// Filled with code by Xen.
static HYPERCALL_PAGE: PageAligned<ForeignPage> = PageAligned(ForeignPage::new([0; PAGE_SIZE]));

/// Whether [`HYPERCALL_PAGE`] is filled.
static CONNECTED: AtomicBool = AtomicBool::new(false);

/// There is no Xen under this guest.
pub(crate) struct NoXen;

/// Asks Xen for the hypercall page (Xen, public/arch-x86/cpuid.h).
pub(crate) fn connect() -> Result<(), NoXen> {
    let base = (0x4000_0000..0x4001_0000).step_by(0x100).find(|leaf| is_xen(*leaf)).ok_or(NoXen)?;
    let msr = cpuid(base + 2).ebx;
    let page = HYPERCALL_PAGE.0.address();
    // SAFETY: the MSR makes Xen write the page, which is ours to be written and code to nobody else.
    unsafe {
        asm!(
            "wrmsr",
            in("ecx") msr,
            in("eax") page as u32,
            in("edx") (page >> 32) as u32,
            options(nostack, preserves_flags),
        );
    }
    CONNECTED.store(true, Relaxed);
    Ok(())
}

/// Whether this is the leaf where Xen presents itself.
fn is_xen(leaf: u32) -> bool {
    let signature = cpuid(leaf);
    [signature.ebx, signature.ecx, signature.edx].map(u32::to_le_bytes).as_flattened() == b"XenVMMXenVMM"
}

fn cpuid(leaf: u32) -> CpuidResult {
    // Newer versions of Rust have this function safe.
    #[allow(unused_unsafe)]
    // SAFETY: every CPU with long mode has CPUID.
    unsafe {
        __cpuid(leaf)
    }
}

/// A hypercall.
///
/// # Safety
/// [`connect`] must have succeeded, and the arguments must be what the hypercall takes.
unsafe fn hypercall(number: u64, first: u64, second: u64, third: u64) -> i64 {
    let result: i64;
    // SAFETY: the page holds Xen's stubs, which take their arguments in RDI, RSI and RDX and follow the C ABI otherwise.
    unsafe {
        asm!(
            "call {stub}",
            stub = in(reg) HYPERCALL_PAGE.0.address() + number * STUB_SIZE,
            inlateout("rdi") first => _,
            inlateout("rsi") second => _,
            inlateout("rdx") third => _,
            lateout("rax") result,
            clobber_abi("C"),
        );
    }
    result
}

/// A `sched_op` hypercall.
///
/// # Safety
/// [`connect`] must have succeeded, and `argument` must be what `operation` takes.
unsafe fn sched_op(operation: u64, argument: *const u32) {
    // SAFETY: as for this function.
    unsafe { hypercall(SCHED_OP, operation, argument as u64, 0) };
}

/// A `vcpu_op` hypercall. Whether it succeeded.
///
/// # Safety
/// [`connect`] must have succeeded, and `argument` must be what `operation` takes.
pub(crate) unsafe fn vcpu_op(operation: u64, vcpu: usize, argument: u64) -> bool {
    // SAFETY: as for this function.
    unsafe { hypercall(VCPU_OP, operation, vcpu as u64, argument) == 0 }
}

/// Most regions of memory that [`memory`] tells of.
pub(crate) const REGIONS: usize = 16;

/// `struct xen_memory_map`.
#[repr(C)]
struct MemoryMap {
    entries: u32,
    buffer: *mut [u32; 5],
}

/// The guest's memory, by guest-physical address. Nothing if Xen does not tell.
pub(crate) fn memory(into: &mut [Range<u64>; REGIONS]) -> &[Range<u64>] {
    // Entries as the BIOS's function E820 has them: start, length and kind, without padding.
    let mut entries = [[0_u32; 5]; REGIONS];
    let mut map = MemoryMap { entries: REGIONS as u32, buffer: entries.as_mut_ptr() };
    // SAFETY: `main` has connected; the argument is what the operation takes, with room for as many entries as it says.
    if unsafe { hypercall(MEMORY_OP, MEMORY_MAP, &raw mut map as u64, 0) } < 0 {
        return &[];
    }
    let mut found = 0;
    for [start, start_high, length, length_high, kind] in entries.into_iter().take(map.entries as usize) {
        let number = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let start = number(start, start_high);
        if kind == RAM {
            into[found] = start..start + number(length, length_high);
            found += 1;
        }
    }
    &into[..found]
}

/// The highest guest frame that there is anything at.
pub(crate) fn highest_frame() -> u64 {
    let domain = u64::from(DOMID_SELF);
    // SAFETY: `main` has connected; the argument is what the operation takes: a `domid_t`.
    let highest = unsafe { hypercall(MEMORY_OP, MAXIMUM_GPFN, &raw const domain as u64, 0) };
    u64::try_from(highest).unwrap_or(0)
}

/// `struct xen_memory_reservation`, for one page.
#[repr(C)]
struct Reservation {
    extent: *const u64,
    extents: u64,
    order: u32,
    flags: u32,
    domain: u16,
}

fn reservation(operation: u64, frame: u64) -> u64 {
    let reservation = Reservation { extent: &frame, extents: 1, order: 0, flags: 0, domain: DOMID_SELF };
    // SAFETY: `main` has connected; the argument is what the operations take. The page is no Rust object.
    unsafe { hypercall(MEMORY_OP, operation, &raw const reservation as u64, 0) as u64 }
}

/// Gives a page back to Xen. How many it has taken.
pub(crate) fn give_back(frame: u64) -> u64 {
    reservation(DECREASE_RESERVATION, frame)
}

/// Has Xen put a page there. How many it has put.
pub(crate) fn take(frame: u64) -> u64 {
    reservation(POPULATE_PHYSMAP, frame)
}

/// `struct xen_hvm_get_mem_type`.
#[repr(C)]
struct MemoryType {
    domain: u16,
    kind: u16,
    _padding: [u16; 2],
    frame: u64,
}

/// What Xen says a frame is: an error, or a type.
pub(crate) fn memory_type(frame: u64) -> u64 {
    let mut asked = MemoryType { domain: DOMID_SELF, kind: 0, _padding: [0; 2], frame };
    // SAFETY: `main` has connected; the argument is what the operation takes.
    let result = unsafe { hypercall(HVM_OP, GET_MEM_TYPE, &raw mut asked as u64, 0) };
    if result < 0 { result as u64 } else { u64::from(asked.kind) }
}

/// An altp2m operation, with nothing in its argument. What Xen answers.
pub(crate) fn altp2m(command: u32) -> i64 {
    /// `HVMOP_ALTP2M_INTERFACE_VERSION`.
    const VERSION: u32 = 1;
    // `struct xen_hvm_altp2m_op`: version, command, domain, and what depends on the command.
    let mut operation = [0_u64; 16];
    operation[0] = u64::from(command) << 32 | u64::from(VERSION);
    operation[1] = u64::from(DOMID_SELF);
    // SAFETY: `main` has connected; the argument is what the operation takes.
    unsafe { hypercall(HVM_OP, ALTP2M, operation.as_mut_ptr() as u64, 0) }
}

/// `struct xen_add_to_physmap`.
#[repr(C)]
struct AddToPhysmap {
    domain: u16,
    size: u16,
    space: u32,
    index: u64,
    gpfn: u64,
}

/// Moves a page to another guest-physical address, in place of what is there. Whether it was done.
pub(crate) fn move_page(from: u64, to: u64) -> bool {
    let (index, gpfn) = (from / PAGE_SIZE as u64, to / PAGE_SIZE as u64);
    let argument = AddToPhysmap { domain: DOMID_SELF, size: 0, space: SPACE_GMFN, index, gpfn };
    // SAFETY: `main` has connected; the argument is what the operation takes.
    unsafe { hypercall(MEMORY_OP, ADD_TO_PHYSMAP, &raw const argument as u64, 0) == 0 }
}

/// Lets another vCPU have this CPU for a while.
pub(crate) fn yield_cpu() {
    if CONNECTED.load(Relaxed) {
        // SAFETY: connected, and a yield takes no argument.
        unsafe { sched_op(SCHEDOP_YIELD, core::ptr::null()) };
    }
    hint::spin_loop();
}

/// Ends the domain in good order.
pub(crate) fn power_off() -> ! {
    shutdown(POWER_OFF)
}

/// Ends the domain as one that crashed.
pub(crate) fn crash() -> ! {
    shutdown(CRASH)
}

fn shutdown(reason: u32) -> ! {
    if CONNECTED.load(Relaxed) {
        // SAFETY: connected; `struct sched_shutdown` is the reason and nothing else.
        unsafe { sched_op(SCHEDOP_SHUTDOWN, &reason) };
    }
    stop()
}

/// Stops this CPU for good.
pub(crate) fn stop() -> ! {
    loop {
        // SAFETY: interrupts are disabled, and nothing is left to do.
        unsafe { asm!("hlt", options(nomem, nostack, preserves_flags)) };
    }
}

/// Writes to the debug port 0xe9. Xen collects a line and puts it into its log as `(dN) …`, N being the domain.
pub(crate) fn print(text: fmt::Arguments<'_>) {
    // The port takes everything: there is no error to handle.
    let _ = DebugPort.write_fmt(text);
}

struct DebugPort;

impl Write for DebugPort {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: nothing but Xen's log listens on the port.
            unsafe { asm!("out 0xe9, al", in("al") byte, options(nomem, nostack, preserves_flags)) };
        }
        Ok(())
    }
}
