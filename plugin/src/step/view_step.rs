//! Single-step on the guest's own pages, then back to the execute view: two events.

use super::Vcpu;
use crate::Reply;
use crate::views::Views;

pub(crate) fn begin(vcpu: &mut Vcpu, views: &Views) -> Reply {
    vcpu.home = true;
    Reply { view: Some(views.own), step: vcpu.step(), ..Reply::default() }
}
