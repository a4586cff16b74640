//! The interpreter against the CPU this runs on: the same instruction from the same state, natively, single-stepped in a
//! child process.
//!
//! `HYPERBP_NATIVE_CASES` says how many cases to try in each mode.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
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
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// A value for a register: a place in the data, something near an edge, or anything.
    fn value(&mut self) -> u64 {
        match self.below(4) {
            0 | 1 => BASE + self.below(0x2000),
            2 => {
                let edge =
                    self.pick(&[0_u64, 0x80, 0x100, 0x8000, 0x1_0000, 0x8000_0000, 0x1_0000_0000, 1 << 47, 1 << 63]);
                edge.wrapping_add(self.below(5)).wrapping_sub(2)
            }
            _ => self.next(),
        }
    }

    /// Bytes that begin with an opcode of the interpreter's.
    fn instruction(&mut self, long: bool) -> [u8; 16] {
        const ONE: &[u8] = &[
            0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25,
            0x28, 0x29, 0x2a, 0x2b, 0x2c, 0x2d, 0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d,
            0x40, 0x41, 0x48, 0x4c, 0x50, 0x53, 0x54, 0x55, 0x57, 0x58, 0x5b, 0x5c, 0x5d, 0x5f, 0x63, 0x68, 0x6a, 0x70,
            0x71, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x7b, 0x7c, 0x7d, 0x7e, 0x7f, 0x80, 0x81, 0x83,
            0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8d, 0x90, 0x91, 0x97, 0xa8, 0xa9, 0xb0, 0xb4, 0xb7, 0xb8,
            0xbf, 0xc2, 0xc3, 0xc6, 0xc7, 0xc9, 0xe8, 0xe9, 0xeb, 0xf6, 0xf7, 0xfe, 0xff,
        ];
        const TWO: &[u8] =
            &[0x1e, 0x1f, 0x40, 0x44, 0x4c, 0x4f, 0x80, 0x85, 0x8c, 0x90, 0x95, 0x9c, 0xb6, 0xb7, 0xbe, 0xbf];
        let mut bytes = [0; 16];
        let mut at = 0;
        let mut push = |byte: u8| {
            bytes[at] = byte;
            at += 1;
        };
        if self.below(8) == 0 {
            push(self.pick(&[0x66, 0x67, 0xf2, 0xf3, 0x2e, 0x3e, 0x64, 0xf0]));
        }
        if long && self.below(2) == 0 {
            push(0x40 | self.below(16) as u8);
        }
        if self.below(4) == 0 {
            push(0x0f);
            push(if self.below(3) == 0 {
                0x40 | self.below(16) as u8 | self.pick(&[0, 0x40, 0x50])
            } else {
                self.pick(TWO)
            });
        } else {
            push(self.pick(ONE));
        }
        // ModR/M, SIB, displacement, immediate: often small.
        push(self.next() as u8);
        let tail = if self.below(2) == 0 { self.next() } else { self.below(0x1000) };
        for byte in tail.to_le_bytes() {
            push(byte);
        }
        bytes
    }
}

/// The region as the parent sees it, and what the interpreter would write.
struct Region<'a> {
    bytes: &'a [u8; SIZE],
    accessed: Option<Operand>,
    written: Option<(u64, [u8; 8], usize)>,
}

impl Region<'_> {
    fn range(linear: u64, length: usize) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(linear.checked_sub(BASE)?).ok()?;
        let end = start.checked_add(length)?;
        (end <= SIZE).then_some(start..end)
    }

    fn note(&mut self, linear: u64, size: usize, intent: Intent) {
        assert!(self.accessed.is_none(), "an instruction accesses memory once");
        self.accessed = Some(Operand { linear, size: size as u8, intent });
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

/// How many cases each mnemonic got.
type Coverage = BTreeMap<String, u64>;

fn compare(mode: CodeMode, cases: u64) -> nix::Result<Coverage> {
    let long = mode == CodeMode::Bits64;
    let mut tracee = Tracee::start()?;
    let base = ptrace::getregs(tracee.pid)?;
    let mut random = Random(u64::from(mode.bits()));
    let mut coverage = Coverage::new();
    let mut image = [0; SIZE];
    for byte in &mut image {
        *byte = random.next() as u8;
    }
    let mut done = 0;
    while done < cases {
        let bytes = random.instruction(long);
        let decoded = Decoder::new(mode.bits(), &bytes, DecoderOptions::NONE).decode();
        let bytes = &bytes[..decoded.len().max(1)];
        let Some(op) = Op::decode(bytes, mode) else { continue };
        let mut registers = Registers { mode, cpl: 3, flat: true, ..Registers::default() };
        registers.gpr = std::array::from_fn(|_| random.value());
        registers.gpr[4] = if random.below(16) == 0 { registers.gpr[4] } else { BASE + 0x20 + random.below(0x1fc0) };
        if !long {
            registers.gpr = registers.gpr.map(|value| value & 0xffff_ffff);
        }
        registers.rip = CODE + random.below(0xff0);
        registers.rflags = FLAGS | random.next() & FREE_FLAGS;
        let code = (registers.rip - BASE) as usize;
        image[code..code + bytes.len()].copy_from_slice(bytes);

        let mut ours = registers;
        let mut region = Region { bytes: &image, accessed: None, written: None };
        if op.run(&registers, &mut ours, &mut region).is_none() {
            continue;
        }
        assert_eq!(region.accessed, op.operand(&registers), "what {bytes:02x?} accesses from {registers:x?}");
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
        *coverage.entry(format!("{:?}", decoded.mnemonic())).or_default() += 1;
        done += 1;
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
                println!("{cases} cases in {}-bit code: {coverage:?}", mode.bits());
                let needed =
                    [Mnemonic::Push, Mnemonic::Pop, Mnemonic::Mov, Mnemonic::Sub, Mnemonic::Call, Mnemonic::Ret];
                for mnemonic in needed {
                    assert!(coverage.contains_key(&format!("{mnemonic:?}")), "{mnemonic:?} was never tried");
                }
            }
            Err(error) => eprintln!("SKIPPED: this machine does not let us trace a child ({error})"),
        }
    }
}
