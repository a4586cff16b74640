//! What the benchmark guest and the runner in dom0 agree on.
//!
//! The guest is one of two: a kernel of ours (`bench/guest`), or a program in a Linux or Windows guest
//! (`bench/guest/program`, whose `abi.h` is this in C).
//!
//! The guest has one **control page**: the kernel's is at a fixed guest-physical address, and the program's is looked for. The runner maps it, writes a
//! [`Control::workload`] and a [`Control::count`], and then a new [`Control::request`]; the guest does the work, puts one
//! time-stamp-counter difference per sample into the **sample pages** and sets [`Control::completed`] to the request.
//! Nothing else passes between the two while a workload runs, so nothing but the breakpoint disturbs it.
//!
//! A program knows the virtual addresses of its pages and nothing else. So its control page has a magic number of its own, and
//! [`Control::alive`], which counts: there may be copies of such a page in memory that nobody uses any more. Asked for
//! [`Workload::Label`], it puts a [`Label`] on each of its other pages, for the runner to find them, and later takes it away.
//!
//! The page under test has the layout of [`TARGET`]: bpbench's page of NOPs (with a few other instructions near its end, for
//! the workload that has breakpoints on them) that ends in RET, with the breakpoint
//! on the last NOP and so placed that the eight bytes WL3 reads there are the page's last eight. (bpbench puts the
//! breakpoint on the RET in the page's last byte; its 8-byte read then reaches into the next page.)
#![no_std]

pub mod hostile;
mod snippets;
mod system;

pub use snippets::{JUMP, Needs, SNIPPET_PAGES, SNIPPET_RUNS, SNIPPETS, Snippet, snippet_offset};
pub use system::{
    FRESH, SYSTEM_CASES, SYSTEM_DATA, SYSTEM_ENTRY, SYSTEM_FAULT_STACK, SYSTEM_GDT, SYSTEM_GDT_BYTES, SYSTEM_HANDLER,
    SYSTEM_IDT, SYSTEM_PART_WORDS, SYSTEM_PARTS, SYSTEM_SAMPLES, SYSTEM_SLOT, SYSTEM_STACK, SYSTEM_TSS, SYSTEM_WORDS,
    SystemCase, TASK, Value, system_hits,
};

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// Guest-physical address of the control page.
pub const CONTROL_GPA: u64 = 0x20_0000;

/// [`Control::magic`] of a guest that is up: `HBPGUEST`, as a little-endian number.
pub const MAGIC: u64 = u64::from_le_bytes(*b"HBPGUEST");

/// [`Control::magic`] of a program that is up: `HBPPROCS`, as a little-endian number.
pub const PROGRAM_MAGIC: u64 = u64::from_le_bytes(*b"HBPPROCS");

/// [`Label::magic`]: `HBPLABEL`, as a little-endian number.
pub const LABEL_MAGIC: u64 = u64::from_le_bytes(*b"HBPLABEL");

/// [`Control::version`] of this layout. A runner refuses any other.
pub const VERSION: u32 = 6;

/// Samples that fit in the sample pages, and so the most a request may ask for.
pub const SAMPLES_MAX: u32 = 4096;

/// Sample pages.
pub const SAMPLE_PAGES: usize = SAMPLES_MAX as usize * size_of::<u64>() / PAGE_SIZE;

/// Bytes in one digest of [`Workload::Scan`]. All that lies beyond the last sample is in that one.
pub const SCAN_CHUNK: usize = 4 * PAGE_SIZE;

/// Offset of the breakpoint in the page under test.
pub const BREAKPOINT_OFFSET: usize = PAGE_SIZE - 8;

/// Most virtual CPUs the guest starts.
pub const VCPUS_MAX: usize = 4;

/// Where [`Workload::Storm`] has its breakpoints, by offset in the page under test. Whoever enters the page at one of them
/// runs through those above it, too: two NOPs beside each other, the upper one at [`BREAKPOINT_OFFSET`]; a push; an
/// integer instruction that is no move and no simple arithmetic; an SSE instruction.
pub const SITES: [usize; 5] = [BREAKPOINT_OFFSET, BREAKPOINT_OFFSET - 1, 4080, 4072, 4066];

/// The byte that [`Workload::Storm`] writes all the time: the page's last.
pub const REWRITTEN_OFFSET: usize = PAGE_SIZE - 1;

/// What is at the last three of [`SITES`]. All of it together changes nothing.
const INSTRUCTIONS: [(usize, &[u8]); 3] = [
    (4066, &[0x0f, 0x28, 0xc0]),                   // movaps xmm0, xmm0
    (4072, &[0x48, 0x0f, 0xc8, 0x48, 0x0f, 0xc8]), // bswap rax, twice
    (4080, &[0x55, 0x5d]),                         // push rbp; pop rbp
];

