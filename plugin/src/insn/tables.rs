//! A guest that has page tables, and nothing else.

use std::convert::Infallible;

use crate::{Gfn, Gpa, Hypervisor, Rights, VcpuId, ViewId};

/// Entries of 8 bytes, in one frame after the other. What is above them is 0.
#[derive(Clone, Debug)]
pub(crate) struct Tables(pub(crate) Vec<u64>);

impl Hypervisor for Tables {
    type Error = Infallible;

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Infallible> {
        for (at, byte) in (gpa.0 as usize..).zip(into) {
            *byte = self.0.get(at / 8).map_or(0, |entry| entry.to_le_bytes()[at % 8]);
        }
        Ok(())
    }

    fn vcpus(&self) -> u16 {
        1
    }

    fn now(&self) -> u64 {
        0
    }

    fn write(&mut self, _: Gpa, _: &[u8]) -> Result<(), Infallible> {
        unreachable!("a walk only reads")
    }

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Infallible> {
        self.write(gpa, bytes).map(|()| true)
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, Infallible> {
        unreachable!("a walk only reads")
    }

    fn drop_shadow_gfn(&mut self, _: Gfn) -> Result<(), Infallible> {
        unreachable!("a walk only reads")
    }

    fn create_view(&mut self) -> Result<ViewId, Infallible> {
        unreachable!("a walk only reads")
    }

    fn switch_view(&mut self, _: ViewId) -> Result<(), Infallible> {
        unreachable!("a walk only reads")
    }

    fn drop_view(&mut self, _: ViewId) -> Result<(), Infallible> {
        unreachable!("a walk only reads")
    }

    fn remap(&mut self, _: ViewId, _: Gfn, _: Option<Gfn>) -> Result<(), Infallible> {
        unreachable!("a walk only reads")
    }

    fn set_rights(&mut self, _: ViewId, _: Gfn, _: Rights) -> Result<(), Infallible> {
        unreachable!("a walk only reads")
    }

    fn rip(&mut self, _: VcpuId) -> Result<u64, Infallible> {
        unreachable!("a walk only reads")
    }

    fn stop_step(&mut self, _: VcpuId) -> Result<(), Infallible> {
        unreachable!("a walk only reads")
    }

    fn pause(&mut self) -> Result<(), Infallible> {
        unreachable!("a walk only reads")
    }

    fn resume(&mut self) -> Result<(), Infallible> {
        unreachable!("a walk only reads")
    }
}
