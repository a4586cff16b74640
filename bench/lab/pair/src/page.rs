//! The page that both processes have, with a function in it.

use std::arch::global_asm;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of it.
pub(crate) const SIZE: usize = 4096;

global_asm!(
    ".pushsection .text.hyperbp_pair, \"ax\", @progbits",
    ".balign 4096",
    "hyperbp_pair_page:",
    // hyperbp steps over the first instruction of a page, for what is before it might put interrupts off.
    ".fill 64, 1, 0x90",
    "hyperbp_pair_function:",
    "push rbp",
    "mov rbp, rsp",
    "lea rax, [rdi + 1]",
    "pop rbp",
    "ret",
    ".balign 4096",
    ".popsection",
);

unsafe extern "C" {
    static hyperbp_pair_page: [AtomicU64; SIZE / 8];
    safe fn hyperbp_pair_function(number: u64) -> u64;
}

/// Calls the function, which adds one to `number`.
pub(crate) fn function(number: u64) -> u64 {
    hyperbp_pair_function(number)
}

/// Where the function is in this process.
pub(crate) fn address() -> usize {
    hyperbp_pair_function as *const () as usize
}

/// What is in it. It is read 8 bytes at a time: SmartVMI answers no longer reads than of 16 bytes rightly.
pub(crate) fn bytes() -> Vec<[u8; 8]> {
    // SAFETY: it is a whole page, of code that can be read, and there as long as this program is. This program does not write
    // to it, and whoever does so from outside may: the words are atomic.
    let page = unsafe { &hyperbp_pair_page };
    page.iter().map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect()
}

/// The guest's number of the page of memory it is in. Only root is told.
pub(crate) fn frame() -> io::Result<u64> {
    /// The bits of an entry that are the number (Linux, `Documentation/admin-guide/mm/pagemap.rst`).
    const NUMBER: u64 = (1 << 55) - 1;
    const ENTRY: usize = 8;
    let mut entry = [0; ENTRY];
    // One entry for each page of virtual memory.
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, (address() / SIZE * ENTRY) as u64)?;
    Ok(u64::from_ne_bytes(entry) & NUMBER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_function_is_all_that_is_in_a_page() {
        assert_eq!(function(41), 42);
        let bytes = bytes().concat();
        assert_eq!(bytes[address() % SIZE..][..4], [0x55, 0x48, 0x89, 0xe5]);
        assert_eq!(bytes.len(), SIZE);
        // Not a breakpoint among them, so that one is seen.
        assert!(!bytes.contains(&0xcc));
    }
}
