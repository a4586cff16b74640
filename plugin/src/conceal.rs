//! What an access to a page with breakpoints gets.
//!
//! A read is answered as the page's [`Conceal`] says. A write, and every read that this cannot be right for, runs as a
//! monitored step on the guest's own bytes: in the host view, or, with breakpoints in place, while these are lifted.
//!
//! [`Conceal::Data`] is right only for an instruction that makes one read that lies wholly in the page: Xen gives *every*
//! read of the instruction the same bytes, and zeros where they end (`set_context_data`, xen/arch/x86/hvm/emulate.c). So
//! the instruction is decoded first.

use iced_x86::InstructionInfoFactory;

use crate::breakpoint::Page;
use crate::step::{self, Vcpu};
use crate::{
    Access, Action, Conceal, Event, Hypervisor, PAGE_SIZE, Placement, READ_BYTES, ReadData, Reply, ViewId, insn,
    placement,
};

/// Answers an access that the guard of `page` denied.
pub(crate) fn begin<H: Hypervisor>(
    hv: &mut H,
    exec: Option<ViewId>,
    vcpu: &mut Vcpu,
    factory: &mut InstructionInfoFactory,
    page: &mut Page,
    event: &Event,
    access: &Access,
) -> Result<Reply, H::Error> {
    if access.write || access.page_walk || vcpu.stepping {
        return on_own_bytes(hv, exec, vcpu, page, access.write);
    }
    match (page.conceal, exec) {
        (Conceal::ViewFastStep, Some(exec)) => {
            return Ok(step::fast_step_in_host_view(vcpu, exec, event.registers.rip));
        }
        (Conceal::Emulate, Some(_)) => return Ok(Reply { action: Action::Emulate, ..Reply::default() }),
        (Conceal::Data, _) => {
            if let Some(data) = data(hv, factory, page, event, access)? {
                return Ok(Reply { action: Action::EmulateRead(data), ..Reply::default() });
            }
        }
        _ => {}
    }
    on_own_bytes(hv, exec, vcpu, page, false)
}

/// The access runs on the guest's own bytes, as a monitored step.
pub(crate) fn on_own_bytes<H: Hypervisor>(
    hv: &mut H,
    exec: Option<ViewId>,
    vcpu: &mut Vcpu,
    page: &mut Page,
    write: bool,
) -> Result<Reply, H::Error> {
    match page.placement {
        Placement::Shadow => {
            if write && vcpu.owe(page.gfn).is_none() {
                return Ok(Reply { action: Action::Emulate, ..Reply::default() });
            }
            Ok(step::step_in_host_view(vcpu))
        }
        Placement::InPlace => match vcpu.owe(page.gfn) {
            None => Ok(Reply { action: Action::Emulate, ..Reply::default() }),
            Some(new) => {
                if new {
                    placement::lift(hv, exec, page)?;
                }
                Ok(Reply { step: vcpu.step(), ..Reply::default() })
            }
        },
    }
}

/// What the instruction is to read, if that can be told.
fn data<H: Hypervisor>(
    hv: &mut H,
    factory: &mut InstructionInfoFactory,
    page: &Page,
    event: &Event,
    access: &Access,
) -> Result<Option<ReadData>, H::Error> {
    let start = access.gpa.offset();
    // At the start of a page the access may have begun in the page before.
    if start == 0 {
        return Ok(None);
    }
    let Some(size) = insn::single_read(hv, factory, &event.registers) else { return Ok(None) };
    let end = usize::from(start) + size;
    if size > READ_BYTES || end > PAGE_SIZE {
        return Ok(None);
    }
    let mut bytes = [0; READ_BYTES];
    hv.read(access.gpa, &mut bytes[..size])?;
    if page.placement == Placement::InPlace {
        let first = page.index(start).unwrap_or_else(|index| index);
        let hidden = page.breakpoints[first..].iter().take_while(|b| usize::from(b.offset()) < end);
        for breakpoint in hidden {
            bytes[usize::from(breakpoint.offset() - start)] = breakpoint.original;
        }
    }
    Ok(Some(ReadData::new(bytes, size)))
}
