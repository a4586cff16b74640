//! Instructions: what one does, whether we or Xen's emulator can do it, and where its bytes are.

mod displaced;
pub(crate) mod interpret;
#[cfg(all(test, target_os = "linux", target_arch = "x86_64"))]
mod native;
mod operand;
#[cfg(all(test, target_os = "linux", target_arch = "x86_64"))]
mod oracle;
pub(crate) mod paging;
#[cfg(test)]
pub(crate) mod tables;
mod walks;

pub(crate) use displaced::{Displaced, Form, LOOK_BACK, MemoryUse, is_plain_after};
pub(crate) use operand::operand_read;
pub(crate) use walks::Walks;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use crate::{Gpa, Hypervisor, PAGE_SIZE, Registers};

/// Most bytes of an instruction (Intel SDM volume 2, section 2.3.11).
const LONGEST: usize = 15;

fn decode_at<H: Hypervisor>(hv: &mut H, registers: &Registers, gpa: Gpa) -> Option<Instruction> {
    let mut bytes = [0; LONGEST];
    let length = LONGEST.min(PAGE_SIZE - usize::from(gpa.offset()));
    hv.read(gpa, &mut bytes[..length]).ok()?;
    let mut decoder = Decoder::with_ip(registers.mode.bits(), &bytes[..length], registers.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (!instruction.is_invalid()).then_some(instruction)
}
