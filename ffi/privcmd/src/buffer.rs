//! What a hypercall reads and writes.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use crate::{PAGE_SIZE, open};

/// Memory that a hypercall can reach: the kernel keeps it where it is. It is accessed by words of eight bytes.
#[derive(Debug)]
pub struct Buffer {
    address: NonNull<u64>,
    words: usize,
}

// SAFETY: the pages are this value's alone.
unsafe impl Send for Buffer {}

impl Buffer {
    /// So many pages, zeroed.
    ///
    /// # Errors
    /// If Linux is older than 4.18, or this is no domain of Xen's.
    pub fn new(pages: usize) -> io::Result<Self> {
        // A device for just that.
        let device = open("/dev/xen/hypercall")?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let length = pages.saturating_mul(PAGE_SIZE);
        // SAFETY: a new mapping, wherever there is room.
        let address = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, device.as_raw_fd(), 0) };
        match NonNull::new(address.cast()) {
            Some(start) if address != libc::MAP_FAILED => Ok(Self { address: start, words: length / size_of::<u64>() }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Words that there is room for.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.words
    }

    /// Whether there is room for none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.words == 0
    }

    /// Where a word is, for a hypercall.
    ///
    /// # Panics
    /// If there is no such word.
    #[must_use]
    pub fn address_of(&self, word: usize) -> u64 {
        self.at(word).as_ptr() as u64
    }

    /// Writes a word.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn set(&mut self, word: usize, value: u64) {
        // SAFETY: `at` is within the pages; the kernel and Xen write only in a call that is told of this buffer.
        unsafe { self.at(word).write_volatile(value) };
    }

    /// Reads a word.
    ///
    /// # Panics
    /// If there is no such word.
    #[must_use]
    pub fn get(&self, word: usize) -> u64 {
        // SAFETY: as in `set`; any bits are valid.
        unsafe { self.at(word).read_volatile() }
    }

    /// Writes words from the first one on.
    ///
    /// # Panics
    /// If they are too many.
    pub fn fill(&mut self, words: &[u64]) {
        for (word, value) in words.iter().enumerate() {
            self.set(word, *value);
        }
    }

    fn at(&self, word: usize) -> NonNull<u64> {
        assert!(word < self.words, "a word behind the buffer");
        // SAFETY: within the mapping, by the assertion.
        unsafe { self.address.add(word) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and nobody else knows of it.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.words * size_of::<u64>()) };
    }
}
