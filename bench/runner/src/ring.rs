//! The `vm_event` ring: how Xen reports events and is answered, and what their fields mean.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hyperbp::{
    Access, Accesses, Action, CodeMode, Event, Gfn, Int3, PAGE_SIZE, Reason, Registers, Reply, Step, VcpuId, ViewId,
    Waits,
};
use hyperbp_event_channel::{EventChannel, Ways};
use hyperbp_xen_sys as sys;
pub(crate) use hyperbp_xen_sys::{vm_event_request_t as Request, vm_event_response_t as Response};

use crate::xen::{Domain, Error, Interface, check};

/// How long a loop waits for an event before it looks after other things, if there is something that no event tells.
pub(crate) const PATIENCE: Duration = Duration::from_millis(20);

/// EFER.LMA: long mode is active.
const EFER_LMA: u64 = 1 << 10;
/// CS.L and CS.D in the 12 bits of `vm_event_x86_selector_reg::ar`, which leave out the unused ones of a descriptor.
const AR_L: u32 = 1 << 9;
const AR_D: u32 = 1 << 10;
/// Granularity 4 KiB, D or B, present, and a code or data segment.
const AR_FLAT: u32 = 1 << 11 | AR_D | 1 << 7 | 1 << 4;
/// The type of a data segment: writable, and it does not grow downwards.
const AR_CODE: u32 = 1 << 3;
const AR_DOWN: u32 = 1 << 2;
const AR_WRITABLE: u32 = 1 << 1;

/// Requests of one domain. While it lives, INT3s, single-steps and failed emulations of the domain are reported, and so
/// are accesses its views deny. When it is dropped, virtual CPUs whose requests wait in the ring go on as if it had answered with
/// nothing: drain the ring, and let steps end, before.
#[derive(Debug)]
pub(crate) struct Monitor {
    ring: BackRing,
    // Dropped in this order.
    _kinds: Vec<Monitoring>,
    channel: Channel,
    _page: RingPage,
}

impl Monitor {
    /// Starts to monitor.
    ///
    /// # Errors
    /// If another monitor is attached (`EBUSY`), or Xen refuses.
    pub(crate) fn attach(domain: &Domain) -> Result<Self, Error> {
        domain.note_attached();
        let (page, port) = domain.pausing(|| RingPage::enable(domain.interface(), domain.id()))?;
        let channel = Channel::bind(domain.id(), port, domain.ways())?;
        // SAFETY: the page is the ring's, mapped until `_page` is dropped, and no one else here uses it.
        let ring = unsafe { BackRing::init(page.address.cast()) };
        // Without single-steps, Xen never ends a fast one; without failed emulations, they end in a #UD for the guest.
        let kinds =
            KINDS.iter().map(|(_, call, set)| Monitoring::start(call, *set, domain)).collect::<Result<_, _>>()?;
        Ok(Self { ring, _kinds: kinds, channel, _page: page })
    }

    /// Waits until Xen signals, or the time is up, in the cheapest way. Whether it has signalled; [`next`](Self::next) has the
    /// requests.
    ///
    /// # Errors
    /// If the event channel fails.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Result<bool, Error> {
        self.channel.wait(timeout, || self.ring.has_requests())
    }

    /// How it has waited so far.
    pub(crate) fn waits(&self) -> Waits {
        self.channel.waiting.waits()
    }

    /// The same as everyone does it: asleep in dom0's kernel.
    ///
    /// # Errors
    /// If the event channel fails.
    pub(crate) fn sleep(&mut self, timeout: Duration) -> Result<bool, Error> {
        self.channel.sleep(timeout)
    }

    /// Takes the next request, if there is one. No system call.
    pub(crate) fn next(&mut self) -> Option<Request> {
        let request = self.ring.pop()?;
        // No field can be trusted to mean what it did in another version.
        assert_eq!(request.version, sys::VM_EVENT_INTERFACE_VERSION, "Xen is not the version its headers are of");
        Some(request)
    }

    /// Puts a response into the ring: one for each request. Xen sees it after [`notify`](Self::notify).
    pub(crate) fn respond(&mut self, response: &Response) {
        self.ring.push(response);
    }

    /// Answers every virtual CPU that waits, whatever it asked a monitor that is gone. Only while the domain is paused.
    ///
    /// Xen takes a response for a virtual CPU that does not wait for none (`vm_event_resume`, xen/common/vm_event.c).
    ///
    /// # Errors
    /// If the event channel fails.
    pub(crate) fn release(&mut self, vcpus: u16) -> Result<(), Error> {
        for vcpu in 0..vcpus {
            let response = Response {
                version: sys::VM_EVENT_INTERFACE_VERSION,
                flags: sys::VM_EVENT_FLAG_VCPU_PAUSED,
                vcpu_id: vcpu.into(),
                ..Default::default()
            };
            self.ring.put(&response);
            // Xen takes it before this returns.
            self.notify()?;
        }
        Ok(())
    }

    /// Lets Xen read the responses.
    ///
    /// # Errors
    /// If the event channel fails.
    pub(crate) fn notify(&mut self) -> Result<(), Error> {
        self.channel.notify()
    }
}

