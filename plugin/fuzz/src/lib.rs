//! What the fuzz targets have in common.

pub mod machine;
pub mod walker;

use arbitrary::Arbitrary;
use hyperbp::{CodeMode, Registers};

/// Registers of a virtual CPU, any.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct AnyRegisters {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    dr7: u64,
    cs_base: u64,
    cpl: u8,
    flat: bool,
    mode: AnyMode,
}

/// A [`CodeMode`], any.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum AnyMode {
    /// [`CodeMode::Bits64`].
    Bits64,
    /// [`CodeMode::Bits32`].
    Bits32,
    /// [`CodeMode::Bits16`].
    Bits16,
}

impl From<AnyMode> for CodeMode {
    fn from(mode: AnyMode) -> Self {
        match mode {
            AnyMode::Bits64 => Self::Bits64,
            AnyMode::Bits32 => Self::Bits32,
            AnyMode::Bits16 => Self::Bits16,
        }
    }
}

impl From<AnyRegisters> for Registers {
    fn from(any: AnyRegisters) -> Self {
        let AnyRegisters { gpr, rip, rflags, cr0, cr3, cr4, efer, dr7, cs_base, cpl, flat, mode } = any;
        Self::default().with(|new| {
            (new.gpr, new.rip, new.rflags) = (gpr, rip, rflags);
            (new.cr0, new.cr3, new.cr4, new.efer, new.dr7) = (cr0, cr3, cr4, efer, dr7);
            (new.cs_base, new.cpl, new.flat, new.mode) = (cs_base, cpl & 3, flat, mode.into());
        })
    }
}
