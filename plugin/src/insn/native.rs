//! The interpreter against the CPU this runs on: the same instruction from the same state, natively, single-stepped in a
//! child process.
//!
//! `HYPERBP_NATIVE_CASES` says how many cases to try in each mode.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::interpret::{Memory, Op, Operand};
use super::paging::Intent;
use crate::{CodeMode, Registers};

/// Below 4 GiB, so that 32-bit code reaches it: two pages of data, one of code.
const BASE: u64 = 0x2000_0000;
const CODE: u64 = BASE + 0x2000;
const SIZE: usize = 0x3000;
/// Cases unless the environment says otherwise.
const CASES: u64 = 20_000;
/// Selectors of Linux's user code segments.
const CS_64: u64 = 0x33;
const CS_32: u64 = 0x23;
/// And of its data segment: 64-bit code needs none, 32-bit code does.
const DS: u64 = 0x2b;
/// IF and the bit that is always set.
const FLAGS: u64 = 0x202;
/// CF, PF, AF, ZF, SF, OF and DF.
const FREE_FLAGS: u64 = 0xcd5;

/// SplitMix64.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// An address in the data, often an aligned one.
    fn address(&mut self) -> u64 {
        BASE + (self.below(0x2000) & !self.pick(&[0, 7]))
    }

    /// A value for a register: an address in the data, something near an edge, or anything.
    fn value(&mut self) -> u64 {
        match self.below(4) {
            0 | 1 => self.address(),
            2 => {
                let edge =
                    self.pick(&[0_u64, 0x80, 0x100, 0x8000, 0x1_0000, 0x8000_0000, 0x1_0000_0000, 1 << 47, 1 << 63]);
                edge.wrapping_add(self.below(5)).wrapping_sub(2)
            }
            _ => self.next(),
        }
    }

    /// An instruction with the opcode of a template, often with other operands.
    fn instruction(&mut self, template: &Template, long: bool) -> [u8; 16] {
        let Template { prefix, opcode, modrm, .. } = *template;
        let mut bytes = [0; 16];
        let mut at = 0;
        let mut push = |byte: u8| {
            bytes[at] = byte;
            at += 1;
        };
        if self.below(16) == 0 {
            push(self.pick(&[0x66, 0x67, 0xf2, 0xf3, 0x2e, 0x3e, 0x64, 0xf0]));
        }
        match prefix {
            Some(0x48) => push(0x48 | self.below(8) as u8),
            _ => {
                prefix.map(&mut push);
                if long && self.below(2) == 0 {
                    push(0x40 | self.below(16) as u8);
                }
            }
        }
        opcode.to_be_bytes().into_iter().skip_while(|byte| *byte == 0).for_each(&mut push);
        if opcode == 0 {
            push(0);
        }
        if matches!(opcode, 0xa0..=0xa3) {
            // An address, and no ModR/M.
            self.address().to_le_bytes().into_iter().for_each(&mut push);
            return bytes;
        }
        push(match self.below(4) {
            0 => self.next() as u8,
            // The same register or extension of the opcode, and memory or not.
            1 if modrm < 0xc0 => modrm & 0x38 | self.next() as u8 & 0x87,
            1 => modrm & 0xf8 | self.next() as u8 & 7,
            _ => modrm,
        });
        // SIB, displacement, immediate: often small, or an address.
        let tail = match self.below(4) {
            0 => self.next(),
            1 if !long => self.address(),
            _ => self.below(0x1000),
        };
        for byte in tail.to_le_bytes() {
            push(byte);
        }
        bytes
    }
}

/// What is counted: which instruction, and what kind of operand.
type Kind = (Code, Operands);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operands {
    /// Registers and immediates.
    Plain,
    Memory,
    /// Memory, relative to RIP.
    Relative,
}

