//! The hypervisors there are, as one type: a session is the same with each.

use hyperbp::{Gfn, Gpa, Hypervisor, Rights, VcpuId, ViewId};

use crate::foreign::Foreign;
#[cfg(feature = "libvmi")]
use crate::libvmi::Domain;

/// Why a hypervisor refused something.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// What C++ threw.
    #[error("{}", .0.what())]
    Thrown(#[from] cxx::Exception),
    /// A null pointer.
    #[error("there is no hypervisor: the pointer is null")]
    NoHypervisor,
    /// A function of LibVMI failed. It does not say why, but in what it prints.
    #[cfg(feature = "libvmi")]
    #[error("{0} failed")]
    LibVmi(&'static str),
    /// Some of LibVMI's forks do not map memory by its guest-physical address.
    #[cfg(feature = "libvmi")]
    #[error("this LibVMI has no vmi_mmap_guest_pa: the host program is to have a map_page")]
    NoMapping,
    /// Nor does LibVMI add any.
    #[cfg(feature = "libvmi")]
    #[error(
        "nobody adds pages to the domain: run the program as root in dom0, with Linux 4.18 or newer, or have it give both \
         add_page and drop_page of hyperbp_memory_t"
    )]
    NoMemory,
    /// A hypercall of our own failed.
    #[cfg(feature = "libvmi")]
    #[error("{call}: {source}")]
    Xen {
        /// Which.
        call: &'static str,
        /// What Xen says.
        source: std::io::Error,
    },
    /// There is no page to be had.
    #[cfg(feature = "libvmi")]
    #[error(transparent)]
    Frame(#[from] hyperbp_xen_domain::Error),
    /// Breakpoints are in views that the guest can leave.
    #[cfg(feature = "libvmi")]
    #[error(
        "domain {domain} has altp2m=\"{mode}\": the guest may make and switch views itself, and so leave those with the \
         breakpoints; put altp2m=\"external\" into its configuration"
    )]
    GuestAltp2m {
        /// Its number.
        domain: u16,
        /// As its configuration has it.
        mode: &'static str,
    },
    /// Guest memory is accessed page by page.
    #[cfg(feature = "libvmi")]
    #[error("{1} bytes at {0} are in two pages")]
    TwoPages(Gpa, usize),
    /// `SET_VCPU_SINGLESTEP` has 32 bits.
    #[cfg(feature = "libvmi")]
    #[error("the domain has {0} virtual CPUs, and LibVMI steps no more than 32: give it fewer")]
    TooManyVcpus(u32),
}

#[cfg(feature = "libvmi")]
impl Error {
    /// Makes one of what Xen says of a call.
    pub(crate) fn of(call: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Xen { call, source }
    }
}

/// A hypervisor.
pub(crate) enum Machine {
    Foreign(Foreign),
    #[cfg(feature = "libvmi")]
    LibVmi(Box<Domain>),
}

/// Calls a method of whichever it is.
macro_rules! whichever {
    ($self:ident, $it:ident => $call:expr) => {
        match $self {
            Self::Foreign($it) => $call,
            #[cfg(feature = "libvmi")]
            Self::LibVmi($it) => $call,
        }
    };
}

impl Machine {
    /// Whether [`now`](Hypervisor::now) counts nanoseconds. If not, it counts at a rate that is constant.
    pub(crate) const fn has_nanoseconds(&self) -> bool {
        matches!(self, Self::Foreign(_))
    }

    /// Looks after what no event tells. To be called now and then.
    pub(crate) fn look_around(&mut self) {
        match self {
            Self::Foreign(_) => {}
            #[cfg(feature = "libvmi")]
            Self::LibVmi(domain) => domain.look_around(),
        }
    }
}

impl Hypervisor for Machine {
    type Error = Error;

    fn vcpus(&self) -> u16 {
        whichever!(self, it => it.vcpus())
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Error> {
        whichever!(self, it => it.read(gpa, into))
    }

    fn read_word(&mut self, gpa: Gpa) -> Result<u64, Error> {
        whichever!(self, it => it.read_word(gpa))
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Error> {
        whichever!(self, it => it.write(gpa, bytes))
    }

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Error> {
        whichever!(self, it => it.write_ram(gpa, bytes))
    }

    fn now(&self) -> u64 {
        whichever!(self, it => it.now())
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Error> {
        whichever!(self, it => it.add_shadow_gfn())
    }

    fn restore_shadow_gfn(&mut self, gfn: Gfn) -> Result<bool, Error> {
        whichever!(self, it => it.restore_shadow_gfn(gfn))
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), Error> {
        whichever!(self, it => it.drop_shadow_gfn(gfn))
    }

    fn create_view(&mut self) -> Result<ViewId, Error> {
        whichever!(self, it => it.create_view())
    }

    fn switch_view(&mut self, view: ViewId) -> Result<(), Error> {
        whichever!(self, it => it.switch_view(view))
    }

    fn drop_view(&mut self, view: ViewId) -> Result<(), Error> {
        whichever!(self, it => it.drop_view(view))
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), Error> {
        whichever!(self, it => it.remap(view, gfn, to))
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), Error> {
        whichever!(self, it => it.set_rights(view, gfn, rights))
    }

    fn rights(&mut self, view: ViewId, gfn: Gfn) -> Result<Option<Rights>, Error> {
        whichever!(self, it => it.rights(view, gfn))
    }

    fn set_default_rights(&mut self, rights: Rights) -> Result<(), Error> {
        whichever!(self, it => it.set_default_rights(rights))
    }

    fn debug_control(&mut self, vcpu: VcpuId) -> Result<Option<u64>, Error> {
        whichever!(self, it => it.debug_control(vcpu))
    }

    fn rip(&mut self, vcpu: VcpuId) -> Result<u64, Error> {
        whichever!(self, it => it.rip(vcpu))
    }

    fn stop_step(&mut self, vcpu: VcpuId) -> Result<(), Error> {
        whichever!(self, it => it.stop_step(vcpu))
    }

    fn pause(&mut self) -> Result<(), Error> {
        whichever!(self, it => it.pause())
    }

    fn resume(&mut self) -> Result<(), Error> {
        whichever!(self, it => it.resume())
    }
}
