//! 0xCC in the guest's own page. Every view shows it, so every view guards the page.

use super::{INT3, adopt};
use crate::breakpoint::Page;
use crate::{Gfn, Hypervisor, PAGE_SIZE, Rights, ViewId};

pub(super) fn guard<H: Hypervisor>(hv: &mut H, exec: Option<ViewId>, gfn: Gfn) -> Result<(), H::Error> {
    set_rights(hv, exec, gfn, Rights::Execute)
}

pub(super) fn unguard<H: Hypervisor>(hv: &mut H, exec: Option<ViewId>, gfn: Gfn) -> Result<(), H::Error> {
    set_rights(hv, exec, gfn, Rights::All)
}

fn set_rights<H: Hypervisor>(hv: &mut H, exec: Option<ViewId>, gfn: Gfn, rights: Rights) -> Result<(), H::Error> {
    if let Some(exec) = exec {
        hv.set_rights(exec, gfn, rights)?;
    }
    hv.set_rights(ViewId::HOST, gfn, rights)
}

pub(super) fn lift<H: Hypervisor>(hv: &mut H, exec: Option<ViewId>, page: &Page) -> Result<(), H::Error> {
    // The bytes first: nothing of ours is to be there when the guard is gone.
    for breakpoint in &page.breakpoints {
        hv.write(breakpoint.id.gpa(), &[breakpoint.original])?;
    }
    unguard(hv, exec, page.gfn)
}

pub(super) fn lower<H: Hypervisor>(hv: &mut H, exec: Option<ViewId>, page: &mut Page) -> Result<(), H::Error> {
    // The guard first, for the same reason.
    guard(hv, exec, page.gfn)?;
    let mut bytes = [0; PAGE_SIZE];
    hv.read(page.gfn.at(0), &mut bytes)?;
    adopt(&bytes, &mut page.breakpoints);
    for breakpoint in &page.breakpoints {
        hv.write(breakpoint.id.gpa(), &[INT3])?;
    }
    Ok(())
}
