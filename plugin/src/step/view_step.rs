//! Single-step on the guest's own pages, then back to the execute view: two events.

use super::Vcpu;
use crate::views::Views;
use crate::{Reply, ViewId};

/// In the write view, if the virtual CPU is to write to a page that has a shadow.
#[inline]
pub(crate) fn begin(vcpu: &mut Vcpu, views: &Views) -> Reply {
    vcpu.home = true;
    Reply { view: Some(view_of(vcpu, views)), step: vcpu.step(), ..Reply::default() }
}

/// The view a virtual CPU is stepped in.
pub(crate) fn view_of(vcpu: &Vcpu, views: &Views) -> ViewId {
    if vcpu.pages.is_empty() { views.own } else { views.write }
}