fn kind(instruction: &Instruction) -> Kind {
    let memory = (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
    let operands = match memory {
        false => Operands::Plain,
        true if instruction.is_ip_rel_memory_operand() => Operands::Relative,
        true => Operands::Memory,
    };
    (instruction.code(), operands)
}

/// How an instruction of one kind is encoded.
#[derive(Clone, Copy, Debug)]
struct Template {
    kind: Kind,
    prefix: Option<u8>,
    /// One byte, or two, the first of them first.
    opcode: u16,
    modrm: u8,
}

/// One of each kind that the interpreter knows, in the order of their encodings. It is asked: no list can be incomplete.
fn templates(mode: CodeMode) -> Vec<Template> {
    let prefixes: &[_] = match mode {
        CodeMode::Bits64 => &[None, Some(0x66), Some(0xf3), Some(0x48)],
        _ => &[None, Some(0x66), Some(0xf3)],
    };
    let opcodes = (0..=0xff).filter(|opcode| *opcode != 0x0f).chain(0x0f00..=0x0fff_u16);
    let mut templates = BTreeMap::new();
    for opcode in opcodes {
        // Registers 2 and 3, what register 6 points to, what is relative to RIP: each with every other operand or extension.
        for modrm in [0xc2, 0xc3, 0x06, 0x05].into_iter().flat_map(|rm| (0..8).map(move |reg| rm | reg << 3)) {
            for prefix in prefixes {
                let mut bytes: Vec<u8> = prefix.iter().copied().collect();
                bytes.extend(opcode.to_be_bytes().into_iter().skip_while(|byte| *byte == 0));
                if opcode == 0 {
                    bytes.push(0);
                }
                bytes.push(modrm);
                bytes.extend([0; 8]);
                let instruction = Decoder::new(mode.bits(), &bytes, DecoderOptions::NONE).decode();
                if Op::decode(&bytes[..instruction.len()], mode).is_some() {
                    let kind = kind(&instruction);
                    let template = Template { kind, prefix: *prefix, opcode, modrm };
                    templates.entry((kind.0 as u32, kind.1)).or_insert(template);
                }
            }
        }
    }
    templates.into_values().collect()
}

/// The region as the parent sees it, and what the interpreter would write.
struct Region<'a> {
    bytes: &'a [u8; SIZE],
    accessed: Vec<Operand>,
    written: Option<(u64, [u8; 8], usize)>,
}

impl Region<'_> {
    fn range(linear: u64, length: usize) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(linear.checked_sub(BASE)?).ok()?;
        let end = start.checked_add(length)?;
        (end <= SIZE).then_some(start..end)
    }

    fn note(&mut self, linear: u64, size: usize, intent: Intent) {
        assert!(self.written.is_none(), "memory is written last");
        self.accessed.push(Operand { linear, size: size as u8, intent });
    }
}

impl Memory for Region<'_> {
    fn read(&mut self, linear: u64, into: &mut [u8]) -> Option<()> {
        into.copy_from_slice(&self.bytes[Self::range(linear, into.len())?]);
        self.note(linear, into.len(), Intent::Read);
        Some(())
    }

    fn write(&mut self, linear: u64, bytes: &[u8]) -> Option<()> {
        Self::range(linear, bytes.len())?;
        self.note(linear, bytes.len(), Intent::Write);
        let mut all = [0; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        self.written = Some((linear, all, bytes.len()));
        Some(())
    }
}

/// A child process that stands still, and memory it shares with us.
struct Tracee {
    pid: Pid,
    shared: *mut u8,
}

impl Tracee {
    fn start() -> nix::Result<Self> {
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED_NOREPLACE;
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE | ProtFlags::PROT_EXEC;
        let (address, size) = (NonZeroUsize::new(BASE as usize), NonZeroUsize::new(SIZE).unwrap());
        // SAFETY: a fresh mapping that replaces none.
        let shared = unsafe { mmap_anonymous(address, size, rights, flags) }?.cast::<u8>().as_ptr();
        // SAFETY: the child makes two system calls, and is stopped then until it is killed.
        match unsafe { fork() }? {
            ForkResult::Child => {
                let traced = ptrace::traceme();
                let _ = traced.and_then(|()| raise(Signal::SIGSTOP));
                std::process::abort();
            }
            ForkResult::Parent { child } => {
                let tracee = Self { pid: child, shared };
                match waitpid(child, None)? {
                    WaitStatus::Stopped(_, Signal::SIGSTOP) => Ok(tracee),
                    _ => Err(nix::Error::EPERM),
                }
            }
        }
    }

    fn memory(&mut self) -> &mut [u8; SIZE] {
        // SAFETY: mapped as long as this process lives, and the child stands still.
        unsafe { &mut *self.shared.cast() }
    }

