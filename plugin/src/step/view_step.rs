//! Single-step in the host view, then back to the execute view: two events.

use super::Vcpu;
use crate::{Reply, ViewId};

pub(crate) fn begin(vcpu: &mut Vcpu) -> Reply {
    vcpu.home = true;
    Reply { view: Some(ViewId::HOST), step: vcpu.step(), ..Reply::default() }
}
