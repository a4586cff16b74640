//! What an instruction does: a decoder and an executor of a few dozen instructions, written without a look at the core's.
//!
//! An instruction is done wholly or not at all. What it writes is handed to the [`Bus`], which makes it true only when the
//! instruction is through.

use hyperbp::{Access, Registers};

/// The flags an arithmetic instruction sets.
const CARRY: u64 = 1;
const PARITY: u64 = 1 << 2;
const ADJUST: u64 = 1 << 4;
const ZERO: u64 = 1 << 6;
const SIGN: u64 = 1 << 7;
const OVERFLOW: u64 = 1 << 11;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;
/// Invalid opcode, general protection and page fault.
pub(crate) const UD: u8 = 6;
pub(crate) const GP: u8 = 13;
pub(crate) const PF: u8 = 14;

/// Why an instruction is not through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It raises this exception.
    Fault(u8),
    /// A view denies this.
    Denied(Access),
    /// It is an INT3 of so many bytes.
    Int3(u8),
    /// It calls the hypervisor, which no emulator of its own does.
    Call,
}

/// Memory as an instruction sees it, by linear address.
pub(crate) trait Bus {
    fn fetch(&mut self, linear: u64) -> Result<u8, Stop>;
    fn read(&mut self, linear: u64, size: u8) -> Result<u64, Stop>;
    fn write(&mut self, linear: u64, size: u8, value: u64) -> Result<(), Stop>;
    /// Reads what is written right after.
    fn read_to_write(&mut self, linear: u64, size: u8) -> Result<u64, Stop>;
}

#[derive(Clone, Copy, Debug)]
enum Operand {
    Register(usize),
    Memory(u64),
}

/// The bytes of an instruction, one after another.
struct Decoder<'a, B> {
    bus: &'a mut B,
    /// What to take instead of what is in memory.
    given: Option<&'a [u8]>,
    start: u64,
    length: u8,
}

impl<B: Bus> Decoder<'_, B> {
    fn byte(&mut self) -> Result<u8, Stop> {
        let at = usize::from(self.length);
        self.length += 1;
        match self.given {
            Some(bytes) => bytes.get(at).copied().ok_or(Stop::Fault(UD)),
            None => self.bus.fetch(self.start.wrapping_add(at as u64)),
        }
    }

    fn signed_byte(&mut self) -> Result<u64, Stop> {
        Ok(self.byte()? as i8 as u64)
    }

    fn signed_dword(&mut self) -> Result<u64, Stop> {
        let bytes = [self.byte()?, self.byte()?, self.byte()?, self.byte()?];
        Ok(i32::from_le_bytes(bytes) as u64)
    }
}

/// An instruction in the middle of being done.
struct Cpu<'a, B> {
    decoder: Decoder<'a, B>,
    old: Registers,
    new: Registers,
    rex: u8,
    size: u8,
}

/// Does one instruction, and returns the registers after it. `given` is what to decode instead of what is at RIP. With
/// `emulated`, it is an emulator that does it.
pub(crate) fn execute(
    registers: &Registers,
    bus: &mut impl Bus,
    given: Option<&[u8]>,
    emulated: bool,
) -> Result<Registers, Stop> {
    let decoder = Decoder { bus, given, start: registers.rip, length: 0 };
    let mut cpu = Cpu { decoder, old: *registers, new: *registers, rex: 0, size: 4 };
    cpu.run(emulated)?;
    Ok(cpu.new)
}

