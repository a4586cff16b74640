//! A domain through LibVMI, in a host that owns the connection and the loop.

mod page;

use std::pin::Pin;

use cxx::UniquePtr;
use hyperbp::{Gfn, Gpa, Hypervisor, PAGE_SIZE, Rights, VcpuId, ViewId};
use hyperbp_guest_page::PageCache;
use libvmi_sys as sys;

use crate::bridge::ffi;
use crate::machine::Error;
use page::Page;

/// LibVMI's way to say that a view shows a frame's own page again: Xen's `INVALID_GFN`.
const OWN: sys::addr_t = sys::addr_t::MAX;

/// A domain. Altp2m must be on, a generic handler for memory events registered, and one for the single-steps of each
/// virtual CPU.
pub(crate) struct Domain {
    vmi: sys::vmi_instance_t,
    vcpus: u16,
    /// LibVMI does not tell which frames are free, nor raise the memory limit: the host does.
    memory: UniquePtr<ffi::Memory>,
    pages: PageCache<Page>,
}

impl Domain {
    /// The domain of an instance of LibVMI.
    ///
    /// # Errors
    /// If there is no `memory`, the domain has more virtual CPUs than LibVMI steps, or nobody maps its pages.
    ///
    /// # Safety
    /// `vmi` is an instance that was initialised with events, and outlives the result.
    pub(crate) unsafe fn new(vmi: sys::vmi_instance_t, memory: UniquePtr<ffi::Memory>) -> Result<Self, Error> {
        if vmi.is_null() || memory.is_null() {
            return Err(Error::NoHypervisor);
        }
        // SAFETY: by this function's contract.
        let vcpus = unsafe { sys::vmi_get_num_vcpus(vmi) };
        if vcpus > sys::MAX_SINGLESTEP_VCPUS {
            return Err(Error::TooManyVcpus(vcpus));
        }
        if !memory.maps_pages() && !cfg!(vmi_mmap_guest_pa) {
            return Err(Error::NoMapping);
        }
        let vcpus = vcpus as u16;
        Ok(Self { vmi, vcpus, memory, pages: PageCache::default() })
    }

    /// A page stays mapped. If the guest puts another one there, this is still the old one: LibVMI does not tell.
    fn page(&mut self, gpa: Gpa, length: usize) -> Result<&Page, Error> {
        if usize::from(gpa.offset()) + length > PAGE_SIZE {
            return Err(Error::TwoPages(gpa, length));
        }
        let Self { pages, vmi, memory, .. } = self;
        // SAFETY: `new` was promised that the instance lives.
        let page = pages.get(gpa.gfn(), || unsafe { page::map(*vmi, memory.pin_mut(), gpa.gfn()) });
        page.map(|page| &*page)
    }

    fn memory(&mut self) -> Pin<&mut ffi::Memory> {
        self.memory.pin_mut()
    }
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
        self.write(gpa, bytes).map(|()| true)
    }

    fn now(&self) -> u64 {
        // SAFETY: every x86-64 CPU has the instruction.
        unsafe { core::arch::x86_64::_rdtsc() }
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Error> {
        let gfn = Gfn(self.memory().add_page()?);
        // If there was another page there before, that is not it.
        self.pages.forget(gfn);
        Ok(gfn)
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), Error> {
        // A mapping would keep the page with the domain.
        self.pages.forget(gfn);
        Ok(self.memory().drop_page(gfn.0)?)
    }

    fn create_view(&mut self) -> Result<ViewId, Error> {
        if self.memory.creates_views() {
            return Ok(ViewId(self.memory().create_view()?));
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
