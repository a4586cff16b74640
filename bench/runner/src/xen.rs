//! One Xen domain, through libxenctrl: memory, views and rights, everything undone when it is dropped.

mod frames;

use std::ffi::{CStr, CString, c_int, c_void};
use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::num::NonZeroU32;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::time::Duration;

use hyperbp::ledger::{self, Ledger, Note};
use hyperbp::{Gfn, Gpa, Hypervisor, PAGE_SIZE, Rights, VcpuId, ViewId};
use hyperbp_event_channel::Ways;
use hyperbp_guest_page::{GuestPage, PageCache};
use hyperbp_xen_sys as sys;

/// What every hypercall goes through.
const PRIVCMD: &str = "/dev/xen/privcmd";

/// Guest frames for shadow pages: in the hole below 4 GiB, under the I/O APIC. A PVH guest has nothing there.
pub(crate) const SHADOW_FIRST: u64 = 0xf_0000;
const SHADOW_END: u64 = 0xf_c000;

/// More memory than a domain will have, in KiB: no limit while shadow pages exist.
const NO_LIMIT: u64 = (u32::MAX >> 4) as u64;

/// Xen's `INVALID_GFN`: a view shows the page of the host view again.
const INVALID_GFN: u64 = u64::MAX;

/// The breakpoint exception.
const VECTOR_BP: u8 = 3;
/// A software exception (INT3, INTO), as the VM-entry interruption type has it.
const TYPE_SOFTWARE_EXCEPTION: u8 = 6;
/// The exception pushes no error code.
const NO_ERROR_CODE: u32 = u32::MAX;

/// `HVM_SAVE_CODE(CPU)`, xen/include/public/arch-x86/hvm/save.h.
const SAVED_CPU: u16 = 2;

/// A call to one of Xen's libraries failed.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}")]
pub(crate) struct Error {
    /// The function.
    call: &'static str,
    /// Its `errno`.
    source: io::Error,
}

impl Error {
    /// `call` has just failed and set `errno`.
    pub(crate) fn last(call: &'static str) -> Self {
        Self { call, source: io::Error::last_os_error() }
    }

    /// Why `call` has failed.
    pub(crate) const fn of(call: &'static str, source: io::Error) -> Self {
        Self { call, source }
    }

    /// Whether this is why it failed, as an `errno`.
    pub(crate) fn is(&self, code: c_int) -> bool {
        self.source.raw_os_error() == Some(code)
    }

    /// Somebody else has the domain's ring.
    pub(crate) fn busy(domain: u32) -> Self {
        let problem = format!(
            "another monitor is attached to domain {domain}: stop it; if it has died, run `hyperbp-bench recover --domain \
             {domain}`"
        );
        Self::invalid("xc_monitor_enable", problem)
    }

    fn invalid(call: &'static str, problem: String) -> Self {
        Self { call, source: io::Error::other(problem) }
    }
}

/// `Ok` unless `result` is negative, as libxenctrl says that `call` failed.
pub(crate) fn check(call: &'static str, result: c_int) -> Result<(), Error> {
    if result < 0 { Err(Error::last(call)) } else { Ok(()) }
}

/// Why a domain cannot be benchmarked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// Hypercalls are not for us.
    #[error("cannot use {PRIVCMD} ({0}): run this as root in dom0 of a Xen host")]
    NotADom0(io::Error),
    /// Nothing has this name or number.
    #[error("there is no domain `{0}`: `xl list` shows those there are")]
    NoSuchDomain(String),
    /// The domain was made without altp2m.
    #[error(
        "domain `{0}` has no views: put altp2m=\"external\" into its configuration and `altp2m=1` on Xen's command line"
    )]
    NoAltp2m(String),
    /// A monitor has died.
    #[error("{source}: run `hyperbp-bench recover --domain {domain}`")]
    Leftover {
        /// The domain's name or number.
        domain: String,
        /// What it has left.
        source: ledger::Error,
    },
    /// There is no ledger to write to.
    #[error(transparent)]
    Ledger(ledger::Error),
    /// Something else.
    #[error(transparent)]
    Other(#[from] Error),
}

