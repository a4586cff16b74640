//! Instructions: what one does, whether we or Xen's emulator can do it, and where its bytes are.

mod displaced;
pub(crate) mod interpret;
#[cfg(all(test, target_os = "linux", target_arch = "x86_64"))]
mod native;
pub(crate) mod paging;
#[cfg(test)]
mod tables;
mod walks;

pub(crate) use displaced::{Displaced, Form, LOOK_BACK, MemoryUse, is_plain_after};
pub(crate) use walks::Walks;

use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess};

use crate::{Gpa, Hypervisor, PAGE_SIZE, Registers};

/// Most bytes of an instruction (Intel SDM volume 2, section 2.3.11).
const LONGEST: usize = 15;

/// If the instruction at RIP makes exactly one read of memory and no write, how many bytes that is.
///
/// `None` too if that cannot be told: the instruction is not in memory, is unknown, or is repeated; and if Xen's emulator
/// would do it wrong.
pub(crate) fn single_read<H: Hypervisor>(
    hv: &mut H,
    factory: &mut InstructionInfoFactory,
    registers: &Registers,
) -> Option<usize> {
    let linear = registers.cs_base.wrapping_add(registers.rip);
    let gpa = paging::translate(hv, registers, linear)?;
    let instruction = decode_at(hv, registers, gpa)?;
    if instruction.has_rep_prefix() || instruction.has_repne_prefix() || displaced::is_done_wrong(&instruction) {
        return None;
    }
    let mut size = None;
    for memory in factory.info(&instruction).used_memory() {
        match memory.access() {
            OpAccess::Read if size.is_none() => size = Some(memory.memory_size().size()),
            OpAccess::NoMemAccess => {}
            _ => return None,
        }
    }
    size.filter(|size| *size > 0)
}

fn decode_at<H: Hypervisor>(hv: &mut H, registers: &Registers, gpa: Gpa) -> Option<Instruction> {
    let mut bytes = [0; LONGEST];
    let length = LONGEST.min(PAGE_SIZE - usize::from(gpa.offset()));
    hv.read(gpa, &mut bytes[..length]).ok()?;
    let mut decoder = Decoder::with_ip(registers.mode.bits(), &bytes[..length], registers.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (!instruction.is_invalid()).then_some(instruction)
}
