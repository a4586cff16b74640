//! The guest: its memory, its page tables, and the programs its virtual CPUs run, made of random instructions.
//!
//! Linear memory: code pages one after another, data pages one after another, a page that is read-only and one that is not
//! there, and everything once more through large pages, the frames where shadows will be included.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::rc::Rc;

use hyperbp::{CodeMode, Gfn, Gpa, PAGE_SIZE, Registers};
use proptest::prelude::*;

use crate::machine::{Machine, Page, SHADOWS, Tables};

/// Frames of the page tables' four levels.
const TABLES: [u64; 4] = [0x10, 0x11, 0x12, 0x13];
/// Frame numbers and linear addresses of the code, of the data, and of a page that may not be written.
const CODE: u64 = 0x20;
const CODE_AT: u64 = 0x40_0000;
pub(crate) const CODE_PAGES: u64 = 4;
const DATA: u64 = 0x28;
const DATA_AT: u64 = 0x41_0000;
const DATA_PAGES: u64 = 2;
const READ_ONLY: u64 = 0x2c;
const READ_ONLY_AT: u64 = 0x42_0000;
const ABSENT_AT: u64 = 0x43_0000;
/// Each virtual CPU has a page for its stack.
const STACKS: u64 = 0x30;
const STACKS_AT: u64 = 0x44_0000;
/// Everything once more.
const ALL_AT: u64 = 0x80_0000;
/// In a code page: a part that holds no code, for data and stacks.
const SCRATCH: u64 = 0x900;
const SCRATCH_SIZE: u64 = 0x100;
/// In the first code page: the gates of exceptions. In each: a stack for the exceptions of a virtual CPU.
const TABLES_AT: Tables = Tables { gates: CODE_AT + 0xa00, stack: CODE_AT + 0xc00, next_stack: PAGE_SIZE as u64 };
/// Where the functions are that all virtual CPUs call.
const FUNCTIONS_AT: u64 = CODE_AT + PAGE_SIZE as u64 + 0x100;
/// Most virtual CPUs of a guest.
pub(crate) const VCPUS: usize = 3;

const CR0: u64 = 1 << 31 | 1 << 16 | 1;
const CR4_PAE: u64 = 1 << 5;
/// LME, LMA and NXE.
const EFER: u64 = 1 << 8 | 1 << 10 | 1 << 11;
const PRESENT_WRITABLE: u64 = 3;
const USER: u64 = 1 << 2;
const ACCESSED_DIRTY: u64 = 3 << 5;
const LARGE: u64 = 1 << 7;

/// A place in linear memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// In the data, also across its pages' ends.
    Data(u16),
    /// In a code page, but not in the code.
    Scratch(u8, u8),
    ReadOnly(u16),
    Absent(u16),
    /// Where a shadow may be.
    Hidden(u8, u16),
}

impl Place {
    fn linear(self) -> u64 {
        match self {
            Self::Data(at) => DATA_AT + u64::from(at) % (DATA_PAGES * PAGE_SIZE as u64 - 8),
            Self::Scratch(page, at) => {
                let page = u64::from(page) % CODE_PAGES;
                // Through either mapping.
                let base = if at & 1 == 0 { CODE_AT } else { ALL_AT + CODE * PAGE_SIZE as u64 };
                base + page * PAGE_SIZE as u64 + SCRATCH + u64::from(at) % (SCRATCH_SIZE - 8)
            }
            Self::ReadOnly(at) => READ_ONLY_AT + u64::from(at) % (PAGE_SIZE as u64 - 8),
            Self::Absent(at) => ABSENT_AT + u64::from(at) % PAGE_SIZE as u64,
            Self::Hidden(frame, at) => {
                ALL_AT + (SHADOWS + u64::from(frame) % 4) * PAGE_SIZE as u64 + u64::from(at) % PAGE_SIZE as u64
            }
        }
    }
}

