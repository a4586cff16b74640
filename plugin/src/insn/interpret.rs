//! Computes what an instruction does, so that it need not run.
//!
//! What functions begin with and what tracers set breakpoints on: moves, simple arithmetic, pushes and pops, near
//! branches. An instruction is done exactly as the CPU does it (Intel SDM volume 2), flags included, or not at all:
//! whatever is unusual (a fault it would raise, a debug exception after it, memory that is not plainly there) is left to
//! the CPU.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::paging::Intent;
use crate::{CodeMode, Registers};

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
pub(super) const TF: u64 = 1 << 8;
const RF: u64 = 1 << 16;
pub(super) const VM: u64 = 1 << 17;
const AC: u64 = 1 << 18;
const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
const CR0_AM: u64 = 1 << 18;
const CR4_LA57: u64 = 1 << 12;
const CR4_CET: u64 = 1 << 23;
/// Numbers of RSP and RBP.
const SP: u8 = 4;
const BP: u8 = 5;

/// What the interpreter asks of guest memory, by linear address. `None` if anything about the access is unusual, its address
/// too: then nothing was written.
pub(crate) trait Memory {
    fn read(&mut self, linear: u64, into: &mut [u8]) -> Option<()>;
    fn write(&mut self, linear: u64, bytes: &[u8]) -> Option<()>;
}

/// The memory that an instruction reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Operand {
    pub(crate) linear: u64,
    pub(crate) size: u8,
    pub(crate) intent: Intent,
}

/// An instruction that can be done exactly, decoded once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Op {
    kind: Kind,
    /// 64-bit code; else 32-bit.
    long: bool,
    /// Bytes of the instruction.
    length: u8,
    /// Bytes of the operands.
    size: u8,
    to: Place,
    from: Place,
    /// An immediate, sign-extended; or how far a branch goes, from the next instruction; or what RET pops besides.
    immediate: i64,
    /// Bytes that it reads at `memory`, if any.
    reads: Option<u8>,
    /// Bytes that it writes at `memory`, or pushes, if any. It reads before it writes.
    writes: Option<u8>,
    /// The address of its memory operand, or of what it pops; for LEA, what it computes.
    memory: Address,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nop,
    Mov,
    /// From an operand of so many bytes.
    MovZero(u8),
    MovSign(u8),
    Lea,
    Add,
    Sub,
    Cmp,
    And,
    Or,
    Xor,
    Test,
    Inc,
    Dec,
    Neg,
    Not,
    Exchange,
    /// If this condition, numbered as in the opcode, holds.
    MovIf(u8),
    SetIf(u8),
    Push,
    Pop,
    Leave,
    Jump,
    JumpIf(u8),
    Call,
    Return,
}

/// Where an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    Register(u8),
    /// AH, CH, DH, BH.
    High(u8),
    Immediate,
    Memory,
}

/// `base + index * scale + displacement`, of which the bits of the mask are left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address {
    base: Base,
    index: Option<u8>,
    scale: u8,
    displacement: i64,
    mask: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    Register(u8),
    Nothing,
    /// RIP of the instruction itself.
    Rip,
}

