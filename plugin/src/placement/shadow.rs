//! 0xCC in a copy of the page, which only the execute view shows.

use super::{INT3, adopt};
use crate::breakpoint::Page;
use crate::views::Views;
use crate::{Gfn, Hypervisor, PAGE_SIZE};

/// No virtual CPU may run: it could write to the page between two of these calls.
pub(super) fn open<H: Hypervisor>(hv: &mut H, views: &mut Views, gfn: Gfn) -> Result<Gfn, H::Error> {
    let mut bytes = [0; PAGE_SIZE];
    hv.read(gfn.at(0), &mut bytes)?;
    let shadow = views.take_frame(hv, &bytes)?;
    if let Err(error) = views.show(hv, shadow, gfn) {
        // What failed is what the caller is to hear about, not that undoing it failed too.
        let _ = views.unshow(hv, gfn);
        let _ = views.give_frame(hv, shadow);
        return Err(error);
    }
    Ok(shadow)
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
