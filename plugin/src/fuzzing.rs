//! What the fuzz targets (`plugin/fuzz`) need besides the public API. It is there in their builds only.

use crate::insn::interpret::{self, Op};
use crate::insn::paging::{self, Intent};
use crate::{CodeMode, Gpa, Hypervisor, Registers, insn};

/// The guest-physical address of a linear address, permissions or not.
pub fn translate<H: Hypervisor>(hv: &mut H, registers: &Registers, linear: u64) -> Option<Gpa> {
    paging::translate(hv, registers, linear)
}

/// What a virtual CPU remembers of its accesses to memory.
#[derive(Clone, Copy, Debug)]
pub struct Walks(insn::Walks);

impl Default for Walks {
    fn default() -> Self {
        Self(insn::Walks::NONE)
    }
}

impl Walks {
    /// Where a read, or a write, of `length` bytes goes, if the CPU would make it at once.
    pub fn access<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        registers: &Registers,
        linear: u64,
        length: usize,
        write: bool,
    ) -> Option<Gpa> {
        self.0.access(hv, registers, linear, length, if write { Intent::Write } else { Intent::Read })
    }
}

/// What the interpreter asks of guest memory, by linear address. `None` if it cannot be accessed.
pub trait Memory {
    /// Reads.
    fn read(&mut self, linear: u64, into: &mut [u8]) -> Option<()>;
    /// Writes.
    fn write(&mut self, linear: u64, bytes: &[u8]) -> Option<()>;
}

/// An instruction that the interpreter can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction(Op);

impl Instruction {
    /// The instruction that `bytes` are, if it is one that can be done.
    #[must_use]
    pub fn decode(bytes: &[u8], mode: CodeMode) -> Option<Self> {
        Op::decode(bytes, mode).map(Self)
    }

    /// Does it: on `Some`, registers and memory are as after it; on `None`, nothing has changed.
    pub fn run(&self, registers: &mut Registers, memory: &mut impl Memory) -> Option<()> {
        let mut new = *registers;
        self.0.run(registers, &mut new, &mut Outside(memory))?;
        *registers = new;
        Some(())
    }
}

struct Outside<'a, M>(&'a mut M);

impl<M: Memory> interpret::Memory for Outside<'_, M> {
    fn read(&mut self, linear: u64, into: &mut [u8]) -> Option<()> {
        self.0.read(linear, into)
    }

    fn write(&mut self, linear: u64, bytes: &[u8]) -> Option<()> {
        self.0.write(linear, bytes)
    }
}