impl Op {
    /// The instruction that `bytes` are, if it is one that can be done.
    pub(crate) fn decode(bytes: &[u8], mode: CodeMode) -> Option<Self> {
        if mode == CodeMode::Bits16 {
            return None;
        }
        // At address 0, so that what is relative to RIP comes out relative.
        let instruction = Decoder::new(mode.bits(), bytes, DecoderOptions::NONE).decode();
        let prefixed = instruction.has_lock_prefix() || instruction.has_repne_prefix() || instruction.has_rep_prefix();
        if instruction.is_invalid() || prefixed || instruction.len() != bytes.len() {
            return None;
        }
        let long = mode == CodeMode::Bits64;
        let mut op = Self {
            kind: Kind::Nop,
            long,
            length: bytes.len() as u8,
            size: if long { 8 } else { 4 },
            to: Place::Nowhere,
            from: Place::Nowhere,
            immediate: 0,
            reads: None,
            writes: None,
            memory: Address { base: Base::Nothing, index: None, scale: 0, displacement: 0, mask: mask(long) },
        };
        op.fill(&instruction)?;
        (op.reads, op.writes) = op.memory_sizes();
        // With an operand-size prefix, branches differ between Intel's and AMD's CPUs.
        let legacy = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67);
        let rex = |byte: &u8| long && matches!(byte, 0x40..=0x4f);
        let mut prefixes = bytes.iter().take_while(|byte| legacy(byte) || rex(byte));
        let branches = instruction.flow_control() != FlowControl::Next;
        (!branches || prefixes.all(|prefix| *prefix != 0x66)).then_some(op)
    }

    fn fill(&mut self, instruction: &Instruction) -> Option<()> {
        use Mnemonic as M;
        // These have operands, and do not look at them.
        if matches!(instruction.mnemonic(), M::Nop | M::Endbr64 | M::Endbr32) {
            return Some(());
        }
        if instruction.flow_control() != FlowControl::Next {
            return self.fill_branch(instruction);
        }
        self.kind = match instruction.mnemonic() {
            M::Mov => Kind::Mov,
            M::Movzx => Kind::MovZero(self.source_size(instruction)?),
            M::Movsx | M::Movsxd => Kind::MovSign(self.source_size(instruction)?),
            M::Lea => Kind::Lea,
            M::Add => Kind::Add,
            M::Sub => Kind::Sub,
            M::Cmp => Kind::Cmp,
            M::And => Kind::And,
            M::Or => Kind::Or,
            M::Xor => Kind::Xor,
            M::Test => Kind::Test,
            M::Inc => Kind::Inc,
            M::Dec => Kind::Dec,
            M::Neg => Kind::Neg,
            M::Not => Kind::Not,
            M::Xchg => Kind::Exchange,
            M::Push => Kind::Push,
            M::Pop => Kind::Pop,
            M::Leave => Kind::Leave,
            _ => match condition(instruction) {
                Some((condition, true)) => Kind::MovIf(condition),
                Some((condition, false)) => Kind::SetIf(condition),
                None => return None,
            },
        };
        match self.kind {
            Kind::Push | Kind::Pop | Kind::Leave => {
                // Not with an operand-size prefix.
                if instruction.stack_pointer_increment().unsigned_abs() != u32::from(self.size)
                    && self.kind != Kind::Leave
                {
                    return None;
                }
                self.memory = self.stack(if self.kind == Kind::Leave { BP } else { SP });
                if self.kind == Kind::Leave {
                    let plain = if self.long { Code::Leaveq } else { Code::Leaved };
                    return (instruction.code() == plain).then_some(());
                }
            }
            Kind::Lea => self.size = register_size(instruction.op0_register())?,
            Kind::SetIf(_) => self.size = 1,
            _ => self.size = self.operand_size(instruction)?,
        }
        // Of memory, Intel's CPUs are said to read 16 bits then, and AMD's 32.
        if instruction.mnemonic() == Mnemonic::Movsxd && self.size == 2 {
            return None;
        }
        match instruction.op_count() {
            1 if self.kind == Kind::Push => self.from = self.place(instruction, 0)?,
            1 => self.to = self.place(instruction, 0)?,
            2 => (self.to, self.from) = (self.place(instruction, 0)?, self.place(instruction, 1)?),
            _ => return None,
        }
        // What both reads and writes memory, or writes it other than by a move or a push, is left to the CPU.
        let writes = !matches!(self.kind, Kind::Cmp | Kind::Test);
        let moves = self.kind == Kind::Mov;
        if (self.to == Place::Memory && writes && !moves) || (self.kind == Kind::Exchange && self.from == Place::Memory)
        {
            return None;
        }
        Some(())
    }

    /// The address in a stack register.
    const fn stack(&self, register: u8) -> Address {
        Address { base: Base::Register(register), index: None, scale: 0, displacement: 0, mask: mask(self.long) }
    }

    /// What the other fields say of [`reads`](Self::reads) and [`writes`](Self::writes).
    fn memory_sizes(&self) -> (Option<u8>, Option<u8>) {
        let size = Some(self.size);
        let operand = size.filter(|_| self.to == Place::Memory || self.from == Place::Memory);
        match self.kind {
            Kind::Push | Kind::Call => (operand, size),
            Kind::Pop | Kind::Leave | Kind::Return => (size, None),
            Kind::Mov if self.to == Place::Memory => (None, size),
            Kind::MovZero(source) | Kind::MovSign(source) => (operand.map(|_| source), None),
            Kind::Lea => (None, None),
            _ => (operand, None),
        }
    }

    fn fill_branch(&mut self, instruction: &Instruction) -> Option<()> {
        let near = |op: &mut Self| {
            // Not with an operand-size prefix.
            let kind = if op.long { OpKind::NearBranch64 } else { OpKind::NearBranch32 };
            (instruction.op0_kind() == kind).then(|| {
                op.from = Place::Immediate;
                op.immediate = (instruction.near_branch_target() as i64).wrapping_sub(i64::from(op.length));
            })
        };
        match instruction.flow_control() {
            FlowControl::UnconditionalBranch if instruction.is_jmp_short_or_near() => {
                self.kind = Kind::Jump;
                near(self)
            }
            FlowControl::ConditionalBranch if instruction.is_jcc_short_or_near() => {
                self.kind = Kind::JumpIf(condition_number(instruction)?);
                near(self)
            }
            FlowControl::Call if instruction.is_call_near() => {
                self.kind = Kind::Call;
                near(self)
            }
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                self.kind = match instruction {
                    _ if instruction.is_jmp_near_indirect() => Kind::Jump,
                    _ if instruction.is_call_near_indirect() => Kind::Call,
                    _ => return None,
                };
                if self.operand_size(instruction)? != self.size {
                    return None;
                }
                self.from = self.place(instruction, 0)?;
                Some(())
            }
            FlowControl::Return => {
                let (plain, popping) = match self.long {
                    true => (Code::Retnq, Code::Retnq_imm16),
                    false => (Code::Retnd, Code::Retnd_imm16),
                };
                self.kind = Kind::Return;
                self.memory = self.stack(SP);
                self.immediate = match instruction.code() {
                    code if code == plain => 0,
                    code if code == popping => instruction.immediate16().into(),
                    _ => return None,
                };
                Some(())
            }
            _ => None,
        }
    }

    /// Bytes of the operands, all general registers, memory, or immediates.
    fn operand_size(&self, instruction: &Instruction) -> Option<u8> {
        match instruction.op0_kind() {
            OpKind::Register => register_size(instruction.op0_register()),
            OpKind::Memory => memory_size(instruction),
            _ => None,
        }
    }

    fn source_size(&self, instruction: &Instruction) -> Option<u8> {
        match instruction.op1_kind() {
            OpKind::Register => register_size(instruction.op1_register()),
            OpKind::Memory => memory_size(instruction),
            _ => None,
        }
    }

    fn place(&mut self, instruction: &Instruction, operand: u32) -> Option<Place> {
        match instruction.op_kind(operand) {
            OpKind::Register => place_of(instruction.op_register(operand)),
            OpKind::Memory => {
                self.memory = self.address(instruction)?;
                Some(Place::Memory)
            }
            OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {
                self.immediate = instruction.immediate(operand) as i64;
                Some(Place::Immediate)
            }
            _ => None,
        }
    }

    fn address(&self, instruction: &Instruction) -> Option<Address> {
        // FS and GS have a base that is not known here; other overrides do not matter in 64-bit code.
        if matches!(instruction.memory_segment(), Register::FS | Register::GS)
            || (!self.long && instruction.has_segment_prefix())
        {
            return None;
        }
        let size = if self.long { 8 } else { 4 };
        let number = |register: Register| match register {
            Register::None => Some(None),
            // Not with an address-size prefix.
            _ if register_size(register)? == size => Some(Some(number_of(register)?)),
            _ => None,
        };
        let base = match instruction.memory_base() {
            Register::RIP => Base::Rip,
            register => number(register)?.map_or(Base::Nothing, Base::Register),
        };
        let index = number(instruction.memory_index())?;
        if self.long && base == Base::Nothing && index.is_none() && instruction.memory_displ_size() != 8 {
            // An absolute address of 32 bits: with an address-size prefix it is not sign-extended, so leave it alone.
            return None;
        }
        let (scale, displacement) =
            (instruction.memory_index_scale() as u8, instruction.memory_displacement64() as i64);
        Some(Address { base, index, scale, displacement, mask: mask(self.long) })
    }

    /// What it would read of memory, and what it would write then. `None` if that is nothing, or if [`run`](Self::run) would
    /// not do it for another reason than the accesses themselves. (The target of a branch is not looked at.)
    #[inline(always)]
    pub(crate) fn operands(&self, registers: &Registers) -> Option<[Option<Operand>; 2]> {
        let accesses = self.reads.is_some() || self.writes.is_some();
        if !(accesses && self.is_usual(registers) && is_unchecked(registers)) {
            return None;
        }
        let at = |linear, size, intent| Operand { linear, size, intent };
        let read = self.reads.map(|size| at(self.memory.of(registers), size, Intent::Read));
        let write = self.writes.map(|size| at(self.written(registers), size, Intent::Write));
        Some([read, write])
    }

    /// The address that it writes to.
    #[inline(always)]
    fn written(&self, registers: &Registers) -> u64 {
        match self.kind {
            Kind::Push | Kind::Call => self.below_stack(registers),
            _ => self.memory.of(registers),
        }
    }

    /// The address that it pushes to.
    #[inline(always)]
    const fn below_stack(&self, registers: &Registers) -> u64 {
        registers.gpr[SP as usize].wrapping_sub(self.size as u64) & mask(self.long)
    }

    /// Whether the CPU would do with it what we do, in the mode that it was decoded for.
    fn is_usual(&self, registers: &Registers) -> bool {
        debug_assert_eq!(registers.mode == CodeMode::Bits64, self.long, "decoded for another mode");
        registers.rflags & (TF | VM) == 0 && registers.cr4 & CR4_CET == 0 && (self.long || registers.flat)
    }

    /// Does it: on `Some`, `new`, which is a copy of the `old` registers, and memory are as after the instruction. On `None`,
    /// memory has not changed, and `new` is of no use.
    #[inline]
    pub(crate) fn run(&self, old: &Registers, new: &mut Registers, memory: &mut impl Memory) -> Option<()> {
        self.is_usual(old).then_some(())?;
        new.rflags &= !RF;
        Machine { op: self, old, new, memory }.run()
    }
}

