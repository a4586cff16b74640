//! The parts of the benchmark guest that can be tested on the host: what a request asks for, what the page under test
//! reads as, how an interrupt gate is encoded, and the memory functions that compiled code calls.
//!
//! The rest of the guest is the binary of the same name.
#![no_std]

mod memory;

use hyperbp_bench_abi::{PAGE_SIZE, REWRITTEN_OFFSET, SAMPLES_MAX, TARGET, Workload};

/// What the runner asked for, made harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub workload: Workload,
    /// How often: at most [`SAMPLES_MAX`], if it leaves a sample each time.
    pub count: usize,
}

impl Request {
    /// Reads a request as it stands in the control page. An unknown workload is `None`; a count beyond the sample pages
    /// is cut to what they hold.
    #[must_use]
    pub fn from_wire(workload: u32, count: u32) -> Option<Self> {
        let workload = Workload::from_wire(workload)?;
        let samples = !matches!(
            workload,
            Workload::Storm
                | Workload::Snippets
                | Workload::Scan
                | Workload::Hostile
                | Workload::Balloon
                | Workload::SystemPage
        );
        let most = if samples { SAMPLES_MAX } else { u32::MAX };
        Some(Self { workload, count: count.min(most) as usize })
    }
}

/// The page under test as it must read, kept where no breakpoint is ever set.
static PRISTINE: [u8; PAGE_SIZE] = TARGET;

/// What an eight-byte read at `offset` into the page under test must yield.
///
/// # Panics
/// If fewer than eight bytes of the page lie at `offset`.
#[must_use]
pub fn expected_at(offset: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&PRISTINE[offset..offset + 8]);
    u64::from_le_bytes(bytes)
}

/// A hash (FNV-1a, by words) of the page under test, without the byte that is rewritten all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hash(u64);

impl Hash {
    /// Of nothing yet.
    #[must_use]
    #[allow(clippy::new_without_default)] // There is no other way to begin.
    pub const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Adds the eight bytes at `offset`.
    pub fn add(&mut self, offset: usize, word: u64) {
        const REWRITTEN: u64 = 0xff << (REWRITTEN_OFFSET % 8 * 8);
        let word = if offset == REWRITTEN_OFFSET & !7 { word & !REWRITTEN } else { word };
        self.0 = (self.0 ^ word).wrapping_mul(0x100_0000_01b3);
    }

    /// What has come out.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0
    }
}

/// The hash of the page under test as it must read.
#[must_use]
pub fn expected_hash() -> u64 {
    let mut hash = Hash::new();
    for offset in (0..PAGE_SIZE).step_by(8) {
        hash.add(offset, expected_at(offset));
    }
    hash.value()
}

/// Where all that is mapped at 0 is mapped a second time, by 2 MiB pages.
pub const LARGE_PAGES: u64 = 1 << 30;

/// Every bit of the result depends on every bit of the word.
const fn mix(z: u64) -> u64 {
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// A hash of words in which no single difference, and no few of them, cancel out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(u64);

impl Digest {
    /// Of nothing yet.
    #[must_use]
    #[allow(clippy::new_without_default)] // There is no other way to begin.
    pub const fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// Adds a word.
    pub const fn add(&mut self, word: u64) {
        self.0 = mix(self.0 ^ word);
    }

    /// What has come out.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0
    }
}

/// Random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Those that come from this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    #[allow(clippy::should_implement_trait)] // There is no end to them.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// One near an edge, half of the time: where carries, signs and overflows are.
    pub const fn number(&mut self) -> u64 {
        const EDGES: [u64; 8] = [0, 0x80, 0x100, 0x8000, 0x1_0000, 0x8000_0000, 1 << 32, 1 << 63];
        let (number, choice) = (self.next(), self.next());
        match choice % 2 {
            0 => EDGES[(choice >> 8) as usize % EDGES.len()].wrapping_add(number % 5).wrapping_sub(2),
            _ => number,
        }
    }
}

/// Selector of the 64-bit code segment in the guest's GDT.
pub const CODE_SELECTOR: u16 = 8;

/// A 64-bit interrupt gate to `handler`, as the two words of an IDT entry (Intel SDM vol. 3, 7.14.1): present, ring 0,
/// on the current stack, with interrupts disabled.
#[must_use]
pub const fn interrupt_gate(handler: u64) -> [u64; 2] {
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e00 << 32;
    let low = (handler & 0xffff) | ((CODE_SELECTOR as u64) << 16) | PRESENT_INTERRUPT_GATE;
    [low | (handler & 0xffff_0000) << 32, handler >> 32]
}