/// Something a program does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Piece {
    Nop,
    /// With a prefix: one may also jump to the byte after that.
    LongNop,
    WideNop,
    Endbr,
    /// One the interpreter does not do.
    Carry(u8),
    Push(u8),
    Pop(u8),
    Move(u8, u8),
    MoveImmediate(u8, i32),
    Lea(u8, u8, i8),
    Arithmetic(u8, u8, u8),
    ArithmeticImmediate(u8, u8, i8),
    StoreStack(i8, u8),
    LoadStack(i8, u8),
    Load(u8, Place),
    LoadByte(u8, Place),
    LoadRelative(u8, Place),
    /// Reads the code itself.
    LoadCode(u8, u16),
    Compare(u8, Place),
    Store(u8, Place),
    StoreByte(u8, Place),
    AddTo(u8, Place),
    PushFrom(Place),
    Copy(Place, Place),
    JumpIf(u8, u8),
    Jump(u8),
    Call(u8),
    /// By way of the address in memory, which is stored there before.
    CallThrough(u8, Place),
    /// To the next piece.
    JumpThrough(Place),
    /// One that the hypervisor's emulator does not do.
    Hypercall,
    /// Writes DR7, as the guest's kernel would for a debugger: which of [`DEBUG_CONTROLS`].
    DebugControl(u8),
    /// The guest's own.
    Int3,
    PrefixedInt3,
    /// A byte, or four, that [`Patch`](Self::Patch)es are written to.
    Cell(bool, u8),
    /// Which cell, and what with.
    Patch(u8, u8),
}

impl Piece {
    /// What several virtual CPUs are not promised is left out. None both reads and writes where there is no memory: see
    /// `World::sees_spill`.
    fn be_modest(&mut self) {
        match self {
            Self::AddTo(_, place @ Place::Hidden(..)) | Self::Copy(place @ Place::Hidden(..), Place::Hidden(..)) => {
                *place = Place::Data(0);
            }
            // Another virtual CPU may write to the same place in between.
            Self::CallThrough(..) | Self::JumpThrough(_) => *self = Self::Nop,
            _ => {}
        }
    }
}

/// What DR7 may be: breakpoints off, on data that is written or accessed, on instructions, and all of that at once. Random
/// programs have none on instructions: where Xen would be late with RF, there is a #DB too many.
const DEBUG_CONTROLS: [u32; 6] = [0x400, 0x1111_0455, 0x3333_0455, 0x33_0405, 0x4aa, 0x3011_0495];

/// What a cell of one byte holds.
const BYTES: [u8; 5] = [0x90, 0xcc, 0x50, 0xf8, 0xf9];
/// What a cell of four bytes holds: always an instruction of three bytes and one of one.
const DWORDS: [[u8; 4]; 5] = [
    [0x48, 0x01, 0xc8, 0x90],
    [0x48, 0x31, 0xca, 0xf9],
    [0x48, 0x89, 0xd8, 0xcc],
    [0x0f, 0x01, 0xc1, 0x90],
    [0x48, 0x29, 0xc1, 0x50],
];

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        3 => (0..0x20_u16, 0..2_u16).prop_map(|(at, page)| Place::Data(page * 0xff8 + at)),
        3 => (any::<u8>(), any::<u8>()).prop_map(|(page, at)| Place::Scratch(page, at)),
        1 => any::<u16>().prop_map(Place::ReadOnly),
        1 => any::<u16>().prop_map(Place::Absent),
        2 => (0..4_u8, 0..0x20_u16).prop_map(|(frame, at)| Place::Hidden(frame, at)),
    ]
}

/// RAX, RCX, RDX, RBX, RBP, RSI, R8 and R15.
fn register() -> impl Strategy<Value = u8> {
    prop::sample::select(vec![0_u8, 1, 2, 3, 5, 6, 8, 15])
}