impl Address {
    /// What it is with these registers.
    #[inline(always)]
    fn of(&self, registers: &Registers) -> u64 {
        let register = |number: u8| registers.gpr[usize::from(number & 15)];
        let base = match self.base {
            Base::Nothing => 0,
            Base::Register(number) => register(number),
            Base::Rip => registers.rip,
        };
        let scaled = self.index.map_or(0, |number| register(number).wrapping_mul(self.scale.into()));
        base.wrapping_add(scaled).wrapping_add(self.displacement as u64) & self.mask
    }
}

/// An instruction in the middle of being done. Memory is written last.
struct Machine<'a, M> {
    op: &'a Op,
    old: &'a Registers,
    new: &'a mut Registers,
    memory: &'a mut M,
}

impl<M: Memory> Machine<'_, M> {
    fn run(&mut self) -> Option<()> {
        let op = self.op;
        let next = self.instruction_pointer(i64::from(op.length))?;
        self.new.rip = next;
        match op.kind {
            Kind::Nop => {}
            Kind::Mov => {
                let value = self.value(op.from, op.size)?;
                self.put(op.to, op.size, value)?;
            }
            Kind::MovZero(size) => {
                let value = self.value(op.from, size)?;
                self.put(op.to, op.size, value)?;
            }
            Kind::MovSign(size) => {
                let value = sign_extend(self.value(op.from, size)?, size);
                self.put(op.to, op.size, value)?;
            }
            Kind::Lea => {
                let value = self.effective();
                self.put(op.to, op.size, value)?;
            }
            Kind::Add | Kind::Sub | Kind::Cmp | Kind::And | Kind::Or | Kind::Xor | Kind::Test => {
                let (left, right) = (self.value(op.to, op.size)?, self.value(op.from, op.size)?);
                let result = self.arithmetic(left, right);
                if !matches!(op.kind, Kind::Cmp | Kind::Test) {
                    self.put(op.to, op.size, result)?;
                }
            }
            Kind::Inc | Kind::Dec | Kind::Neg => {
                let value = self.value(op.to, op.size)?;
                let carry = self.old.rflags & CF;
                let result = match op.kind {
                    Kind::Inc => self.add(value, 1),
                    Kind::Dec => self.subtract(value, 1),
                    _ => self.subtract(0, value),
                };
                if op.kind != Kind::Neg {
                    self.new.rflags = self.new.rflags & !CF | carry;
                }
                self.put(op.to, op.size, result)?;
            }
            Kind::Not => {
                let value = self.value(op.to, op.size)?;
                self.put(op.to, op.size, !value)?;
            }
            Kind::Exchange => {
                let (left, right) = (self.value(op.to, op.size)?, self.value(op.from, op.size)?);
                self.put(op.to, op.size, right)?;
                self.put(op.from, op.size, left)?;
            }
            Kind::MovIf(condition) => {
                // The source is read, and a 32-bit destination loses its upper half, whatever the condition.
                let (old, new) = (self.value(op.to, op.size)?, self.value(op.from, op.size)?);
                self.put(op.to, op.size, if holds(condition, self.old.rflags) { new } else { old })?;
            }
            Kind::SetIf(condition) => {
                let value = u64::from(holds(condition, self.old.rflags));
                self.put(op.to, op.size, value)?;
            }
            Kind::Push => {
                let value = self.value(op.from, op.size)?;
                self.push(value)?;
            }
            Kind::Pop => {
                let value = self.pop()?;
                // After RSP has moved: POP RSP keeps what it has popped.
                self.put(op.to, op.size, value)?;
            }
            Kind::Leave => {
                let value = self.pop()?;
                self.put(Place::Register(BP), op.size, value)?;
            }
            Kind::Jump => {
                let target = self.target()?;
                self.new.rip = target;
            }
            Kind::JumpIf(condition) => {
                if holds(condition, self.old.rflags) {
                    let target = self.target()?;
                    self.new.rip = target;
                }
            }
            Kind::Call => {
                let target = self.target()?;
                self.new.rip = target;
                self.push(next)?;
            }
            Kind::Return => {
                let target = self.pop()?;
                self.new.rip = self.elsewhere(target)?;
                let stack = &mut self.new.gpr[usize::from(SP)];
                *stack = stack.wrapping_add(op.immediate as u64) & ones(op.size);
            }
        }
        Some(())
    }

    /// The instruction pointer, so far from this instruction's.
    fn instruction_pointer(&self, distance: i64) -> Option<u64> {
        self.checked(self.old.rip.wrapping_add(distance as u64) & self.op.memory.mask)
    }

    /// An address, if it is one that code can be at.
    fn checked(&self, address: u64) -> Option<u64> {
        match self.op.long {
            true => is_canonical(address, self.old).then_some(address),
            false => Some(address & self.op.memory.mask),
        }
    }

    fn target(&mut self) -> Option<u64> {
        match self.op.from {
            Place::Immediate => self.instruction_pointer(self.op.immediate.wrapping_add(i64::from(self.op.length))),
            place => {
                let target = self.value(place, self.op.size)?;
                self.elsewhere(target)
            }
        }
    }

    /// The target of an indirect branch, if it is another instruction. A branch to itself is stepped: after any other
    /// reply, RIP would not tell that the virtual CPU has resumed ([`Engine::is_settled`](crate::Engine::is_settled)).
    fn elsewhere(&self, target: u64) -> Option<u64> {
        self.checked(target).filter(|target| *target != self.old.rip)
    }

    /// The memory operand's address.
    fn effective(&self) -> u64 {
        self.op.memory.of(self.old)
    }

    fn read(&mut self, size: u8) -> Option<u64> {
        is_unchecked(self.old).then_some(())?;
        let mut bytes = [0; 8];
        self.memory.read(self.effective(), bytes.get_mut(..usize::from(size))?)?;
        Some(u64::from_le_bytes(bytes))
    }

    #[inline(always)]
    fn write(&mut self, linear: u64, size: u8, value: u64) -> Option<()> {
        is_unchecked(self.old).then_some(())?;
        self.memory.write(linear, value.to_le_bytes().get(..usize::from(size))?)
    }

    #[inline(always)]
    fn value(&mut self, place: Place, size: u8) -> Option<u64> {
        let value = match place {
            Place::Nowhere => return None,
            Place::Register(number) => self.old.gpr[usize::from(number & 15)],
            Place::High(number) => self.old.gpr[usize::from(number & 15)] >> 8,
            Place::Immediate => self.op.immediate as u64,
            Place::Memory => self.read(size)?,
        };
        Some(value & ones(size))
    }

    fn put(&mut self, place: Place, size: u8, value: u64) -> Option<()> {
        let value = value & ones(size);
        match place {
            Place::Register(number) => {
                // Results of 32 bits are zero-extended; of fewer, the rest stays (Intel SDM volume 1, section 3.4.1.1).
                let register = &mut self.new.gpr[usize::from(number & 15)];
                *register = if size >= 4 { value } else { *register & !ones(size) | value };
            }
            Place::High(number) => {
                let register = &mut self.new.gpr[usize::from(number & 15)];
                *register = *register & !0xff00 | value << 8;
            }
            Place::Memory => self.write(self.effective(), size, value)?,
            Place::Nowhere | Place::Immediate => return None,
        }
        Some(())
    }

    #[inline(always)]
    fn push(&mut self, value: u64) -> Option<()> {
        let (size, stack) = (self.op.size, self.op.below_stack(self.old));
        self.put(Place::Register(SP), size, stack)?;
        self.write(stack, size, value)
    }

    /// Reads what is on the stack, and leaves the stack pointer behind it.
    fn pop(&mut self) -> Option<u64> {
        let size = self.op.size;
        let value = self.read(size)?;
        self.put(Place::Register(SP), size, self.effective().wrapping_add(size.into()))?;
        Some(value)
    }

    fn arithmetic(&mut self, left: u64, right: u64) -> u64 {
        match self.op.kind {
            Kind::Add => self.add(left, right),
            Kind::Sub | Kind::Cmp => self.subtract(left, right),
            Kind::Or => self.logic(left | right),
            Kind::Xor => self.logic(left ^ right),
            _ => self.logic(left & right),
        }
    }

    fn add(&mut self, left: u64, right: u64) -> u64 {
        let result = left.wrapping_add(right) & ones(self.op.size);
        let overflow = !(left ^ right) & (left ^ result);
        self.flags(result, result < left, left ^ right ^ result, overflow);
        result
    }

    fn subtract(&mut self, left: u64, right: u64) -> u64 {
        let result = left.wrapping_sub(right) & ones(self.op.size);
        let overflow = (left ^ right) & (left ^ result);
        self.flags(result, left < right, left ^ right ^ result, overflow);
        result
    }

    /// AF is undefined then; Intel's CPUs clear it.
    fn logic(&mut self, result: u64) -> u64 {
        self.flags(result, false, 0, 0);
        result
    }

    /// Sets the flags: `carries` has those out of each bit below it, `overflow` the overflow in the sign's bit.
    fn flags(&mut self, result: u64, carry: bool, carries: u64, overflow: u64) {
        let sign = |value: u64| value >> (u32::from(self.op.size) * 8 - 1) & 1 != 0;
        let parity = (result as u8).count_ones().is_multiple_of(2);
        let flags = [
            (CF, carry),
            (PF, parity),
            (AF, carries & 0x10 != 0),
            (ZF, result == 0),
            (SF, sign(result)),
            (OF, sign(overflow)),
        ];
        let set = flags.into_iter().filter(|(_, set)| *set).fold(0, |all, (flag, _)| all | flag);
        self.new.rflags = self.new.rflags & !STATUS | set;
    }
}