    /// Runs one instruction. `None` if it faults.
    fn step(&self, registers: &libc_registers::Native) -> nix::Result<Option<libc_registers::Native>> {
        ptrace::setregs(self.pid, *registers)?;
        ptrace::step(self.pid, None)?;
        match waitpid(self.pid, None)? {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => ptrace::getregs(self.pid).map(Some),
            WaitStatus::Stopped(..) => Ok(None),
            status => panic!("the child is gone: {status:?}"),
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
        // SAFETY: nobody uses it any more.
        let _ = unsafe { nix::sys::mman::munmap(std::ptr::NonNull::new(self.shared).unwrap().cast(), SIZE) };
    }
}

mod libc_registers {
    /// What ptrace calls the registers.
    pub(super) type Native = nix::libc::user_regs_struct;
}

fn native_of(registers: &Registers, base: &libc_registers::Native, long: bool) -> libc_registers::Native {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = registers.gpr;
    let (rip, eflags) = (registers.rip, registers.rflags);
    let cs = if long { CS_64 } else { CS_32 };
    // Not in a system call that would be restarted.
    let orig_rax = u64::MAX;
    libc_registers::Native {
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        eflags,
        cs,
        orig_rax,
        ds: DS,
        es: DS,
        ..*base
    }
}

fn registers_of(native: &libc_registers::Native, like: &Registers) -> Registers {
    let n = native;
    Registers {
        gpr: [
            n.rax, n.rcx, n.rdx, n.rbx, n.rsp, n.rbp, n.rsi, n.rdi, n.r8, n.r9, n.r10, n.r11, n.r12, n.r13, n.r14,
            n.r15,
        ],
        rip: n.rip,
        rflags: n.eflags & !(1 << 16),
        ..*like
    }
}

/// How many cases each kind got.
type Coverage = BTreeMap<String, u64>;

/// A kind is tried so often in a row that it has a case that the interpreter does: addresses must be in the region, and targets
/// canonical.
const TRIES: u64 = 500;

fn compare(mode: CodeMode, cases: u64) -> nix::Result<Coverage> {
    let long = mode == CodeMode::Bits64;
    let templates = templates(mode);
    let mut coverage: Coverage = templates.iter().map(|template| (format!("{:?}", template.kind), 0)).collect();
    let mut tracee = Tracee::start()?;
    let base = ptrace::getregs(tracee.pid)?;
    let mut random = Random(u64::from(mode.bits()));
    let mut image = [0; SIZE];
    for word in image.as_chunks_mut::<8>().0 {
        *word = random.value().to_le_bytes();
    }
    let (mut done, mut tries) = (0, 0);
    let mut order = templates.iter().cycle();
    let mut template = order.next().expect("the interpreter knows instructions");
    while done < cases {
        tries += 1;
        if tries > TRIES {
            template = order.next().expect("they are repeated");
            tries = 0;
        }
        let bytes = random.instruction(template, long);
        let decoded = Decoder::new(mode.bits(), &bytes, DecoderOptions::NONE).decode();
        let bytes = &bytes[..decoded.len().max(1)];
        let Some(op) = Op::decode(bytes, mode) else { continue };
        let mut registers = Registers { mode, cpl: 3, flat: true, ..Registers::default() };
        registers.gpr = std::array::from_fn(|_| random.value());
        registers.gpr[4] = if random.below(16) == 0 { registers.gpr[4] } else { random.address() };
        if !long {
            registers.gpr = registers.gpr.map(|value| value & 0xffff_ffff);
        }
        registers.rip = CODE + random.below(0xff0);
        registers.rflags = FLAGS | random.next() & FREE_FLAGS;
        let code = (registers.rip - BASE) as usize;
        image[code..code + bytes.len()].copy_from_slice(bytes);

        let mut ours = registers;
        let mut region = Region { bytes: &image, accessed: Vec::new(), written: None };
        if op.run(&registers, &mut ours, &mut region).is_none() {
            continue;
        }
        let expected: Vec<_> = op.operands(&registers).into_iter().flatten().flatten().collect();
        assert_eq!(region.accessed, expected, "what {bytes:02x?} accesses from {registers:x?}");
        if let Some((linear, bytes, length)) = region.written {
            let range = Region::range(linear, length).unwrap();
            tracee.memory().copy_from_slice(&image);
            image[range].copy_from_slice(&bytes[..length]);
        } else {
            tracee.memory().copy_from_slice(&image);
        }
        let native = tracee.step(&native_of(&registers, &base, long))?;
        let what = || format!("{:?} ({bytes:02x?}) from {registers:x?}", decoded.code());
        let native = native.unwrap_or_else(|| panic!("the CPU faults: {}", what()));
        let native = registers_of(&native, &ours);
        assert_eq!(ours, native, "{}", what());
        assert!(*tracee.memory() == image, "memory differs after {}", what());
        let kind = kind(&decoded);
        *coverage.entry(format!("{kind:?}")).or_default() += 1;
        done += 1;
        if kind == template.kind {
            template = order.next().expect("they are repeated");
            tries = 0;
        }
    }
    Ok(coverage)
}

#[test]
fn does_what_this_cpu_does() {
    let _alone = crate::FORKING.lock();
    let cases = std::env::var("HYPERBP_NATIVE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES);
    for mode in [CodeMode::Bits64, CodeMode::Bits32] {
        match compare(mode, cases) {
            Ok(coverage) => {
                let kinds = coverage.len() as u64;
                let mut rarest: Vec<_> = coverage.iter().map(|(kind, count)| (count, kind)).collect();
                rarest.sort();
                println!("{cases} cases of {kinds} kinds in {}-bit code: {rarest:?}", mode.bits());
                let floor = cases / kinds / 2;
                let rare: Vec<_> = rarest.iter().take_while(|(count, _)| **count < floor).collect();
                assert!(rare.is_empty(), "tried less than {floor} times: {rare:?}");
            }
            Err(error) => eprintln!("SKIPPED: this machine does not let us trace a child ({error})"),
        }
    }
}
