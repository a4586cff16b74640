//! The interpreter: any bytes, registers and memory; against what iced-x86 knows of the instruction.
#![no_main]

use std::collections::HashMap;

use arbitrary::Arbitrary;
use hyperbp::fuzzing::{Instruction, Memory};
use hyperbp::{CodeMode, Registers};
use hyperbp_fuzz::AnyRegisters;
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, OpAccess, OpKind, Register, RflagsBits, UsedMemory,
};
use libfuzzer_sys::fuzz_target;

const TF: u64 = 1 << 8;
const RF: u64 = 1 << 16;
const VM: u64 = 1 << 17;
/// Most bytes of an instruction.
const LONGEST: usize = 15;

#[derive(Arbitrary, Debug)]
struct Input {
    registers: AnyRegisters,
    /// Nothing in the registers keeps the interpreter from its work.
    plain: bool,
    bytes: [u8; LONGEST + 1],
    /// What memory is filled with.
    fill: u64,
    /// A bit for each of 8 classes of pages that cannot be accessed.
    missing: u8,
}

/// All of the address space.
#[derive(Clone, Default)]
struct Space {
    fill: u64,
    missing: u8,
    /// What is written is noted, but goes nowhere.
    rehearsal: bool,
    written: HashMap<u64, u8>,
    reads: Vec<(u64, usize)>,
    writes: Vec<(u64, Vec<u8>)>,
}

impl Space {
    fn is_there(&self, linear: u64) -> Option<()> {
        let class = (linear >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61;
        (self.missing >> class & 1 == 0).then_some(())
    }

    fn byte(&self, linear: u64) -> u8 {
        let old = || (self.fill.wrapping_mul(linear | 1) >> 32) as u8;
        self.written.get(&linear).copied().unwrap_or_else(old)
    }

    fn value(&self, linear: u64, size: usize) -> u64 {
        (0..size as u64).rev().fold(0, |value, at| value << 8 | u64::from(self.byte(linear.wrapping_add(at))))
    }
}

impl Memory for Space {
    fn read(&mut self, linear: u64, into: &mut [u8]) -> Option<()> {
        self.is_there(linear)?;
        assert!(self.writes.is_empty(), "memory is written last");
        self.reads.push((linear, into.len()));
        for (at, byte) in (0..).zip(into) {
            *byte = self.byte(linear.wrapping_add(at));
        }
        Some(())
    }