/// Kinds of events that [`Monitor`] asks for.
const KINDS: [Kind; 3] = [
    ("single-steps", "xc_monitor_singlestep", sys::xc_monitor_singlestep),
    ("INT3s", "xc_monitor_software_breakpoint", sys::xc_monitor_software_breakpoint),
    ("failed emulations", "xc_monitor_emul_unimplemented", sys::xc_monitor_emul_unimplemented),
];

/// What it is, and the function that switches it, by its name.
type Kind = (&'static str, &'static str, unsafe extern "C" fn(*mut sys::xc_interface, u32, bool) -> c_int);

/// Stops all that is reported of a domain, whoever asked for it, and tells what that was.
///
/// # Errors
/// If Xen refuses.
pub(crate) fn stop_all(domain: &Domain) -> Result<Vec<&'static str>, Error> {
    let mut stopped = Vec::new();
    for (what, call, set) in KINDS {
        // SAFETY: it needs an open handle and no more.
        match check(call, unsafe { set(domain.interface().raw(), domain.id(), false) }) {
            Ok(()) => stopped.push(what),
            // It was off.
            Err(error) if error.is(libc::EEXIST) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(stopped)
}

/// Takes the ring, if there is one, away from a monitor that is gone. Virtual CPUs that wait for its answer go on waiting: see
/// [`Monitor::release`].
///
/// # Errors
/// If Xen refuses.
pub(crate) fn disable(domain: &Domain) -> Result<(), Error> {
    // SAFETY: the handle is open.
    let disabled =
        check("xc_monitor_disable", unsafe { sys::xc_monitor_disable(domain.interface().raw(), domain.id()) });
    match disabled {
        // There was none (`vm_event_domctl`, xen/common/vm_event.c).
        Err(error) if error.is(libc::EINVAL) => Ok(()),
        disabled => disabled,
    }
}

/// A kind of event that is reported while this lives.
#[derive(Debug)]
struct Monitoring {
    set: unsafe extern "C" fn(*mut sys::xc_interface, u32, bool) -> c_int,
    xc: Rc<Interface>,
    domain: u32,
}

impl Monitoring {
    fn start(
        call: &'static str,
        set: unsafe extern "C" fn(*mut sys::xc_interface, u32, bool) -> c_int,
        domain: &Domain,
    ) -> Result<Self, Error> {
        let (xc, domain) = (Rc::clone(domain.interface()), domain.id());
        // SAFETY: `set` is one of libxenctrl's functions that need an open handle and no more.
        check(call, unsafe { set(xc.raw(), domain, true) })?;
        Ok(Self { set, xc, domain })
    }
}

impl Drop for Monitoring {
    fn drop(&mut self) {
        // SAFETY: as in `start`. If the domain is gone there is nothing to stop.
        unsafe { (self.set)(self.xc.raw(), self.domain, false) };
    }
}

/// The ring's page. The domain can have a monitor while this lives.
#[derive(Debug)]
struct RingPage {
    address: NonNull<c_void>,
    xc: Rc<Interface>,
    domain: u32,
}

impl RingPage {
    /// The page, and the event channel's port on Xen's side.
    fn enable(xc: &Rc<Interface>, domain: u32) -> Result<(Self, u32), Error> {
        let mut port = 0;
        // SAFETY: the handle is open and `port` outlives the call.
        let address = unsafe { sys::xc_monitor_enable(xc.raw(), domain, &mut port) };
        let address = NonNull::new(address).ok_or_else(|| match Error::last("xc_monitor_enable") {
            error if error.is(libc::EBUSY) => Error::busy(domain),
            error => error,
        })?;
        Ok((Self { address, xc: Rc::clone(xc), domain }, port))
    }
}

impl Drop for RingPage {
    fn drop(&mut self) {
        // SAFETY: the handle is open.
        unsafe { sys::xc_monitor_disable(self.xc.raw(), self.domain) };
        // SAFETY: xc_monitor_enable mapped this one page and leaves it to us.
        unsafe { libc::munmap(self.address.as_ptr(), PAGE_SIZE) };
    }
}

/// The event channel that goes with the ring.
#[derive(Debug)]
struct Channel {
    handle: NonNull<sys::xenevtchn_handle>,
    /// Ours.
    port: Option<sys::evtchn_port_t>,
    waiting: EventChannel,
}

impl Channel {
    fn bind(domain: u32, remote: u32, ways: Ways) -> Result<Self, Error> {
        // SAFETY: a null logger is documented to mean the default.
        let handle = unsafe { sys::xenevtchn_open(ptr::null_mut(), 0) };
        let handle = NonNull::new(handle).ok_or_else(|| Error::last("xenevtchn_open"))?;
        let mut channel = Self { handle, port: None, waiting: EventChannel::new(ways) };
        // SAFETY: the handle is open.
        let port = unsafe { sys::xenevtchn_bind_interdomain(handle.as_ptr(), domain, remote) };
        channel.port = Some(port.try_into().map_err(|_| Error::last("xenevtchn_bind_interdomain"))?);
        Ok(channel)
    }

    fn wait(&mut self, timeout: Duration, pending: impl Fn() -> bool) -> Result<bool, Error> {
        // SAFETY: the handle is open.
        let fd = unsafe { sys::xenevtchn_fd(self.handle.as_ptr()) };
        // SAFETY: so is its file.
        let device = unsafe { BorrowedFd::borrow_raw(fd) };
        match self.waiting.wait(device, Some(timeout), pending) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            waited => waited.map_err(|error| Error::of("waiting for the event channel", error)),
        }
    }

    fn sleep(&self, timeout: Duration) -> Result<bool, Error> {
        // SAFETY: the handle is open.
        let fd = unsafe { sys::xenevtchn_fd(self.handle.as_ptr()) };
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let timeout = c_int::try_from(timeout.as_millis()).unwrap_or(c_int::MAX);
        // SAFETY: the one entry outlives the call.
        match unsafe { libc::poll(&mut poll, 1, timeout) } {
            0 => return Ok(false),
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => return Ok(false),
            -1 => return Err(Error::last("poll")),
            _ => {}
        }
        // SAFETY: the handle is open.
        let pending = unsafe { sys::xenevtchn_pending(self.handle.as_ptr()) };
        let port = pending.try_into().map_err(|_| Error::last("xenevtchn_pending"))?;
        // Before the ring is read: what comes after that signals again.
        // SAFETY: the handle is open.
        check("xenevtchn_unmask", unsafe { sys::xenevtchn_unmask(self.handle.as_ptr(), port) })?;
        Ok(true)
    }

    fn notify(&self) -> Result<(), Error> {
        let Some(port) = self.port else { return Ok(()) };
        // SAFETY: the handle is open.
        check("xenevtchn_notify", unsafe { sys::xenevtchn_notify(self.handle.as_ptr(), port) })
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if let Some(port) = self.port {
            // SAFETY: the handle is open.
            unsafe { sys::xenevtchn_unbind(self.handle.as_ptr(), port) };
        }
        // SAFETY: opened in `bind`, and closed nowhere else.
        unsafe { sys::xenevtchn_close(self.handle.as_ptr()) };
    }
}

