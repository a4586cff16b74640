//! Whether a read was made by the instruction at RIP, for its operand.
//!
//! An access event names a page and RIP. It does not say what made the access. The instruction reads its operand, and
//! the CPU reads for itself: page-table entries, descriptors, gates of the IDT, the TSS. The CPU delivers an exception or
//! an interrupt with RIP still at the instruction that is interrupted. Xen knows that an event is being delivered
//! (`vmx_idtv_reinject`, xen/arch/x86/hvm/vmx/vmx.c), but the `vm_event` does not say so.
//!
//! Xen's emulator would run the instruction at RIP, whatever made the access. So an access counts as the operand's only
//! if nothing else can have made it:
//!
//! - The instruction is one that reads its operand and nothing else. It loads no segment, and no descriptor table.
//! - The operand is at the address of the event, and the page tables permit the read. So the read raises no page fault.
//! - The instruction raises no other exception either. So the CPU does not deliver one at this instruction.
//! - The guest does not single-step, and has no breakpoint in the debug registers. So there is no trap to deliver.
//!
//! What is left is an interrupt or an NMI whose gate, descriptor or stack pointer is the instruction's operand. The
//! emulator runs the instruction, and the CPU delivers the interrupt after it, as if it had come a little later.

use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, UsedMemory};

use super::decode_at;
use super::displaced::{has_general_operands, is_done_wrong, is_integer};
use super::interpret::{TF, VM, is_unchecked};
use super::paging::{self, Intent};
use crate::{CodeMode, Gpa, Hypervisor, PAGE_SIZE, Registers};

/// The local and global enable bits of DR7 (Intel SDM volume 3, section 18.2.4).
const ENABLED: u64 = 0xff;

/// How many bytes the instruction at RIP reads at `gpa`, if a read there can only be the one of its operand, and if that
/// is within one page.
pub(crate) fn operand_read<H: Hypervisor>(
    hv: &mut H,
    factory: &mut InstructionInfoFactory,
    registers: &Registers,
    gpa: Gpa,
) -> Option<usize> {
    let flat = registers.mode == CodeMode::Bits64 || registers.flat;
    let traps = registers.rflags & (TF | VM) != 0 || registers.dr7 & ENABLED != 0;
    if !flat || traps || !is_unchecked(registers) {
        return None;
    }
    let at = paging::translate_rip(hv, registers)?;
    let instruction = decode_at(hv, registers, at)?;
    if !only_moves_data(&instruction) || is_done_wrong(&instruction) {
        return None;
    }
    let mut operand = None;
    for memory in factory.info(&instruction).used_memory() {
        match memory.access() {
            OpAccess::Read if operand.is_none() => operand = Some(*memory),
            OpAccess::None | OpAccess::NoMemAccess => {}
            _ => return None,
        }
    }
    let operand = operand?;
    let (linear, size) = (linear(registers, &operand)?, operand.memory_size().size());
    // A misaligned vector is a general-protection fault with some instructions.
    if size == 0 || (size > 8 && !linear.is_multiple_of(size as u64)) {
        return None;
    }
    // Where the page tables are in the page itself, what is read of them may have a breakpoint in place.
    let is_plain = |gfn| gfn != gpa.gfn();
    let (read, _) = paging::access(hv, registers, linear, Intent::Read, &is_plain)?;
    (read == gpa && usize::from(gpa.offset()) + size <= PAGE_SIZE).then_some(size)
}

/// Whether the instruction reads and writes no memory but its operands, and raises no exception but a page fault, if
/// these are aligned and the CPU has the instruction.
///
/// (#NM, #MF, #XM and #UD it may raise. The emulator raises the same one then, and that takes the place of the first.)
fn only_moves_data(instruction: &Instruction) -> bool {
    let prefixed = instruction.has_lock_prefix() || instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let goes_on = instruction.flow_control() == FlowControl::Next;
    let integer = is_integer(instruction.mnemonic()) && has_general_operands(instruction);
    goes_on && !prefixed && (integer || is_vector_move(instruction))
}

/// A move, a comparison for equality or a logical operation, between vector registers and one operand in memory.
fn is_vector_move(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let known = matches!(
        instruction.mnemonic(),
        Movups
            | Movupd
            | Movdqu
            | Movaps
            | Movapd
            | Movdqa
            | Lddqu
            | Movd
            | Movq
            | Movss
            | Pxor
            | Por
            | Pand
            | Pcmpeqb
            | Pcmpeqd
            | Vmovups
            | Vmovupd
            | Vmovdqu
            | Vmovaps
            | Vmovapd
            | Vmovdqa
            | Vlddqu
            | Vmovd
            | Vmovq
            | Vmovss
            | Vpxor
            | Vpor
            | Vpand
            | Vpcmpeqb
            | Vpcmpeqd
    );
    // A mask may hide a part of the operand.
    known && instruction.op_mask() == Register::None && !has_segment_operand(instruction)
}

fn has_segment_operand(instruction: &Instruction) -> bool {
    (0..instruction.op_count())
        .any(|n| instruction.op_kind(n) == OpKind::Register && instruction.op_register(n).is_segment_register())
}

/// The linear address of an operand, if the base of its segment is known: FS and GS have one of their own.
fn linear(registers: &Registers, operand: &UsedMemory) -> Option<u64> {
    if matches!(operand.segment(), Register::FS | Register::GS) {
        return None;
    }
    let linear = operand.virtual_address(0, |register, _, _| match register {
        register if register.is_segment_register() => Some(0),
        register if register.is_gpr() => {
            let value = *registers.gpr.get(register.full_register().number())?;
            Some(value & u64::MAX >> (64 - 8 * register.size()))
        }
        _ => None,
    })?;
    Some(if registers.mode == CodeMode::Bits64 { linear } else { linear & 0xffff_ffff })
}
