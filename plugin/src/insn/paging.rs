//! The guest's page tables (Intel SDM volume 3, chapter 4).
//!
//! They belong to the guest, which may write anything there, and on another virtual CPU at any time. So every walk is
//! bounded by the number of levels, and whatever is unusual is no translation.

use super::interpret::is_canonical;
use crate::{Gfn, Gpa, Hypervisor, Registers};

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const CR0_WP: u64 = 1 << 16;
const CR4_PSE: u64 = 1 << 4;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const CR4_PKS: u64 = 1 << 24;
const CR4_LASS: u64 = 1 << 27;
const EFER_NXE: u64 = 1 << 11;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
/// Of a large page, the PAT bit: the lowest above the flags.
const LARGE_PAT: u64 = 1 << 12;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 51 to 12: where an entry of PAE, 4- or 5-level paging points.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The guest-physical address of a linear address, if the page tables have one. Permissions are not looked at: it is for what
/// the CPU has just translated itself.
pub(crate) fn translate<H: Hypervisor>(hv: &mut H, registers: &Registers, linear: u64) -> Option<Gpa> {
    let linear = if registers.efer & EFER_LMA != 0 { linear } else { linear & 0xffff_ffff };
    match registers.cr0 & CR0_PG {
        0 => Some(Gpa(linear & 0xffff_ffff)),
        _ => walk(hv, registers, linear, &|_| true).map(|walked| walked.gpa),
    }
}

/// The same of the instruction at RIP.
pub(crate) fn translate_rip<H: Hypervisor>(hv: &mut H, registers: &Registers) -> Option<Gpa> {
    translate(hv, registers, registers.cs_base.wrapping_add(registers.rip))
}

/// What a virtual CPU wants of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Intent {
    /// To read data.
    Read,
    /// To write data.
    Write,
}

/// The entries of a walk through four levels of 8-byte entries, and where they are, that of the page first. Where a large page
/// ends the walk, its entry takes the place of those that there are none of.
pub(super) type Path = [Step; 4];

/// No path.
pub(super) const NOWHERE: Path = [Step { at: Gpa(0), entry: 0 }; 4];

/// An entry that a walk has read, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) at: Gpa,
    pub(super) entry: u64,
}

/// Where an access goes that is within one page: see [`Walks::anew`](super::Walks::anew). And the way there, if it is a [`Path`].
/// Only `is_plain` frames are read.
pub(super) fn access<H: Hypervisor>(
    hv: &mut H,
    registers: &Registers,
    linear: u64,
    intent: Intent,
    is_plain: &impl Fn(Gfn) -> bool,
) -> Option<(Gpa, Option<Path>)> {
    let reachable = match registers.efer & EFER_LMA {
        0 => linear <= u32::MAX.into(),
        _ => is_canonical(linear, registers),
    };
    if registers.cr0 & CR0_PG == 0 {
        return (linear <= u32::MAX.into()).then_some((Gpa(linear), None));
    }
    // Linear-address-space separation may keep it from a page.
    if !reachable || registers.cr4 & CR4_LASS != 0 {
        return None;
    }
    let walked = walk(hv, registers, linear, is_plain)?;
    walked.permits(registers, intent).then_some((walked.gpa, walked.path))
}

/// Where a walk has come, and what it has met.
struct Walked {
    gpa: Gpa,
    /// The flags that all entries have. (Those of a page-directory-pointer entry of PAE paging are others: but for P they are
    /// reserved, or of no importance here.)
    all: u64,
    /// The flags that any has.
    any: u64,
    /// The entry that maps the page.
    leaf: u64,
    /// Bits of it that are reserved, or of an address above 4 GiB where it has 4 bytes (PSE-36).
    odd: u64,
    /// The CPU walks in the same way, whatever its model, and whatever was changed since it loaded CR3.
    certain: bool,
    path: Option<Path>,
}

impl Walked {
    /// Whether the CPU would go through with it (Intel SDM volume 3, section 4.6).
    fn permits(&self, registers: &Registers, intent: Intent) -> bool {
        let user = registers.cpl == 3;
        let write = intent == Intent::Write;
        // A page is a user page if every level says so. Protection keys may keep anybody from it, and SMAP the supervisor,
        // unless RFLAGS.AC is set. Both are left to a step.
        let (keys, smap) = match self.all & USER {
            0 => (CR4_PKS, 0),
            _ => (CR4_PKE, if user { 0 } else { CR4_SMAP }),
        };
        let mut needed = ACCESSED | if user { USER } else { 0 };
        if write && (user || registers.cr0 & CR0_WP != 0) {
            needed |= WRITABLE;
        }
        let reserved = if registers.efer & EFER_NXE == 0 { NO_EXECUTE } else { 0 };
        self.certain
            && registers.cr4 & (keys | smap) == 0
            && self.all & needed == needed
            && self.any & reserved == 0
            && self.leaf & self.odd == 0
            && (!write || self.leaf & DIRTY != 0)
    }
}