/// The back end of a ring: the macros of `xen/io/ring.h`, as far as they are needed.
#[derive(Debug)]
struct BackRing {
    shared: NonNull<sys::vm_event_sring>,
    requests_taken: u32,
    responses_put: u32,
}

impl BackRing {
    /// Entries: as many as fit, rounded down to a power of two, as `__RING_SIZE` has it.
    const ENTRIES: u32 = {
        let room = PAGE_SIZE - std::mem::offset_of!(sys::vm_event_sring, ring);
        1 << (room / size_of::<sys::vm_event_sring_entry>()).ilog2()
    };

    /// An empty ring (`SHARED_RING_INIT`, `BACK_RING_INIT`).
    ///
    /// # Safety
    /// `shared` is a page that is mapped, writable, while the result is used, and that only the front end uses besides.
    unsafe fn init(shared: NonNull<sys::vm_event_sring>) -> Self {
        let ring = Self { shared, requests_taken: 0, responses_put: 0 };
        // SAFETY: by this function's contract; nothing is in flight yet.
        unsafe { shared.cast::<u8>().write_bytes(0, std::mem::offset_of!(sys::vm_event_sring, ring)) };
        for (index, value) in [(0, 0), (1, 1), (2, 0), (3, 1)] {
            ring.index(index).store(value, Ordering::Release);
        }
        ring
    }

