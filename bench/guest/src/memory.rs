//! C's memory functions: rustc may turn any copy or comparison into a call of them, and there is no C library here.
//!
//! They are assembly, because a loop in Rust may well be compiled into a call of the very function it implements. In the
//! unit tests they go without their C names, which belong to the host's library there.

use core::arch::naked_asm;
use core::ffi::{c_int, c_void};

/// # Safety
/// As in C: both are valid for `_length` bytes and do not overlap.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memcpy(_to: *mut c_void, _from: *const c_void, _length: usize) -> *mut c_void {
    naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret")
}

/// # Safety
/// As in C: both are valid for `_length` bytes.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memmove(_to: *mut c_void, _from: *const c_void, _length: usize) -> *mut c_void {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        "sub rdi, rsi", // The distance, as an unsigned number: below the length only if going upwards overwrites bytes
        "cmp rdi, rdx", // that are still to be copied.
        "mov rdi, rax",
        "jb 2f",
        "rep movsb",
        "ret",
        "2:",
        "lea rdi, [rdi + rdx - 1]",
        "lea rsi, [rsi + rdx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret",
    )
}

/// # Safety
/// As in C: `_to` is valid for `_length` bytes.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memset(_to: *mut c_void, _byte: c_int, _length: usize) -> *mut c_void {
    naked_asm!("mov r8, rdi", "mov eax, esi", "mov rcx, rdx", "rep stosb", "mov rax, r8", "ret")
}

/// # Safety
/// As in C: both are valid for `_length` bytes.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memcmp(_left: *const c_void, _right: *const c_void, _length: usize) -> c_int {
    naked_asm!(
        "mov rcx, rdx",
        "xor eax, eax", // and ZF: nothing to compare is equal
        "repe cmpsb",
        "je 2f",
        "movzx eax, byte ptr [rdi - 1]",
        "movzx ecx, byte ptr [rsi - 1]",
        "sub eax, ecx",
        "2:",
        "ret",
    )
}

/// # Safety
/// As in C: both are valid for `_length` bytes.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn bcmp(_left: *const c_void, _right: *const c_void, _length: usize) -> c_int {
    naked_asm!("jmp {memcmp}", memcmp = sym memcmp)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; 24] = {
        let mut bytes = [0; 24];
        let mut i = 0;
        while i < bytes.len() {
            bytes[i] = i as u8 + 1;
            i += 1;
        }
        bytes
    };

    /// Every (from, to, length) within [`BYTES`].
    fn ranges() -> impl Iterator<Item = (usize, usize, usize)> {
        let size = BYTES.len();
        (0..size).flat_map(move |from| {
            (0..size).flat_map(move |to| (0..=size - from.max(to)).map(move |length| (from, to, length)))
        })
    }

    #[test]
    fn memmove_copies_whichever_way_the_ranges_overlap() {
        for (from, to, length) in ranges() {
            let (mut ours, mut expected) = (BYTES, BYTES);
            expected.copy_within(from..from + length, to);
            let base = ours.as_mut_ptr();
            // SAFETY: `ranges` stays within the array.
            let returned = unsafe { memmove(base.wrapping_add(to).cast(), base.wrapping_add(from).cast(), length) };
            assert_eq!((ours, returned), (expected, base.wrapping_add(to).cast()), "{from} {to} {length}");
        }
    }

    #[test]
    fn memcpy_and_memset_touch_the_range_and_nothing_else() {
        for (from, to, length) in ranges() {
            let (mut ours, mut expected) = ([0; BYTES.len()], [0; BYTES.len()]);
            expected[to..to + length].copy_from_slice(&BYTES[from..from + length]);
            let start = ours[to..].as_mut_ptr();
            // SAFETY: `ranges` stays within the arrays, which are two.
            let returned = unsafe { memcpy(start.cast(), BYTES[from..].as_ptr().cast(), length) };
            assert_eq!((ours, returned), (expected, start.cast()));

            expected[to..to + length].fill(0x81);
            // SAFETY: as above.
            let returned = unsafe { memset(start.cast(), 0x1181, length) };
            assert_eq!((ours, returned), (expected, start.cast()));
        }
    }

    #[test]
    fn memcmp_has_the_sign_of_the_first_difference() {
        for length in 0..BYTES.len() {
            for differs in 0..BYTES.len() {
                let mut other = BYTES;
                other[differs] = 0xff;
                let (left, right) = (BYTES.as_ptr().cast(), other.as_ptr().cast());
                // SAFETY: both are arrays of more than `length` bytes.
                let order = unsafe { memcmp(left, right, length) }.signum();
                assert_eq!(order, if differs < length { -1 } else { 0 });
                // SAFETY: as above.
                assert_eq!(unsafe { memcmp(right, left, length) }.signum(), -order);
                // SAFETY: as above.
                assert_eq!(unsafe { bcmp(left, right, length) } != 0, order != 0);
            }
        }
    }
}
