//! What the hypervisor is to do with the virtual CPU that waits.

use crate::{Registers, ViewId};

/// Bytes of instruction Xen wants for [`Action::EmulateInstruction`], all of them filled (`vm_event_emul_insn_data`).
pub const INSTRUCTION_BYTES: usize = 16;

/// Most bytes [`ReadData`] can carry: the largest operand of one instruction, a ZMM register.
pub const READ_BYTES: usize = 64;

/// The answer to an [`Event`](crate::Event). Xen carries out `action`, then `step`, then `view`.
///
/// This type, [`Step`] and [`Action`] are exhaustive: a host must carry out all of a reply, and the
/// compiler tells it when there is more to carry out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the virtual CPU waits until the reply is carried out"]
pub struct Reply {
    /// Switch the virtual CPU to this view.
    pub view: Option<ViewId>,
    /// Start or stop single-stepping it.
    pub step: Step,
    /// How the interrupted instruction goes on.
    pub action: Action,
}

impl Reply {
    /// It goes on with a copy of these registers, which may be changed.
    pub(crate) fn set_registers(&mut self, registers: &Registers) -> &mut Registers {
        self.action = Action::SetRegisters(*registers);
        match &mut self.action {
            Action::SetRegisters(registers) => registers,
            _ => unreachable!("it was set to that"),
        }
    }
}

/// What becomes of single-stepping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Step {
    /// As it is.
    #[default]
    Keep,
    /// On: an event after the next instruction. Never asked for while it is on.
    On,
    /// Off. Never asked for while it is off.
    Off,
    /// One instruction, then the hypervisor itself switches to this view, without an event (fast single-step, FSS).
    Fast(ViewId),
}

/// How the interrupted instruction goes on. One of these at most fits in a response: Xen keeps the data of those that
/// have any in one union.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// It runs again.
    #[default]
    Resume,
    /// The hypervisor emulates it, and makes its memory accesses through the guest's own pages.
    Emulate,
    /// The same, but what it reads is this.
    EmulateRead(ReadData),
    /// The hypervisor emulates this instruction in its place.
    EmulateInstruction([u8; INSTRUCTION_BYTES]),
    /// It goes on with these registers, of which the general ones, RIP and RFLAGS count: with the next instruction, or where
    /// else they say. The only one of these that comes with a step, too.
    SetRegisters(Registers),
    /// It was the guest's own INT3: deliver it.
    Reinject,
}

/// What an emulated instruction reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadData {
    bytes: [u8; READ_BYTES],
    length: u8,
}

impl ReadData {
    /// The first `length` of `bytes`, at most [`READ_BYTES`].
    #[must_use]
    pub fn new(bytes: [u8; READ_BYTES], length: usize) -> Self {
        Self { bytes, length: length.min(READ_BYTES) as u8 }
    }

    /// The bytes, from the first that is read.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}