    /// Number `which` of req_prod, req_event, rsp_prod, rsp_event.
    fn index(&self, which: usize) -> &AtomicU32 {
        // SAFETY: the ring begins with four of them; `init` was promised that it stays mapped.
        let index = unsafe { self.shared.cast::<u32>().add(which) };
        // SAFETY: aligned, as the page is; both sides access them as a whole.
        unsafe { AtomicU32::from_ptr(index.as_ptr()) }
    }

    /// Where entry number `index` is, counted on without end.
    fn entry(&self, index: u32) -> *mut sys::vm_event_st {
        let first = std::mem::offset_of!(sys::vm_event_sring, ring);
        let at = first + (index % Self::ENTRIES) as usize * size_of::<sys::vm_event_sring_entry>();
        // SAFETY: within the page: `ENTRIES` entries fit.
        unsafe { self.shared.cast::<u8>().add(at) }.as_ptr().cast()
    }

    fn has_requests(&self) -> bool {
        self.index(0).load(Ordering::Acquire) != self.requests_taken
    }

    fn pop(&mut self) -> Option<Request> {
        let [req_prod, req_event] = [0, 1].map(|which| self.index(which));
        // The request must be read after the index that says it is there.
        let waiting = req_prod.load(Ordering::Acquire).wrapping_sub(self.requests_taken);
        let unanswered = self.requests_taken.wrapping_sub(self.responses_put);
        if waiting == 0 || unanswered >= Self::ENTRIES {
            return None;
        }
        // SAFETY: an aligned entry that Xen has filled, and will not touch until there is a response; any bits are valid.
        let request = unsafe { self.entry(self.requests_taken).read_volatile() };
        let taken = self.requests_taken.wrapping_add(1);
        req_event.store(taken.wrapping_add(1), Ordering::Relaxed);
        self.requests_taken = taken;
        Some(request)
    }

    fn push(&mut self, response: &Response) {
        assert_ne!(self.requests_taken, self.responses_put, "a response without a request");
        self.put(response);
    }

    /// Puts a response, or something that is none to any request: then no virtual CPU may run until the ring is gone.
    fn put(&mut self, response: &Response) {
        // SAFETY: an aligned entry that is ours: its request has been taken, or there is none.
        unsafe { self.entry(self.responses_put).write_volatile(*response) };
        self.responses_put = self.responses_put.wrapping_add(1);
        // Xen must see the response before the index that says it is there.
        self.index(2).store(self.responses_put, Ordering::Release);
    }
}

/// The virtual CPU of a request.
#[must_use]
pub(crate) fn vcpu_of(request: &Request) -> VcpuId {
    // Xen has no more than 512.
    VcpuId(request.vcpu_id as u16)
}

/// The INT3 a request is about. Only for [`VM_EVENT_REASON_SOFTWARE_BREAKPOINT`](sys::VM_EVENT_REASON_SOFTWARE_BREAKPOINT).
#[must_use]
pub(crate) fn int3_of(request: &Request) -> Int3 {
    let registers = x86_of(request);
    // SAFETY: plain numbers: any bits are valid.
    let int3 = unsafe { request.u.software_breakpoint };
    let linear = u64::from(registers.cs_base).wrapping_add(registers.rip);
    Int3::new(Gfn(int3.gfn).at((linear & 0xfff) as u16), int3.insn_length as u8)
}

