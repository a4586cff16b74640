//! Connections to Xen's libraries, and what Xen says about a domain.

use std::ffi::c_void;
use std::io;
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::time::Duration;

use hyperbp::Gfn;
use hyperbp_guest_page::GuestPage;
use hyperbp_xen_sys as sys;

use super::{Error, check};

/// What every hypercall goes through.
pub(super) const PRIVCMD: &str = "/dev/xen/privcmd";

/// A connection to libxenctrl. Shared by all that make calls with it.
#[derive(Debug)]
pub(crate) struct Interface(NonNull<sys::xc_interface>);

impl Interface {
    pub(super) fn open() -> Result<Self, Error> {
        // SAFETY: null loggers are documented to mean the default.
        let handle = unsafe { sys::xc_interface_open(ptr::null_mut(), ptr::null_mut(), 0) };
        NonNull::new(handle).map(Self).ok_or_else(|| Error::last("xc_interface_open"))
    }

    pub(crate) fn raw(&self) -> *mut sys::xc_interface {
        self.0.as_ptr()
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        // SAFETY: opened in `open`, and closed nowhere else.
        unsafe { sys::xc_interface_close(self.raw()) };
    }
}

/// A connection to libxenforeignmemory.
#[derive(Debug)]
pub(crate) struct ForeignMemory(pub(super) NonNull<sys::xenforeignmemory_handle>);

impl ForeignMemory {
    pub(super) fn open() -> Result<Self, Error> {
        // SAFETY: a null logger is documented to mean the default.
        let handle = unsafe { sys::xenforeignmemory_open(ptr::null_mut(), 0) };
        NonNull::new(handle).map(Self).ok_or_else(|| Error::last("xenforeignmemory_open"))
    }
}

impl Drop for ForeignMemory {
    fn drop(&mut self) {
        // SAFETY: opened in `open`; every `Mapping` holds a reference, so none is left.
        unsafe { sys::xenforeignmemory_close(self.0.as_ptr()) };
    }
}

/// Asks Xen for the types of a domain's pages (`HVMOP_get_mem_type`).
#[derive(Debug)]
pub(super) struct MemTypes {
    handle: NonNull<sys::xencall_handle>,
    /// Memory that a hypercall can reach.
    buffer: NonNull<sys::xen_hvm_get_mem_type_t>,
    domain: u32,
}

impl MemTypes {
    pub(super) fn open(domain: u32) -> Result<Self, Error> {
        // SAFETY: a null logger is documented to mean the default.
        let handle = unsafe { sys::xencall_open(ptr::null_mut(), 0) };
        let handle = NonNull::new(handle).ok_or_else(|| Error::last("xencall_open"))?;
        // SAFETY: the handle is open.
        let buffer = unsafe { sys::xencall_alloc_buffer(handle.as_ptr(), size_of::<sys::xen_hvm_get_mem_type_t>()) };
        let Some(buffer) = NonNull::new(buffer) else {
            let error = Error::last("xencall_alloc_buffer");
            // SAFETY: opened a moment ago, and used by nobody.
            unsafe { sys::xencall_close(handle.as_ptr()) };
            return Err(error);
        };
        Ok(Self { handle, buffer: buffer.cast(), domain })
    }

    /// Whether a page is plain memory. One that is read-only, or that log-dirty mode watches, is not.
    pub(super) fn is_ram(&self, gfn: Gfn) -> Result<bool, Error> {
        Ok(self.get(gfn)? == sys::HVMMEM_ram_rw)
    }

    /// What is at a frame number, of `HVMMEM_*`.
    pub(super) fn get(&self, gfn: Gfn) -> Result<u32, Error> {
        let question = sys::xen_hvm_get_mem_type_t { domid: self.domain as u16, pfn: gfn.0, ..Default::default() };
        // SAFETY: the buffer is ours, and there is room for the one question.
        unsafe { self.buffer.write_volatile(question) };
        let (call, operation) = (sys::__HYPERVISOR_hvm_op, u64::from(sys::HVMOP_get_mem_type));
        // SAFETY: the handle is open, and the argument is what the operation takes.
        let result = unsafe { sys::xencall2(self.handle.as_ptr(), call, operation, self.buffer.as_ptr() as u64) };
        check("HVMOP_get_mem_type", result)?;
        // SAFETY: Xen has filled it; any bits are valid.
        Ok(u32::from(unsafe { self.buffer.read_volatile() }.mem_type))
    }
}

impl Drop for MemTypes {
    fn drop(&mut self) {
        // SAFETY: allocated with this handle in `open`, and freed nowhere else.
        unsafe { sys::xencall_free_buffer(self.handle.as_ptr(), self.buffer.as_ptr().cast()) };
        // SAFETY: opened in `open`, and closed nowhere else.
        unsafe { sys::xencall_close(self.handle.as_ptr()) };
    }
}

