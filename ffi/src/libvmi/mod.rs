//! A domain through LibVMI, in a host that owns the connection and the loop.

mod page;

use cxx::UniquePtr;
use hyperbp::{Gfn, Gpa, Hypervisor, PAGE_SIZE, Rights, VcpuId, ViewId};
use hyperbp_debug_control::DebugControl;
use hyperbp_guest_page::{GuestPage, Pages};
use hyperbp_xen_domain::{self as xen, Altp2m, Frames, GuestMemory as _};
use libvmi_sys as sys;

use crate::bridge::ffi;
use crate::machine::Error;
use page::{Mapper, Mapping};

/// LibVMI's way to say that a view shows a frame's own page again: Xen's `INVALID_GFN`.
const OWN: sys::addr_t = sys::addr_t::MAX;

/// How long the type of a page is taken for what it was, in ticks of the time-stamp counter: 100 ms at the most, for none counts
/// at less than 1 GHz.
const TYPE_AGE: u64 = 100_000_000;

/// A domain. Altp2m must be on, a generic handler for memory events registered, and one for the single-steps of each
/// virtual CPU.
pub(crate) struct Domain {
    vmi: sys::vmi_instance_t,
    vcpus: u16,
    pages: Pages<Mapper>,
    /// The frames that we have added, and not the host.
    frames: Frames,
    /// None if hypercalls of our own are not to be had.
    debug_control: Option<DebugControl>,
}

impl Domain {
    /// The domain of an instance of LibVMI.
    ///
    /// # Errors
    /// If the domain has more virtual CPUs than LibVMI steps, its guest may switch views itself, or nobody adds or maps its
    /// pages.
    ///
    /// # Safety
    /// `vmi` is an instance that was initialised with events, and outlives the result.
    pub(crate) unsafe fn new(vmi: sys::vmi_instance_t, host: UniquePtr<ffi::Memory>) -> Result<Self, Error> {
        if vmi.is_null() || host.is_null() {
            return Err(Error::NoHypervisor);
        }
        // SAFETY: by this function's contract.
        let vcpus = unsafe { sys::vmi_get_num_vcpus(vmi) };
        if vcpus > sys::MAX_SINGLESTEP_VCPUS {
            return Err(Error::TooManyVcpus(vcpus));
        }
        let vcpus = vcpus as u16;
        // SAFETY: by this function's contract.
        let id = unsafe { sys::vmi_get_vmid(vmi) } as u16;
        let xen = xen::Domain::open(id).inspect_err(|error| {
            log::warn!(
                "no hypercalls but LibVMI's: pages are mapped for each access, and instructions that access memory are \
                 stepped: {error}"
            );
        });
        let xen = xen.ok();
        if xen.is_none() && !host.adds_pages() {
            return Err(Error::NoMemory);
        }
        if xen.is_none() && !host.maps_pages() && !cfg!(vmi_mmap_guest_pa) {
            return Err(Error::NoMapping);
        }
        let (mut m2p, mut debug_control) = (None, None);
        if let Some(xen) = &xen {
            refuse_guests_views(id, xen.altp2m().map_err(Error::of("HVM_PARAM_ALTP2M"))?)?;
            m2p =
                xen.map_m2p().inspect_err(|error| log::warn!("no page of the guest can be kept mapped: {error}")).ok();
            debug_control = DebugControl::open(id)
                .inspect_err(|error| {
                    log::warn!("instructions that access memory are stepped: Xen does not tell DR7: {error}");
                })
                .ok();
        }
        let pages = Pages::new(Mapper { vmi, host, xen }, m2p, TYPE_AGE);
        Ok(Self { vmi, vcpus, pages, frames: Frames::default(), debug_control })
    }

    /// The page that is there now.
    fn page(&mut self, gpa: Gpa, length: usize) -> Result<&GuestPage<Mapping>, Error> {
        if usize::from(gpa.offset()) + length > PAGE_SIZE {
            return Err(Error::TwoPages(gpa, length));
        }
        if self.pages.wants_search() {
            self.search_frames()?;
        }
        self.pages.get(gpa.gfn())
    }

    /// Finds out which machine frames pages may have that were mapped once.
    #[cold]
    fn search_frames(&mut self) -> Result<(), Error> {
        // One virtual CPU waits for an answer to its event. Another could move frames meanwhile; and there may be no event.
        self.pause()?;
        self.pages.search();
        self.resume()
    }

