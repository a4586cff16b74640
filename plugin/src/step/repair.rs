//! Write the byte back, single-step, write 0xCC again: two events, and right on one virtual CPU only.

use super::Vcpu;
use crate::breakpoint::{Breakpoint, Located};
use crate::{Hypervisor, Reply};

pub(super) fn begin<H: Hypervisor>(
    hv: &mut H,
    vcpu: &mut Vcpu,
    found: Located,
    breakpoint: &Breakpoint,
) -> Result<Reply, H::Error> {
    hv.replace(breakpoint.gpa, breakpoint.displaced.byte())?;
    Ok(vcpu.step_over(breakpoint.gpa, found))
}
