//! A virtual CPU's registers, as far as a breakpoint needs them.

/// How the CPU decodes instructions: the D and L bits of CS, and EFER.LMA (Intel SDM volume 3, section 3.4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CodeMode {
    /// 16-bit code: real mode, virtual-8086 mode, or CS.D = 0.
    Bits16,
    /// 32-bit code: CS.D = 1, also in compatibility mode.
    Bits32,
    /// 64-bit code: EFER.LMA and CS.L.
    #[default]
    Bits64,
}

impl CodeMode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bits16, Self::Bits32, Self::Bits64];

    /// 16, 32 or 64.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// The registers of a virtual CPU at an event.
///
/// A host starts with [`Registers::default`] and sets every field it knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: in the order instructions encode them.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3: the page tables' root.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// The EFER model-specific register.
    pub efer: u64,
    /// Debug register 7: which of the guest's own breakpoints are on. Xen gives what it saved when it last switched the
    /// virtual CPU out; [`Hypervisor::debug_control`](crate::Hypervisor::debug_control) gives the current value.
    pub dr7: u64,
    /// Base of CS; 0 in 64-bit code.
    pub cs_base: u64,
    /// Current privilege level, 0 to 3: the DPL of SS.
    pub cpl: u8,
    /// Outside 64-bit code: CS, SS, DS and ES are the flat 4-GiB segments. In 64-bit code of no importance.
    pub flat: bool,
    /// How instructions are decoded.
    pub mode: CodeMode,
}

impl Registers {
    /// RFLAGS.RF: the CPU does not compare the address of the next instruction with the guest's own breakpoints.
    pub(crate) const RF: u64 = 1 << 16;

    /// A copy with changes.
    ///
    /// ```
    /// use hyperbp::Registers;
    ///
    /// let before = Registers::default().with(|registers| registers.rip = 0x1000);
    /// let after = before.with(|registers| registers.gpr[0] = 5);
    /// assert_eq!((after.rip, after.gpr[0]), (0x1000, 5));
    /// ```
    #[inline]
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}
