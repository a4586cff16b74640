//! The guest's page tables (Intel SDM volume 3, chapter 4).
//!
//! They belong to the guest, which may write anything there, and on another virtual CPU at any time. So every walk is
//! bounded by the number of levels, and whatever is unusual is no translation.

use super::interpret::is_canonical;
use crate::{Gpa, Hypervisor, PAGE_SIZE, Registers};

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const CR0_WP: u64 = 1 << 16;
const CR4_PSE: u64 = 1 << 4;
const CR4_PKE: u64 = 1 << 22;
const CR4_PKS: u64 = 1 << 24;
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

/// The guest-physical address of a linear address, if the page tables have one. Permissions are not looked at.
pub(crate) fn translate<H: Hypervisor>(hv: &mut H, registers: &Registers, linear: u64) -> Option<Gpa> {
    if registers.cr0 & CR0_PG == 0 {
        return Some(Gpa(linear & 0xffff_ffff));
    }
    if registers.efer & EFER_LMA != 0 {
        let levels = if registers.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        return walk(hv, registers.cr3 & ADDRESS, levels, linear);
    }
    let linear = linear & 0xffff_ffff;
    if registers.cr4 & CR4_PAE != 0 {
        // The four page-directory-pointer entries lie anywhere below 4 GiB, 32-byte aligned.
        let pointer = entry(hv, (registers.cr3 & 0xffff_ffe0) + (linear >> 30) * 8)?;
        return walk(hv, pointer & ADDRESS, 2, linear);
    }
    walk_32(hv, registers, linear)
}

/// Paging with 8-byte entries, from the table at `table`, which is of this level.
fn walk<H: Hypervisor>(hv: &mut H, mut table: u64, levels: u32, linear: u64) -> Option<Gpa> {
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let entry = entry(hv, table + ((linear >> shift) & 0x1ff) * 8)?;
        // Only levels 1 and 2 (2 MiB and 1 GiB) have large pages.
        if level > 2 && entry & LARGE != 0 {
            return None;
        }
        if level == 0 || entry & LARGE != 0 {
            let within = (1 << shift) - 1;
            return Some(Gpa((entry & ADDRESS & !within) | (linear & within)));
        }
        table = entry & ADDRESS;
    }
    None
}

fn entry<H: Hypervisor>(hv: &mut H, at: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    hv.read(Gpa(at), &mut bytes).ok()?;
    Some(u64::from_le_bytes(bytes)).filter(|entry| entry & PRESENT != 0)
}

/// Paging with 4-byte entries and two levels.
fn walk_32<H: Hypervisor>(hv: &mut H, registers: &Registers, linear: u64) -> Option<Gpa> {
    let mut entry = |at: u64| -> Option<u64> {
        let mut bytes = [0; 4];
        hv.read(Gpa(at), &mut bytes).ok()?;
        Some(u64::from(u32::from_le_bytes(bytes))).filter(|entry| entry & PRESENT != 0)
    };
    let directory = entry((registers.cr3 & 0xffff_f000) + (linear >> 22) * 4)?;
    if directory & LARGE != 0 && registers.cr4 & CR4_PSE != 0 {
        // PSE-36: bits 20 to 13 are bits 39 to 32 of the address.
        let high = (directory >> 13 & 0xff) << 32;
        return Some(Gpa(high | (directory & 0xffc0_0000) | (linear & 0x003f_ffff)));
    }
    let page = entry((directory & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)?;
    Some(Gpa((page & 0xffff_f000) | (linear & 0xfff)))
}

/// What a virtual CPU wants of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Intent {
    /// To read data.
    Read,
    /// To write data.
    Write,
}

