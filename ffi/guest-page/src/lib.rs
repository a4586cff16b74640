//! Pages of a guest that are mapped into this process, and a cache of them: mapping one costs as much as serving a hit.
//!
//! The guest changes its memory whenever it likes, so there are no references into a page: every access is an atomic one,
//! of 8, 4, 2 or 1 bytes.

mod cache;
mod m2p;
mod pages;

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

pub use cache::PageCache;
use hyperbp::PAGE_SIZE;
pub use m2p::{Frames, M2p};
pub use pages::{Pages, Source};

/// A page of a guest, mapped readable and writable. `M` keeps it so, and ends that when it is dropped.
#[derive(Debug)]
pub struct GuestPage<M> {
    address: NonNull<u8>,
    _mapping: M,
}

impl<M> GuestPage<M> {
    /// The page at `address`.
    ///
    /// # Safety
    /// [`PAGE_SIZE`] bytes there must be readable and writable while `mapping` lives, the address be a multiple of
    /// [`PAGE_SIZE`], and nothing in this process hold a reference into them.
    #[must_use]
    pub const unsafe fn new(address: NonNull<u8>, mapping: M) -> Self {
        Self { address, _mapping: mapping }
    }

    /// The page's first byte, for volatile or atomic accesses of [`PAGE_SIZE`] bytes while this lives.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Copies bytes out of the page.
    ///
    /// # Panics
    /// If they reach over its end.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(offset <= PAGE_SIZE && into.len() <= PAGE_SIZE - offset, "a read over the end of a page");
        let mut done = 0;
        while done < into.len() {
            let (at, to) = (offset + done, &mut into[done..]);
            done += match piece(at, to.len()) {
                8 => put(to, self.word::<AtomicU64>(at).load(Relaxed).to_ne_bytes()),
                4 => put(to, self.word::<AtomicU32>(at).load(Relaxed).to_ne_bytes()),
                2 => put(to, self.word::<AtomicU16>(at).load(Relaxed).to_ne_bytes()),
                _ => put(to, self.word::<AtomicU8>(at).load(Relaxed).to_ne_bytes()),
            };
        }
    }

    /// Eight bytes at a multiple of eight, at once, as this machine orders them.
    ///
    /// # Panics
    /// If it is none, or if they reach over the page's end.
    #[must_use]
    pub fn load(&self, offset: usize) -> u64 {
        self.word::<AtomicU64>(offset).load(Relaxed)
    }

    /// Copies bytes into the page. What is naturally aligned and of 8, 4, 2 or 1 bytes is stored at once: no virtual CPU
    /// sees a part of it.
    ///
    /// # Panics
    /// If they reach over its end.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset <= PAGE_SIZE && bytes.len() <= PAGE_SIZE - offset, "a write over the end of a page");
        let mut done = 0;
        while done < bytes.len() {
            let (at, from) = (offset + done, &bytes[done..]);
            let length = piece(at, from.len());
            match length {
                8 => self.word::<AtomicU64>(at).store(u64::from_ne_bytes(first(from)), Relaxed),
                4 => self.word::<AtomicU32>(at).store(u32::from_ne_bytes(first(from)), Relaxed),
                2 => self.word::<AtomicU16>(at).store(u16::from_ne_bytes(first(from)), Relaxed),
                _ => self.word::<AtomicU8>(at).store(from[0], Relaxed),
            }
            done += length;
        }
    }

    /// An atomic (or plain byte) of the page: the guest accesses it at the same time.
    fn word<T>(&self, at: usize) -> &T {
        assert!(at.is_multiple_of(align_of::<T>()) && at + size_of::<T>() <= PAGE_SIZE);
        // SAFETY: within the page, by the assertion.
        let word = unsafe { self.as_ptr().add(at) }.cast::<T>();
        // SAFETY: aligned, as the page is; mapped while `self` lives; only atomics are asked for, and any bits are one.
        unsafe { &*word }
    }
}

/// How many bytes at `at` can be accessed at once, of `left` that are to be.
fn piece(at: usize, left: usize) -> usize {
    [8, 4, 2].into_iter().find(|size| at.is_multiple_of(*size) && left >= *size).unwrap_or(1)
}

/// Copies bytes to the start of `to`, and tells how many.
fn put<const N: usize>(to: &mut [u8], bytes: [u8; N]) -> usize {
    to[..N].copy_from_slice(&bytes);
    N
}

/// The first `N` of at least as many bytes.
fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut first = [0; N];
    first.copy_from_slice(&bytes[..N]);
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Memory([u8; PAGE_SIZE]);

    fn page() -> GuestPage<Box<Memory>> {
        let mut memory = Box::new(Memory([0; PAGE_SIZE]));
        let address = NonNull::from(&mut memory.0).cast();
        // SAFETY: the box has one aligned page, which moves with nothing and that nothing else refers to.
        unsafe { GuestPage::new(address, memory) }
    }

    #[test]
    fn what_is_written_is_read_again_at_any_offset_and_length() {
        let page = page();
        for offset in (0..24).chain(PAGE_SIZE - 24..PAGE_SIZE) {
            for length in 0..=24.min(PAGE_SIZE - offset) {
                let bytes: Vec<u8> = (0..length).map(|n| (offset + 7 * n + length) as u8).collect();
                page.write(offset, &bytes);
                let mut read = vec![0; length];
                page.read(offset, &mut read);
                assert_eq!(read, bytes, "{length} at {offset}");
            }
        }
    }

    #[test]
    fn a_write_changes_nothing_around_it() {
        let page = page();
        page.write(5, &[0xff; 9]);
        let mut read = [0; 16];
        page.read(0, &mut read);
        assert_eq!(read, [0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "over the end")]
    fn nothing_is_read_over_the_end() {
        page().read(PAGE_SIZE - 1, &mut [0; 2]);
    }

    #[test]
    #[should_panic(expected = "over the end")]
    fn nothing_is_written_over_the_end() {
        page().write(PAGE_SIZE - 7, &[0; 8]);
    }
}