/// Walks the page tables. The linear address is one that paging translates.
#[inline]
fn walk<H: Hypervisor>(
    hv: &mut H,
    registers: &Registers,
    linear: u64,
    is_plain: &impl Fn(Gfn) -> bool,
) -> Option<Walked> {
    match registers.efer & EFER_LMA != 0 && registers.cr4 & CR4_LA57 == 0 {
        true => walk_long::<_, 4>(hv, registers.cr3 & ADDRESS, linear, is_plain),
        false => walk_otherwise(hv, registers, linear, is_plain),
    }
}

/// With 5 levels, or outside of long mode.
#[cold]
fn walk_otherwise<H: Hypervisor>(
    hv: &mut H,
    registers: &Registers,
    linear: u64,
    is_plain: &impl Fn(Gfn) -> bool,
) -> Option<Walked> {
    if registers.efer & EFER_LMA != 0 {
        return walk_long::<_, 5>(hv, registers.cr3 & ADDRESS, linear, is_plain);
    }
    if registers.cr4 & CR4_PAE != 0 {
        // The four page-directory-pointer entries lie anywhere below 4 GiB, 32-byte aligned. The CPU uses those that it has
        // loaded with CR3 (Intel SDM volume 3, section 4.4.1), and memory may have others by now.
        let pointer = entry(hv, (registers.cr3 & 0xffff_ffe0) + (linear >> 30) * 8, is_plain)?;
        let walked = walk_long::<_, 2>(hv, pointer & ADDRESS, linear, is_plain)?;
        return Some(Walked { certain: false, ..walked });
    }
    walk_32(hv, registers, linear, is_plain)
}

/// Through so many levels of 8-byte entries, from the table at `table`.
#[inline(always)]
fn walk_long<H: Hypervisor, const LEVELS: usize>(
    hv: &mut H,
    mut table: u64,
    linear: u64,
    is_plain: &impl Fn(Gfn) -> bool,
) -> Option<Walked> {
    let (mut all, mut any, mut path) = (u64::MAX, 0, NOWHERE);
    for level in (0..LEVELS).rev() {
        let shift = 12 + 9 * level;
        let at = table | (linear >> (shift - 3) & 0xff8);
        let entry = entry(hv, at, is_plain)?;
        path.iter_mut().take(level + 1).for_each(|step| *step = Step { at: Gpa(at), entry });
        all &= entry;
        any |= entry;
        if level == 0 || entry & LARGE != 0 {
            // Only levels 1 and 2 (2 MiB and 1 GiB) have large pages; 1 GiB is not known to every CPU, for which the bit is
            // reserved then. Bits at or above MAXPHYADDR stay in the address, at which there is no memory then.
            let within = (1 << shift) - 1;
            let gpa = Gpa((entry & ADDRESS & !within) | (linear & within));
            let odd = if level == 0 { 0 } else { ADDRESS & within & !LARGE_PAT };
            let path = (LEVELS == path.len()).then_some(path);
            return (level <= 2).then_some(Walked { gpa, all, any, leaf: entry, odd, certain: level < 2, path });
        }
        table = entry & ADDRESS;
    }
    None
}

/// An entry of 8 bytes, if it is present.
fn entry<H: Hypervisor>(hv: &mut H, at: u64, is_plain: &impl Fn(Gfn) -> bool) -> Option<u64> {
    is_plain(Gpa(at).gfn()).then_some(())?;
    hv.read_word(Gpa(at)).ok().filter(|entry| entry & PRESENT != 0)
}

/// Through two levels of 4-byte entries.
fn walk_32<H: Hypervisor>(
    hv: &mut H,
    registers: &Registers,
    linear: u64,
    is_plain: &impl Fn(Gfn) -> bool,
) -> Option<Walked> {
    let mut entry = |at: u64| -> Option<u64> {
        is_plain(Gpa(at).gfn()).then_some(())?;
        let mut bytes = [0; 4];
        hv.read(Gpa(at), &mut bytes).ok()?;
        Some(u64::from(u32::from_le_bytes(bytes))).filter(|entry| entry & PRESENT != 0)
    };
    let directory = entry((registers.cr3 & 0xffff_f000) + (linear >> 22) * 4)?;
    if directory & LARGE != 0 && registers.cr4 & CR4_PSE != 0 {
        // PSE-36: bits 20 to 13 are bits 39 to 32 of the address.
        let high = (directory >> 13 & 0xff) << 32;
        let gpa = Gpa(high | (directory & 0xffc0_0000) | (linear & 0x003f_ffff));
        let (all, any, leaf) = (directory, directory, directory);
        return Some(Walked { gpa, all, any, leaf, odd: 0x003f_e000, certain: true, path: None });
    }
    let page = entry((directory & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)?;
    let gpa = Gpa((page & 0xffff_f000) | (linear & 0xfff));
    let (all, any) = (directory & page, directory | page);
    Some(Walked { gpa, all, any, leaf: page, odd: 0, certain: true, path: None })
}