/// A page of a guest.
pub(crate) type Page = GuestPage<Mapping>;

/// Unmaps pages when it is dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(super) address: NonNull<c_void>,
    pub(super) pages: usize,
    pub(super) memory: Rc<ForeignMemory>,
}

pub(super) fn map(memory: &Rc<ForeignMemory>, domain: u32, gfn: Gfn) -> Result<Page, Error> {
    let mut error = 0;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: both arrays have the one element the call is told of; the handle is open.
    let address = unsafe { sys::xenforeignmemory_map(memory.0.as_ptr(), domain, protection, 1, &gfn.0, &mut error) };
    let address = NonNull::new(address).ok_or_else(|| Error::last("xenforeignmemory_map"))?;
    let mapping = Mapping { address, pages: 1, memory: Rc::clone(memory) };
    if error != 0 {
        return Err(Error::of("xenforeignmemory_map", io::Error::from_raw_os_error(error.abs())));
    }
    // SAFETY: it is mapped readable and writable, a page long and on a page's boundary, until the mapping is dropped;
    // nobody else knows of it.
    Ok(unsafe { GuestPage::new(address.cast(), mapping) })
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this handle and length, and unmapped nowhere else.
        unsafe { sys::xenforeignmemory_unmap(self.memory.0.as_ptr(), self.address.as_ptr(), self.pages) };
    }
}
/// The call, of those that tell about domains, that every version of libxenctrl has.
pub(super) const GETINFO: &str = "xc_domain_getinfolist";

/// What Xen says about a domain.
pub(super) struct Info(pub(super) sys::xc_domaininfo_t);

impl Info {
    /// Whether it has this flag, of `XEN_DOMINF_*`.
    pub(super) fn has(&self, flag: u32) -> bool {
        self.0.flags & flag != 0
    }

    /// How long all its virtual CPUs have been running.
    pub(super) fn cpu_time(&self) -> Duration {
        Duration::from_nanos(self.0.cpu_time)
    }
}

/// What a domain does, as far as its virtual CPUs and their monitor go on or do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It runs, or waits for something of its own.
    Running,
    /// Somebody has paused it.
    Paused,
    /// It has suspended itself, to be saved or moved.
    Suspended,
    /// It has crashed: a triple fault, for one.
    Crashed,
    /// It has shut down, or is about to start again.
    ShutDown,
    /// There is no such domain any more.
    Gone,
}

impl State {
    fn of(info: Option<&Info>) -> Self {
        let Some(info) = info else { return Self::Gone };
        if info.has(sys::XEN_DOMINF_dying) {
            Self::Gone
        } else if info.has(sys::XEN_DOMINF_shutdown) {
            match info.0.flags >> sys::XEN_DOMINF_shutdownshift & sys::XEN_DOMINF_shutdownmask {
                sys::SHUTDOWN_crash => Self::Crashed,
                sys::SHUTDOWN_suspend => Self::Suspended,
                _ => Self::ShutDown,
            }
        } else if info.has(sys::XEN_DOMINF_paused) {
            Self::Paused
        } else {
            Self::Running
        }
    }

    /// Whether nothing will happen in it any more, unless somebody takes it up again.
    pub(crate) const fn has_ended(self) -> bool {
        !matches!(self, Self::Running | Self::Paused)
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running => "the domain runs",
            Self::Paused => "the domain is paused",
            Self::Suspended => "the domain has been suspended",
            Self::Crashed => "the domain has crashed: `xl dmesg` may show why",
            Self::ShutDown => "the domain has shut down, or starts again, as after a triple fault",
            Self::Gone => "the domain is gone",
        })
    }
}

/// What a domain does.
pub(super) fn state(xc: &Interface, id: u32) -> Result<State, Error> {
    Ok(State::of(info(xc, id)?.as_ref()))
}

/// What Xen says about a domain, if there is one with this number.
pub(super) fn info(xc: &Interface, id: u32) -> Result<Option<Info>, Error> {
    let mut info = Info(sys::xc_domaininfo_t::default());
    // SAFETY: the handle is open, and there is room for the one domain asked for.
    let found = unsafe { sys::xc_domain_getinfolist(xc.raw(), id, 1, &mut info.0) };
    check(GETINFO, found)?;
    // It gives the first domain from that number on.
    Ok((found == 1 && u32::from(info.0.domain) == id).then_some(info))
}

/// How long all virtual CPUs of a domain have been running so far.
#[derive(Debug)]
pub(crate) struct CpuTime {
    pub(super) xc: Rc<Interface>,
    pub(super) id: u32,
}

impl CpuTime {
    /// # Errors
    /// If there is no such domain, or Xen does not answer.
    pub(crate) fn get(&self) -> Result<Duration, Error> {
        let gone = || Error::invalid(GETINFO, format!("there is no domain {}", self.id));
        info(&self.xc, self.id)?.map(|info| info.cpu_time()).ok_or_else(gone)
    }
}
