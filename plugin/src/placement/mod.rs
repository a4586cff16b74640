//! Where the 0xCC lies.
//!
//! A page with breakpoints is *guarded*: reads and writes of it are events, so that the guest never sees a 0xCC of ours
//! and we see every change of its code.

mod in_place;
mod shadow;

pub(crate) use in_place::{guests_byte, lift, uncover};

use crate::breakpoint::{Breakpoint, Page};
use crate::insn::Displaced;
use crate::views::Views;
use crate::{Gfn, Gpa, Hypervisor, INSTRUCTION_BYTES, PAGE_SIZE, Placement, Rights, ViewId};

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

/// Whether memory still has the instruction that a breakpoint has displaced. Writes of devices, of other domains that map
/// the page, and of the device model are no events.
///
/// This is asked at each hit: it is one load for most instructions.
#[inline(always)]
pub(crate) fn is_current<H: Hypervisor>(hv: &mut H, placement: Placement, breakpoint: &Breakpoint) -> bool {
    let (gpa, displaced) = (breakpoint.gpa, &breakpoint.displaced);
    // If the guest has no page there any more, nothing can be taken over.
    let Ok(word) = hv.read_word(Gpa(gpa.0 & !7)) else { return true };
    let changed = displaced.changed_bits(word);
    let in_place = placement == Placement::InPlace;
    let is_first = changed == 0 || (in_place && changed == displaced.bits_of(INT3, breakpoint.offset()));
    is_first && (!displaced.is_split() || is_rest_current(hv, breakpoint))
}

/// The same of the bytes of the instruction that are not in the aligned eight bytes that it begins in.
#[inline(never)]
fn is_rest_current<H: Hypervisor>(hv: &mut H, breakpoint: &Breakpoint) -> bool {
    let expected = breakpoint.displaced.after_word(breakpoint.offset());
    let (mut bytes, at) = ([0; INSTRUCTION_BYTES], Gpa((breakpoint.gpa.0 | 7) + 1));
    let bytes = &mut bytes[..expected.len()];
    hv.read(at, bytes).is_err() || bytes == expected
}

/// Compares what is known of a page, and what is shown of it, with what the guest has there. If that is not the same, it
/// is taken over, and the breakpoints are set on it. Breakpoints that a virtual CPU `is_stepped` over are not there, and
/// are not expected. Returns whether there was a difference.
pub(crate) fn resync<H: Hypervisor>(
    hv: &mut H,
    views: Option<&Views>,
    page: &mut Page,
    is_stepped: &dyn Fn(Gpa) -> bool,
) -> Result<bool, H::Error> {
    if page.unsettled && page.lifted == 0 {
        return catch_up(hv, views, page).map(|()| true);
    }
    match page.shadow {
        Some(shadow) => shadow::resync(hv, page, shadow),
        None => in_place::resync(hv, page, is_stepped),
    }
}

/// Xen may have lost what was set up for a page: because the guest got another page there, or a view was reset. Sets it up
/// again. No virtual CPU may run. With a shadow, a view lets go of a page, and what the shadow has is to be compared.
pub(crate) fn restore<H: Hypervisor>(hv: &mut H, views: Option<&mut Views>, page: &Page) -> Result<(), H::Error> {
    match (page.shadow, views) {
        (Some(shadow), Some(views)) => views.show_again(hv, shadow, page.gfn),
        // While it is lifted, it is not guarded.
        (_, views) if page.lifted == 0 && !page.unsettled => in_place::guard(hv, views.as_deref(), page.gfn),
        _ => Ok(()),
    }
}

/// Adds the pages of frames of ours again that are needed to [set up](rearm) a page, and that the guest has given back. No
/// virtual CPU may run. Whether it had.
pub(crate) fn regain<H: Hypervisor>(hv: &mut H, views: Option<&Views>, page: &Page) -> Result<bool, H::Error> {
    let (Some(shadow), Some(views)) = (page.shadow, views) else { return Ok(false) };
    let lost = views.regain(hv)?;
    if lost {
        views.restore(hv)?;
    }
    Ok(hv.restore_shadow_gfn(shadow)? || lost)
}

/// A page that should not be executable without its breakpoints is executed: the guest has put another page there, or Xen has
/// reset the views. Sets the breakpoints in what is there now. No virtual CPU may run. Whether they were gone.
pub(crate) fn rearm<H: Hypervisor>(hv: &mut H, views: Option<&Views>, page: &mut Page) -> Result<bool, H::Error> {
    match (page.shadow, views) {
        (Some(shadow), Some(views)) => {
            shadow::follow(hv, page, shadow)?;
            // A view is remapped to what it shows itself: at the shadow's frame that is the sink. With a change of the host
            // view it is the shadow again, and no view has to let go of anything.
            hv.set_rights(ViewId::HOST, shadow, Rights::All)?;
            views.show(hv, shadow, page.gfn)?;
            Ok(true)
        }
        (_, views) => in_place::rearm(hv, views, page),
    }
}

/// After an instruction has accessed the page: puts the breakpoints on what is there now.
pub(crate) fn settle<H: Hypervisor>(hv: &mut H, views: Option<&Views>, page: &mut Page) -> Result<(), H::Error> {
    page.owed = page.owed.saturating_sub(1);
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
/// Returns whether any is another one.
fn adopt(bytes: &[u8; PAGE_SIZE], breakpoints: &mut [Breakpoint]) -> bool {
    let mut changed = false;
    for breakpoint in breakpoints {
        breakpoint.displaced.look_back(bytes, breakpoint.offset());
        if !breakpoint.displaced.is_in(bytes, breakpoint.offset()) {
            breakpoint.displaced = Displaced::of(bytes, breakpoint.offset());
            breakpoint.not_emulable = false;
            breakpoint.figures.rewritten += 1;
            changed = true;
        }
    }
    changed
}