pub(crate) fn piece() -> impl Strategy<Value = Piece> {
    let plain = prop_oneof![
        2 => Just(Piece::Nop),
        1 => Just(Piece::LongNop),
        1 => Just(Piece::WideNop),
        1 => Just(Piece::Endbr),
        1 => prop::sample::select(vec![0xf5_u8, 0xf8, 0xf9]).prop_map(Piece::Carry),
        2 => register().prop_map(Piece::Push),
        2 => register().prop_map(Piece::Pop),
        1 => (register(), register()).prop_map(|(to, from)| Piece::Move(to, from)),
        1 => (register(), any::<i32>()).prop_map(|(to, value)| Piece::MoveImmediate(to, value)),
        1 => (register(), register(), any::<i8>()).prop_map(|(to, base, by)| Piece::Lea(to, base, by)),
        2 => (0..7_u8, register(), register()).prop_map(|(op, to, from)| Piece::Arithmetic(op, to, from)),
        1 => (0..6_u8, register(), any::<i8>()).prop_map(|(op, to, by)| Piece::ArithmeticImmediate(op, to, by)),
        1 => Just(Piece::Hypercall),
    ];
    let memory = prop_oneof![
        1 => (0..0x40_i8, register()).prop_map(|(at, from)| Piece::StoreStack(at, from)),
        1 => (0..0x40_i8, register()).prop_map(|(at, to)| Piece::LoadStack(at, to)),
        2 => (register(), place()).prop_map(|(to, from)| Piece::Load(to, from)),
        1 => (register(), place()).prop_map(|(to, from)| Piece::LoadByte(to, from)),
        1 => (register(), place()).prop_map(|(to, from)| Piece::LoadRelative(to, from)),
        3 => (register(), any::<u16>()).prop_map(|(to, from)| Piece::LoadCode(to, from)),
        1 => (register(), place()).prop_map(|(left, right)| Piece::Compare(left, right)),
        2 => (register(), place()).prop_map(|(from, to)| Piece::Store(from, to)),
        1 => (0..4_u8, place()).prop_map(|(from, to)| Piece::StoreByte(from, to)),
        1 => (register(), place()).prop_map(|(by, to)| Piece::AddTo(by, to)),
        1 => place().prop_map(Piece::PushFrom),
        1 => (place(), place()).prop_map(|(from, to)| Piece::Copy(from, to)),
    ];
    let code = prop_oneof![
        2 => (0..16_u8, 0..4_u8).prop_map(|(condition, over)| Piece::JumpIf(condition, over)),
        1 => (0..4_u8).prop_map(Piece::Jump),
        3 => any::<u8>().prop_map(Piece::Call),
        1 => (any::<u8>(), place()).prop_map(|(which, place)| Piece::CallThrough(which, place)),
        1 => place().prop_map(Piece::JumpThrough),
        2 => (0..3_u8).prop_map(Piece::DebugControl),
        1 => Just(Piece::Int3),
        1 => Just(Piece::PrefixedInt3),
        2 => (any::<bool>(), 0..5_u8).prop_map(|(four, what)| Piece::Cell(four, what)),
        3 => (any::<u8>(), 0..5_u8).prop_map(|(cell, what)| Piece::Patch(cell, what)),
    ];
    prop_oneof![5 => plain, 5 => memory, 4 => code]
}

/// A function that all virtual CPUs may call: nothing in it is ever written, and it calls nobody.
fn function() -> impl Strategy<Value = Vec<Piece>> {
    let fixed = piece().prop_map(|piece| match piece {
        Piece::Cell(..) | Piece::Patch(..) | Piece::Call(_) | Piece::Push(_) | Piece::Pop(_) | Piece::PushFrom(_) => {
            Piece::Nop
        }
        mut piece => {
            piece.be_modest();
            piece
        }
    });
    prop::collection::vec(fixed, 0..4)
}

/// What the program of a virtual CPU is made of, and how it begins.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pieces: Vec<Piece>,
    /// Its stack is in a code page.
    stack_in_code: bool,
    registers: [u64; 16],
}

#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    programs: Vec<Program>,
    functions: Vec<Vec<Piece>>,
    user: bool,
    /// The data has not been accessed yet, as far as the page tables know.
    fresh: bool,
}