    fn write(&mut self, linear: u64, bytes: &[u8]) -> Option<()> {
        self.is_there(linear)?;
        self.writes.push((linear, bytes.to_vec()));
        if !self.rehearsal {
            self.written.extend((0..).zip(bytes).map(|(at, byte)| (linear.wrapping_add(at), *byte)));
        }
        Some(())
    }
}

fuzz_target!(|input: Input| {
    let mut old = Registers::from(input.registers);
    if input.plain {
        old.rflags &= !(TF | VM);
        (old.cr4, old.dr7, old.flat) = (0, 0, true);
        old.rip &= if old.mode == CodeMode::Bits64 { u64::MAX >> 17 } else { u32::MAX.into() };
    }
    let known: Vec<_> = (0..=input.bytes.len())
        .filter_map(|length| Some((length, Instruction::decode(&input.bytes[..length], old.mode)?)))
        .collect();
    assert!(known.len() <= 1, "an instruction of several lengths");
    let Some((length, instruction)) = known.first() else { return };

    let mut space = Space { fill: input.fill, missing: input.missing, ..Space::default() };
    let mut rehearsal = Space { rehearsal: true, ..space.clone() };
    let (mut again, before) = (space.clone(), space.clone());
    let (mut new, mut rehearsed, mut repeated) = (old, old, old);
    let done = instruction.run(&mut new, &mut space);
    assert_eq!(done, instruction.run(&mut rehearsed, &mut rehearsal), "a rehearsal goes as it does");
    assert_eq!(done, instruction.run(&mut repeated, &mut again), "it does the same again");
    if done.is_none() {
        assert_eq!(new, old, "nothing has changed");
        assert!(space.writes.is_empty(), "nothing was written");
        return;
    }
    assert_eq!((new, &space.writes), (rehearsed, &rehearsal.writes), "a rehearsal says what it does");
    assert_eq!((new, &space.writes), (repeated, &again.writes), "it does the same again");
    Expected::of(&input.bytes[..*length], &old, &before).check(&new, &space);
});

/// What iced-x86 knows of an instruction.
struct Expected {
    instruction: iced_x86::Instruction,
    old: Registers,
    /// Where RIP may be.
    next: Vec<u64>,
    /// Which general registers it may write.
    gpr: [bool; 16],
    reads: Vec<(u64, usize)>,
    writes: Vec<(u64, usize)>,
}

impl Expected {
    fn of(bytes: &[u8], old: &Registers, memory: &Space) -> Self {
        let instruction = Decoder::with_ip(old.mode.bits(), bytes, old.rip, DecoderOptions::NONE).decode();
        assert!(!instruction.is_invalid() && instruction.len() == bytes.len(), "another instruction");
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(&instruction);
        let mut gpr = [false; 16];
        for used in info.used_registers() {
            let writes = matches!(
                used.access(),
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            );
            if writes && let Some(number) = number(used.register()) {
                gpr[number] = true;
            }
        }
        let place = |used: &UsedMemory| {
            let at = used.virtual_address(0, |register, _, _| Some(value(old, register)));
            (at.unwrap_or_default(), used.memory_size().size())
        };
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        for used in info.used_memory() {
            match used.access() {
                OpAccess::Read | OpAccess::CondRead => reads.push(place(used)),
                OpAccess::Write | OpAccess::CondWrite => writes.push(place(used)),
                _ => {}
            }
        }
        let mut next = vec![instruction.next_ip()];
        match instruction.flow_control() {
            FlowControl::ConditionalBranch => next.push(instruction.near_branch_target()),
            FlowControl::UnconditionalBranch | FlowControl::Call => next = vec![instruction.near_branch_target()],
            FlowControl::IndirectBranch | FlowControl::IndirectCall if instruction.op0_kind() == OpKind::Register => {
                next = vec![value(old, instruction.op0_register())];
            }
            FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return => {
                next = reads.iter().map(|(at, size)| memory.value(*at, *size)).collect()
            }
            _ => {}
        }
        Self { instruction, old: *old, next, gpr, reads, writes }
    }

    fn check(&self, new: &Registers, space: &Space) {
        let (instruction, old) = (&self.instruction, &self.old);
        let mask = if old.mode == CodeMode::Bits64 { u64::MAX } else { u32::MAX.into() };
        let next = self.next.iter().any(|next| next & mask == new.rip);
        assert!(next, "{instruction:?} goes on at {:#x}, not {:#x?}", new.rip, self.next);
        for (number, written) in self.gpr.iter().enumerate() {
            let same = old.gpr[number] == new.gpr[number];
            assert!(*written || same, "{instruction:?} changes register {number}");
        }
        let flags = status(instruction.rflags_modified());
        assert_eq!((old.rflags ^ new.rflags) & !flags & !RF, 0, "{instruction:?} changes other flags");
        assert_eq!(new.rflags & RF, 0, "an instruction clears RF");
        let rest = (*new).with(|new| {
            new.gpr = old.gpr;
            new.rip = old.rip;
            new.rflags = old.rflags;
        });
        assert_eq!(rest, *old, "{instruction:?} changes other registers");
        let reads = space.reads.iter().all(|read| self.reads.contains(read));
        assert!(reads, "{instruction:?} reads {:x?}, not {:x?}", space.reads, self.reads);
        let writes: Vec<_> = space.writes.iter().map(|(at, bytes)| (*at, bytes.len())).collect();
        assert_eq!(writes, self.writes, "{instruction:?} writes elsewhere");
    }
}

/// The number of a general register.
fn number(register: Register) -> Option<usize> {
    register.is_gpr().then(|| register.full_register() as usize - Register::RAX as usize)
}

/// The value of a register. All segments begin at 0.
fn value(registers: &Registers, register: Register) -> u64 {
    let whole = number(register).map_or(0, |number| registers.gpr[number]);
    match register.size() {
        8 => whole,
        size => whole & ((1 << (size * 8)) - 1),
    }
}

/// The status flags of iced-x86's.
fn status(bits: u32) -> u64 {
    let flags = [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::OF, 11),
    ];
    flags.iter().filter(|(flag, _)| bits & flag != 0).map(|(_, bit)| 1 << bit).sum()
}