/// What a request says, unless it is about something that was not asked for.
#[must_use]
pub(crate) fn event_of(request: &Request) -> Option<Event> {
    let reason = match request.reason {
        sys::VM_EVENT_REASON_SOFTWARE_BREAKPOINT => Reason::Int3(int3_of(request)),
        sys::VM_EVENT_REASON_SINGLESTEP => Reason::Step,
        sys::VM_EVENT_REASON_EMUL_UNIMPLEMENTED => Reason::EmulationFailed,
        sys::VM_EVENT_REASON_MEM_ACCESS => {
            // SAFETY: plain numbers: any bits are valid.
            let access = unsafe { request.u.mem_access };
            let has = |flag| access.flags & flag != 0;
            let accesses = Accesses {
                read: has(sys::MEM_ACCESS_R),
                write: has(sys::MEM_ACCESS_W),
                execute: has(sys::MEM_ACCESS_X),
            };
            let gpa = Gfn(access.gfn).at((access.offset & 0xfff) as u16);
            Reason::Access(Access::new(gpa, accesses).with_page_walk(has(sys::MEM_ACCESS_FAULT_IN_GPT)))
        }
        _ => return None,
    };
    let in_view = request.flags & sys::VM_EVENT_FLAG_ALTERNATE_P2M != 0;
    let view = if in_view { ViewId(request.altp2m_idx) } else { ViewId::HOST };
    Some(Event::new(vcpu_of(request), view, registers_of(x86_of(request)), reason))
}

/// The registers of a request, all that Xen tells of them.
#[must_use]
pub(crate) fn x86_of(request: &Request) -> &sys::vm_event_regs_x86 {
    // SAFETY: plain numbers: any bits are valid.
    let registers = unsafe { &request.data.regs };
    // SAFETY: as above.
    unsafe { &registers.x86 }
}

fn registers_of(x86: &sys::vm_event_regs_x86) -> Registers {
    let attributes = x86.cs.ar();
    let mode = if x86.msr_efer & EFER_LMA != 0 && attributes & AR_L != 0 {
        CodeMode::Bits64
    } else if attributes & AR_D != 0 {
        CodeMode::Bits32
    } else {
        CodeMode::Bits16
    };
    Registers::default().with(|registers| {
        registers.gpr = [
            x86.rax, x86.rcx, x86.rdx, x86.rbx, x86.rsp, x86.rbp, x86.rsi, x86.rdi, x86.r8, x86.r9, x86.r10, x86.r11,
            x86.r12, x86.r13, x86.r14, x86.r15,
        ];
        registers.rip = x86.rip;
        registers.rflags = x86.rflags;
        registers.cr0 = x86.cr0;
        registers.cr3 = x86.cr3;
        registers.cr4 = x86.cr4;
        registers.efer = x86.msr_efer;
        registers.dr7 = x86.dr7;
        registers.cs_base = if mode == CodeMode::Bits64 { 0 } else { x86.cs_base.into() };
        registers.cpl = (x86.ss.ar() >> 5 & 3) as u8;
        registers.flat = is_flat(x86);
        registers.mode = mode;
    })
}

/// Whether CS, SS, DS and ES are the flat 4-GiB segments.
fn is_flat(x86: &sys::vm_event_regs_x86) -> bool {
    let flat = |base: u32, segment: &sys::vm_event_x86_selector_reg, kind: u32| {
        let mask = AR_FLAT | AR_CODE | if kind == AR_CODE { 0 } else { AR_DOWN | AR_WRITABLE };
        base == 0 && segment.limit() == 0xf_ffff && segment.ar() & mask == AR_FLAT | kind
    };
    flat(x86.cs_base, &x86.cs, AR_CODE)
        && flat(x86.ss_base, &x86.ss, AR_WRITABLE)
        && flat(x86.ds_base, &x86.ds, AR_WRITABLE)
        && flat(x86.es_base, &x86.es, AR_WRITABLE)
}

/// The response that lets the virtual CPU of a request go on, unchanged.
#[must_use]
pub(crate) fn plain_response(request: &Request) -> Response {
    let mut response = Response {
        version: sys::VM_EVENT_INTERFACE_VERSION,
        flags: request.flags & sys::VM_EVENT_FLAG_VCPU_PAUSED,
        reason: request.reason,
        vcpu_id: request.vcpu_id,
        altp2m_idx: request.altp2m_idx,
        ..Default::default()
    };
    if request.reason == sys::VM_EVENT_REASON_MEM_ACCESS {
        // Xen emulates only what the access named here would need.
        response.u = request.u;
    }
    response
}

