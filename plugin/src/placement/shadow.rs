//! 0xCC in a copy of the page, which only the execute view shows.

use super::{INT3, adopt};
use crate::breakpoint::Page;
use crate::views::Views;
use crate::{Gfn, Hypervisor, PAGE_SIZE};

/// No virtual CPU may run until the copy is shown: it could write to the page.
pub(super) fn copy<H: Hypervisor>(hv: &mut H, views: &mut Views, gfn: Gfn) -> Result<Gfn, H::Error> {
    let mut bytes = [0; PAGE_SIZE];
    hv.read(gfn.at(0), &mut bytes)?;
    views.take_frame(hv, &bytes)
}

pub(super) fn close<H: Hypervisor>(hv: &mut H, views: &mut Views, gfn: Gfn, shadow: Gfn) -> Result<(), H::Error> {
    views.unshow(hv, gfn)?;
    views.give_frame(hv, shadow)
}

/// The guest has written to its page: the copy follows.
pub(super) fn refresh<H: Hypervisor>(
    hv: &mut H,
    views: Option<&Views>,
    page: &mut Page,
    shadow: Gfn,
) -> Result<(), H::Error> {
    // First: what another virtual CPU writes from here on is an event of its own.
    if let Some(views) = views {
        views.deny_write(hv, page.gfn)?;
    }
    follow(hv, page, shadow)
}

/// Compares the copy with the page, which someone may have written to whose writes are no events. The copy follows if it
/// is not the same. Returns whether it was not.
pub(super) fn resync<H: Hypervisor>(hv: &mut H, page: &mut Page, shadow: Gfn) -> Result<bool, H::Error> {
    let (mut own, mut copy) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    hv.read(page.gfn.at(0), &mut own)?;
    hv.read(shadow.at(0), &mut copy)?;
    let mut changed = adopt(&own, &mut page.breakpoints);
    for breakpoint in &page.breakpoints {
        own[usize::from(breakpoint.offset())] = INT3;
    }
    if own != copy {
        changed = true;
        hv.write(shadow.at(0), &own)?;
    }
    Ok(changed)
}

/// The guest may still be writing to its page: the copy follows so far.
pub(super) fn follow<H: Hypervisor>(hv: &mut H, page: &mut Page, shadow: Gfn) -> Result<(), H::Error> {
    let mut bytes = [0; PAGE_SIZE];
    hv.read(page.gfn.at(0), &mut bytes)?;
    adopt(&bytes, &mut page.breakpoints);
    for breakpoint in &page.breakpoints {
        bytes[usize::from(breakpoint.offset())] = INT3;
    }
    hv.write(shadow.at(0), &bytes)
}
