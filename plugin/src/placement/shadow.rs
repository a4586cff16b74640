//! 0xCC in a copy of the page, which the execute view shows in its place. The host view keeps the guest's own.

use super::{INT3, adopt};
use crate::breakpoint::Page;
use crate::{Gfn, Hypervisor, PAGE_SIZE, Rights, ViewId};

pub(super) fn open<H: Hypervisor>(hv: &mut H, exec: ViewId, gfn: Gfn) -> Result<Gfn, H::Error> {
    // No write of the guest may fall between the copy and the guard.
    hv.pause()?;
    let opened = open_paused(hv, exec, gfn);
    hv.resume()?;
    opened
}

fn open_paused<H: Hypervisor>(hv: &mut H, exec: ViewId, gfn: Gfn) -> Result<Gfn, H::Error> {
    let mut bytes = [0; PAGE_SIZE];
    hv.read(gfn.at(0), &mut bytes)?;
    let shadow = hv.add_shadow_gfn()?;
    let mapped = (|| {
        hv.write(shadow.at(0), &bytes)?;
        hv.remap(exec, gfn, Some(shadow))?;
        hv.set_rights(exec, gfn, Rights::Execute)
    })();
    if let Err(error) = mapped {
        // What failed is what the caller is to hear about, not that undoing it failed too.
        let _ = hv.remap(exec, gfn, None);
        let _ = hv.drop_shadow_gfn(shadow);
        return Err(error);
    }
    Ok(shadow)
}

pub(super) fn close<H: Hypervisor>(hv: &mut H, exec: ViewId, gfn: Gfn, shadow: Gfn) -> Result<(), H::Error> {
    hv.remap(exec, gfn, None)?;
    hv.drop_shadow_gfn(shadow)
}

/// The guest has written to its page: the copy follows.
pub(super) fn refresh<H: Hypervisor>(hv: &mut H, page: &mut Page, shadow: Gfn) -> Result<(), H::Error> {
    let mut bytes = [0; PAGE_SIZE];
    hv.read(page.gfn.at(0), &mut bytes)?;
    adopt(&bytes, &mut page.breakpoints);
    for breakpoint in &page.breakpoints {
        bytes[usize::from(breakpoint.offset())] = INT3;
    }
    hv.write(shadow.at(0), &bytes)
}