/// The response that carries out `reply`, and whether the guest's own INT3 is to be injected besides, before it goes out.
///
/// A fast step and the details of an access share a field of the response: a reply to an access never has both a
/// [`Step::Fast`] and an action that emulates.
#[must_use]
pub(crate) fn response_to(request: &Request, reply: &Reply) -> (Response, bool) {
    let mut response = plain_response(request);
    let mut inject = false;
    if let Some(view) = reply.view {
        response.flags |= sys::VM_EVENT_FLAG_ALTERNATE_P2M;
        response.altp2m_idx = view.0;
    }
    match reply.step {
        Step::Keep => {}
        // It toggles; the engine never asks for what is so already.
        Step::On | Step::Off => response.flags |= sys::VM_EVENT_FLAG_TOGGLE_SINGLESTEP,
        Step::Fast(back) => {
            response.flags |= sys::VM_EVENT_FLAG_FAST_SINGLESTEP;
            response.u.fast_singlestep.p2midx = back.0;
        }
    }
    match reply.action {
        Action::Resume => {}
        Action::Emulate => response.flags |= sys::VM_EVENT_FLAG_EMULATE,
        Action::EmulateRead(data) => emulate_read(&mut response, data.as_slice()),
        Action::EmulateInstruction(bytes) => {
            response.flags |= sys::VM_EVENT_FLAG_EMULATE | sys::VM_EVENT_FLAG_SET_EMUL_INSN_DATA;
            response.data.emul.insn.data = bytes;
        }
        Action::SetRegisters(registers) => set_registers(request, &registers, &mut response),
        Action::Reinject => inject = true,
    }
    (response, inject)
}

/// Lets Xen emulate the instruction, and read these bytes. At most as many as the response holds count.
pub(crate) fn emulate_read(response: &mut Response, bytes: &[u8]) {
    response.flags |= sys::VM_EVENT_FLAG_EMULATE | sys::VM_EVENT_FLAG_SET_EMUL_READ_DATA;
    let mut read = sys::vm_event_emul_read_data::default();
    let length = bytes.len().min(read.data.len());
    read.size = length as u32;
    read.data[..length].copy_from_slice(&bytes[..length]);
    response.data.emul.read = read;
}

