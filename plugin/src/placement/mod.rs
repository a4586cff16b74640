//! Where the 0xCC lies.
//!
//! A page with breakpoints is *guarded*: reads and writes of it are events, so that the guest never sees a 0xCC of ours
//! and we see every change of its code.

mod in_place;
mod shadow;

use crate::breakpoint::{Breakpoint, Page};
use crate::{Gfn, Hypervisor, INSTRUCTION_BYTES, PAGE_SIZE, Placement, ViewId, insn};

/// INT3.
pub(crate) const INT3: u8 = 0xcc;

/// Prepares a page for its first breakpoint. Returns its shadow, if the placement has one.
pub(crate) fn open<H: Hypervisor>(
    hv: &mut H,
    exec: Option<ViewId>,
    gfn: Gfn,
    placement: Placement,
) -> Result<Option<Gfn>, H::Error> {
    match (placement, exec) {
        (Placement::Shadow, Some(exec)) => shadow::open(hv, exec, gfn).map(Some),
        _ => in_place::guard(hv, exec, gfn).map(|()| None),
    }
}

/// Makes a page whose last breakpoint is gone the guest's own again.
pub(crate) fn close<H: Hypervisor>(hv: &mut H, exec: Option<ViewId>, page: &Page) -> Result<(), H::Error> {
    match (page.shadow, exec) {
        (Some(shadow), Some(exec)) => shadow::close(hv, exec, page.gfn, shadow),
        _ => in_place::unguard(hv, exec, page.gfn),
    }
}

/// Puts a byte where the guest executes it: 0xCC to arm a breakpoint, its original byte to disarm it.
pub(crate) fn put<H: Hypervisor>(hv: &mut H, page: &Page, offset: u16, byte: u8) -> Result<(), H::Error> {
    hv.write(page.shadow.unwrap_or(page.gfn).at(offset), &[byte])
}

/// Takes the breakpoints of an in-place page out, guard and all, so that one instruction can access it.
pub(crate) fn lift<H: Hypervisor>(hv: &mut H, exec: Option<ViewId>, page: &mut Page) -> Result<(), H::Error> {
    page.lifted += 1;
    in_place::lift(hv, exec, page)
}

/// After an instruction has accessed the page: puts the breakpoints on what is there now.
pub(crate) fn settle<H: Hypervisor>(hv: &mut H, exec: Option<ViewId>, page: &mut Page) -> Result<(), H::Error> {
    if let Some(shadow) = page.shadow {
        return shadow::refresh(hv, page, shadow);
    }
    page.lifted = page.lifted.saturating_sub(1);
    if page.lifted > 0 {
        return Ok(()); // another virtual CPU is in the middle of its access
    }
    in_place::lower(hv, exec, page)
}

/// The byte at `offset` of a page of the guest's, and the instruction there if it ends within the page. The other
/// breakpoints of the page must not be in `bytes`.
pub(crate) fn displaced(bytes: &[u8; PAGE_SIZE], offset: u16) -> (u8, Option<[u8; INSTRUCTION_BYTES]>) {
    let rest = &bytes[usize::from(offset)..];
    let mut instruction = [0x90; INSTRUCTION_BYTES];
    let length = rest.len().min(INSTRUCTION_BYTES);
    instruction[..length].copy_from_slice(&rest[..length]);
    (rest[0], insn::is_whole(&rest[..length]).then_some(instruction))
}

/// Takes over what the guest now has under its breakpoints.
fn adopt(bytes: &[u8; PAGE_SIZE], breakpoints: &mut [Breakpoint]) {
    for breakpoint in breakpoints {
        (breakpoint.original, breakpoint.instruction) = displaced(bytes, breakpoint.offset());
    }
}
