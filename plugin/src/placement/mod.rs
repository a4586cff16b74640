//! Where the 0xCC lies.
//!
//! A page with breakpoints is *guarded*: reads and writes of it are events, so that the guest never sees a 0xCC of ours
//! and we see every change of its code.

mod in_place;
mod shadow;

pub(crate) use in_place::{lift, uncover};

use crate::breakpoint::{Breakpoint, Page};
use crate::insn::Displaced;
use crate::views::Views;
use crate::{Gfn, Gpa, Hypervisor, PAGE_SIZE, Placement};

/// INT3.
pub(crate) const INT3: u8 = 0xcc;

/// Makes the shadow of a page that is to be [opened](open), if the placement has one. No virtual CPU may run from here on.
pub(crate) fn prepare<H: Hypervisor>(
    hv: &mut H,
    views: Option<&mut Views>,
    gfn: Gfn,
    placement: Placement,
) -> Result<Option<Gfn>, H::Error> {
    match (placement, views) {
        (Placement::Shadow, Some(views)) => shadow::copy(hv, views, gfn).map(Some),
        _ => Ok(None),
    }
}

/// Makes a page one that breakpoints can be in. If the hypervisor refuses, and it has a shadow, it is to be [closed](close).
pub(crate) fn open<H: Hypervisor>(
    hv: &mut H,
    views: Option<&Views>,
    gfn: Gfn,
    shadow: Option<Gfn>,
) -> Result<(), H::Error> {
    match (shadow, views) {
        (Some(shadow), Some(views)) => views.show(hv, shadow, gfn),
        (_, views) => {
            let guarded = in_place::guard(hv, views, gfn);
            // What failed is what the caller is to hear about, not that undoing it failed too.
            guarded.inspect_err(|_| drop(in_place::unguard(hv, views, gfn)))
        }
    }
}

/// Makes a page whose last breakpoint is gone the guest's own again.
pub(crate) fn close<H: Hypervisor>(hv: &mut H, views: Option<&mut Views>, page: &Page) -> Result<(), H::Error> {
    match (page.shadow, views) {
        (Some(shadow), Some(views)) => shadow::close(hv, views, page.gfn, shadow),
        (_, views) => in_place::unguard(hv, views.as_deref(), page.gfn),
    }
}

/// Puts a breakpoint where the guest executes it, over the byte `original`.
pub(crate) fn arm<H: Hypervisor>(hv: &mut H, page: &Page, gpa: Gpa, original: u8) -> Result<(), H::Error> {
    match page.shadow {
        Some(shadow) => hv.write(shadow.at(gpa.offset()), &[INT3]),
        None => hv.displace(gpa, original),
    }
}

/// Takes it away again.
pub(crate) fn disarm<H: Hypervisor>(hv: &mut H, page: &Page, gpa: Gpa, original: u8) -> Result<(), H::Error> {
    match page.shadow {
        Some(shadow) => hv.write(shadow.at(gpa.offset()), &[original]),
        None => hv.replace(gpa, original),
    }
}

/// After an instruction has accessed the page: puts the breakpoints on what is there now.
pub(crate) fn settle<H: Hypervisor>(hv: &mut H, views: Option<&Views>, page: &mut Page) -> Result<(), H::Error> {
    page.lifted = page.lifted.saturating_sub(1);
    page.unsettled = true;
    catch_up(hv, views, page)
}

/// Another virtual CPU may have written to the page while it could be written to: its shadow follows.
pub(crate) fn follow<H: Hypervisor>(hv: &mut H, page: &mut Page) -> Result<(), H::Error> {
    match page.shadow {
        Some(shadow) => shadow::follow(hv, page, shadow),
        None => Ok(()),
    }
}

/// Settles the page if that is still to be done: because the hypervisor refused something when it was tried.
pub(crate) fn catch_up<H: Hypervisor>(hv: &mut H, views: Option<&Views>, page: &mut Page) -> Result<(), H::Error> {
    // While it is lifted, another virtual CPU is in the middle of its access.
    if !page.unsettled || page.lifted > 0 {
        return Ok(());
    }
    match page.shadow {
        Some(shadow) => shadow::refresh(hv, views, page, shadow)?,
        None => in_place::lower(hv, views, page)?,
    }
    page.unsettled = false;
    Ok(())
}

/// Takes over what the guest now has under its breakpoints. A breakpoint stays where it is, on the new instruction.
fn adopt(bytes: &[u8; PAGE_SIZE], breakpoints: &mut [Breakpoint]) {
    for breakpoint in breakpoints {
        breakpoint.displaced.look_back(bytes, breakpoint.offset());
        if !breakpoint.displaced.is_in(bytes, breakpoint.offset()) {
            breakpoint.displaced = Displaced::of(bytes, breakpoint.offset());
            breakpoint.not_emulable = false;
            breakpoint.figures.rewritten += 1;
        }
    }
}
