//! The instruction under a breakpoint, decoded once.

use iced_x86::{
    CpuidFeature, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register,
};

use super::interpret::Op;
use crate::{CodeMode, INSTRUCTION_BYTES, PAGE_SIZE};

const STI: u8 = 0xfb;
const POP_SS: u8 = 0x17;
/// The opcode, and the upper five bits of the byte after it.
const MOV_TO_SEGMENT: u8 = 0x8e;
const TO_SS_FROM_REGISTER: u8 = 0b11_010;

/// What the guest has under a breakpoint. Which instruction that is depends on the mode the CPU is in when it gets there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Displaced {
    /// From the breakpoint on, with NOPs after the end of the page.
    bytes: [u8; INSTRUCTION_BYTES],
    /// How many of them, at most, are of the instruction.
    length: u8,
    /// What may come before it.
    before: Before,
    /// The aligned eight bytes of memory that it begins in, and which of their bits are its own.
    word: u64,
    word_mask: u64,
    /// It does not end in them.
    split: bool,
    /// By [`CodeMode`].
    forms: [Form; CodeMode::ALL.len()],
}

/// What is before an instruction: it may be in the interrupt shadow of that. After STI, MOV SS or POP SS the CPU holds interrupts
/// back for one instruction. Only an instruction that runs, or is emulated, ends that (Intel SDM volume 3, section 6.8.3); one
/// whose result is set would leave the shadow to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// Nothing that has such a shadow.
    Plain,
    /// Bytes that are, or end, such an instruction.
    Shadow,
    /// The last bytes of the page before, which only the linear address tells: see [`is_plain_after`].
    OtherPage,
}

/// How many bytes before an instruction tell whether it may be in an interrupt shadow.
pub(crate) const LOOK_BACK: usize = 2;

/// Whether an instruction after these bytes is in no interrupt shadow.
pub(crate) fn is_plain_after(bytes: [u8; LOOK_BACK]) -> bool {
    match bytes {
        [_, STI | POP_SS] => false,
        // With memory for the source, the displacement may be in between: nobody loads SS from memory but to load RSP next.
        [opcode, operands] => opcode != MOV_TO_SEGMENT || operands >> 3 != TO_SS_FROM_REGISTER,
    }
}

/// The instruction in one mode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    /// What it does, if we know.
    pub(crate) op: Option<Op>,
    /// Xen's emulator can be given it: it ends within the page, and is none that the emulator [does wrong](is_done_wrong).
    pub(crate) emulable: bool,
    /// Xen's emulator certainly does it, and as the CPU would.
    pub(crate) certain: bool,
    pub(crate) memory: MemoryUse,
    /// See [`jumps_to_itself`].
    pub(crate) jumps_to_itself: bool,
    /// See [`repeats`].
    pub(crate) repeats: bool,
}

/// What an instruction does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryUse {
    None,
    Reads,
    Writes,
    /// It accesses an I/O port, which the guest may have a breakpoint on (CR4.DE).
    Port,
}

impl Displaced {
    /// What is at `offset` of a page of the guest's, which must not have the other breakpoints of the page in it.
    pub(crate) fn of(page: &[u8; PAGE_SIZE], offset: u16) -> Self {
        let rest = &page[usize::from(offset) % PAGE_SIZE..];
        let there = rest.len().min(INSTRUCTION_BYTES);
        let mut bytes = [0x90; INSTRUCTION_BYTES];
        bytes[..there].copy_from_slice(&rest[..there]);
        let mut length = 1;
        let forms = CodeMode::ALL.map(|mode| {
            let (form, bytes) = Form::of(&bytes[..there], mode);
            length = length.max(bytes);
            form
        });
        let (word, word_mask) = first_word(&bytes[..length], offset);
        let split = usize::from(offset % 8) + length > 8;
        Self { bytes, length: length as u8, word, word_mask, split, before: Before::of(page, offset), forms }
    }