/// Where an access to data, made with the privilege of `registers`, goes: if the CPU would make it at once, without a fault
/// and without setting an accessed or dirty bit. (A stale TLB may still know another translation; a guest that has not
/// flushed it cannot rely on either.)
pub(crate) fn access<H: Hypervisor>(
    hv: &mut H,
    registers: &Registers,
    linear: u64,
    length: usize,
    intent: Intent,
) -> Option<Gpa> {
    if (linear % PAGE_SIZE as u64) as usize + length > PAGE_SIZE {
        return None;
    }
    if registers.cr0 & CR0_PG == 0 {
        return (linear <= u32::MAX.into()).then_some(Gpa(linear));
    }
    let walk = Walk {
        write: intent == Intent::Write,
        user: registers.cpl == 3,
        no_execute: registers.efer & EFER_NXE != 0,
        write_protect: registers.cr0 & CR0_WP != 0,
        keys: registers.cr4 & if registers.cpl == 3 { CR4_PKE } else { CR4_PKS } != 0,
    };
    if registers.efer & EFER_LMA != 0 {
        let levels = if registers.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        return is_canonical(linear, registers).then(|| walk.long(hv, registers.cr3 & ADDRESS, levels, linear))?;
    }
    if linear > u32::MAX.into() {
        return None;
    }
    if registers.cr4 & CR4_PAE != 0 {
        // Its flags are others than those of an entry: but for P they are reserved, or of no importance here.
        let pointer = entry(hv, (registers.cr3 & 0xffff_ffe0) + (linear >> 30) * 8)?;
        return walk.long(hv, pointer & ADDRESS, 2, linear);
    }
    walk.short(hv, registers, linear)
}

/// A walk that the CPU would go through with.
struct Walk {
    write: bool,
    user: bool,
    /// Bit 63 of an entry is no reserved one.
    no_execute: bool,
    /// The supervisor may not write to what is not writable.
    write_protect: bool,
    /// Protection keys have a say, too.
    keys: bool,
}

impl Walk {
    /// Through entries of 8 bytes.
    fn long<H: Hypervisor>(&self, hv: &mut H, mut table: u64, levels: u32, linear: u64) -> Option<Gpa> {
        // A page is the user's if every level says so.
        let mut user = true;
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let entry = entry(hv, table + ((linear >> shift) & 0x1ff) * 8)?;
            let leaf = level == 0 || entry & LARGE != 0;
            if (leaf && level > 2) || (entry & NO_EXECUTE != 0 && !self.no_execute) || !self.permits(entry, leaf) {
                return None;
            }
            user &= entry & USER != 0;
            if leaf {
                let within = (1 << shift) - 1;
                let reserved = ADDRESS & within & !LARGE_PAT;
                if (level > 0 && entry & reserved != 0) || !self.privilege(user) {
                    return None;
                }
                return Some(Gpa((entry & ADDRESS & !within) | (linear & within)));
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// Through two levels of entries of 4 bytes.
    fn short<H: Hypervisor>(&self, hv: &mut H, registers: &Registers, linear: u64) -> Option<Gpa> {
        let mut entry = |at: u64| -> Option<u64> {
            let mut bytes = [0; 4];
            hv.read(Gpa(at), &mut bytes).ok()?;
            Some(u64::from(u32::from_le_bytes(bytes))).filter(|entry| entry & PRESENT != 0)
        };
        let directory = entry((registers.cr3 & 0xffff_f000) + (linear >> 22) * 4)?;
        if directory & LARGE != 0 && registers.cr4 & CR4_PSE != 0 {
            // With bits of an address above 4 GiB (PSE-36), or reserved ones: not here.
            let plain = directory & 0x003f_e000 == 0;
            let ok = plain && self.permits(directory, true) && self.privilege(directory & USER != 0);
            return ok.then_some(Gpa((directory & 0xffc0_0000) | (linear & 0x003f_ffff)));
        }
        let page = entry((directory & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)?;
        let user = directory & page & USER != 0;
        let ok = self.permits(directory, false) && self.permits(page, true) && self.privilege(user);
        ok.then_some(Gpa((page & 0xffff_f000) | (linear & 0xfff)))
    }

    fn permits(&self, entry: u64, leaf: bool) -> bool {
        let writable = entry & WRITABLE != 0 || !(self.user || self.write_protect);
        let clean = leaf && entry & DIRTY == 0;
        entry & ACCESSED != 0 && !(self.write && (!writable || clean))
    }

    /// The supervisor may be kept from the user's pages (SMAP), and keys from any: then it is not for us to say.
    fn privilege(&self, user: bool) -> bool {
        user == self.user && !self.keys
    }
}
