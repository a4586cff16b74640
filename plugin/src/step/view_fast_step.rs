//! Single-step in the host view, and let the hypervisor switch back by itself: one event.

use super::Vcpu;
use crate::{Reply, Step, ViewId};

pub(crate) fn begin(vcpu: &mut Vcpu, exec: ViewId, rip: u64) -> Reply {
    vcpu.fast = Some(rip);
    Reply { view: Some(ViewId::HOST), step: Step::Fast(exec), ..Reply::default() }
}
