//! Single-step on the guest's own pages, then back to the execute view: two events.

use super::Vcpu;
use crate::Reply;
use crate::views::Views;

/// In the write view, if the virtual CPU is to write to a page that has a shadow.
pub(crate) fn begin(vcpu: &mut Vcpu, views: &Views) -> Reply {
    vcpu.home = true;
    let writes = vcpu.pages.iter().any(Option::is_some);
    Reply { view: Some(if writes { views.write } else { views.own }), step: vcpu.step(), ..Reply::default() }
}