/// What addresses are taken modulo, less one.
const fn mask(long: bool) -> u64 {
    if long { u64::MAX } else { u32::MAX as u64 }
}

/// Whether nobody asks if addresses are aligned.
pub(super) fn is_unchecked(registers: &Registers) -> bool {
    registers.rflags & AC == 0 || registers.cr0 & CR0_AM == 0 || registers.cpl != 3
}

/// The lowest so many bytes.
const fn ones(size: u8) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (size as u32 * 8)) - 1 }
}

fn sign_extend(value: u64, size: u8) -> u64 {
    let shift = 64 - u32::from(size.clamp(1, 8)) * 8;
    ((value << shift) as i64 >> shift) as u64
}

/// Whether the upper bits are all the same as the highest that paging translates (Intel SDM volume 1, section 3.3.7.1).
pub(super) fn is_canonical(address: u64, registers: &Registers) -> bool {
    let upper = |width: u32| matches!(address as i64 >> (width - 1), 0 | -1);
    // What is with 48 bits is with 57, too.
    upper(48) || (registers.cr4 & CR4_LA57 != 0 && upper(57))
}

/// Whether a condition, numbered as in the opcodes of Jcc (Intel SDM volume 1, appendix B), holds.
const fn holds(condition: u8, flags: u64) -> bool {
    let (carry, zero) = (flags & CF != 0, flags & ZF != 0);
    let less = (flags & SF != 0) != (flags & OF != 0);
    let positive = match condition >> 1 {
        0 => flags & OF != 0,
        1 => carry,
        2 => zero,
        3 => carry || zero,
        4 => flags & SF != 0,
        5 => flags & PF != 0,
        6 => less,
        _ => less || zero,
    };
    positive != (condition & 1 != 0)
}

