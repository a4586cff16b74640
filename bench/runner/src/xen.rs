//! One Xen domain, through libxenctrl: memory, views and rights, everything undone when it is dropped.

mod channels;
mod error;
mod frames;
mod handle;
mod memory;
mod operator;
mod pages;
mod store;
mod views;

use std::collections::HashSet;
use std::ffi::c_int;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::num::NonZeroU32;
use std::path::Path;
use std::rc::Rc;

use hyperbp::ledger::{self, Ledger, Note};
use hyperbp::{Gfn, Gpa, Hypervisor, Rights, VcpuId, ViewId};
use hyperbp_debug_control::DebugControl;
use hyperbp_event_channel::Ways;
use hyperbp_xen_domain::{Frames, PAGE_KIB};
use hyperbp_xen_sys as sys;

pub(crate) use error::{Error, OpenError, check};
pub(crate) use handle::{CpuTime, Interface, Page, State};
use handle::{ForeignMemory, Mapping, MemTypes, PRIVCMD, info, map, state};
use hyperbp_guest_page::Pages;
pub(crate) use operator::Shutdown;
use pages::Source;
pub(crate) use store::Requests;
use store::id_of;
pub(crate) use views::VIEWS;
use views::{Altp2m, guest_mode};

/// The breakpoint exception.
const VECTOR_BP: u8 = 3;
/// A software exception (INT3, INTO), as the VM-entry interruption type has it.
const TYPE_SOFTWARE_EXCEPTION: u8 = 6;
/// The exception pushes no error code.
const NO_ERROR_CODE: u32 = u32::MAX;

/// `HVM_SAVE_CODE(CPU)`, xen/include/public/arch-x86/hvm/save.h.
const SAVED_CPU: u16 = 2;

/// A domain to set breakpoints in. Dropping it puts every virtual CPU back into the host view, and removes the views,
/// rights and shadow pages it was given. Let single-steps end first: see [`Hypervisor::stop_step`].
#[derive(Debug)]
pub(crate) struct Domain {
    xc: Rc<Interface>,
    mem_types: MemTypes,
    memory: Rc<ForeignMemory>,
    id: u32,
    uuid: [u8; 16],
    /// `HVM_PARAM_ALTP2M`.
    altp2m: u64,
    vcpus: u16,
    pages: Pages<Source>,
    /// When [`look_around`](Self::look_around) last did.
    looked_around: u64,
    /// How altp2m was before it was needed; `None` while it is not.
    altp2m_found: Option<Altp2m>,
    views: Vec<ViewId>,
    /// Pages of the host view whose rights are not [`Rights::All`].
    guarded: HashSet<Gfn>,
    /// New pages of the host view may be executed, as ever.
    has_default_access: bool,
    frames: Frames,
    /// Calls of `pause` without their `resume`.
    pauses: u32,
    /// What of this is to be undone if this process is killed. None if nothing is to be changed.
    ledger: Option<Ledger>,
    /// How a monitor of it may wait.
    ways: Ways,
    /// Asks for DR7; none inside if it cannot. Opened when it is asked for the first time.
    debug_control: Option<Option<DebugControl>>,
}