    /// The bits of `word` that are not those of the instruction. `word` is what memory has now in the aligned
    /// eight bytes that the instruction begins in.
    #[inline(always)]
    pub(crate) const fn changed_bits(&self, word: u64) -> u64 {
        (word ^ self.word) & self.word_mask
    }

    /// What [`changed_bits`](Self::changed_bits) returns when only the first byte is another one.
    #[inline(always)]
    pub(crate) const fn bits_of(&self, first: u8, offset: u16) -> u64 {
        ((self.bytes[0] ^ first) as u64) << (offset % 8 * 8)
    }

    /// Whether it does not end in the aligned eight bytes that it begins in.
    #[inline(always)]
    pub(crate) const fn is_split(&self) -> bool {
        self.split
    }

    /// The bytes of the instruction that are not in the aligned eight bytes that it begins in.
    pub(crate) fn after_word(&self, offset: u16) -> &[u8] {
        self.bytes[..usize::from(self.length)].get(8 - usize::from(offset % 8)..).unwrap_or(&[])
    }

    /// Whether it is what is at `offset` of this page.
    pub(crate) fn is_in(&self, page: &[u8; PAGE_SIZE], offset: u16) -> bool {
        let length = usize::from(self.length);
        page[usize::from(offset) % PAGE_SIZE..].starts_with(&self.bytes[..length])
    }

    /// Takes over what is before it in this page now.
    pub(crate) fn look_back(&mut self, page: &[u8; PAGE_SIZE], offset: u16) {
        self.before = Before::of(page, offset);
    }

    /// The byte that 0xCC displaces.
    pub(crate) const fn byte(&self) -> u8 {
        self.bytes[0]
    }

    /// How many bytes it has, in the mode in which it has most.
    pub(crate) const fn length(&self) -> u8 {
        self.length
    }

    /// What Xen's emulator wants to be given.
    pub(crate) const fn bytes(&self) -> [u8; INSTRUCTION_BYTES] {
        self.bytes
    }

    /// What it does, if we can do that in this mode in its place. If the page [before](Self::begins_page) allows it.
    pub(crate) fn op(&self, mode: CodeMode) -> Option<&Op> {
        self.form(mode).op.as_ref().filter(|_| self.before != Before::Shadow)
    }

    /// Whether the bytes before it are in another page, so that each hit must look at them.
    pub(crate) fn begins_page(&self) -> bool {
        self.before == Before::OtherPage
    }

    /// The instruction in this mode.
    pub(crate) const fn form(&self, mode: CodeMode) -> &Form {
        &self.forms[mode as usize]
    }
}

/// The aligned eight bytes of memory that an instruction at `offset` begins in, with zeros around it, and a mask
/// of its bits.
fn first_word(instruction: &[u8], offset: u16) -> (u64, u64) {
    let at = usize::from(offset % 8);
    let (mut word, mut mask) = ([0; 8], [0; 8]);
    for ((word, mask), byte) in word[at..].iter_mut().zip(&mut mask[at..]).zip(instruction) {
        (*word, *mask) = (*byte, 0xff);
    }
    (u64::from_le_bytes(word), u64::from_le_bytes(mask))
}

impl Form {
    /// The instruction at the start of `bytes`, and how many of them it has, or all if they are too few.
    fn of(bytes: &[u8], mode: CodeMode) -> (Self, usize) {
        let mut decoder = Decoder::new(mode.bits(), bytes, DecoderOptions::NONE);
        let instruction = decoder.decode();
        // An instruction that no CPU knows raises #UD, with or without the bytes that follow.
        let whole = decoder.last_error() != DecoderError::NoMoreBytes;
        let length = if whole { instruction.len().max(1) } else { bytes.len() };
        if !whole || instruction.is_invalid() {
            let memory = MemoryUse::Writes;
            let form =
                Self { op: None, emulable: whole, certain: false, memory, jumps_to_itself: false, repeats: false };
            return (form, length);
        }
        let memory = memory_use(&instruction);
        let (jumps_to_itself, repeats) = (jumps_to_itself(&instruction), repeats(&instruction));
        if jumps_to_itself || repeats {
            return (Self { op: None, emulable: false, certain: false, memory, jumps_to_itself, repeats }, length);
        }
        let op = Op::decode(&bytes[..length], mode);
        let emulable = !is_done_wrong(&instruction) && !uses_descriptors(&instruction);
        let certain = emulable && is_certain(&instruction, memory);
        (Self { op, emulable, certain, memory, jumps_to_itself, repeats }, length)
    }
}

