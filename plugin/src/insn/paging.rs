//! The guest's page tables (Intel SDM volume 3, chapter 4).
//!
//! They belong to the guest, which may write anything there, and on another virtual CPU at any time. So every walk is
//! bounded by the number of levels, and whatever is unusual is no translation.

use crate::{Gpa, Hypervisor, Registers};

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
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
        if level == 0 || (entry & LARGE != 0 && level <= 2) {
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
    const CR4_PSE: u64 = 1 << 4;
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
pub(crate) enum Intent {
    Read,
    Write,
}
pub(crate) fn access<H: Hypervisor>(_: &mut H, _: &Registers, _: u64, _: usize, _: Intent) -> Option<Gpa> {
    None
}
