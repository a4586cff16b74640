//! A hypervisor that is implemented in C++.

use std::pin::Pin;

use cxx::UniquePtr;
use hyperbp::{Gfn, Gpa, Hypervisor, Rights, VcpuId, ViewId};

use crate::bridge::ffi;
use crate::convert;
use crate::machine::Error;

/// An object of the C++ class `hyperbp::Hypervisor`. What it throws is an error here.
pub(crate) struct Foreign {
    hypervisor: UniquePtr<ffi::Hypervisor>,
    vcpus: u16,
}

impl Foreign {
    /// Takes it.
    ///
    /// # Errors
    /// If there is none, or it does not know its virtual CPUs.
    pub(crate) fn new(hypervisor: UniquePtr<ffi::Hypervisor>) -> Result<Self, Error> {
        let vcpus = hypervisor.as_ref().ok_or(Error::NoHypervisor)?.vcpus()?;
        Ok(Self { hypervisor, vcpus })
    }

    fn it(&mut self) -> Pin<&mut ffi::Hypervisor> {
        self.hypervisor.pin_mut()
    }
}

impl Hypervisor for Foreign {
    type Error = Error;

    fn vcpus(&self) -> u16 {
        self.vcpus
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Error> {
        Ok(self.it().read(gpa.0, into)?)
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.it().write(gpa.0, bytes)?)
    }

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Error> {
        Ok(self.it().write_ram(gpa.0, bytes)?)
    }

    fn now(&self) -> u64 {
        self.hypervisor.as_ref().map_or(0, ffi::Hypervisor::now)
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Error> {
        Ok(Gfn(self.it().add_page()?))
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), Error> {
        Ok(self.it().drop_page(gfn.0)?)
    }

    fn create_view(&mut self) -> Result<ViewId, Error> {
        Ok(ViewId(self.it().create_view()?))
    }

    fn switch_view(&mut self, view: ViewId) -> Result<(), Error> {
        Ok(self.it().switch_view(view.0)?)
    }

    fn drop_view(&mut self, view: ViewId) -> Result<(), Error> {
        Ok(self.it().drop_view(view.0)?)
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), Error> {
        match to {
            Some(to) => Ok(self.it().remap(view.0, gfn.0, to.0)?),
            None => Ok(self.it().unmap(view.0, gfn.0)?),
        }
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), Error> {
        Ok(self.it().set_rights(view.0, gfn.0, convert::rights(rights))?)
    }

    fn rights(&mut self, view: ViewId, gfn: Gfn) -> Result<Option<Rights>, Error> {
        let mut rights = ffi::Rights::All;
        Ok(self.it().rights(view.0, gfn.0, &mut rights)?.then(|| convert::rights_of(rights)).flatten())
    }

    fn set_default_rights(&mut self, rights: Rights) -> Result<(), Error> {
        Ok(self.it().set_default_rights(convert::rights(rights))?)
    }

    fn debug_control(&mut self, vcpu: VcpuId) -> Result<Option<u64>, Error> {
        let mut dr7 = 0;
        Ok(self.it().debug_control(vcpu.0, &mut dr7)?.then_some(dr7))
    }

    fn rip(&mut self, vcpu: VcpuId) -> Result<u64, Error> {
        Ok(self.it().rip(vcpu.0)?)
    }

    fn stop_step(&mut self, vcpu: VcpuId) -> Result<(), Error> {
        Ok(self.it().stop_step(vcpu.0)?)
    }

    fn pause(&mut self) -> Result<(), Error> {
        Ok(self.it().pause()?)
    }

    fn resume(&mut self) -> Result<(), Error> {
        Ok(self.it().resume()?)
    }
}