/// The page under test, byte for byte: NOPs and the [`SITES`]' instructions, the last NOP under the breakpoint, RET, and six
/// marked bytes of which the last is written.
pub const TARGET: [u8; PAGE_SIZE] = {
    let mut page = [0x90; PAGE_SIZE];
    let mut n = 0;
    while n < INSTRUCTIONS.len() {
        let (at, bytes) = INSTRUCTIONS[n];
        let mut i = 0;
        while i < bytes.len() {
            page[at + i] = bytes[i];
            i += 1;
        }
        n += 1;
    }
    page[BREAKPOINT_OFFSET + 1] = 0xc3;
    let mut i = 2;
    while i < 8 {
        page[BREAKPOINT_OFFSET + i] = 0x11 * (i as u8 - 1);
        i += 1;
    }
    page
};

/// Where the code of [`Workload::Balloon`] is in its page.
pub const BALLOON_OFFSET: usize = 0x100;

/// That code: loads RAX from where RDI says, pushes RBP, clears it, pops it, and returns.
pub const BALLOON_CODE: [u8; 8] = [0x48, 0x8b, 0x07, 0x55, 0x31, 0xed, 0x5d, 0xc3];

/// Where in its page breakpoints go: on the load, and on the push.
pub const BALLOON_SITES: [usize; 2] = [BALLOON_OFFSET, BALLOON_OFFSET + 3];

/// Runs of that code for each of the `count` rounds of [`Workload::Balloon`].
pub const BALLOON_RUNS: u32 = 5;

/// What the guest is asked to do `count` times. The numbers are the wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Workload {
    /// Take a time stamp twice: what the measurement itself costs.
    Timer = 1,
    /// bpbench's WL1: call the breakpointed instruction.
    ExecBp = 2,
    /// bpbench's WL2: call the start of the page, and so run all of it and the breakpoint at its end.
    ExecPage = 3,
    /// bpbench's WL3: read the eight bytes at the breakpoint.
    ReadBp = 4,
    /// bpbench's WL4: read the whole page, eight bytes at a time.
    ReadPage = 5,
    /// Execute an INT3 of the guest's own, elsewhere. Its handler counts it in [`Control::own_int3s`].
    OwnInt3 = 6,
    /// Write the last of the six marked bytes (with the value it has): a guest write to the page under test.
    WriteByte = 7,
    /// Power off.
    Shutdown = 8,
    /// All virtual CPUs at once: they execute the [`SITES`], `count` calls each, while one hashes the whole page all the
    /// time and one writes to it. Leaves no samples; counts are in [`Storm`].
    Storm = 9,
    /// Execute each of the [`SNIPPETS`], [`SNIPPET_RUNS`] times, from states of the registers for which `count` is the seed.
    /// Instead of a time, the sample of each is a digest of the registers, the flags, the data, and where the instruction
    /// led to; or 0, if this CPU does not have it.
    Snippets = 10,
    /// Read all memory, and `count` frames from [`Control::scan_gpa`] on. The first sample is how many words of the frames were
    /// not all ones. The others are digests of [`SCAN_CHUNK`] bytes of memory each, without what the guest changes itself: the
    /// control page, the samples, and its stack.
    Scan = 11,
    /// A program puts a [`Label`] with the tag [`Control::tag`] on its other pages. With the tag 0, the pages become what they were.
    Label = 12,
    /// Run a probe of a hostile guest: number `count`, or, if there is none with this number, list them all. See [`hostile`].
    Hostile = 13,
    /// Give pages back to Xen and get others in their place (a stack, an operand, a page table, the page with the breakpoints),
    /// `count` times each, and execute [`BALLOON_CODE`] after each. The first samples count what was not as it must be: what was
    /// popped, what was popped where page tables had changed, what was loaded, the bytes of the code, and hypercalls that were
    /// refused.
    Balloon = 14,
    /// Execute each of the [`SYSTEM_CASES`] in both copies. Instead of times, the samples are what they have left:
    /// see [`SYSTEM_SAMPLES`].
    SystemPage = 15,
}

impl Workload {
    /// Every workload, in wire order.
    pub const ALL: [Self; 15] = [
        Self::Timer,
        Self::ExecBp,
        Self::ExecPage,
        Self::ReadBp,
        Self::ReadPage,
        Self::OwnInt3,
        Self::WriteByte,
        Self::Shutdown,
        Self::Storm,
        Self::Snippets,
        Self::Scan,
        Self::Label,
        Self::Hostile,
        Self::Balloon,
        Self::SystemPage,
    ];

    /// The workload with this number, if there is one.
    #[must_use]
    pub fn from_wire(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|w| *w as u32 == number)
    }
}

