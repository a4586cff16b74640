//! Single-step on the guest's own pages, and let the hypervisor switch back by itself: one event.

use super::Vcpu;
use crate::views::Views;
use crate::{Reply, Step};

#[inline]
pub(crate) fn begin(vcpu: &mut Vcpu, views: &Views, rip: u64) -> Reply {
    vcpu.fast = Some(rip);
    Reply { view: Some(views.own), step: Step::Fast(views.home(vcpu.monitored)), ..Reply::default() }
}
