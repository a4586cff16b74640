//! The page under test, and the pages that keep others away from theirs.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::sync::atomic::AtomicU64;

use hyperbp_bench_abi::{PAGE_SIZE, SAMPLES_MAX, TARGET};

/// A value on pages of its own.
#[repr(C, align(4096))]
pub(crate) struct PageAligned<T>(pub(crate) T);

/// A page that is written behind the compiler's back: by Xen, by the monitor, or by assembly.
#[repr(transparent)]
pub(crate) struct ForeignPage(UnsafeCell<[u8; PAGE_SIZE]>);

// SAFETY: Rust code never takes a reference to the bytes, only their address.
unsafe impl Sync for ForeignPage {}

impl ForeignPage {
    pub(crate) const fn new(bytes: [u8; PAGE_SIZE]) -> Self {
        Self(UnsafeCell::new(bytes))
    }

    /// Its address: guest-virtual and guest-physical at once.
    pub(crate) fn address(&self) -> u64 {
        self.0.get() as u64
    }
}

/// The page the breakpoint is set on.
#[unsafe(link_section = ".target")]
pub(crate) static PAGE_UNDER_TEST: PageAligned<ForeignPage> = PageAligned(ForeignPage::new(TARGET));

/// One time-stamp-counter difference per sample.
pub(crate) static SAMPLES: PageAligned<[AtomicU64; SAMPLES_MAX as usize]> =
    PageAligned([const { AtomicU64::new(0) }; SAMPLES_MAX as usize]);

/// Reads eight bytes. The guest has all that it maps in its hands, and no address is wrong, not even 0.
pub(crate) fn read(address: u64) -> u64 {
    let value: u64;
    // SAFETY: reading memory has no effect, whatever is there.
    unsafe { asm!("mov {}, [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags, readonly)) };
    value
}

/// Writes a byte of a [`ForeignPage`].
pub(crate) fn write_byte(address: u64, value: u8) {
    // SAFETY: such a page is no Rust object.
    unsafe { asm!("mov [{}], {}", in(reg) address, in(reg_byte) value, options(nostack, preserves_flags)) };
}

/// Writes eight bytes of a [`ForeignPage`].
pub(crate) fn write_word(address: u64, value: u64) {
    // SAFETY: as above.
    unsafe { asm!("mov [{}], {}", in(reg) address, in(reg) value, options(nostack, preserves_flags)) };
}