/// The number of the condition of a CMOVcc (true) or SETcc (false).
fn condition(instruction: &Instruction) -> Option<(u8, bool)> {
    use Mnemonic as M;
    let moves = matches!(
        instruction.mnemonic(),
        M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
    );
    let sets = matches!(
        instruction.mnemonic(),
        M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
    );
    (moves || sets).then(|| condition_number(instruction).map(|number| (number, moves))).flatten()
}

fn condition_number(instruction: &Instruction) -> Option<u8> {
    use iced_x86::ConditionCode as C;
    Some(match instruction.condition_code() {
        C::None => return None,
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    })
}

fn place_of(register: Register) -> Option<Place> {
    Some(match register {
        Register::AH => Place::High(0),
        Register::CH => Place::High(1),
        Register::DH => Place::High(2),
        Register::BH => Place::High(3),
        _ => Place::Register(number_of(register)?),
    })
}

/// The number of a general register.
fn number_of(register: Register) -> Option<u8> {
    if !register.is_gpr() {
        return None;
    }
    let number = register.full_register() as u32 - Register::RAX as u32;
    u8::try_from(number).ok().filter(|number| *number < 16)
}

fn register_size(register: Register) -> Option<u8> {
    register.is_gpr().then(|| register.size() as u8)
}

fn memory_size(instruction: &Instruction) -> Option<u8> {
    Some(instruction.memory_size().size() as u8).filter(|size| matches!(size, 1 | 2 | 4 | 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No memory at all.
    struct Nothing;

    impl Memory for Nothing {
        fn read(&mut self, _: u64, _: &mut [u8]) -> Option<()> {
            None
        }

        fn write(&mut self, _: u64, _: &[u8]) -> Option<()> {
            None
        }
    }

    fn flat() -> Registers {
        Registers { rip: 0x1000, rflags: 0x202, flat: true, mode: CodeMode::Bits64, ..Registers::default() }
    }

    fn run(bytes: &[u8], registers: Registers) -> Option<Registers> {
        let (op, mut new) = (Op::decode(bytes, registers.mode)?, registers);
        op.run(&registers, &mut new, &mut Nothing).map(|()| new)
    }

    #[test]
    fn what_functions_begin_with_is_known() {
        let known = |bytes: &[u8]| Op::decode(bytes, CodeMode::Bits64).is_some();
        for bytes in [
            &[0xf3, 0x0f, 0x1e, 0xfa][..],
            &[0x0f, 0x1f, 0x44, 0, 0],
            &[0x66, 0x90],
            &[0x55],
            &[0x41, 0x57],
            &[0x48, 0x89, 0xe5],
            &[0x48, 0x83, 0xec, 0x28],
            &[0x48, 0x89, 0x5c, 0x24, 8],
            &[0x40, 0x53],
            &[0x33, 0xc0],
            &[0xe8, 0, 0, 0, 0],
            &[0xc3],
            &[0xff, 0x25, 0, 0, 0, 0],       // jmp [rip]
            &[0x48, 0xff, 0x25, 0, 0, 0, 0], // the same, as Windows has it
            &[0xff, 0x15, 0, 0, 0, 0],       // call [rip]
            &[0xff, 0x37],                   // push [rdi]
        ] {
            assert!(known(bytes), "{bytes:02x?}");
        }
        for bytes in [
            &[0xf3, 0x90][..],                           // pause
            &[0xcc],                                     // int3
            &[0xf0, 0x01, 0x07],                         // lock add [rdi], eax
            &[0x01, 0x07],                               // add [rdi], eax
            &[0x65, 0x48, 0x8b, 4, 0x25, 0x28, 0, 0, 0], // mov rax, gs:[0x28]
            &[0x0f, 0x20, 0xc0],                         // mov rax, cr0
            &[0x66, 0xe8, 0, 0, 0, 0],                   // call, of another length on AMD's CPUs
            &[0xff, 0x2f],                               // jmp far [rdi]
            &[0xff, 0x1f],                               // call far [rdi]
            &[0x66, 0xff, 0x37],                         // push word [rdi]
            &[0x66, 0x63, 0x07],                         // movsxd ax, [rdi], of another width on AMD's CPUs
            &[0x65, 0xff, 0x27],                         // jmp gs:[rdi]
            &[0x0f, 0x05],                               // syscall
            &[0xc5, 0xf8, 0x77],                         // vzeroupper
        ] {
            assert!(!known(bytes), "{bytes:02x?}");
        }
    }

    #[test]
    fn what_would_trap_or_fault_is_left_to_the_cpu() {
        let nop = &[0x90][..];
        assert_eq!(run(nop, flat()).unwrap().rip, 0x1001);
        for unusual in [
            Registers { rflags: TF, ..flat() },
            Registers { cr4: CR4_CET, ..flat() },
            Registers { rip: (1 << 47) - 1, ..flat() },
            Registers { mode: CodeMode::Bits32, flat: false, ..flat() },
        ] {
            assert_eq!(run(nop, unusual), None, "{unusual:x?}");
        }
        let mut far = flat();
        far.gpr[0] = 1 << 47;
        assert_eq!(run(&[0xff, 0xe0], far), None, "jmp rax");
        far.cr4 = CR4_LA57;
        assert!(run(&[0xff, 0xe0], far).is_some(), "jmp rax with 57-bit addresses");
        assert_eq!(run(&[0x55], flat()), None, "push rbp without a stack");
    }

    #[test]
    fn a_branch_to_itself_is_left_to_the_cpu() {
        let mut here = flat();
        here.gpr[0] = here.rip;
        assert_eq!(run(&[0xff, 0xe0], here), None, "jmp rax");
        here.gpr[0] += 1;
        assert!(run(&[0xff, 0xe0], here).is_some());
    }

    #[test]
    fn an_instruction_ends_what_iret_began() {
        assert_eq!(run(&[0x90], Registers { rflags: RF | 0x202, ..flat() }).unwrap().rflags, 0x202);
    }
}