impl Domain {
    /// Opens the domain with this name or number, and a ledger for it. Changes nothing in it. A guest that may switch
    /// views itself is accepted only if that is insisted on.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub(crate) fn open(name_or_id: &str, allow_guest_altp2m: bool) -> Result<Self, OpenError> {
        let mut domain = Self::connect(name_or_id)?;
        if !domain.has_altp2m() {
            return Err(OpenError::NoAltp2m(name_or_id.to_owned()));
        }
        if let Some(mode) = guest_mode(domain.altp2m) {
            let refused = OpenError::GuestAltp2m { domain: name_or_id.to_owned(), mode };
            if !allow_guest_altp2m {
                return Err(refused);
            }
            log::warn!("{refused}");
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
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                return Err(OpenError::NotADom0(error.into_source()));
            }
            Err(error) => return Err(error.into()),
        };

        let mut altp2m = u64::from(sys::XEN_ALTP2M_disabled);
        if info.has(sys::XEN_DOMINF_hvm_guest) {
            // SAFETY: the handle is open and `altp2m` outlives the call.
            let result = unsafe { sys::xc_hvm_param_get(xc.raw(), id, sys::HVM_PARAM_ALTP2M, &mut altp2m) };
            check("xc_hvm_param_get", result)?;
        }

        let (xc, memory) = (Rc::new(xc), Rc::new(ForeignMemory::open()?));
        Ok(Self {
            altp2m,
            uuid: info.0.handle,
            ledger: None,
            ways: Ways::default(),
            debug_control: None,
            pages: pages::new(&xc, &memory, id)?,
            looked_around: 0,
            mem_types: MemTypes::open(id)?,
            xc,
            memory,
            id,
            vcpus: u16::try_from(info.0.max_vcpu_id.saturating_add(1)).unwrap_or(u16::MAX),
            altp2m_found: None,
            views: Vec::new(),
            guarded: HashSet::new(),
            has_default_access: true,
            frames: Frames::default(),
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
        self.altp2m != u64::from(sys::XEN_ALTP2M_disabled)
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
        noted.map_err(|source| Error::of("the ledger", source))
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

    /// Delivers the guest's own INT3, of `length` bytes, to it when this virtual CPU goes on. Whether Xen has taken it: it does
    /// not while another exception waits. The virtual CPU must be answered all the same; it executes the INT3 again then.
    pub(crate) fn inject_int3(&mut self, vcpu: VcpuId, length: u8) -> bool {
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
            .inspect_err(|error| log::warn!("an INT3 of the guest's own: {error}"))
            .is_ok()
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

    /// Memory of the machine that no domain has, in KiB.
    fn host_free_kib(&self) -> Result<u64, Error> {
        let mut info = sys::xc_physinfo_t::default();
        // SAFETY: the handle is open and `info` outlives the call.
        check("xc_physinfo", unsafe { sys::xc_physinfo(self.xc.raw(), &mut info) })?;
        Ok(info.free_pages.saturating_mul(PAGE_KIB))
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

    /// What it does.
    ///
    /// # Errors
    /// If Xen does not answer.
    pub(crate) fn state(&self) -> Result<State, Error> {
        state(&self.xc, self.id)
    }

    /// Tells what it does, also while it is borrowed for something else.
    pub(crate) fn watcher(&self) -> impl Fn() -> State + use<> {
        let (xc, id) = (Rc::clone(&self.xc), self.id);
        // If Xen does not answer now, the next one who asks is told why.
        move || state(&xc, id).unwrap_or(State::Running)
    }

    /// Undoes every `pause` of ours.
    ///
    /// # Errors
    /// If the domain is gone.
    pub(crate) fn let_go_on(&mut self) -> Result<(), Error> {
        while self.pauses > 0 {
            self.resume()?;
        }
        Ok(())
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
        Ok(self.state()? == State::Crashed)
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

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Error> {
        self.write_as_guest(gpa, bytes)
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
        self.allocate_gfn()
    }

    fn restore_shadow_gfn(&mut self, gfn: Gfn) -> Result<bool, Error> {
        self.restore_gfn(gfn)
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), Error> {
        self.free_gfn(gfn)
    }

    fn create_view(&mut self) -> Result<ViewId, Error> {
        self.make_view()
    }

    fn switch_view(&mut self, view: ViewId) -> Result<(), Error> {
        self.switch_all_to(view)
    }

    fn drop_view(&mut self, view: ViewId) -> Result<(), Error> {
        self.destroy_view(view)
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), Error> {
        self.change_gfn(view, gfn, to)
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), Error> {
        self.set_mem_access(view, gfn, rights)
    }

    fn rights(&mut self, view: ViewId, gfn: Gfn) -> Result<Option<Rights>, Error> {
        self.mem_access(view, gfn)
    }

    fn set_default_rights(&mut self, rights: Rights) -> Result<(), Error> {
        self.set_default_access(rights)
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

    fn debug_control(&mut self, vcpu: VcpuId) -> Result<Option<u64>, Error> {
        let id = self.id;
        let control = self.debug_control.get_or_insert_with(|| {
            let opened = u16::try_from(id).map_err(std::io::Error::other).and_then(DebugControl::open);
            opened
                .inspect_err(|error| {
                    log::warn!("instructions that access memory are stepped: Xen does not tell DR7: {error}");
                })
                .ok()
        });
        let dr7 = control.as_mut().map(|control| control.get(vcpu)).transpose();
        dr7.map_err(|source| Error::of("XEN_DOMCTL_gethvmcontext_partial", source))
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
        // In place of the byte, a virtual CPU would meet an INT3 that nobody knows of.
        let in_place = ledger.notes().iter().any(|note| matches!(note, Note::Displaced { .. }));
        // The guest may be gone already, and then so is all of this.
        let gone = matches!(self.state(), Ok(State::Gone));
        let mut results = Vec::new();
        // One that has crashed may be looked at, and one that is suspended goes on.
        if !gone {
            self.undo(&mut results);
        }
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            log::warn!("leaving domain {}: {error}", self.id);
        }
        // What could not be undone is left for `recover`.
        if results.iter().all(Result::is_ok)
            && (gone || !in_place)
            && let Err(error) = ledger.remove()
        {
            log::warn!("the ledger of domain {} cannot be removed: {error}", self.id);
        }
    }
}

impl Domain {
    /// Undoes what the engine could not, when it was refused something on its way out. Only while there is a ring.
    pub(crate) fn undo_all(&mut self) {
        let mut results: Vec<_> = (0..self.vcpus).map(|vcpu| self.stop_step(VcpuId(vcpu))).collect();
        self.undo(&mut results);
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            log::warn!("leaving domain {}: {error}", self.id);
        }
    }

    fn undo(&mut self, results: &mut Vec<Result<(), Error>>) {
        // No virtual CPU may be in a view that goes, nor a view show a page that goes.
        if self.altp2m_found.is_some() {
            results.push(self.switch_view(ViewId::HOST));
            for view in std::mem::take(&mut self.views) {
                results.push(self.destroy(view));
            }
            results.push(self.put_altp2m_back());
        }
        if !self.has_default_access {
            results.push(self.set_default_access(Rights::All));
        }
        for gfn in std::mem::take(&mut self.guarded) {
            results.push(self.set_rights(ViewId::HOST, gfn, Rights::All));
        }
        for gfn in self.frames.all() {
            results.push(self.free_gfn(gfn));
        }
        while self.pauses > 0 {
            let result = self.resume();
            if result.is_err() {
                self.pauses = 0;
            }
            results.push(result);
        }
    }
}