pub(crate) fn recipe(vcpus: usize) -> impl Strategy<Value = Recipe> {
    let register =
        prop_oneof![Just(0_u64), Just(u64::MAX), 0..0x1000_u64, any::<u64>().prop_map(|value| value | 1 << 40)];
    let program = (prop::collection::vec(piece(), 1..24), any::<bool>(), prop::array::uniform16(register))
        .prop_map(|(pieces, stack_in_code, registers)| Program { pieces, stack_in_code, registers });
    let functions = prop::collection::vec(function(), 1..4);
    let program = program.prop_map(move |mut program| {
        if vcpus > 1 {
            program.pieces.iter_mut().for_each(Piece::be_modest);
        }
        program
    });
    (prop::collection::vec(program, vcpus), functions, any::<bool>(), any::<bool>())
        .prop_map(|(programs, functions, user, fresh)| Recipe { programs, functions, user, fresh })
}

impl Recipe {
    /// One program for each virtual CPU, and no functions.
    pub(crate) fn plain(programs: &[&[Piece]]) -> Self {
        let program = |pieces: &&[Piece]| Program { pieces: pieces.to_vec(), stack_in_code: false, registers: [0; 16] };
        Self { programs: programs.iter().map(program).collect(), functions: Vec::new(), user: false, fresh: false }
    }
}

/// A guest that can be run.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) machine: Machine,
    /// Where a breakpoint may be set: where an instruction begins, or in data. Sorted.
    pub(crate) sites: Vec<Gpa>,
}

impl Recipe {
    pub(crate) fn build(&self) -> Guest {
        let mut assembler = Assembler::default();
        let functions: Vec<u64> = {
            assembler.at = FUNCTIONS_AT;
            let mut one = |pieces: &Vec<Piece>| {
                let start = assembler.at;
                assembler.pieces(pieces, &[]);
                assembler.emit(&[0xc3]);
                start
            };
            self.functions.iter().map(&mut one).collect()
        };
        let mut handlers = Vec::new();
        for (number, program) in (0..).zip(&self.programs) {
            // So that it crosses a page's end.
            let length = { Assembler::default().program(program, number, &functions) };
            let end = CODE_AT + (number + 1) * PAGE_SIZE as u64;
            assembler.at = end - length / 2;
            handlers.push(assembler.at);
            assembler.program(program, number, &functions);
        }
        let Assembler { bytes, starts, .. } = assembler;
        let starts: HashSet<u64> = starts.into_iter().collect();
        let mut sites: BTreeSet<Gpa> =
            starts.iter().map(|start| Gpa(start - CODE_AT + CODE * PAGE_SIZE as u64)).collect();
        sites.extend([Gfn(DATA).at(0xffc), Gfn(DATA + 1).at(4), Gfn(CODE).at(SCRATCH as u16 + 9)]);
        sites.insert(Gfn(STACKS).at(0x7f4));

        let registers: Vec<_> = (0..)
            .zip(&self.programs)
            .map(|(number, program)| {
                let mut gpr = program.registers;
                gpr[4] = program.stack(number);
                Registers::default().with(|new| {
                    new.gpr = gpr;
                    new.rip = handlers[number as usize];
                    new.rflags = 0x202;
                    new.cr0 = CR0;
                    new.cr3 = TABLES[0] * PAGE_SIZE as u64;
                    new.cr4 = CR4_PAE;
                    new.efer = EFER;
                    new.cpl = if self.user { 3 } else { 0 };
                    new.mode = CodeMode::Bits64;
                })
            })
            .collect();
        let mut memory = self.memory();
        for (linear, byte) in bytes {
            let at = (linear - CODE_AT) as usize;
            let page = memory.get_mut(&Gfn(CODE + (at / PAGE_SIZE) as u64)).expect("the code has pages");
            page[at % PAGE_SIZE] = byte;
        }
        Guest {
            machine: Machine::new(memory, Rc::new(starts), &registers, handlers, TABLES_AT),
            sites: sites.into_iter().collect(),
        }
    }

