//! The page of [`Workload::SystemPage`](crate::Workload::SystemPage): code, and what the CPU reads and writes for itself.
//!
//! The guest has two copies of the [`SYSTEM_CASES`]' code: one in this page, with a breakpoint on each, and one elsewhere.
//! Under both the GDT, the IDT, the TSS, the stack and a page table are in this page.

/// Bytes of a case's slot in either copy.
pub const SYSTEM_SLOT: usize = 16;

/// Slot of the code that handles #UD: a jump out of the page.
pub const SYSTEM_HANDLER: usize = 31;

/// Where in the page the global descriptor table is.
pub const SYSTEM_GDT: usize = 0x200;
/// Bytes in it: see [`SYSTEM_GDT`].
pub const SYSTEM_GDT_BYTES: usize = 0x60;
/// Where the task-state segment is.
pub const SYSTEM_TSS: usize = 0x280;
/// Where the interrupt descriptor table is.
pub const SYSTEM_IDT: usize = 0x300;
/// Where the stack begins, downwards.
pub const SYSTEM_STACK: usize = 0x900;
/// Where the stack of page faults begins.
pub const SYSTEM_FAULT_STACK: usize = 0xb00;
/// Where data is.
pub const SYSTEM_DATA: usize = 0xc00;
/// The first entry of the page table that is used.
pub const SYSTEM_ENTRY: usize = 448;

/// Selectors of data segments whose descriptors are marked as not accessed, one for each register that is loaded.
pub const FRESH: [u16; 4] = [0x18, 0x20, 0x28, 0x30];
/// Selector of the task-state segment: its descriptor has 16 bytes.
pub const TASK: u16 = 0x40;

/// What a register holds when a case begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// This.
    Number(u64),
    /// The address of this byte of the page.
    Page(usize),
    /// The address that this entry of the page table maps, counted from [`SYSTEM_ENTRY`].
    Window(u64),
    /// An address that is not mapped, by an entry of the page table.
    Unmapped,
    /// The address of a RET.
    Return,
}

/// Some instructions, the last of which is RET, or leads to one.
#[derive(Clone, Copy, Debug)]
pub struct SystemCase {
    /// What it does.
    pub name: &'static str,
    /// Its code.
    pub code: &'static [u8],
    /// RAX, RCX, RDX, RBX, RSI and RDI.
    pub registers: [Value; 6],
}

const ZERO: Value = Value::Number(0);
const DATA: Value = Value::Page(SYSTEM_DATA);

const fn case(name: &'static str, code: &'static [u8]) -> SystemCase {
    SystemCase { name, code, registers: [ZERO; 6] }
}

impl SystemCase {
    const fn rax(mut self, value: Value) -> Self {
        self.registers[0] = value;
        self
    }

    const fn rcx(mut self, value: Value) -> Self {
        self.registers[1] = value;
        self
    }

    const fn rbx(mut self, value: Value) -> Self {
        self.registers[3] = value;
        self
    }

    const fn rsi(mut self, value: Value) -> Self {
        self.registers[4] = value;
        self
    }

    const fn rdi(mut self, value: Value) -> Self {
        self.registers[5] = value;
        self
    }

    /// What IRETQ pops: [`IRETQ`] pushes SS, RSP, the flags, CS and RIP.
    const fn returning(mut self, flags: u64) -> Self {
        let stack = Value::Page(SYSTEM_STACK - 8);
        self.registers = [Value::Return, Value::Number(8), Value::Number(0x10), ZERO, stack, Value::Number(flags)];
        self
    }
}

/// `push rdx; push rsi; push rdi; push rcx; push rax; iretq`
const IRETQ: &[u8] = &[0x52, 0x56, 0x57, 0x51, 0x50, 0x48, 0xcf];
/// `mov rax, [rbx]; ret`
const LOAD: &[u8] = &[0x48, 0x8b, 0x03, 0xc3];
/// `mov [rbx], rax; ret`
const STORE: &[u8] = &[0x48, 0x89, 0x03, 0xc3];
/// `movsb; ret`
const COPY: &[u8] = &[0xa4, 0xc3];
/// `mov ds, eax; ret`
const LOAD_DS: &[u8] = &[0x8e, 0xd8, 0xc3];

