//! Guest-physical addresses and frames.

use std::fmt;

/// Bytes in a page, and in a frame.
pub const PAGE_SIZE: usize = 4096;

/// Guest frame number: which page of guest-physical memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

impl Gfn {
    /// Guest-physical address of a byte of this frame. Only the low 12 bits of `offset` count.
    #[must_use]
    pub const fn at(self, offset: u16) -> Gpa {
        Gpa((self.0 << 12) | (offset as u64 & 0xfff))
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {:#x}", self.0)
    }
}

/// Guest-physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The frame this address lies in.
    #[must_use]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> 12)
    }

    /// Where in its frame this address lies: 0 to 4095.
    #[must_use]
    pub const fn offset(self) -> u16 {
        (self.0 & 0xfff) as u16
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gpa {:#x}", self.0)
    }
}