    /// Memory without code.
    fn memory(&self) -> BTreeMap<Gfn, Page> {
        let gfns = TABLES
            .into_iter()
            .chain(CODE..CODE + CODE_PAGES)
            .chain(DATA..DATA + DATA_PAGES)
            .chain([READ_ONLY])
            .chain(STACKS..STACKS + VCPUS as u64);
        let mut memory: BTreeMap<Gfn, Page> = gfns
            .map(|gfn| {
                let mut page = Box::new([0; PAGE_SIZE]);
                if !TABLES.contains(&gfn) {
                    (0..PAGE_SIZE).for_each(|at| page[at] = (at as u64 * 7 + gfn) as u8);
                }
                (Gfn(gfn), page)
            })
            .collect();
        let user = if self.user { USER } else { 0 };
        let mut set = |table: u64, index: u64, entry: u64| {
            let page = memory.get_mut(&Gfn(table)).expect("the tables have pages");
            page[index as usize * 8..][..8].copy_from_slice(&(entry | user).to_le_bytes());
        };
        let all = PRESENT_WRITABLE | ACCESSED_DIRTY;
        for pair in TABLES.windows(2) {
            // The code is in the third 2 MiB.
            let index = if pair[0] == TABLES[2] { CODE_AT >> 21 } else { 0 };
            set(pair[0], index, (pair[1] * PAGE_SIZE as u64) | all);
        }
        let fresh = if self.fresh { PRESENT_WRITABLE } else { all };
        set(TABLES[2], ALL_AT >> 21, LARGE | fresh);
        let mut map =
            |at: u64, gfn: u64, flags: u64| set(TABLES[3], at >> 12 & 0x1ff, (gfn * PAGE_SIZE as u64) | flags);
        (0..CODE_PAGES).for_each(|page| map(CODE_AT + page * PAGE_SIZE as u64, CODE + page, all));
        (0..DATA_PAGES).for_each(|page| map(DATA_AT + page * PAGE_SIZE as u64, DATA + page, fresh));
        (0..VCPUS as u64).for_each(|page| map(STACKS_AT + page * PAGE_SIZE as u64, STACKS + page, fresh));
        map(READ_ONLY_AT, READ_ONLY, all & !2);
        memory
    }
}

impl Program {
    fn stack(&self, number: u64) -> u64 {
        match self.stack_in_code {
            true => CODE_AT + number * PAGE_SIZE as u64 + SCRATCH + SCRATCH_SIZE - 0x40,
            false => STACKS_AT + number * PAGE_SIZE as u64 + 0x800,
        }
    }
}

/// Writes code, and remembers where instructions begin.
#[derive(Default)]
struct Assembler {
    at: u64,
    bytes: BTreeMap<u64, u8>,
    starts: BTreeSet<u64>,
}

impl Assembler {
    fn emit(&mut self, bytes: &[u8]) {
        self.starts.insert(self.at);
        for byte in bytes {
            self.bytes.insert(self.at, *byte);
            self.at += 1;
        }
    }

    /// An endless program, which is also what handles its exceptions. Returns how many bytes it has.
    fn program(&mut self, program: &Program, number: u64, functions: &[u64]) -> u64 {
        let start = self.at;
        let stack = program.stack(number) as u32;
        self.emit_with(&[0x48, 0xc7, 0xc4], &stack.to_le_bytes());
        self.pieces(&program.pieces, functions);
        let back = start.wrapping_sub(self.at + 5) as u32;
        self.emit_with(&[0xe9], &back.to_le_bytes());
        self.at - start
    }

    fn emit_with(&mut self, opcode: &[u8], rest: &[u8]) {
        self.emit(&[opcode, rest].concat());
    }

    /// With the absolute address of a place for its operand; `register` is the one in the ModRM byte.
    fn absolute(&mut self, rex: u8, opcode: &[u8], register: u8, linear: u64, rest: &[u8]) {
        let mut bytes = Vec::new();
        if rex | register >> 3 != 0 {
            bytes.push(0x40 | rex | register >> 3 << 2);
        }
        bytes.extend(opcode);
        bytes.extend([4 | (register & 7) << 3, 0x25]);
        bytes.extend((linear as u32).to_le_bytes());
        bytes.extend(rest);
        self.emit(&bytes);
    }