fn set_registers(request: &Request, registers: &Registers, response: &mut Response) {
    response.flags |= sys::VM_EVENT_FLAG_SET_REGISTERS;
    let old = *x86_of(request);
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = registers.gpr;
    let (rip, rflags) = (registers.rip, registers.rflags);
    // Of the others Xen takes none.
    response.data.regs.x86 = sys::vm_event_regs_x86 {
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
        ..old
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperbp::{Gpa, READ_BYTES, ReadData};

    fn request(reason: u32) -> Request {
        let mut request = Request {
            version: sys::VM_EVENT_INTERFACE_VERSION,
            flags: sys::VM_EVENT_FLAG_VCPU_PAUSED,
            reason,
            vcpu_id: 3,
            ..Default::default()
        };
        let mut x86 = sys::vm_event_regs_x86 { rip: 0x7fff_1234_5ff8, rbx: 7, cr3: 0x1000, ..Default::default() };
        x86.msr_efer = EFER_LMA;
        x86.cs.set_ar(AR_L);
        request.data.regs.x86 = x86;
        request
    }

    fn respond(request: &Request, reply: Reply) -> (Response, bool) {
        response_to(request, &reply)
    }

    #[test]
    fn an_int3_is_in_the_frame_xen_names_at_the_offset_of_rip() {
        let mut request = request(sys::VM_EVENT_REASON_SOFTWARE_BREAKPOINT);
        request.u.software_breakpoint = sys::vm_event_debug { gfn: 0x101, insn_length: 2, ..Default::default() };
        let event = event_of(&request).unwrap();
        assert_eq!(event.reason, Reason::Int3(Int3::new(Gpa(0x10_1ff8), 2)));
        assert_eq!((event.vcpu, event.view), (VcpuId(3), ViewId::HOST));
        assert_eq!((event.registers.gpr[3], event.registers.cr3), (7, 0x1000));
        assert_eq!(event.registers.mode, CodeMode::Bits64);

        let mut x86 = sys::vm_event_regs_x86 { rip: 0x10, cs_base: 0xff8, ..Default::default() };
        x86.cs.set_ar(AR_D);
        request.data.regs.x86 = x86;
        let event = event_of(&request).unwrap();
        assert_eq!(event.reason, Reason::Int3(Int3::new(Gpa(0x10_1008), 2)));
        assert_eq!((event.registers.mode, event.registers.cs_base), (CodeMode::Bits32, 0xff8));
    }

    #[test]
    fn flat_segments_are_recognised() {
        // As a PVH guest starts: g, d, p, s, and the types of accessed code and data.
        let mut x86 = sys::vm_event_regs_x86::default();
        let set = |segment: &mut sys::vm_event_x86_selector_reg, ar| {
            segment.set_limit(0xf_ffff);
            segment.set_ar(ar);
        };
        set(&mut x86.cs, 0xc9b);
        for segment in [&mut x86.ss, &mut x86.ds, &mut x86.es] {
            set(segment, 0xcf3);
        }
        assert!(is_flat(&x86));
        assert_eq!((registers_of(&x86).mode, registers_of(&x86).cpl), (CodeMode::Bits32, 3));
        assert!(!is_flat(&sys::vm_event_regs_x86 { ss_base: 0x1000, ..x86 }));
        set(&mut x86.ss, 0xcf7);
        assert!(!is_flat(&x86), "a stack that grows downwards");
    }

    #[test]
    fn an_access_says_where_and_how() {
        let mut request = request(sys::VM_EVENT_REASON_MEM_ACCESS);
        request.flags |= sys::VM_EVENT_FLAG_ALTERNATE_P2M;
        request.altp2m_idx = 2;
        let flags = sys::MEM_ACCESS_R | sys::MEM_ACCESS_W | sys::MEM_ACCESS_FAULT_IN_GPT;
        request.u.mem_access = sys::vm_event_mem_access { gfn: 0x101, offset: 0xff8, flags, ..Default::default() };
        let event = event_of(&request).unwrap();
        assert_eq!(event.view, ViewId(2));
        let gpa = Gpa(0x10_1ff8);
        assert_eq!(
            event.reason,
            Reason::Access(Access::new(gpa, Accesses { execute: false, ..Accesses::ALL }).with_page_walk(true))
        );

        let (response, _) = respond(&request, Reply { action: Action::Emulate, ..Reply::default() });
        assert_eq!(response.flags, sys::VM_EVENT_FLAG_VCPU_PAUSED | sys::VM_EVENT_FLAG_EMULATE);
        // SAFETY: plain numbers.
        assert_eq!(unsafe { response.u.mem_access.gfn }, 0x101);
    }

    #[test]
    fn other_reasons_are_no_events() {
        assert_eq!(event_of(&request(sys::VM_EVENT_REASON_CPUID)), None);
        assert_eq!(event_of(&request(sys::VM_EVENT_REASON_SINGLESTEP)).unwrap().reason, Reason::Step);
    }

    #[test]
    fn steps_and_views_become_flags() {
        let request = request(sys::VM_EVENT_REASON_SOFTWARE_BREAKPOINT);
        let (response, inject) = respond(&request, Reply::default());
        assert_eq!((response.flags, response.vcpu_id, inject), (sys::VM_EVENT_FLAG_VCPU_PAUSED, 3, false));

        let fast = Reply { view: Some(ViewId::HOST), step: Step::Fast(ViewId(4)), ..Reply::default() };
        let (response, _) = respond(&request, fast);
        let flags = sys::VM_EVENT_FLAG_ALTERNATE_P2M | sys::VM_EVENT_FLAG_FAST_SINGLESTEP;
        assert_eq!((response.flags, response.altp2m_idx), (sys::VM_EVENT_FLAG_VCPU_PAUSED | flags, 0));
        // SAFETY: plain numbers.
        assert_eq!(unsafe { response.u.fast_singlestep.p2midx }, 4);

        let off = Reply { view: Some(ViewId(4)), step: Step::Off, ..Reply::default() };
        let (response, _) = respond(&request, off);
        let flags = sys::VM_EVENT_FLAG_ALTERNATE_P2M | sys::VM_EVENT_FLAG_TOGGLE_SINGLESTEP;
        assert_eq!((response.flags, response.altp2m_idx), (sys::VM_EVENT_FLAG_VCPU_PAUSED | flags, 4));
    }

    #[test]
    fn new_registers_replace_the_request_s() {
        let request = request(sys::VM_EVENT_REASON_SOFTWARE_BREAKPOINT);
        let mut registers =
            event_of(&Request { reason: sys::VM_EVENT_REASON_SINGLESTEP, ..request }).unwrap().registers;
        registers.rip += 1;
        registers.gpr[15] = 15;
        registers.rflags = 0x246;
        let (response, _) = respond(&request, Reply { action: Action::SetRegisters(registers), ..Reply::default() });
        assert_eq!(response.flags, sys::VM_EVENT_FLAG_VCPU_PAUSED | sys::VM_EVENT_FLAG_SET_REGISTERS);
        let x86 = x86_of(&response);
        assert_eq!((x86.rip, x86.rbx, x86.r15, x86.rflags), (0x7fff_1234_5ff9, 7, 15, 0x246));
        assert_eq!(x86.cr3, 0x1000);
    }

    #[test]
    fn data_for_the_emulator_is_in_the_response() {
        let request = request(sys::VM_EVENT_REASON_MEM_ACCESS);
        let read = ReadData::new([0x5a; READ_BYTES], 8);
        let (response, _) = respond(&request, Reply { action: Action::EmulateRead(read), ..Reply::default() });
        // SAFETY: plain numbers: any bits are valid.
        let emul = unsafe { response.data.emul };
        // SAFETY: as above.
        let data = unsafe { emul.read };
        assert_eq!((data.size, data.data[7], data.data[8]), (8, 0x5a, 0));
        assert_ne!(response.flags & sys::VM_EVENT_FLAG_SET_EMUL_READ_DATA, 0);

        let action = Action::EmulateInstruction([0x90; 16]);
        let (response, _) = respond(&request, Reply { action, ..Reply::default() });
        // SAFETY: plain numbers: any bits are valid.
        let emul = unsafe { response.data.emul };
        // SAFETY: as above.
        assert_eq!(unsafe { emul.insn }.data, [0x90; 16]);
        assert_ne!(response.flags & sys::VM_EVENT_FLAG_SET_EMUL_INSN_DATA, 0);
    }

    #[test]
    fn the_guest_s_own_int3_is_injected() {
        let request = request(sys::VM_EVENT_REASON_SOFTWARE_BREAKPOINT);
        let (response, inject) = respond(&request, Reply { action: Action::Reinject, ..Reply::default() });
        assert_eq!((response.flags, inject), (sys::VM_EVENT_FLAG_VCPU_PAUSED, true));
    }

    #[test]
    fn the_ring_has_the_size_xen_computes() {
        assert_eq!(std::mem::offset_of!(sys::vm_event_sring, ring), 64);
        assert_eq!(size_of::<sys::vm_event_sring_entry>(), 400);
        assert_eq!(BackRing::ENTRIES, 8);
    }

    #[test]
    fn the_ring_passes_requests_and_responses_in_order_and_wraps() {
        #[repr(align(4096))]
        struct Aligned([u8; PAGE_SIZE]);
        let mut page = Box::new(Aligned([0xff; PAGE_SIZE]));
        let shared = NonNull::new(page.0.as_mut_ptr()).unwrap().cast();
        // SAFETY: a page of our own, which outlives the ring.
        let mut ring = unsafe { BackRing::init(shared) };
        assert!(ring.pop().is_none());
        for n in 0..3 * BackRing::ENTRIES {
            let (sent, at) = (Request { vcpu_id: n, ..request(sys::VM_EVENT_REASON_SINGLESTEP) }, ring.entry(n));
            // SAFETY: an entry that is free.
            unsafe { at.write(sent) };
            ring.index(0).store(n + 1, Ordering::Release);
            let taken = ring.pop().unwrap();
            assert_eq!(taken.vcpu_id, n);
            assert!(ring.pop().is_none());
            ring.push(&plain_response(&taken));
            assert_eq!(ring.index(2).load(Ordering::Acquire), n + 1);
            assert_eq!(ring.index(1).load(Ordering::Acquire), n + 2);
        }
        drop(page);
    }
}
