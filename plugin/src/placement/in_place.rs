//! 0xCC in the guest's own page. Every view shows it, so every view guards the page.

use super::{INT3, adopt};
use crate::breakpoint::Page;
use crate::views::Views;
use crate::{Gfn, Gpa, Hypervisor, PAGE_SIZE, Rights, ViewId};

pub(super) fn guard<H: Hypervisor>(hv: &mut H, views: Option<&Views>, gfn: Gfn) -> Result<(), H::Error> {
    set_rights(hv, views, gfn, Rights::Execute)
}

pub(super) fn unguard<H: Hypervisor>(hv: &mut H, views: Option<&Views>, gfn: Gfn) -> Result<(), H::Error> {
    set_rights(hv, views, gfn, Rights::All)
}

fn set_rights<H: Hypervisor>(hv: &mut H, views: Option<&Views>, gfn: Gfn, rights: Rights) -> Result<(), H::Error> {
    // Xen carries a change of the host view into the others, so these come last.
    hv.set_rights(ViewId::HOST, gfn, rights)?;
    views.map_or(Ok(()), |views| views.all().into_iter().try_for_each(|view| hv.set_rights(view, gfn, rights)))
}

/// Takes the breakpoints of a page out so that one instruction can access it. Meanwhile nobody may execute the page: it
/// would run past them. If the instruction itself is in the page, that cannot be helped.
pub(crate) fn lift<H: Hypervisor>(
    hv: &mut H,
    views: Option<&Views>,
    page: &mut Page,
    from_within: bool,
) -> Result<(), H::Error> {
    // At no moment may somebody execute the page without breakpoints, or read them.
    // If they are out already, the guest may have written there since.
    let there = if page.lifted == 0 { page.breakpoints.as_slice() } else { &[] };
    let mut bytes = [0; PAGE_SIZE];
    let lifted = set_rights(hv, views, page.gfn, Rights::None)
        .and_then(|()| if there.is_empty() { Ok(()) } else { hv.read(page.gfn.at(0), &mut bytes) })
        .and_then(|()| {
            there.iter().try_for_each(|b| {
                let now = bytes[usize::from(b.offset())];
                hv.replace(b.gpa, guests_byte(now, b.displaced.byte()))
            })
        })
        .and_then(|()| match from_within {
            true => uncover(hv, views, page.gfn),
            false => set_rights(hv, views, page.gfn, Rights::ReadWrite),
        });
    // What failed is what the caller is to hear about, not that undoing it failed too.
    match (&lifted, page.lifted) {
        (Ok(()), _) => page.lifted = page.lifted.saturating_add(1),
        (Err(_), 0) => {
            // Only those that were there: what a device has written over another one is taken over later.
            for b in page.breakpoints.iter().filter(|b| bytes[usize::from(b.offset())] == INT3) {
                let _ = hv.displace(b.gpa, b.displaced.byte());
            }
            let _ = guard(hv, views, page.gfn);
        }
        // It is still lifted for others, which must get on.
        (Err(_), _) => drop(uncover(hv, views, page.gfn)),
    }
    lifted
}

/// Lets the instruction that a page is lifted for be executed from that page.
pub(crate) fn uncover<H: Hypervisor>(hv: &mut H, views: Option<&Views>, gfn: Gfn) -> Result<(), H::Error> {
    unguard(hv, views, gfn)
}

/// Sets the breakpoints in a page that has come in place of the one they were in. Whether there is one.
pub(super) fn rearm<H: Hypervisor>(hv: &mut H, views: Option<&Views>, page: &mut Page) -> Result<bool, H::Error> {
    let mut bytes = [0; PAGE_SIZE];
    hv.read(page.gfn.at(0), &mut bytes)?;
    // Most often the event is of a moment ago, when the page was lifted.
    if page.breakpoints.iter().all(|breakpoint| bytes[usize::from(breakpoint.offset())] == INT3) {
        guard(hv, views, page.gfn)?;
        return Ok(false);
    }
    lower(hv, views, page)?;
    Ok(true)
}

pub(super) fn lower<H: Hypervisor>(hv: &mut H, views: Option<&Views>, page: &mut Page) -> Result<(), H::Error> {
    set_rights(hv, views, page.gfn, Rights::None)?;
    let mut bytes = [0; PAGE_SIZE];
    hv.read(page.gfn.at(0), &mut bytes)?;
    adopt(&bytes, &mut page.breakpoints);
    let armed = page.breakpoints.iter().try_for_each(|b| hv.displace(b.gpa, b.displaced.byte()));
    let lowered = armed.and_then(|()| guard(hv, views, page.gfn));
    if lowered.is_err() {
        // The next attempt is not to take our 0xCC for the guest's.
        for breakpoint in &page.breakpoints {
            let _ = hv.replace(breakpoint.gpa, breakpoint.displaced.byte());
        }
    }
    lowered
}

/// What the guest has where a breakpoint is in place. `now` is the byte in memory, `displaced` what the breakpoint has
/// displaced. Another byte than 0xCC was written by someone whose writes are no events, a device for example: it is the
/// guest's own.
pub(crate) const fn guests_byte(now: u8, displaced: u8) -> u8 {
    if now == INT3 { displaced } else { now }
}

/// Compares the page with what is known of it. Takes over what is new, and writes each 0xCC again that is not there any
/// more, unless a virtual CPU `is_stepped` over it. Returns whether there was a difference.
pub(super) fn resync<H: Hypervisor>(
    hv: &mut H,
    page: &mut Page,
    is_stepped: &dyn Fn(Gpa) -> bool,
) -> Result<bool, H::Error> {
    let mut bytes = [0; PAGE_SIZE];
    hv.read(page.gfn.at(0), &mut bytes)?;
    if page.lifted > 0 {
        // None of ours is there now.
        return Ok(adopt(&bytes, &mut page.breakpoints));
    }
    let memory = bytes;
    for b in &page.breakpoints {
        let byte = &mut bytes[usize::from(b.offset())];
        *byte = guests_byte(*byte, b.displaced.byte());
    }
    let mut changed = adopt(&bytes, &mut page.breakpoints);
    for b in &page.breakpoints {
        if memory[usize::from(b.offset())] != INT3 && !is_stepped(b.gpa) {
            changed = true;
            hv.displace(b.gpa, b.displaced.byte())?;
        }
    }
    Ok(changed)
}