    /// Tells Xen of what was written to pages that log-dirty mode watches since. To be called now and then.
    pub(crate) fn look_around(&mut self) {
        let now = self.now();
        self.pages.report_written(now, |mapper, gfn| {
            if let Some(xen) = &mapper.xen
                && let Err(error) = xen.report_written(gfn)
            {
                log::warn!("a migration may miss a write to {gfn}: {error}");
            }
        });
    }
}

/// Refuses a domain whose guest may leave the views with the breakpoints.
fn refuse_guests_views(domain: u16, altp2m: Altp2m) -> Result<(), Error> {
    let mode = match altp2m {
        Altp2m::Mixed => "mixed",
        Altp2m::Limited => "limited",
        Altp2m::Disabled | Altp2m::External | Altp2m::Unknown(_) => return Ok(()),
    };
    Err(Error::GuestAltp2m { domain, mode })
}

/// What LibVMI says of a call.
fn check(call: &'static str, status: sys::status_t) -> Result<(), Error> {
    if status == sys::VMI_SUCCESS { Ok(()) } else { Err(Error::LibVmi(call)) }
}

/// LibVMI's name for rights is what is trapped, not what is permitted.
const fn trapped(rights: Rights) -> u32 {
    match rights {
        Rights::All => sys::VMI_MEMACCESS_N,
        Rights::Execute => sys::VMI_MEMACCESS_RW,
        Rights::ReadWrite => sys::VMI_MEMACCESS_X,
        Rights::ReadExecute => sys::VMI_MEMACCESS_W,
        Rights::Read => sys::VMI_MEMACCESS_WX,
        Rights::None => sys::VMI_MEMACCESS_RWX,
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
        let now = self.now();
        if !self.pages.is_ram(gpa.gfn(), now)? {
            return Ok(false);
        }
        self.write(gpa, bytes).map(|()| true)
    }

    fn now(&self) -> u64 {
        // SAFETY: every x86-64 CPU has the instruction.
        unsafe { core::arch::x86_64::_rdtsc() }
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Error> {
        let mapper = self.pages.source();
        let gfn = match mapper.host.adds_pages() {
            true => Gfn(mapper.host().add_page()?),
            false => self.frames.allocate(mapper.xen()?)?,
        };
        // If there was another page there before, that is not it.
        self.pages.forget(gfn);
        // It stays mapped: that is the page which views show, whatever the guest puts there.
        self.pages.add_own(gfn).or_else(|error| self.drop_shadow_gfn(gfn).and(Err(error)))?;
        Ok(gfn)
    }

    fn restore_shadow_gfn(&mut self, gfn: Gfn) -> Result<bool, Error> {
        let mapper = self.pages.source();
        match &mut mapper.xen {
            Some(xen) if !mapper.host.adds_pages() => {
                if !xen.is_empty(gfn).map_err(Error::of("HVMOP_get_mem_type"))? {
                    return Ok(false);
                }
                xen.populate(gfn)?;
            }
            // The host's page is the host's to look after.
            _ => return Ok(false),
        }
        // The old one is still mapped, and goes with that.
        self.pages.forget(gfn);
        self.pages.add_own(gfn)?;
        Ok(true)
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), Error> {
        // A mapping would keep the page with the domain.
        self.pages.forget(gfn);
        let mapper = self.pages.source();
        match mapper.host.adds_pages() {
            true => Ok(mapper.host().drop_page(gfn.0)?),
            false => Ok(self.frames.release(mapper.xen()?, gfn)?),
        }
    }

    fn create_view(&mut self) -> Result<ViewId, Error> {
        let mapper = self.pages.source();
        if mapper.host.creates_views() {
            return Ok(ViewId(mapper.host().create_view()?));
        }
        if let Some(xen) = &mapper.xen {
            return xen.create_view().map_err(Error::of("HVMOP_altp2m_create_p2m"));
        }
        let mut view = 0;
        // SAFETY: the instance lives, and `view` outlives the call.
        check("vmi_slat_create", unsafe { sys::vmi_slat_create(self.vmi, &mut view) })?;
        Ok(ViewId(view))
    }

    fn switch_view(&mut self, view: ViewId) -> Result<(), Error> {
        // SAFETY: the instance lives.
        check("vmi_slat_switch", unsafe { sys::vmi_slat_switch(self.vmi, view.0) })
    }

    fn drop_view(&mut self, view: ViewId) -> Result<(), Error> {
        // SAFETY: the instance lives.
        check("vmi_slat_destroy", unsafe { sys::vmi_slat_destroy(self.vmi, view.0) })
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), Error> {
        let to = to.map_or(OWN, |gfn| gfn.0);
        // SAFETY: the instance lives.
        check("vmi_slat_change_gfn", unsafe { sys::vmi_slat_change_gfn(self.vmi, view.0, gfn.0, to) })
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), Error> {
        let access = trapped(rights) as sys::vmi_mem_access_t;
        // SAFETY: the instance lives.
        check("vmi_set_mem_event", unsafe { sys::vmi_set_mem_event(self.vmi, gfn.0, access, view.0) })
    }

    fn rights(&mut self, view: ViewId, gfn: Gfn) -> Result<Option<Rights>, Error> {
        match &self.pages.source().xen {
            Some(xen) if view != ViewId::HOST => {
                xen.view_rights(view, gfn).map_err(Error::of("HVMOP_altp2m_get_mem_access"))
            }
            _ => Ok(None),
        }
    }

    fn set_default_rights(&mut self, rights: Rights) -> Result<(), Error> {
        match &self.pages.source().xen {
            Some(xen) => xen.set_default_rights(rights).map_err(Error::of("XENMEM_access_op_set_access")),
            None => Ok(()),
        }
    }

    fn debug_control(&mut self, vcpu: VcpuId) -> Result<Option<u64>, Error> {
        let dr7 = self.debug_control.as_mut().map(|control| control.get(vcpu)).transpose();
        dr7.map_err(Error::of("XEN_DOMCTL_gethvmcontext_partial"))
    }

    fn rip(&mut self, vcpu: VcpuId) -> Result<u64, Error> {
        let (mut rip, register) = (0, u64::from(sys::RIP));
        // SAFETY: the instance lives, and there is room for the register.
        let read = unsafe { sys::vmi_get_vcpureg(self.vmi, &mut rip, register as sys::reg_t, vcpu.0.into()) };
        check("vmi_get_vcpureg", read).map(|()| rip)
    }

    fn stop_step(&mut self, vcpu: VcpuId) -> Result<(), Error> {
        let number = u32::from(vcpu.0);
        // SAFETY: the instance lives.
        let registered = unsafe { sys::vmi_get_singlestep_event(self.vmi, number) };
        let mut none = sys::vmi_event_t::default();
        // This takes the virtual CPU from the event that is registered for it: from this one, which is not registered.
        // SAFETY: the instance lives, and the event outlives the call.
        let stopped = unsafe { sys::vmi_stop_single_step_vcpu(self.vmi, &mut none, number) };
        if !registered.is_null() {
            // SAFETY: the host keeps an event while it is registered, and nobody else looks at it now.
            unsafe { register_again(self.vmi, registered, number) }?;
        }
        check("vmi_stop_single_step_vcpu", stopped)
    }

    fn pause(&mut self) -> Result<(), Error> {
        // SAFETY: the instance lives.
        check("vmi_pause_vm", unsafe { sys::vmi_pause_vm(self.vmi) })
    }

    fn resume(&mut self) -> Result<(), Error> {
        // SAFETY: the instance lives.
        check("vmi_resume_vm", unsafe { sys::vmi_resume_vm(self.vmi) })
    }
}

/// Lets the single-steps of a virtual CPU go to `event` again, as they did. It may be registered for others, too.
///
/// # Safety
/// `vmi` and `event` live, and nobody else accesses `event`.
unsafe fn register_again(vmi: sys::vmi_instance_t, event: *mut sys::vmi_event_t, vcpu: u32) -> Result<(), Error> {
    // SAFETY: by this function's contract.
    let event = unsafe { &mut *event };
    // SAFETY: the event is one of single-steps: this is the part of the union that counts.
    let steps = unsafe { &mut event.__bindgen_anon_1.ss_event };
    let before = *steps;
    // It is refused for virtual CPUs it is registered for; and nothing is to be stepped now.
    steps.vcpus = 1 << vcpu;
    steps.enable = 0;
    // SAFETY: by this function's contract.
    let status = unsafe { sys::vmi_register_event(vmi, event) };
    // SAFETY: as above.
    let steps = unsafe { &mut event.__bindgen_anon_1.ss_event };
    *steps = before;
    check("vmi_register_event", status)
}
