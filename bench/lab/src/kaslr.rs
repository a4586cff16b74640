//! A Linux guest's kernel at another address than it was linked for, as kernels with randomized addresses (KASLR) are.
//!
//! What moves a kernel is its own decompressor, from a table at the end of the decompressed image; but Xen decompresses a
//! PVH guest's kernel itself, so there it stays where it was linked. Monitors expect it to be moved: DRAKVUF takes a
//! distance of 0 for one it has not found. So we do what the decompressor does (`handle_relocations` in Linux's
//! `arch/x86/boot/compressed/misc.c`), by the same distance every time.

use goblin::elf::Elf;
use goblin::elf::program_header::PT_LOAD;

/// Where the kernel's addresses begin in virtual memory: Linux's `__START_KERNEL_map`.
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// Xen's ELF notes that are addresses in the kernel: `ENTRY`, `HYPERCALL_PAGE`, `PHYS32_ENTRY` of its `public/elfnote.h`.
const ADDRESSES: [u32; 3] = [1, 2, 18];

/// In an ELF file's header: the entry point, in a program header: the virtual and the physical address.
const ENTRY: usize = 24;
const VIRTUAL: usize = 16;
const PHYSICAL: usize = 24;

/// The `kernel`, an ELF file with its table of relocations behind it, moved up by `distance` bytes in physical and in virtual
/// memory. Linux needs a multiple of 2 MiB.
///
/// Nothing when there is no such table, or something in it is not in the kernel.
#[must_use]
pub fn moved(kernel: &[u8], distance: u32) -> Option<Vec<u8>> {
    let elf = Elf::parse(kernel).ok()?;
    let mut moved = kernel.to_vec();
    let mut add = |at: usize, number: u64, size: usize| {
        let bytes = moved.get_mut(at..at + size)?;
        let mut word = [0; 8];
        word[..size].copy_from_slice(bytes);
        bytes.copy_from_slice(&u64::from_le_bytes(word).wrapping_add(number).to_le_bytes()[..size]);
        Some(())
    };

    // Three lists of addresses, each behind a zero: read from the end. A difference of addresses becomes smaller when it is
    // to something that does not move, which is what the second is about.
    let distance = u64::from(distance);
    let mut words = kernel.rchunks_exact(4).map(|word| i32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    let mut some = false;
    for (size, number) in [(4, distance), (4, distance.wrapping_neg()), (8, distance)] {
        loop {
            let word = words.next()?;
            if word == 0 {
                break;
            }
            let physical = (i64::from(word) as u64).wrapping_sub(START_KERNEL_MAP);
            let segment = elf.program_headers.iter().find(|segment| {
                let offset = physical.wrapping_sub(segment.p_paddr);
                segment.p_type == PT_LOAD && offset < segment.p_filesz
            })?;
            add(usize::try_from(physical - segment.p_paddr + segment.p_offset).ok()?, number, size)?;
            some = true;
        }
    }
    add(ENTRY, distance, 8)?;
    // Not in the table: a kernel that moves itself is not asked for these any more.
    for note in elf.iter_note_headers(kernel)?.flatten() {
        if note.name == "Xen" && ADDRESSES.contains(&note.n_type) && note.desc.len() == 8 {
            add(note.desc.as_ptr().addr() - kernel.as_ptr().addr(), distance, 8)?;
        }
    }
    let headers = usize::try_from(elf.header.e_phoff).ok()?;
    for header in (0..elf.program_headers.len()).map(|n| headers + n * usize::from(elf.header.e_phentsize)) {
        add(header + VIRTUAL, distance, 8)?;
        add(header + PHYSICAL, distance, 8)?;
    }
    some.then_some(moved)
}
