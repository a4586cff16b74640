//! Instructions: how long one is, what it reads, and where its bytes are.

pub(crate) mod paging;

use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess};

use crate::{CodeMode, Gpa, Hypervisor, PAGE_SIZE, Registers};

/// Most bytes of an instruction (Intel SDM volume 2, section 2.3.11).
const LONGEST: usize = 15;

/// Whether the instruction at the start of `bytes` ends within them, whatever mode the CPU is in.
pub(crate) fn is_whole(bytes: &[u8]) -> bool {
    CodeMode::ALL.iter().all(|mode| {
        let mut decoder = Decoder::new(mode.bits(), bytes, DecoderOptions::NONE);
        let _ = decoder.decode();
        // An instruction that no CPU knows raises #UD, with or without the bytes that follow.
        decoder.last_error() != iced_x86::DecoderError::NoMoreBytes
    })
}

/// If the instruction at RIP makes exactly one read of memory, how many bytes that is.
///
/// `None` too if that cannot be told: the instruction is not in memory, is unknown, is repeated, or reads twice.
pub(crate) fn single_read<H: Hypervisor>(
    hv: &mut H,
    factory: &mut InstructionInfoFactory,
    registers: &Registers,
) -> Option<usize> {
    let linear = registers.cs_base.wrapping_add(registers.rip);
    let gpa = paging::translate(hv, registers, linear)?;
    let instruction = decode_at(hv, registers, gpa)?;
    if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
        return None;
    }
    let mut size = None;
    for memory in factory.info(&instruction).used_memory() {
        match memory.access() {
            OpAccess::Read if size.is_none() => size = Some(memory.memory_size().size()),
            OpAccess::Write | OpAccess::NoMemAccess => {}
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_is_whole_when_its_last_byte_is_there() {
        assert!(is_whole(&[0xc3]));
        assert!(is_whole(&[0x90, 0xe8]));
        assert!(!is_whole(&[0xe8, 0, 0]));
        assert!(!is_whole(&[0xe8, 0, 0, 0]), "in 16-bit code it is, in 32-bit code it is not");
        assert!(is_whole(&[0xe8, 0, 0, 0, 0]));
        assert!(!is_whole(&[0x48]));
        assert!(!is_whole(&[]));
    }
}