    /// 64-bit, on two registers.
    fn registers(&mut self, opcode: u8, register: u8, low: u8, rest: &[u8]) {
        let rex = 0x48 | register >> 3 << 2 | low >> 3;
        self.emit_with(&[rex, opcode, 0xc0 | (register & 7) << 3 | low & 7], rest);
    }

    fn pieces(&mut self, pieces: &[Piece], functions: &[u64]) {
        // Where cells are is known only when everything has been written once. So it is done twice, and whatever has to do
        // with a cell has always as many bytes.
        let (start, starts) = (self.at, self.starts.clone());
        let cells = self.pass(pieces, functions, &[]);
        (self.at, self.starts) = (start, starts);
        self.pass(pieces, functions, &cells);
    }

    fn pass(&mut self, pieces: &[Piece], functions: &[u64], cells: &[(u64, bool)]) -> Vec<(u64, bool)> {
        let mut found = Vec::new();
        // Jumps ahead: where the distance is, and to which piece.
        let (mut begins, mut jumps) = (Vec::new(), Vec::new());
        for (number, piece) in pieces.iter().enumerate() {
            begins.push(self.at);
            self.piece(*piece, functions, cells, &mut found);
            if let Piece::Jump(over) | Piece::JumpIf(_, over) = piece {
                jumps.push((self.at - 1, number + 1 + usize::from(*over)));
            }
        }
        for (at, to) in jumps {
            let target = begins.get(to).copied().unwrap_or(self.at);
            self.bytes.insert(at, (target - at - 1) as u8);
        }
        found
    }

