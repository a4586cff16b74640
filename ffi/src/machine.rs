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
    /// Guest memory is accessed page by page.
    #[cfg(feature = "libvmi")]
    #[error("{1} bytes at {0} are in two pages")]
    TwoPages(Gpa, usize),
    /// `SET_VCPU_SINGLESTEP` has 32 bits.
    #[cfg(feature = "libvmi")]
    #[error("the domain has {0} virtual CPUs, and LibVMI steps no more than 32: give it fewer")]
    TooManyVcpus(u32),
}

/// A hypervisor.
pub(crate) enum Machine {
    Foreign(Foreign),
    #[cfg(feature = "libvmi")]
    LibVmi(Domain),
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