/// The control page. Fields are little-endian and naturally aligned; both sides access them with volatile or atomic
/// operations only.
#[derive(Debug)]
#[repr(C)]
pub struct Control {
    /// [`MAGIC`] once the guest is ready for a request.
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// Virtual CPUs the guest has started.
    pub vcpus: u32,
    /// Guest-physical address of the page under test; mapped at the same virtual address. A program, which does not know the one,
    /// has the other here.
    pub target_gpa: u64,
    /// Guest-physical address of the first sample page: [`SAMPLES_MAX`] numbers of 64 bits. A program has 0 here.
    pub samples_gpa: u64,

    /// Runner: number of the request, one more than the last. Written last.
    pub request: u32,
    /// Runner: a [`Workload`], as its number.
    pub workload: u32,
    /// Runner: how many samples, at most [`SAMPLES_MAX`].
    pub count: u32,
    /// Guest: number of the last request that is done.
    pub completed: u32,

    /// Guest: how often it has executed the breakpointed instruction, since it started.
    pub executions: u64,
    /// Guest: how often its own INT3 handler has run, since it started.
    pub own_int3s: u64,
    /// Guest: how many reads of the page under test differed from [`TARGET`], since it started.
    pub mismatches: u64,
    /// Guest: offset in the page of the first read that differed.
    pub mismatch_offset: u64,
    /// Guest: the eight bytes it saw there.
    pub mismatch_seen: u64,
    /// Guest-physical address of the page with [`Storm`].
    pub storm_gpa: u64,
    /// Guest-physical address of the first of [`SNIPPET_PAGES`] pages with the [`SNIPPETS`].
    pub snippets_gpa: u64,
    /// Runner: where [`Workload::Scan`] looks besides in memory, from 3 to 4 or from 5 to 6 GiB.
    pub scan_gpa: u64,
    /// Program: changes all the time while it waits for a request.
    pub alive: u64,
    /// Program: its number in the guest's operating system.
    pub process: u64,
    /// Runner: what [`Workload::Label`] writes.
    pub tag: u64,
    /// Guest-physical address of the page with [`BALLOON_CODE`].
    pub balloon_gpa: u64,
    /// Guest-physical address of the page of [`Workload::SystemPage`].
    pub system_gpa: u64,
}

/// What is at the start of a program's page while the runner looks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Label {
    /// [`LABEL_MAGIC`].
    pub magic: u64,
    /// [`Control::tag`]: a new one each time, so that no page that once was the program's is taken for one that is.
    pub tag: u64,
    /// 0 for the page under test, and from 1 on for the sample pages.
    pub index: u64,
}

/// What the virtual CPUs have counted in [`Workload::Storm`], since the guest started: a page of its own.
#[derive(Debug)]
#[repr(C)]
pub struct Storm {
    /// By virtual CPU.
    pub vcpus: [StormCounts; VCPUS_MAX],
}

/// What a virtual CPU has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct StormCounts {
    /// How often it has executed each of the [`SITES`].
    pub executions: [u64; SITES.len()],
    /// How often it has hashed the page, but for the byte that is rewritten.
    pub hashes: u64,
    /// How many of the hashes were not the right one.
    pub hash_mismatches: u64,
    /// How often it has rewritten the byte.
    pub rewrites: u64,
    /// How often the byte did not read as it was written.
    pub rewrite_mismatches: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{align_of, offset_of, size_of};

    #[test]
    fn the_control_page_has_the_layout_the_guest_was_built_with() {
        assert!(size_of::<Control>() <= PAGE_SIZE);
        assert_eq!(align_of::<Control>(), 8);
        assert_eq!(offset_of!(Control, request), 0x20);
        assert_eq!(offset_of!(Control, executions), 0x30);
        assert_eq!(offset_of!(Control, mismatch_seen), 0x50);
        assert_eq!(offset_of!(Control, alive), 0x70);
        assert_eq!(size_of::<Control>(), 0x98);
        assert_eq!(size_of::<Label>(), 24);
        assert_eq!(SAMPLE_PAGES, 8);
        assert!(size_of::<Storm>() <= PAGE_SIZE);
        assert!(SNIPPETS.len() <= SAMPLES_MAX as usize);
    }

    #[test]
    fn the_page_under_test_ends_with_the_breakpointed_instruction_and_a_return() {
        assert_eq!(TARGET[BREAKPOINT_OFFSET..], [0x90, 0xc3, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66]);
        assert!(TARGET[..SITES[4]].iter().all(|byte| *byte == 0x90));
        assert!(SITES.is_sorted_by(|a, b| a > b));
        assert!(!TARGET.contains(&0xcc));
    }

    #[test]
    fn workload_numbers_round_trip() {
        for workload in Workload::ALL {
            assert_eq!(Workload::from_wire(workload as u32), Some(workload));
        }
        assert_eq!(Workload::from_wire(0), None);
        assert_eq!(Workload::from_wire(16), None);
    }
}