/// Whether it is a branch to where it is itself, decoded at address 0. After that nobody could tell whether a virtual CPU has
/// gone on with what it was answered ([`Engine::is_settled`](crate::Engine::is_settled)): so it is stepped.
fn jumps_to_itself(instruction: &Instruction) -> bool {
    let near = matches!(instruction.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    instruction.op_count() > 0 && near && instruction.near_branch_target() == 0
}

/// Whether it is a string instruction with a REP prefix. A single-step runs one iteration of it, and Xen's emulator some; RIP
/// stays at the instruction until the last is done. All of them are one execution, and one hit. So they are single-stepped, and
/// the breakpoint is not met again before RIP leaves it.
fn repeats(instruction: &Instruction) -> bool {
    instruction.is_string_instruction() && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
}

/// Whether Xen's emulator does it in another way than the CPU, or raises #UD in the guest without asking the monitor: that is
/// what comes of `X86EMUL_UNHANDLEABLE`, other than of `X86EMUL_UNIMPLEMENTED` (`hvm_emulate_one_vm_event`,
/// xen/arch/x86/hvm/emulate.c).
pub(super) fn is_done_wrong(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    match instruction.mnemonic() {
        // It takes them for fences with a wrong operand, and knows IRET in real mode only: `fail_if` in x86_emulate.c.
        Xrstor | Xrstor64 | Xsaveopt | Xsaveopt64 | Ptwrite | Clrssbsy | Iret | Iretd | Iretq => true,
        // It leaves flags alone that are undefined, and that the CPU changes.
        Mul | Div | Idiv => true,
        // IMUL with an immediate is computed in the same way (opcodes 0x69 and 0x6b go to the label `imul`).
        Imul => instruction.op_count() != 2,
        // It looks at TF afterwards; not all CPUs do.
        Syscall | Sysenter | Sysexit | Sysexitq | Sysret | Sysretq => true,
        // Debug registers are not known to it.
        Mov => instruction.op0_register().is_dr() || instruction.op1_register().is_dr(),
        _ => false,
    }
}

/// Whether the CPU reads a descriptor or a gate for the instruction, and may write one. Xen's emulator does the same to the
/// guest's own pages, whatever a view denies: a copy would not follow, and nobody would hear of it. And a software interrupt
/// that it [injects](crate::Action::Reinject) is executed once more where its gate cannot be read.
fn uses_descriptors(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let loaded = instruction.op_count() > 0
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register().is_segment_register();
    let far = instruction.is_jmp_far()
        || instruction.is_jmp_far_indirect()
        || instruction.is_call_far()
        || instruction.is_call_far_indirect();
    let known = matches!(
        instruction.mnemonic(),
        Lds | Les | Lfs | Lgs | Lss | Lar | Lsl | Verr | Verw | Ltr | Lldt | Retf | Int | Into | Int1 | Int3
    );
    known || far || (loaded && matches!(instruction.mnemonic(), Mov | Pop))
}

impl Before {
    fn of(page: &[u8; PAGE_SIZE], offset: u16) -> Self {
        let offset = usize::from(offset) % PAGE_SIZE;
        let before = offset.checked_sub(LOOK_BACK).and_then(|from| page[from..].first_chunk());
        match before {
            Some(bytes) if is_plain_after(*bytes) => Self::Plain,
            Some(_) => Self::Shadow,
            None => Self::OtherPage,
        }
    }
}

fn memory_use(instruction: &Instruction) -> MemoryUse {
    if matches!(instruction.mnemonic(), Mnemonic::In | Mnemonic::Out) {
        return MemoryUse::Port;
    }
    let mut factory = InstructionInfoFactory::new();
    let mut all = MemoryUse::None;
    for memory in factory.info(instruction).used_memory() {
        match memory.access() {
            OpAccess::None | OpAccess::NoMemAccess => {}
            OpAccess::Read | OpAccess::CondRead if all == MemoryUse::None => all = MemoryUse::Reads,
            OpAccess::Read | OpAccess::CondRead => {}
            _ => all = MemoryUse::Writes,
        }
    }
    all
}

/// Whether Xen's emulator can be relied on: it knows every plain integer instruction since 4.0 (xen/arch/x86/x86_emulate),
/// and one that writes no memory, and reads none that could be a device's, is done at once. CPUID is emulated anyhow, with the
/// same leaves (`hvmemul_cpuid`, xen/arch/x86/hvm/emulate.c), and a step over it would end too late.
fn is_certain(instruction: &Instruction, memory: MemoryUse) -> bool {
    let plain = instruction.cpuid_features().iter().all(|feature| {
        matches!(
            feature,
            CpuidFeature::INTEL8086
                | CpuidFeature::INTEL186
                | CpuidFeature::INTEL386
                | CpuidFeature::INTEL486
                | CpuidFeature::X64
                | CpuidFeature::CMOV
        )
    });
    let flow = matches!(
        instruction.flow_control(),
        FlowControl::Next | FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
    );
    let prefixed = instruction.has_lock_prefix() || instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let plain = plain
        && flow
        && !prefixed
        && is_integer(instruction.mnemonic())
        && has_general_operands(instruction)
        && no_device(instruction, memory);
    plain || instruction.mnemonic() == Mnemonic::Cpuid
}

/// What it reads is the stack's, the code's or a thread's, not a device's.
fn no_device(instruction: &Instruction, memory: MemoryUse) -> bool {
    let by = |register| instruction.memory_base() == register && instruction.memory_index() == Register::None;
    match memory {
        MemoryUse::None => true,
        MemoryUse::Writes | MemoryUse::Port => false,
        MemoryUse::Reads => {
            let segment = matches!(instruction.memory_segment(), Register::FS | Register::GS);
            let stack = [Register::RSP, Register::ESP, Register::RBP, Register::EBP].into_iter().any(by);
            segment || stack || instruction.is_ip_rel_memory_operand()
        }
    }
}

/// No control, debug or segment register is an operand: MOV has such forms.
pub(super) fn has_general_operands(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).all(|operand| match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).is_gpr(),
        OpKind::FarBranch16 | OpKind::FarBranch32 => false,
        _ => true,
    })
}

