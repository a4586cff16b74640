//! What an access to a page with breakpoints gets.
//!
//! A read is answered as the page's [`Conceal`] says. A write, and every read that this cannot be right for, runs as a
//! monitored step on the guest's own bytes: in the own view, or, with breakpoints in place, while these are lifted.
//!
//! [`Conceal::Data`] is right only for an instruction that makes one read that lies wholly in the page: Xen gives *every*
//! read of the instruction the same bytes, and zeros where they end (`set_context_data`, xen/arch/x86/hvm/emulate.c). So
//! the instruction is decoded first.

use iced_x86::InstructionInfoFactory;

use crate::breakpoint::Page;
use crate::insn::paging;
use crate::step::{self, Emulating, Vcpu};
use crate::views::Views;
use crate::{
    Access, Action, Conceal, Event, Hypervisor, PAGE_SIZE, Placement, READ_BYTES, ReadData, Reason, Registers, Reply,
    insn, placement,
};

/// Answers the access of an event, which the guard of `page` denied. `others_in_place`: the same instruction might read a page with
/// breakpoints in place, too, and Xen's emulator would see them.
pub(crate) fn begin<H: Hypervisor>(
    hv: &mut H,
    views: Option<&Views>,
    vcpu: &mut Vcpu,
    factory: &mut InstructionInfoFactory,
    page: &mut Page,
    others_in_place: bool,
    event: &Event,
) -> Result<Reply, H::Error> {
    let Reason::Access(access) = &event.reason else { return Ok(Reply::default()) };
    let emulated = |vcpu: &mut Vcpu, action| {
        vcpu.emulating = Some(Emulating::Access(access.gpa.gfn()));
        Ok(Reply { action, ..Reply::default() })
    };
    if !(access.write || access.page_walk || vcpu.stepping) {
        let emulable = !event.registers.has_debugger();
        match (page.conceal, views) {
            (Conceal::ViewFastStep, Some(views)) => {
                return Ok(step::fast_step_in_own_view(vcpu, views, event.registers.rip));
            }
            (Conceal::Emulate, Some(_)) if emulable && !others_in_place => return emulated(vcpu, Action::Emulate),
            (Conceal::Data, _) if emulable => {
                if let Some(data) = data(hv, factory, page, event, access)? {
                    return emulated(vcpu, Action::EmulateRead(data));
                }
            }
            _ => {}
        }
    }
    on_own_bytes(hv, views, vcpu, page, &event.registers, access.write)
}

/// The instruction at RIP runs on the guest's own bytes, as a monitored step. If it writes to the page, what it writes is
/// taken over after that.
pub(crate) fn on_own_bytes<H: Hypervisor>(
    hv: &mut H,
    views: Option<&Views>,
    vcpu: &mut Vcpu,
    page: &mut Page,
    registers: &Registers,
    write: bool,
) -> Result<Reply, H::Error> {
    match (page.placement, views) {
        (Placement::Shadow, Some(views)) if !write || vcpu.owe(page.gfn) => Ok(step::step_in_own_view(vcpu, views)),
        (Placement::InPlace, _) => {
            let lift = !vcpu.owes(page.gfn) || page.lifted == 0;
            if !vcpu.owe(page.gfn) {
                return Ok(Reply { action: Action::Emulate, ..Reply::default() });
            }
            if lift {
                let linear = registers.cs_base.wrapping_add(registers.rip);
                let within = paging::translate(hv, registers, linear).is_none_or(|gpa| gpa.gfn() == page.gfn);
                placement::lift(hv, views, page, within).inspect_err(|_| vcpu.disown(page.gfn))?;
            }
            Ok(Reply { step: vcpu.step(), ..Reply::default() })
        }
        (Placement::Shadow, _) => Ok(Reply { action: Action::Emulate, ..Reply::default() }),
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
            bytes[usize::from(breakpoint.offset() - start)] = breakpoint.displaced.byte();
        }
    }
    Ok(Some(ReadData::new(bytes, size)))
}