impl<B: Bus> Cpu<'_, B> {
    fn run(&mut self, emulated: bool) -> Result<(), Stop> {
        let (mut opcode, mut operand_size, mut rep) = (self.decoder.byte()?, false, false);
        while matches!(opcode, 0x66 | 0xf3) {
            operand_size |= opcode == 0x66;
            rep |= opcode == 0xf3;
            opcode = self.decoder.byte()?;
        }
        if opcode & 0xf0 == 0x40 {
            self.rex = opcode;
            opcode = self.decoder.byte()?;
        }
        if opcode == 0xcc {
            return Err(Stop::Int3(self.decoder.length));
        }
        let known = match (operand_size, rep) {
            (true, false) => opcode == 0x90,
            (false, true) => opcode == 0x0f,
            (both, _) => !both,
        };
        if !known {
            return Err(Stop::Fault(UD));
        }
        if self.rex & 8 != 0 {
            self.size = 8;
        }
        let target = self.perform(opcode, rep, emulated)?;
        let next = self.old.rip.wrapping_add(self.decoder.length.into());
        self.new.rip = target.unwrap_or(next);
        Ok(())
    }

    /// Does what the opcode says. Returns where it goes on, if not with the next instruction.
    fn perform(&mut self, opcode: u8, rep: bool, emulated: bool) -> Result<Option<u64>, Stop> {
        match opcode {
            0x0f => self.two_bytes(rep, emulated)?,
            0x90 => {}
            0x01 | 0x09 | 0x21 | 0x29 | 0x31 | 0x39 | 0x85 => {
                let (register, operand) = self.modrm(0)?;
                self.arithmetic(opcode, operand, self.old.gpr[register])?;
            }
            0x03 | 0x0b | 0x23 | 0x2b | 0x33 | 0x3b => {
                let (register, operand) = self.modrm(0)?;
                let right = self.load(operand, self.size)?;
                self.arithmetic(opcode - 2, Operand::Register(register), right)?;
            }
            0x83 => {
                let (extension, operand) = self.modrm(1)?;
                let right = self.decoder.signed_byte()?;
                let opcode = match extension & 7 {
                    0 => 0x01,
                    1 => 0x09,
                    4 => 0x21,
                    5 => 0x29,
                    6 => 0x31,
                    7 => 0x39,
                    _ => return Err(Stop::Fault(UD)),
                };
                self.arithmetic(opcode, operand, right)?;
            }
            0x88 => {
                let (register, operand) = self.modrm(0)?;
                self.store(operand, 1, self.old.gpr[register])?;
            }
            0x89 => {
                let (register, operand) = self.modrm(0)?;
                self.store(operand, self.size, self.old.gpr[register])?;
            }
            0x8b => {
                let (register, operand) = self.modrm(0)?;
                let value = self.load(operand, self.size)?;
                self.store(Operand::Register(register), self.size, value)?;
            }
            0x8d => match self.modrm(0)? {
                (register, Operand::Memory(address)) => self.store(Operand::Register(register), self.size, address)?,
                _ => return Err(Stop::Fault(UD)),
            },
            0xc6 => {
                let (_, operand) = self.modrm(1)?;
                let value = self.decoder.byte()?;
                self.store(operand, 1, value.into())?;
            }
            0xc7 => {
                let (_, operand) = self.modrm(4)?;
                let value = self.decoder.signed_dword()?;
                self.store(operand, self.size, value)?;
            }
            0x50..=0x57 => self.push(self.old.gpr[self.low(opcode)])?,
            0x58..=0x5f => {
                let value = self.pop()?;
                self.new.gpr[self.low(opcode)] = value;
            }
            0xa4 => {
                let value = self.decoder.bus.read(self.old.gpr[RSI], 1)?;
                self.decoder.bus.write(self.old.gpr[RDI], 1, value)?;
                self.new.gpr[RSI] = self.old.gpr[RSI].wrapping_add(1);
                self.new.gpr[RDI] = self.old.gpr[RDI].wrapping_add(1);
            }
            0xf5 => self.new.rflags ^= CARRY,
            0xf8 => self.new.rflags &= !CARRY,
            0xf9 => self.new.rflags |= CARRY,
            0xff => match self.modrm(0)? {
                (6, operand) => {
                    let value = self.load(operand, 8)?;
                    self.push(value)?;
                }
                (form @ (2 | 4), operand) => {
                    let target = self.load(operand, 8)?;
                    if !is_canonical(target) {
                        return Err(Stop::Fault(GP));
                    }
                    if form == 2 {
                        self.push(self.branch(0))?;
                    }
                    return Ok(Some(target));
                }
                _ => return Err(Stop::Fault(UD)),
            },
            0x70..=0x7f => {
                let distance = self.decoder.signed_byte()?;
                return Ok(self.condition(opcode & 15).then(|| self.branch(distance)));
            }
            0xeb => {
                let distance = self.decoder.signed_byte()?;
                return Ok(Some(self.branch(distance)));
            }
            0xe9 => {
                let distance = self.decoder.signed_dword()?;
                return Ok(Some(self.branch(distance)));
            }
            0xe8 => {
                let distance = self.decoder.signed_dword()?;
                self.push(self.branch(0))?;
                return Ok(Some(self.branch(distance)));
            }
            0xc3 => {
                let target = self.pop()?;
                return if is_canonical(target) { Ok(Some(target)) } else { Err(Stop::Fault(GP)) };
            }
            _ => return Err(Stop::Fault(UD)),
        }
        Ok(None)
    }

    fn two_bytes(&mut self, rep: bool, emulated: bool) -> Result<(), Stop> {
        match (self.decoder.byte()?, rep) {
            (0x1e, true) => (self.decoder.byte()? == 0xfa).then_some(()).ok_or(Stop::Fault(UD)),
            (0x1f, false) => self.modrm(0).map(|_| ()),
            (0x01, false) if self.decoder.byte()? == 0xc1 => {
                // A hypercall. What it returns is a number that grows.
                self.new.gpr[0] = self.old.gpr[0].wrapping_add(1);
                if emulated { Err(Stop::Call) } else { Ok(()) }
            }
            (0x23, false) => {
                // To DR7. No emulator does it.
                if emulated {
                    return Err(Stop::Fault(UD));
                }
                match self.modrm(0)? {
                    (7, Operand::Register(from)) => self.new.dr7 = self.old.gpr[from] & 0xffff_03ff | 0x400,
                    _ => return Err(Stop::Fault(UD)),
                }
                Ok(())
            }
            (0xb6, false) => {
                let (register, operand) = self.modrm(0)?;
                let value = self.load(operand, 1)?;
                self.store(Operand::Register(register), 4, value)
            }
            _ => Err(Stop::Fault(UD)),
        }
    }

    /// The register an opcode ends with.
    fn low(&self, opcode: u8) -> usize {
        usize::from(opcode & 7 | (self.rex & 1) << 3)
    }

    fn branch(&self, distance: u64) -> u64 {
        self.old.rip.wrapping_add(self.decoder.length.into()).wrapping_add(distance)
    }

    /// The two operands that a ModRM byte names. `behind` so many bytes of immediate follow.
    fn modrm(&mut self, behind: u8) -> Result<(usize, Operand), Stop> {
        let modrm = self.decoder.byte()?;
        let register = usize::from(modrm >> 3 & 7 | (self.rex & 4) << 1);
        let (mode, low) = (modrm >> 6, modrm & 7);
        let base = usize::from(low | (self.rex & 1) << 3);
        if mode == 3 {
            return Ok((register, Operand::Register(base)));
        }
        let mut address = 0_u64;
        let (mut absolute, mut relative) = (false, false);
        match (low, mode) {
            (4, _) => {
                let sib = self.decoder.byte()?;
                let index = usize::from(sib >> 3 & 7 | (self.rex & 2) << 2);
                if index != RSP {
                    address = self.old.gpr[index] << (sib >> 6);
                }
                absolute = sib & 7 == 5 && mode == 0;
                if !absolute {
                    let base = usize::from(sib & 7 | (self.rex & 1) << 3);
                    address = address.wrapping_add(self.old.gpr[base]);
                }
            }
            (5, 0) => relative = true,
            _ => address = self.old.gpr[base],
        }
        let displacement = match mode {
            1 => self.decoder.signed_byte()?,
            2 => self.decoder.signed_dword()?,
            _ if absolute || relative => self.decoder.signed_dword()?,
            _ => 0,
        };
        address = address.wrapping_add(displacement);
        if relative {
            address = address.wrapping_add(self.branch(behind.into()));
        }
        Ok((register, Operand::Memory(address)))
    }

    fn load(&mut self, operand: Operand, size: u8) -> Result<u64, Stop> {
        match operand {
            Operand::Register(number) => Ok(self.old.gpr[number] & mask(size)),
            Operand::Memory(address) => self.decoder.bus.read(address, size),
        }
    }

    fn store(&mut self, operand: Operand, size: u8, value: u64) -> Result<(), Stop> {
        match (operand, size) {
            (Operand::Memory(address), _) => self.decoder.bus.write(address, size, value & mask(size)),
            (Operand::Register(number), 4 | 8) => {
                self.new.gpr[number] = value & mask(size);
                Ok(())
            }
            // High byte registers are not worth it.
            _ => Err(Stop::Fault(UD)),
        }
    }

    fn push(&mut self, value: u64) -> Result<(), Stop> {
        let stack = self.old.gpr[RSP].wrapping_sub(8);
        self.decoder.bus.write(stack, 8, value)?;
        self.new.gpr[RSP] = stack;
        Ok(())
    }

    fn pop(&mut self) -> Result<u64, Stop> {
        let value = self.decoder.bus.read(self.old.gpr[RSP], 8)?;
        self.new.gpr[RSP] = self.old.gpr[RSP].wrapping_add(8);
        Ok(value)
    }

    /// The arithmetic instruction whose form `op r/m, r` has this opcode.
    fn arithmetic(&mut self, opcode: u8, operand: Operand, right: u64) -> Result<(), Stop> {
        let (size, keeps) = (self.size, matches!(opcode, 0x39 | 0x85));
        let left = match operand {
            Operand::Memory(address) if !keeps => self.decoder.bus.read_to_write(address, size)?,
            operand => self.load(operand, size)?,
        };
        let right = right & mask(size);
        let wide = |value: u64| i128::from(value);
        let signed = |value: u64| ((value << (64 - 8 * size)) as i64 >> (64 - 8 * size)) as i128;
        let (exact, exact_signed, low) = match opcode {
            0x01 => (wide(left) + wide(right), signed(left) + signed(right), (left & 15) + (right & 15) > 15),
            0x29 | 0x39 => (wide(left) - wide(right), signed(left) - signed(right), left & 15 < right & 15),
            _ => {
                let value = match opcode {
                    0x09 => left | right,
                    0x31 => left ^ right,
                    _ => left & right,
                };
                (wide(value), signed(value), false)
            }
        };
        let result = exact as u64 & mask(size);
        self.new.rflags &= !(CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW);
        let mut set = |flag: u64, on: bool| self.new.rflags |= if on { flag } else { 0 };
        set(CARRY, exact < 0 || exact > wide(mask(size)));
        set(PARITY, (result as u8).count_ones().is_multiple_of(2));
        set(ADJUST, low);
        set(ZERO, result == 0);
        set(SIGN, signed(result) < 0);
        set(OVERFLOW, signed(result) != exact_signed);
        if keeps { Ok(()) } else { self.store(operand, size, result) }
    }

    fn condition(&self, number: u8) -> bool {
        let is = |flag| self.old.rflags & flag != 0;
        let holds = match number >> 1 {
            0 => is(OVERFLOW),
            1 => is(CARRY),
            2 => is(ZERO),
            3 => is(CARRY) | is(ZERO),
            4 => is(SIGN),
            5 => is(PARITY),
            6 => is(SIGN) ^ is(OVERFLOW),
            _ => is(ZERO) | (is(SIGN) ^ is(OVERFLOW)),
        };
        holds ^ (number & 1 != 0)
    }
}

/// The lowest so many bytes.
fn mask(size: u8) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(size))
}

pub(crate) fn is_canonical(address: u64) -> bool {
    (address << 16) as i64 >> 16 == address as i64
}