/// All of them, in the order of their slots.
pub const SYSTEM_CASES: [SystemCase; 30] = [
    case("nop", &[0x90, 0xc3]),
    case("push rbp; pop rbp", &[0x55, 0x5d, 0xc3]),
    case("a read of data", LOAD).rbx(DATA),
    case("a read of a descriptor", LOAD).rbx(Value::Page(SYSTEM_GDT + 8)),
    case("a read of a gate", LOAD).rbx(Value::Page(SYSTEM_IDT + 14 * 16)),
    case("a read of what is not mapped", LOAD).rbx(Value::Unmapped),
    case("a write to what is not mapped", STORE).rbx(Value::Unmapped),
    case("mov ds, eax", LOAD_DS).rax(Value::Number(FRESH[0] as u64)),
    // The selector is in the page, and so is the descriptor.
    case("mov es, [rbx]", &[0x8e, 0x03, 0xc3]).rbx(Value::Page(SYSTEM_DATA + 0x20)),
    case("mov ss, eax", &[0x8e, 0xd0, 0xc3]).rax(Value::Number(FRESH[2] as u64)),
    case("lfs eax, [rbx]", &[0x0f, 0xb4, 0x03, 0xc3]).rbx(Value::Page(SYSTEM_DATA + 0x28)),
    case("mov ds, eax beyond the table", LOAD_DS).rax(Value::Number(0xff8)),
    case("lar eax, ecx", &[0x0f, 0x02, 0xc1, 0xc3]).rcx(Value::Number(0x10)),
    case("lsl eax, ecx", &[0x0f, 0x03, 0xc1, 0xc3]).rcx(Value::Number(0x10)),
    case("verr cx", &[0x0f, 0x00, 0xe1, 0xc3]).rcx(Value::Number(0x10)),
    case("ltr ax", &[0x0f, 0x00, 0xd8, 0xc3]).rax(Value::Number(TASK as u64)),
    case("ud2", &[0x0f, 0x0b, 0xc3]),
    case("div ecx", &[0xf7, 0xf1, 0xc3]),
    case("int 0x18", &[0xcd, 0x18, 0xc3]),
    case("int3", &[0xcc, 0xc3]),
    case("a write of data", STORE).rax(Value::Number(0x1234_5678)).rbx(Value::Page(SYSTEM_DATA + 8)),
    case("a read through the page table", LOAD).rbx(Value::Window(0)),
    case("a write through the page table", STORE).rax(Value::Number(0x9abc)).rbx(Value::Window(1)),
    // push rcx; push rax; retfq
    case("retfq", &[0x51, 0x50, 0x48, 0xcb]).rax(Value::Return).rcx(Value::Number(8)),
    case("iretq", IRETQ).returning(2),
    case("iretq to a single step", IRETQ).returning(0x102),
    case("push [rbx]; pop rax", &[0xff, 0x33, 0x58, 0xc3]).rbx(DATA),
    case("call rax", &[0xff, 0xd0, 0xc3]).rax(Value::Return),
    case("movsb to what is not mapped", COPY).rsi(DATA).rdi(Value::Unmapped),
    case("movsb within the page", COPY).rsi(DATA).rdi(Value::Page(SYSTEM_DATA + 0x30)),
];

/// How often one run executes what is at each slot of the page.
///
/// # Panics
/// If there is no such slot.
#[must_use]
pub fn system_hits(slot: usize) -> u64 {
    assert!(slot < SYSTEM_CASES.len() || slot == SYSTEM_HANDLER, "there is no slot {slot}");
    // The handler serves both copies.
    if slot == SYSTEM_HANDLER { 2 } else { 1 }
}

/// Words that each case leaves: see [`SYSTEM_SAMPLES`].
pub const SYSTEM_WORDS: [&str; 20] = [
    "RAX",
    "RCX",
    "RDX",
    "RBX",
    "RSI",
    "RDI",
    "flags",
    "RSP",
    "DS",
    "ES",
    "FS",
    "SS",
    "exceptions",
    "vector",
    "error code",
    "pushed RIP",
    "pushed CS",
    "pushed flags",
    "pushed RSP",
    "pushed SS",
];

/// The parts of the page that cases change, as offsets of their first word and of what is behind them.
pub const SYSTEM_PARTS: [(usize, usize); 3] = [
    (SYSTEM_GDT, SYSTEM_GDT + SYSTEM_GDT_BYTES),
    (SYSTEM_ENTRY * 8, SYSTEM_ENTRY * 8 + 0x20),
    (SYSTEM_DATA, SYSTEM_DATA + 0x40),
];

/// Words in [`SYSTEM_PARTS`], and one of what the page table maps.
pub const SYSTEM_PART_WORDS: usize = {
    let (mut words, mut n) = (1, 0);
    while n < SYSTEM_PARTS.len() {
        words += (SYSTEM_PARTS[n].1 - SYSTEM_PARTS[n].0) / 8;
        n += 1;
    }
    words
};

/// What [`Workload::SystemPage`](crate::Workload::SystemPage) leaves, for each copy, the page's first: [`SYSTEM_WORDS`] for
/// each case, and then [`SYSTEM_PART_WORDS`] of the page.
pub const SYSTEM_SAMPLES: usize = 2 * (SYSTEM_CASES.len() * SYSTEM_WORDS.len() + SYSTEM_PART_WORDS);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SAMPLES_MAX;

    const _: () = {
        assert!((SYSTEM_HANDLER + 1) * SYSTEM_SLOT <= SYSTEM_GDT && SYSTEM_CASES.len() <= SYSTEM_HANDLER);
        assert!(SYSTEM_GDT + SYSTEM_GDT_BYTES <= SYSTEM_TSS && SYSTEM_TSS + 104 <= SYSTEM_IDT);
        assert!(SYSTEM_IDT + 32 * 16 <= SYSTEM_STACK - 0x400 && SYSTEM_STACK < SYSTEM_FAULT_STACK);
        assert!(SYSTEM_DATA + 0x40 <= SYSTEM_ENTRY * 8 && SYSTEM_SAMPLES <= SAMPLES_MAX as usize);
        assert!(TASK as usize + 16 <= SYSTEM_GDT_BYTES);
    };

    #[test]
    fn each_case_fits_into_its_slot() {
        assert!(SYSTEM_CASES.iter().all(|case| case.code.len() <= SYSTEM_SLOT));
    }

    #[test]
    fn the_handler_serves_both_copies() {
        assert_eq!([system_hits(0), system_hits(SYSTEM_HANDLER)], [1, 2]);
    }
}
