//! What a probe has seen, for the runner: pairs of a name and a number in the samples.

use core::slice;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use hyperbp_bench_abi::hostile::{FIRST_NOTE, FIRST_PROBE, FIRST_SITE, NAME_WORDS, NOTES_MAX, PROBE_WORDS, SITES_MAX};

use crate::page::{SAMPLES, read};
use crate::privilege::{Cpu, RF, SYSCALL};

/// Notes so far.
#[unsafe(link_section = ".volatile")]
static NOTES: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    /// In `hostile.s`.
    static hostile_sites: u64;
    static hostile_sites_end: u64;
    static hostile_blocks: u64;
    static hostile_blocks_end: u64;
}

/// Where the breakpoints go.
fn sites() -> &'static [u64] {
    let (first, end) = (&raw const hostile_sites, &raw const hostile_sites_end);
    // SAFETY: the table in `hostile.s` lies between the two, and is constant.
    unsafe { slice::from_raw_parts(first, (end as usize - first as usize) / size_of::<u64>()) }
}

/// Where the code's blocks begin.
fn blocks() -> &'static [u64] {
    let (first, end) = (&raw const hostile_blocks, &raw const hostile_blocks_end);
    // SAFETY: the table in `hostile.s` lies between the two, and is constant.
    unsafe { slice::from_raw_parts(first, (end as usize - first as usize) / size_of::<u64>()) }
}

/// Forgets the probe before.
pub(super) fn begin() {
    NOTES.store(0, Relaxed);
    SAMPLES.0[..FIRST_NOTE].iter().for_each(|sample| sample.store(0, Relaxed));
}

/// Lets the runner have it.
pub(super) fn end() {
    SAMPLES.0[0].store(NOTES.load(Relaxed), Relaxed);
}

/// Tells the runner of all sites, and all probes.
pub(super) fn list<'a>(probes: impl Iterator<Item = (&'a str, u32)>) {
    let sites = sites();
    assert!(sites.len() <= SITES_MAX, "more breakpoints than the samples have room for");
    sites.iter().zip(&SAMPLES.0[FIRST_SITE..]).for_each(|(site, sample)| sample.store(*site, Relaxed));
    let mut count = 0;
    for ((name, vcpus), samples) in probes.zip(SAMPLES.0[FIRST_PROBE..].chunks(PROBE_WORDS)) {
        let mut bytes = [0; NAME_WORDS * 8];
        let length = name.len().min(bytes.len());
        bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
        let words = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
        words.chain([u64::from(vcpus)]).zip(samples).for_each(|(word, sample)| sample.store(word, Relaxed));
        count += 1;
    }
    SAMPLES.0[0].store(sites.len() as u64, Relaxed);
    SAMPLES.0[1].store(count, Relaxed);
}

/// Notes a number. Those for which there is no room go into the last.
pub(super) fn note(name: &str, number: u64) {
    let n = NOTES.load(Relaxed) as usize;
    let mut word = [0; 8];
    let length = name.len().min(word.len());
    word[..length].copy_from_slice(&name.as_bytes()[..length]);
    if n < NOTES_MAX - 1 {
        SAMPLES.0[FIRST_NOTE + 2 * n].store(u64::from_le_bytes(word), Relaxed);
        SAMPLES.0[FIRST_NOTE + 2 * n + 1].store(number, Relaxed);
        NOTES.store(n as u64 + 1, Relaxed);
    } else {
        let (name, last) = (&SAMPLES.0[FIRST_NOTE + 2 * n], &SAMPLES.0[FIRST_NOTE + 2 * n + 1]);
        name.store(u64::from_le_bytes(*b"the rest"), Relaxed);
        last.store(last.load(Relaxed).rotate_left(7) ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15), Relaxed);
    }
}

/// Notes an interruption: why, and the state of the code.
pub(super) fn note_cpu(cpu: &Cpu) {
    const NAMES: [&str; 16] =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    const VECTORS: [&str; 20] = [
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9", "#TS", "#NP", "#SS", "#GP", "#PF", "15",
        "#MF", "#AC", "#MC", "#XM",
    ];
    match cpu.vector {
        SYSCALL => note("SYSCALL", cpu.rip),
        vector => note(VECTORS.get(vector as usize).copied().unwrap_or("INT"), vector << 48 | cpu.rip),
    }
    note("error", cpu.error);
    // An EPT violation sets RF, and a CPU clears it when the instruction has run after all. Bochs 3.0 leaves it set.
    note("flags", cpu.flags & !RF);
    note("cs, ss", cpu.cs << 16 | cpu.ss);
    match cpu.vector {
        1 => note("dr6", cpu.dr6),
        14 => note("cr2", cpu.cr2),
        _ => {}
    }
    NAMES.iter().zip(cpu.gpr).for_each(|(name, value)| note(name, value));
}

/// Notes words of memory.
pub(super) fn note_memory(name: &str, from: u64, words: u64) {
    (0..words).for_each(|n| note(name, read(from + 8 * n)));
}

/// The address of a block's site.
pub(super) fn site(block: u64, number: usize) -> u64 {
    sites_of(block).nth(number).unwrap_or(block)
}

fn sites_of(block: u64) -> impl Iterator<Item = u64> {
    let end = blocks().iter().copied().filter(|other| *other > block).min().unwrap_or(u64::MAX);
    sites().iter().copied().filter(move |site| (block..end).contains(site))
}

/// Counts another execution, if there is a site at this address.
pub(super) fn executed_at(address: u64) {
    if let Some(index) = sites().iter().position(|site| *site == address) {
        let sample = &SAMPLES.0[FIRST_SITE + index];
        sample.store(sample.load(Relaxed) + 1, Relaxed);
    }
}

/// Counts an execution of each site of a block up to this address.
pub(super) fn executed_until(block: u64, address: u64) {
    sites_of(block).filter(|site| *site <= address).for_each(executed_at);
}

/// Counts executions of each site of a block.
pub(super) fn executed(block: u64, times: u64) {
    for site in sites_of(block) {
        (0..times).for_each(|_| executed_at(site));
    }
}
