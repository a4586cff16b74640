//! Computes what an instruction does. (The interpreter itself is in the next commits: this one refuses all.)
use crate::{CodeMode, Registers};
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Op;
pub(crate) trait Memory {
    fn read(&mut self, linear: u64, into: &mut [u8]) -> Option<()>;
    fn write(&mut self, linear: u64, bytes: &[u8]) -> Option<()>;
}
impl Op {
    pub(crate) fn decode(_: &[u8], _: CodeMode) -> Option<Self> {
        None
    }
    pub(crate) fn run(&self, _: &mut Registers, _: &mut impl Memory) -> Option<()> {
        None
    }
}