/// The two words of a GDT's entry for a 64-bit TSS (Intel SDM vol. 3, 8.2.3): present, DPL 0, available.
#[must_use]
pub const fn tss_descriptor(base: u64, limit: u16) -> [u64; 2] {
    const AVAILABLE_TSS: u64 = 0x89 << 40;
    let low = limit as u64 | (base & 0xff_ffff) << 16 | AVAILABLE_TSS | (base >> 24 & 0xff) << 56;
    [low, base >> 32]
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use hyperbp_bench_abi::BREAKPOINT_OFFSET;

    #[test]
    fn a_request_within_bounds_is_taken_as_it_is() {
        for workload in Workload::ALL {
            assert_eq!(Request::from_wire(workload as u32, 7), Some(Request { workload, count: 7 }));
        }
        for workload in [Workload::Storm, Workload::Snippets, Workload::Scan, Workload::Hostile, Workload::Balloon] {
            let request = Request::from_wire(workload as u32, u32::MAX);
            assert_eq!(request.map(|request| request.count), Some(u32::MAX as usize), "its count is not of samples");
        }
        assert_eq!(Request::from_wire(1, 0).map(|r| r.count), Some(0));
    }

    #[test]
    fn a_count_beyond_the_sample_pages_is_cut() {
        let count = |n| Request::from_wire(1, n).map(|r| r.count);
        assert_eq!(count(SAMPLES_MAX), Some(SAMPLES_MAX as usize));
        assert_eq!(count(SAMPLES_MAX + 1), Some(SAMPLES_MAX as usize));
        assert_eq!(count(u32::MAX), Some(SAMPLES_MAX as usize));
    }

    #[test]
    fn an_unknown_workload_is_no_request() {
        assert_eq!(Request::from_wire(0, 1), None);
        assert_eq!(Request::from_wire(u32::MAX, 1), None);
    }

    #[test]
    fn the_page_reads_as_nops_up_to_the_breakpoint() {
        assert_eq!(expected_at(0), 0x9090_9090_9090_9090);
        assert_eq!(expected_at(BREAKPOINT_OFFSET - 8), 0x9090_9090_9090_5d55);
        assert_eq!(expected_at(BREAKPOINT_OFFSET), 0x6655_4433_2211_c390);
    }

    #[test]
    fn the_hash_is_of_every_byte_but_the_rewritten_one() {
        let hash = |change: usize| {
            let mut hash = Hash::new();
            for offset in (0..PAGE_SIZE).step_by(8) {
                let flip = if change & !7 == offset { 1 << (change % 8 * 8) } else { 0 };
                hash.add(offset, expected_at(offset) ^ flip);
            }
            hash.value()
        };
        assert_eq!(hash(REWRITTEN_OFFSET), expected_hash());
        assert!((0..REWRITTEN_OFFSET).all(|offset| hash(offset) != expected_hash()));
    }

    #[test]
    fn a_digest_depends_on_every_bit_and_the_order() {
        let digest = |words: [u64; 3]| {
            let mut digest = Digest::new();
            words.into_iter().for_each(|word| digest.add(word));
            digest.value()
        };
        let mut seen = std::collections::HashSet::from([digest([1, 2, 3]), digest([2, 1, 3])]);
        for bit in 0..64 {
            for word in 0..3 {
                let mut words = [1, 2, 3];
                words[word] ^= 1 << bit;
                seen.insert(digest(words));
            }
            seen.insert(digest([1 ^ 1 << bit, 2 ^ 1 << bit, 3]));
        }
        assert_eq!(seen.len(), 2 + 4 * 64);
    }

    #[test]
    fn a_gate_holds_the_whole_address() {
        let [low, high] = interrupt_gate(0x1122_3344_5566_7788);
        assert_eq!(low, 0x5566_8e00_0008_7788);
        assert_eq!(high, 0x1122_3344);
    }

    #[test]
    fn a_descriptor_holds_the_whole_address_and_the_limit() {
        let [low, high] = tss_descriptor(0x1122_3344_5566_7788, 103);
        assert_eq!(low, 0x5500_8966_7788_0067);
        assert_eq!(high, 0x1122_3344);
    }
}