/// Arithmetic, moves and jumps.
pub(super) fn is_integer(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Mov | Movzx
            | Movsx
            | Movsxd
            | Lea
            | Add
            | Adc
            | Sub
            | Sbb
            | And
            | Or
            | Xor
            | Cmp
            | Test
            | Inc
            | Dec
            | Neg
            | Not
            | Imul
            | Shl
            | Shr
            | Sar
            | Rol
            | Ror
            | Bt
            | Bswap
            | Cbw
            | Cwde
            | Cdqe
            | Cwd
            | Cdq
            | Cqo
            | Nop
            | Jmp
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte of the instruction counts, and no other, wherever in the aligned word it begins.
    #[test]
    fn a_change_of_any_byte_is_seen_and_of_none_beside() {
        let code = [0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8];
        for offset in 64..72_u16 {
            let mut page = [0x90; PAGE_SIZE];
            let (start, end) = (usize::from(offset), usize::from(offset) + code.len());
            page[start..end].copy_from_slice(&code);
            let displaced = Displaced::of(&page, offset);
            let same = |page: &[u8; PAGE_SIZE]| {
                let mut word = [0; 8];
                word.copy_from_slice(&page[64..72]);
                let after = displaced.after_word(offset);
                displaced.changed_bits(u64::from_le_bytes(word)) == 0 && page[72..].starts_with(after)
            };
            for at in 56..96 {
                let mut page = page;
                page[at] ^= 1;
                assert_eq!(same(&page), !(start..end).contains(&at), "byte {at}, the instruction at {offset}");
            }
            let first = u64::from(displaced.byte() ^ 0xcc) << (8 * (offset % 8));
            assert_eq!(displaced.bits_of(0xcc, offset), first);
        }
    }

    fn displaced(bytes: &[u8], offset: u16) -> Displaced {
        let mut page = [0x90; PAGE_SIZE];
        page[usize::from(offset)..][..bytes.len()].copy_from_slice(bytes);
        let displaced = Displaced::of(&page, offset);
        assert!(displaced.is_in(&page, offset));
        displaced
    }

    #[test]
    fn an_instruction_can_be_emulated_when_its_last_byte_is_in_the_page() {
        let whole = |bytes: &[u8], offset| CodeMode::ALL.map(|mode| displaced(bytes, offset).form(mode).emulable);
        assert_eq!(whole(&[0xc3], 4095), [true; 3]);
        assert_eq!(whole(&[0x90, 0xe8], 4094), [true; 3]);
        assert_eq!(whole(&[0xe8, 0, 0], 4093), [true, false, false], "in 16-bit code a call has three bytes");
        assert_eq!(whole(&[0xe8, 0, 0, 0, 0], 4091), [true; 3]);
        assert_eq!(whole(&[0x48], 4095), [true, true, false], "a REX prefix, or DEC");
    }

    #[test]
    fn what_xen_would_raise_ud_for_is_not_emulated() {
        let emulable = |bytes: &[u8]| displaced(bytes, 0).form(CodeMode::Bits64).emulable;
        assert!(!emulable(&[0x0f, 0xae, 0x2f]), "xrstor [rdi]");
        assert!(!emulable(&[0x0f, 0xae, 0x37]), "xsaveopt [rdi]");
        assert!(!emulable(&[0x48, 0xcf]), "iretq");
        assert!(emulable(&[0x0f, 0xae, 0x27]), "xsave [rdi]: that is reported");
        assert!(!emulable(&[0x0f, 0x23, 0xf8]), "mov dr7, rax");
        assert!(!emulable(&[0x0f, 0x05]), "syscall: no single-step trap");
        assert!(emulable(&[0x0f, 0x22, 0xd8]), "mov cr3, rax");
        assert!(emulable(&[0x0f, 0xae, 0xe8]), "lfence");
        assert!(!emulable(&[0x48, 0xf7, 0xe3]), "mul rbx: other flags");
        assert!(!emulable(&[0xf7, 0xeb]), "imul ebx");
        assert!(!emulable(&[0x6b, 0xc3, 0x9c]), "imul eax, ebx, -100");
        assert!(!emulable(&[0x69, 0xc3, 0, 1, 0, 0]), "imul eax, ebx, 256");
        assert!(emulable(&[0x48, 0x0f, 0xaf, 0xc3]), "imul rax, rbx");
    }

    #[test]
    fn what_jumps_to_itself_is_stepped() {
        for mode in CodeMode::ALL {
            let stepped = |bytes: &[u8]| {
                let displaced = displaced(bytes, 8);
                displaced.op(mode).is_none() && !displaced.form(mode).emulable
            };
            assert!(stepped(&[0xeb, 0xfe]), "jmp");
            assert!(stepped(&[0x74, 0xfe]), "je");
            assert!(stepped(&[0xe2, 0xfe]), "loop");
            assert!(stepped(&[0xe3, 0xfe]), "jecxz");
            assert!(!stepped(&[0xeb, 0xfd]), "one byte further");
        }
        assert!(!displaced(&[0xe8, 0xfb, 0xff, 0xff, 0xff], 8).form(CodeMode::Bits64).emulable, "call");
    }

    #[test]
    fn what_is_repeated_is_stepped() {
        for mode in CodeMode::ALL {
            let form = |bytes: &[u8]| *displaced(bytes, 8).form(mode);
            for opcode in [0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0x6c, 0x6d, 0x6e, 0x6f] {
                for prefix in [0xf2, 0xf3] {
                    let form = form(&[prefix, opcode]);
                    assert!(form.repeats && form.op.is_none() && !form.emulable, "{prefix:#x} {opcode:#x}");
                }
                assert!(!form(&[opcode]).repeats, "{opcode:#x}");
            }
            assert!(!form(&[0xf3, 0x90]).repeats, "pause");
            assert!(!form(&[0xf3, 0xc3]).repeats, "rep ret");
        }
    }

    #[test]
    fn only_the_instruction_counts_not_what_follows() {
        let nop = displaced(&[0x90, 1, 2, 3], 8);
        let mut page = [0x90; PAGE_SIZE];
        assert!(nop.is_in(&page, 8));
        page[8] = 0x91;
        assert!(!nop.is_in(&page, 8));
    }

    #[test]
    fn what_may_be_in_an_interrupt_shadow_is_not_done_by_us() {
        let after = |bytes: &[u8]| {
            let mut page = [0x90; PAGE_SIZE];
            page[8 - bytes.len()..8].copy_from_slice(bytes);
            Displaced::of(&page, 8).op(CodeMode::Bits64).copied()
        };
        assert!(after(&[0x90]).is_some());
        assert!(after(&[0xfb]).is_none(), "sti");
        assert!(after(&[0x17]).is_none(), "pop ss");
        assert!(after(&[0x8e, 0xd0]).is_none(), "mov ss, eax");
        assert!(after(&[0x8e, 0xd8]).is_some(), "mov ds, eax");
        assert!(after(&[0x89, 0xd0]).is_some(), "mov eax, edx");
        for offset in [0, 1] {
            assert!(displaced(&[0x90], offset).begins_page(), "other bytes are before it at each linear address");
        }
        assert!(!displaced(&[0x90], 2).begins_page());
        let mut page = [0x90; PAGE_SIZE];
        let mut nop = Displaced::of(&page, 8);
        page[7] = 0xfb;
        nop.look_back(&page, 8);
        assert!(nop.op(CodeMode::Bits64).is_none());
    }

    #[test]
    fn xen_is_relied_on_for_plain_instructions_only() {
        let certain = |bytes: &[u8]| displaced(bytes, 0).form(CodeMode::Bits64).certain;
        assert!(certain(&[0x48, 0x89, 0xe5]), "mov rbp, rsp");
        assert!(certain(&[0x48, 0x0f, 0xaf, 0xc3]), "imul rax, rbx");
        assert!(certain(&[0x65, 0x48, 0x8b, 0x04, 0x25, 0x28, 0, 0, 0]), "mov rax, gs:[0x28]");
        assert!(certain(&[0xeb, 0x10]), "jmp");
        assert!(certain(&[0x0f, 0xa2]), "cpuid");
        assert!(!certain(&[0x55]), "push rbp writes");
        assert!(!certain(&[0x8b, 0x07]), "mov eax, [rdi] may be a device's register");
        assert!(!certain(&[0x0f, 0x20, 0xc0]), "mov rax, cr0");
        assert!(!certain(&[0x8e, 0xd8]), "mov ds, eax");
        assert!(!certain(&[0x0f, 0x28, 0xc1]), "movaps");
        assert!(!certain(&[0x0f, 0x01, 0xc1]), "vmcall");
        assert!(!certain(&[0xf3, 0xa4]), "rep movsb");
        assert!(!certain(&[0xcc]), "int3");
        assert!(!certain(&[0xf0, 0x01, 0x07]), "lock add [rdi], eax");
        assert!(!certain(&[0x06]), "unknown in 64-bit code");
    }
}