/// A connection to libxenctrl. Shared by all that make calls with it.
#[derive(Debug)]
pub(crate) struct Interface(NonNull<sys::xc_interface>);

impl Interface {
    fn open() -> Result<Self, Error> {
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
pub(crate) struct ForeignMemory(NonNull<sys::xenforeignmemory_handle>);

impl ForeignMemory {
    fn open() -> Result<Self, Error> {
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

/// A page of a guest.
pub(crate) type Page = GuestPage<Mapping>;

/// Unmaps pages when it is dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: NonNull<c_void>,
    pages: usize,
    memory: Rc<ForeignMemory>,
}

fn map(memory: &Rc<ForeignMemory>, domain: u32, gfn: Gfn) -> Result<Page, Error> {
    let mut error = 0;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: both arrays have the one element the call is told of; the handle is open.
    let address = unsafe { sys::xenforeignmemory_map(memory.0.as_ptr(), domain, protection, 1, &gfn.0, &mut error) };
    let address = NonNull::new(address).ok_or_else(|| Error::last("xenforeignmemory_map"))?;
    let mapping = Mapping { address, pages: 1, memory: Rc::clone(memory) };
    if error != 0 {
        return Err(Error { call: "xenforeignmemory_map", source: io::Error::from_raw_os_error(error.abs()) });
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

/// A domain to set breakpoints in. Dropping it puts every virtual CPU back into the host view, and removes the views,
/// rights and shadow pages it was given. Let single-steps end first: see [`Hypervisor::stop_step`].
#[derive(Debug)]
pub(crate) struct Domain {
    xc: Rc<Interface>,
    memory: Rc<ForeignMemory>,
    id: u32,
    uuid: [u8; 16],
    has_altp2m: bool,
    vcpus: u16,
    /// The limit to put back, in KiB.
    memory_limit: u64,
    cache: PageCache<Page>,
    altp2m_on: bool,
    views: Vec<ViewId>,
    /// Pages of the host view whose rights are not [`Rights::All`].
    guarded: Vec<Gfn>,
    shadows: Vec<Gfn>,
    /// Where shadow pages begin; set by the first one.
    shadow_base: Option<u64>,
    /// Calls of `pause` without their `resume`.
    pauses: u32,
    /// What of this is to be undone if this process is killed. None if nothing is to be changed.
    ledger: Option<Ledger>,
    /// How a monitor of it may wait.
    ways: Ways,
}

impl Domain {
    /// Opens the domain with this name or number, and a ledger for it. Changes nothing in it.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub(crate) fn open(name_or_id: &str) -> Result<Self, OpenError> {
        let mut domain = Self::connect(name_or_id)?;
        if !domain.has_altp2m {
            return Err(OpenError::NoAltp2m(name_or_id.to_owned()));
        }
        let ledger =
            Ledger::create(Path::new(ledger::DIRECTORY), domain.id, domain.uuid).map_err(|source| match source {
                ledger::Error::Leftover(_) => OpenError::Leftover { domain: name_or_id.to_owned(), source },
                _ => OpenError::Ledger(source),
            })?;
        domain.ledger = Some(ledger);
        Ok(domain)
    }

    /// Opens the domain with this name or number, to look at it or to recover it.
    ///
    /// # Errors
    /// See [`OpenError`]; whether it has altp2m is of no importance.
    pub(crate) fn connect(name_or_id: &str) -> Result<Self, OpenError> {
        OpenOptions::new().read(true).write(true).open(PRIVCMD).map_err(OpenError::NotADom0)?;
        let xc = Interface::open()?;
        let no_such = || OpenError::NoSuchDomain(name_or_id.to_owned());
        let id = match name_or_id.parse() {
            Ok(id) => id,
            Err(_) => id_of(name_or_id)?.ok_or_else(no_such)?,
        };
        let info = match info(&xc, id) {
            Ok(info) => info.ok_or_else(no_such)?,
            // A domU may have the device, too.
            Err(Error { source, .. }) if source.kind() == ErrorKind::PermissionDenied => {
                return Err(OpenError::NotADom0(source));
            }
            Err(error) => return Err(error.into()),
        };

        let mut altp2m = u64::from(sys::XEN_ALTP2M_disabled);
        if info.has(sys::XEN_DOMINF_hvm_guest) {
            // SAFETY: the handle is open and `altp2m` outlives the call.
            let result = unsafe { sys::xc_hvm_param_get(xc.raw(), id, sys::HVM_PARAM_ALTP2M, &mut altp2m) };
            check("xc_hvm_param_get", result)?;
        }

        Ok(Self {
            has_altp2m: altp2m != u64::from(sys::XEN_ALTP2M_disabled),
            uuid: info.0.handle,
            ledger: None,
            ways: Ways::default(),
            xc: Rc::new(xc),
            memory: Rc::new(ForeignMemory::open()?),
            id,
            vcpus: u16::try_from(info.0.max_vcpu_id.saturating_add(1)).unwrap_or(u16::MAX),
            memory_limit: info.memory_limit(),
            cache: PageCache::default(),
            altp2m_on: false,
            views: Vec::new(),
            guarded: Vec::new(),
            shadows: Vec::new(),
            shadow_base: None,
            pauses: 0,
        })
    }

    /// Its number.
    #[must_use]
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// What tells it from another domain with the same number.
    #[must_use]
    pub(crate) fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Whether it was made with altp2m.
    #[must_use]
    pub(crate) fn has_altp2m(&self) -> bool {
        self.has_altp2m
    }

    /// Does something that pauses the domain for a moment, and would leave it paused if this process was killed meanwhile.
    pub(crate) fn pausing<T>(&self, work: impl FnOnce() -> T) -> T {
        if let Some(ledger) = &self.ledger {
            ledger.note_pause();
        }
        let done = work();
        if let Some(ledger) = &self.ledger {
            ledger.erase_pause();
        }
        done
    }

    /// Its events are about to be reported.
    pub(crate) fn note_attached(&self) {
        if let Some(ledger) = &self.ledger {
            ledger.note_attached();
        }
    }

    fn note(&mut self, note: Note) -> Result<(), Error> {
        let noted = self.ledger.as_mut().map_or(Ok(()), |ledger| ledger.note(note));
        noted.map_err(|source| Error { call: "the ledger", source })
    }

    fn erase(&mut self, note: Note) {
        if let Some(ledger) = &mut self.ledger {
            ledger.erase(note);
        }
    }

    pub(crate) fn interface(&self) -> &Rc<Interface> {
        &self.xc
    }

    /// Maps a page of the guest for as long as the result lives.
    ///
    /// # Errors
    /// If there is no such page.
    pub(crate) fn map_page(&self, gfn: Gfn) -> Result<Page, Error> {
        map(&self.memory, self.id, gfn)
    }

    /// Delivers the guest's own INT3, of `length` bytes, to it when this virtual CPU goes on.
    ///
    /// # Errors
    /// If there is no such virtual CPU, or another exception waits for it already.
    pub(crate) fn inject_int3(&mut self, vcpu: VcpuId, length: u8) -> Result<(), Error> {
        // SAFETY: the handle is open.
        let result = unsafe {
            sys::xc_hvm_inject_trap(
                self.xc.raw(),
                self.id,
                c_int::from(vcpu.0),
                VECTOR_BP,
                TYPE_SOFTWARE_EXCEPTION,
                NO_ERROR_CODE,
                length,
                0,
            )
        };
        check("xc_hvm_inject_trap", result)
    }

    /// CPUs of the machine Xen runs on.
    ///
    /// # Errors
    /// If Xen does not tell.
    pub(crate) fn host_cpus(&self) -> Result<u32, Error> {
        let mut info = sys::xc_physinfo_t::default();
        // SAFETY: the handle is open and `info` outlives the call.
        check("xc_physinfo", unsafe { sys::xc_physinfo(self.xc.raw(), &mut info) })?;
        Ok(info.nr_cpus)
    }

    /// How many thousand times a second its virtual CPUs' time stamp counters count; none if Xen does not know.
    ///
    /// # Errors
    /// If Xen does not answer.
    pub(crate) fn tsc_khz(&self) -> Result<Option<NonZeroU32>, Error> {
        let (mut mode, mut elapsed, mut khz, mut incarnation) = (0, 0, 0, 0);
        // SAFETY: the handle is open, and each of the others outlives the call.
        check("xc_domain_get_tsc_info", unsafe {
            sys::xc_domain_get_tsc_info(self.xc.raw(), self.id, &mut mode, &mut elapsed, &mut khz, &mut incarnation)
        })?;
        Ok(NonZeroU32::new(khz))
    }

    /// Its pages, and its memory limit in KiB.
    ///
    /// # Errors
    /// If Xen does not answer.
    pub(crate) fn memory(&self) -> Result<(u64, u64), Error> {
        let info = info(&self.xc, self.id)?;
        let info = info.ok_or_else(|| Error::invalid(GETINFO, "the domain is gone".to_owned()))?;
        Ok((info.0.tot_pages, info.memory_limit()))
    }

    /// How a monitor that is attached from now on waits for the domain's events.
    pub(crate) fn wait_by(&mut self, ways: Ways) {
        self.ways = ways;
    }

    /// How a monitor of it waits.
    #[must_use]
    pub(crate) fn ways(&self) -> Ways {
        self.ways
    }

    /// The CPU time of a domain of this host.
    #[must_use]
    pub(crate) fn cpu_time_of(&self, id: u32) -> CpuTime {
        CpuTime { xc: Rc::clone(&self.xc), id }
    }

    /// How many views can be made. Only while there are none.
    ///
    /// # Errors
    /// If views cannot be switched on, or not off again.
    pub(crate) fn free_views(&mut self) -> Result<usize, Error> {
        self.set_altp2m(true)?;
        let mut views = Vec::new();
        while let Ok(view) = self.create_view() {
            views.push(view);
        }
        if views.is_empty() {
            self.set_altp2m(false)?;
        }
        let dropped: Result<Vec<()>, Error> = views.iter().map(|view| self.drop_view(*view)).collect();
        dropped.map(|views| views.len())
    }

    /// Whether it exists and has neither shut down nor crashed.
    ///
    /// # Errors
    /// If Xen does not answer.
    pub(crate) fn is_running(&self) -> Result<bool, Error> {
        Ok(info(&self.xc, self.id)?.is_some_and(|info| info.is_running()))
    }

    /// Tells whether it is running, also while it is borrowed for something else.
    pub(crate) fn watcher(&self) -> impl Fn() -> bool + use<> {
        let (xc, id) = (Rc::clone(&self.xc), self.id);
        move || matches!(info(&xc, id), Ok(Some(info)) if info.is_running())
    }

    /// Lets it run, however often somebody who is gone now has paused it.
    ///
    /// # Errors
    /// If Xen refuses.
    pub(crate) fn let_run(&self) -> Result<(), Error> {
        while self.is_paused()? {
            // SAFETY: the handle is open.
            check("xc_domain_unpause", unsafe { sys::xc_domain_unpause(self.xc.raw(), self.id) })?;
        }
        Ok(())
    }

    /// Whether it exists and somebody has paused it.
    ///
    /// # Errors
    /// If Xen does not answer.
    pub(crate) fn is_paused(&self) -> Result<bool, Error> {
        Ok(info(&self.xc, self.id)?.is_some_and(|info| info.has(sys::XEN_DOMINF_paused)))
    }

    /// Whether it exists and has crashed.
    ///
    /// # Errors
    /// If Xen does not answer.
    pub(crate) fn has_crashed(&self) -> Result<bool, Error> {
        Ok(info(&self.xc, self.id)?.is_some_and(|info| info.has_crashed()))
    }

    fn page(&mut self, gpa: Gpa, length: usize) -> Result<&Page, Error> {
        if usize::from(gpa.offset()) + length > PAGE_SIZE {
            return Err(Error::invalid("guest memory access", format!("{length} bytes at {gpa} are in two pages")));
        }
        let Self { cache, memory, id, .. } = self;
        cache.get(gpa.gfn(), || map(memory, *id, gpa.gfn()))
    }

    pub(crate) fn set_memory_limit(&self, kib: u64) -> Result<(), Error> {
        // SAFETY: the handle is open.
        check("xc_domain_setmaxmem", unsafe { sys::xc_domain_setmaxmem(self.xc.raw(), self.id, kib) })
    }

    /// Puts the limit back that made no room for shadow pages.
    fn limit_memory(&mut self) -> Result<(), Error> {
        if self.shadow_base.is_some() {
            self.set_memory_limit(self.memory_limit)?;
            self.shadow_base = None;
            if let Some(ledger) = &self.ledger {
                ledger.note_memory_limit(None);
            }
        }
        Ok(())
    }

    /// The lowest frame number for a shadow page.
    fn shadow_base(&mut self) -> Result<u64, Error> {
        if let Some(base) = self.shadow_base {
            return Ok(base);
        }
        let last = self.last_gfn()?;
        if let Some(ledger) = &self.ledger {
            ledger.note_memory_limit(Some(self.memory_limit));
        }
        self.set_memory_limit(NO_LIMIT)?;
        Ok(*self.shadow_base.insert((last + 1).min(SHADOW_FIRST)))
    }

    /// Takes a page that this process, or one before it, has added to the domain away.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn release(&mut self, gfn: Gfn) -> Result<(), Error> {
        // A mapping would keep the page with the domain.
        self.cache.forget(gfn);
        let mut frame = gfn.0;
        // SAFETY: the handle is open, and the one extent outlives the call.
        let result = unsafe { sys::xc_domain_decrease_reservation_exact(self.xc.raw(), self.id, 1, 0, &mut frame) };
        check("xc_domain_decrease_reservation_exact", result)?;
        self.erase(Note::Frame(gfn));
        Ok(())
    }

    /// Whether views are in use.
    ///
    /// # Errors
    /// If Xen does not tell.
    pub(crate) fn is_altp2m_on(&self) -> Result<bool, Error> {
        let mut on = false;
        // SAFETY: the handle is open and `on` outlives the call.
        let result = unsafe { sys::xc_altp2m_get_domain_state(self.xc.raw(), self.id, &mut on) };
        check("xc_altp2m_get_domain_state", result)?;
        Ok(on)
    }

    pub(crate) fn set_altp2m(&mut self, on: bool) -> Result<(), Error> {
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_altp2m_set_domain_state(self.xc.raw(), self.id, on) };
        check("xc_altp2m_set_domain_state", result)?;
        self.altp2m_on = on;
        Ok(())
    }

    fn destroy(&self, view: ViewId) -> Result<(), Error> {
        // SAFETY: the handle is open.
        check("xc_altp2m_destroy_view", unsafe { sys::xc_altp2m_destroy_view(self.xc.raw(), self.id, view.0) })
    }
}

impl Hypervisor for Domain {
    type Error = Error;

    fn vcpus(&self) -> u16 {
        self.vcpus
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Error> {
        self.page(gpa, into.len())?.read(gpa.offset().into(), into);
        Ok(())
    }

    fn read_word(&mut self, gpa: Gpa) -> Result<u64, Error> {
        Ok(self.page(gpa, 8)?.load(gpa.offset().into()))
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Error> {
        self.page(gpa, bytes.len())?.write(gpa.offset().into(), bytes);
        Ok(())
    }

    fn displace(&mut self, gpa: Gpa, original: u8) -> Result<(), Error> {
        self.note(Note::Displaced { gpa, original })?;
        self.write(gpa, &[0xcc])
    }

    fn replace(&mut self, gpa: Gpa, original: u8) -> Result<(), Error> {
        self.write(gpa, &[original])?;
        self.erase(Note::Displaced { gpa, original });
        Ok(())
    }

    /// Ticks of this CPU's time-stamp counter.
    fn now(&self) -> u64 {
        // SAFETY: every CPU that Xen runs on has it, and a PV dom0 may read it.
        unsafe { std::arch::x86_64::_rdtsc() }
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Error> {
        let call = "xc_domain_populate_physmap_exact";
        let base = self.shadow_base()?;
        let mut frame = (base..SHADOW_END)
            .find(|frame| !self.shadows.contains(&Gfn(*frame)))
            .ok_or_else(|| Error::invalid(call, "no guest frame is left for a shadow page".to_owned()))?;
        let gfn = Gfn(frame);
        self.note(Note::Frame(gfn))?;
        // SAFETY: the handle is open, and the one extent outlives the call.
        let result = unsafe { sys::xc_domain_populate_physmap_exact(self.xc.raw(), self.id, 1, 0, 0, &mut frame) };
        check(call, result).inspect_err(|_| self.erase(Note::Frame(gfn)))?;
        self.shadows.push(gfn);
        Ok(gfn)
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), Error> {
        let Some(at) = self.shadows.iter().position(|shadow| *shadow == gfn) else {
            return Err(Error::invalid("drop_shadow_gfn", format!("{gfn} is no shadow page")));
        };
        self.release(gfn)?;
        self.shadows.swap_remove(at);
        if self.shadows.is_empty() { self.limit_memory() } else { Ok(()) }
    }

    fn create_view(&mut self) -> Result<ViewId, Error> {
        if !self.altp2m_on {
            self.set_altp2m(true)?;
        }
        let mut view = 0;
        // Never XENMEM_access_default: its number differs between Xen's versions.
        let access = sys::XENMEM_access_rwx;
        // SAFETY: the handle is open and `view` outlives the call.
        let result = unsafe { sys::xc_altp2m_create_view(self.xc.raw(), self.id, access, &mut view) };
        check("xc_altp2m_create_view", result)?;
        self.views.push(ViewId(view));
        Ok(ViewId(view))
    }

    fn switch_view(&mut self, view: ViewId) -> Result<(), Error> {
        if view == ViewId::HOST && !self.altp2m_on {
            return Ok(()); // There is no other.
        }
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_altp2m_switch_to_view(self.xc.raw(), self.id, view.0) };
        check("xc_altp2m_switch_to_view", result)
    }

    fn drop_view(&mut self, view: ViewId) -> Result<(), Error> {
        self.destroy(view)?;
        self.views.retain(|other| *other != view);
        // With altp2m on, Xen carries every change of the host view into others.
        if self.views.is_empty() { self.set_altp2m(false) } else { Ok(()) }
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), Error> {
        let to = to.map_or(INVALID_GFN, |gfn| gfn.0);
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_altp2m_change_gfn(self.xc.raw(), self.id, view.0, gfn.0, to) };
        check("xc_altp2m_change_gfn", result)
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), Error> {
        let access = match rights {
            Rights::All => sys::XENMEM_access_rwx,
            Rights::Execute => sys::XENMEM_access_x,
            Rights::ReadWrite => sys::XENMEM_access_rw,
            Rights::ReadExecute => sys::XENMEM_access_rx,
            Rights::Read => sys::XENMEM_access_r,
            Rights::None => sys::XENMEM_access_n,
        };
        if view != ViewId::HOST {
            // SAFETY: the handle is open.
            let result = unsafe { sys::xc_altp2m_set_mem_access(self.xc.raw(), self.id, view.0, gfn.0, access) };
            return check("xc_altp2m_set_mem_access", result);
        }
        if rights != Rights::All {
            self.note(Note::Guard(gfn))?;
        }
        // SAFETY: the handle is open.
        check("xc_set_mem_access", unsafe { sys::xc_set_mem_access(self.xc.raw(), self.id, access, gfn.0, 1) })?;
        self.guarded.retain(|guarded| *guarded != gfn);
        match rights {
            Rights::All => self.erase(Note::Guard(gfn)),
            _ => self.guarded.push(gfn),
        }
        Ok(())
    }

    fn rip(&mut self, vcpu: VcpuId) -> Result<u64, Error> {
        let call = "xc_domain_hvm_getcontext_partial";
        let mut cpu = sys::hvm_hw_cpu::default();
        let (into, size) = (std::ptr::from_mut(&mut cpu).cast(), size_of_val(&cpu) as u32);
        // SAFETY: the handle is open, and there is room for as much as is said.
        let result =
            unsafe { sys::xc_domain_hvm_getcontext_partial(self.xc.raw(), self.id, SAVED_CPU, vcpu.0, into, size) };
        check(call, result).map(|()| cpu.rip)
    }

    fn stop_step(&mut self, vcpu: VcpuId) -> Result<(), Error> {
        let off = sys::XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF;
        // SAFETY: the handle is open.
        let result = unsafe { sys::xc_domain_debug_control(self.xc.raw(), self.id, off, vcpu.0.into()) };
        check("xc_domain_debug_control", result)
    }

    fn pause(&mut self) -> Result<(), Error> {
        if let Some(ledger) = &self.ledger {
            ledger.note_pause();
        }
        // SAFETY: the handle is open.
        check("xc_domain_pause", unsafe { sys::xc_domain_pause(self.xc.raw(), self.id) })?;
        self.pauses += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        // SAFETY: the handle is open.
        check("xc_domain_unpause", unsafe { sys::xc_domain_unpause(self.xc.raw(), self.id) })?;
        self.pauses = self.pauses.saturating_sub(1);
        if let Some(ledger) = &self.ledger {
            ledger.erase_pause();
        }
        Ok(())
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        let Some(ledger) = self.ledger.take() else { return };
        // The guest may be gone already, and then so is all of this.
        let mut results = Vec::new();
        // One that has crashed may be looked at.
        if matches!(info(&self.xc, self.id), Ok(Some(info)) if info.is_running() || info.has_crashed()) {
            self.undo(&mut results);
        }
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            log::warn!("leaving domain {}: {error}", self.id);
        }
        // What could not be undone is left for `recover`.
        if results.iter().all(Result::is_ok)
            && let Err(error) = ledger.remove()
        {
            log::warn!("the ledger of domain {} cannot be removed: {error}", self.id);
        }
    }
}

impl Domain {
    fn undo(&mut self, results: &mut Vec<Result<(), Error>>) {
        // No virtual CPU may be in a view that goes, nor a view show a page that goes.
        if self.altp2m_on {
            results.push(self.switch_view(ViewId::HOST));
            for view in std::mem::take(&mut self.views) {
                results.push(self.destroy(view));
            }
            results.push(self.set_altp2m(false));
        }
        for gfn in std::mem::take(&mut self.guarded) {
            results.push(self.set_rights(ViewId::HOST, gfn, Rights::All));
        }
        for gfn in std::mem::take(&mut self.shadows) {
            results.push(self.release(gfn));
        }
        results.push(self.limit_memory());
        while self.pauses > 0 {
            let result = self.resume();
            if result.is_err() {
                self.pauses = 0;
            }
            results.push(result);
        }
    }
}

/// The call, of those that tell about domains, that every version of libxenctrl has.
const GETINFO: &str = "xc_domain_getinfolist";

/// What Xen says about a domain.
struct Info(sys::xc_domaininfo_t);

impl Info {
    /// Whether it has this flag, of `XEN_DOMINF_*`.
    fn has(&self, flag: u32) -> bool {
        self.0.flags & flag != 0
    }

    /// Whether it has neither shut down nor crashed.
    fn is_running(&self) -> bool {
        !self.has(sys::XEN_DOMINF_dying | sys::XEN_DOMINF_shutdown)
    }

    fn has_crashed(&self) -> bool {
        let reason = self.0.flags >> sys::XEN_DOMINF_shutdownshift & sys::XEN_DOMINF_shutdownmask;
        self.has(sys::XEN_DOMINF_shutdown) && reason == sys::SHUTDOWN_crash
    }

    /// How long all its virtual CPUs have been running.
    fn cpu_time(&self) -> Duration {
        Duration::from_nanos(self.0.cpu_time)
    }

    /// How much memory it may have, in KiB.
    fn memory_limit(&self) -> u64 {
        self.0.max_pages.saturating_mul(PAGE_SIZE as u64 / 1024)
    }
}

/// What Xen says about a domain, if there is one with this number.
fn info(xc: &Interface, id: u32) -> Result<Option<Info>, Error> {
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
    xc: Rc<Interface>,
    id: u32,
}

impl CpuTime {
    /// # Errors
    /// If there is no such domain, or Xen does not answer.
    pub(crate) fn get(&self) -> Result<Duration, Error> {
        let gone = || Error::invalid(GETINFO, format!("there is no domain {}", self.id));
        info(&self.xc, self.id)?.map(|info| info.cpu_time()).ok_or_else(gone)
    }
}

/// The number of the domain with this name, from xenstore.
fn id_of(name: &str) -> Result<Option<u32>, Error> {
    let store = Store::open()?;
    for id in store.directory(c"/local/domain")? {
        let Ok(path) = CString::new(format!("/local/domain/{id}/name")) else { continue };
        // A domain may go while we look.
        if store.read(&path).as_deref() == Some(name.as_bytes()) {
            return Ok(id.parse().ok());
        }
    }
    Ok(None)
}

/// A connection to xenstore.
struct Store(NonNull<sys::xs_handle>);

impl Store {
    fn open() -> Result<Self, Error> {
        // SAFETY: takes nothing but flags.
        NonNull::new(unsafe { sys::xs_open(0) }).map(Self).ok_or_else(|| Error::last("xs_open"))
    }

    /// The names of a node's children.
    fn directory(&self, path: &CStr) -> Result<Vec<String>, Error> {
        let mut count = 0;
        // SAFETY: the handle is open, the path ends in NUL, and `count` outlives the call.
        let list = unsafe { sys::xs_directory(self.0.as_ptr(), 0, path.as_ptr(), &mut count) };
        let list = Allocated::new(list).ok_or_else(|| Error::last("xs_directory"))?;
        // SAFETY: the call returns an array of `count` pointers, in one allocation with what they point to.
        let names = unsafe { std::slice::from_raw_parts(list.0.as_ptr(), count as usize) };
        // SAFETY: each is a string that ends in NUL and lives as long as `list`.
        Ok(names.iter().map(|name| unsafe { CStr::from_ptr(*name) }.to_string_lossy().into_owned()).collect())
    }

    /// The value of a node, if there is one.
    fn read(&self, path: &CStr) -> Option<Vec<u8>> {
        let mut length = 0;
        // SAFETY: the handle is open, the path ends in NUL, and `length` outlives the call.
        let value = unsafe { sys::xs_read(self.0.as_ptr(), 0, path.as_ptr(), &mut length) };
        let value = Allocated::new(value)?;
        // SAFETY: the call returns `length` bytes (and a NUL).
        Some(unsafe { std::slice::from_raw_parts(value.0.as_ptr().cast::<u8>(), length as usize) }.to_vec())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: opened in `open`, and closed nowhere else.
        unsafe { sys::xs_close(self.0.as_ptr()) };
    }
}

/// Memory of the C library, to be freed.
struct Allocated<T>(NonNull<T>);

impl<T> Allocated<T> {
    fn new(pointer: *mut T) -> Option<Self> {
        NonNull::new(pointer).map(Self)
    }
}

impl<T> Drop for Allocated<T> {
    fn drop(&mut self) {
        // SAFETY: only made of what libxenstore allocated with malloc and leaves to us.
        unsafe { libc::free(self.0.as_ptr().cast::<c_void>()) };
    }
}