    fn piece(&mut self, piece: Piece, functions: &[u64], cells: &[(u64, bool)], found: &mut Vec<(u64, bool)>) {
        match piece {
            Piece::Nop => self.emit(&[0x90]),
            Piece::LongNop => {
                self.emit(&[0x66, 0x90]);
                self.starts.insert(self.at - 1);
            }
            Piece::WideNop => self.emit(&[0x0f, 0x1f, 0x44, 0, 0]),
            Piece::Endbr => self.emit(&[0xf3, 0x0f, 0x1e, 0xfa]),
            Piece::Carry(opcode) => self.emit(&[opcode]),
            Piece::Push(register) => {
                self.emit(&[0x40 | register >> 3, 0x50 | register & 7][usize::from(register < 8)..])
            }
            Piece::Pop(register) => {
                self.emit(&[0x40 | register >> 3, 0x58 | register & 7][usize::from(register < 8)..])
            }
            Piece::Move(to, from) => self.registers(0x89, from, to, &[]),
            Piece::MoveImmediate(to, value) => self.registers(0xc7, 0, to, &value.to_le_bytes()),
            Piece::Lea(to, base, by) => {
                let rex = 0x48 | to >> 3 << 2 | base >> 3;
                self.emit(&[rex, 0x8d, 0x40 | (to & 7) << 3 | base & 7, by as u8]);
            }
            Piece::Arithmetic(op, to, from) => {
                let opcode = [0x01, 0x09, 0x21, 0x29, 0x31, 0x39, 0x85][usize::from(op)];
                self.registers(opcode, from, to, &[]);
            }
            Piece::ArithmeticImmediate(op, to, by) => {
                self.registers(0x83, [0, 1, 4, 5, 6, 7][usize::from(op)], to, &[by as u8]);
            }
            Piece::StoreStack(at, from) => {
                self.emit(&[0x48 | from >> 3 << 2, 0x89, 0x44 | (from & 7) << 3, 0x24, at as u8]);
            }
            Piece::LoadStack(at, to) => {
                self.emit(&[0x48 | to >> 3 << 2, 0x8b, 0x44 | (to & 7) << 3, 0x24, at as u8]);
            }
            Piece::Load(to, from) => self.absolute(8, &[0x8b], to, from.linear(), &[]),
            Piece::LoadByte(to, from) => self.absolute(0, &[0x0f, 0xb6], to, from.linear(), &[]),
            Piece::LoadRelative(to, from) => {
                let distance = from.linear().wrapping_sub(self.at + 7) as u32;
                self.emit_with(&[0x48 | to >> 3 << 2, 0x8b, 5 | (to & 7) << 3], &distance.to_le_bytes());
            }
            Piece::LoadCode(to, from) => {
                let linear = CODE_AT + u64::from(from) % (CODE_PAGES * PAGE_SIZE as u64 - 8);
                self.absolute(8, &[0x8b], to, linear, &[]);
            }
            Piece::Compare(left, right) => self.absolute(8, &[0x3b], left, right.linear(), &[]),
            Piece::Store(from, to) => self.absolute(8, &[0x89], from, to.linear(), &[]),
            Piece::StoreByte(from, to) => self.absolute(0, &[0x88], from, to.linear(), &[]),
            Piece::AddTo(by, to) => self.absolute(8, &[0x01], by, to.linear(), &[]),
            Piece::PushFrom(from) => self.absolute(0, &[0xff], 6, from.linear(), &[]),
            Piece::Copy(from, to) => {
                for (register, place) in [(6, from), (7, to)] {
                    self.registers(0xc7, 0, register, &(place.linear() as u32).to_le_bytes());
                }
                self.emit(&[0xa4]);
            }
            Piece::JumpIf(condition, _) => self.emit(&[0x70 | condition, 0]),
            Piece::Jump(_) => self.emit(&[0xeb, 0]),
            Piece::Call(which) => match functions.get(usize::from(which) % functions.len().max(1)) {
                Some(function) => {
                    let distance = function.wrapping_sub(self.at + 5) as u32;
                    self.emit_with(&[0xe8], &distance.to_le_bytes());
                }
                None => self.emit(&[0x90]),
            },
            Piece::CallThrough(which, place) => {
                if let Some(function) = functions.get(usize::from(which) % functions.len().max(1)) {
                    self.registers(0xc7, 0, 0, &(*function as u32).to_le_bytes());
                    self.absolute(8, &[0x89], 0, place.linear(), &[]);
                    self.absolute(0, &[0xff], 2, place.linear(), &[]);
                }
            }
            Piece::JumpThrough(place) => {
                // The two instructions that follow have 8 and 7 bytes.
                self.emit(&[0x48, 0x8d, 0x05, 15, 0, 0, 0]);
                self.absolute(8, &[0x89], 0, place.linear(), &[]);
                self.absolute(0, &[0xff], 4, place.linear(), &[]);
            }
            Piece::Hypercall => self.emit(&[0x0f, 0x01, 0xc1]),
            Piece::DebugControl(which) => {
                self.registers(0xc7, 0, 0, &DEBUG_CONTROLS[usize::from(which)].to_le_bytes());
                self.emit(&[0x0f, 0x23, 0xf8]);
            }
            Piece::Int3 => self.emit(&[0xcc]),
            Piece::PrefixedInt3 => {
                self.emit(&[0x66, 0xcc]);
                self.starts.insert(self.at - 1);
            }
            Piece::Cell(four, what) => {
                found.push((self.at, four));
                match four {
                    false => self.emit(&BYTES[usize::from(what)..][..1]),
                    true => {
                        let [instruction @ .., last] = DWORDS[usize::from(what)];
                        self.emit(&instruction);
                        self.emit(&[last]);
                    }
                }
            }
            Piece::Patch(which, what) => {
                let (cell, four) = cells.get(usize::from(which) % cells.len().max(1)).copied().unwrap_or((0, false));
                // One of a byte is written through the other mapping.
                match four {
                    false => {
                        let other = (ALL_AT + CODE * PAGE_SIZE as u64).wrapping_add(cell.wrapping_sub(CODE_AT));
                        self.absolute(0, &[0xc6], 0, other, &BYTES[usize::from(what)..][..1]);
                        self.emit(&[0x0f, 0x1f, 0x00]);
                    }
                    true => self.absolute(0, &[0xc7], 0, cell, &DWORDS[usize::from(what)]),
                }
            }
        }
    }
}
