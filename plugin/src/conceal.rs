//! What an access to a page with breakpoints gets.
//!
//! A read is answered as the page's [`Conceal`] says. A write, and every read that this cannot be right for, runs as a
//! monitored step on the guest's own bytes: in the own view, or, with breakpoints in place, while these are lifted.
//!
//! Xen's emulator works on the guest's own pages, whatever a view shows or denies, and tells nobody. So
//! [`Conceal::Emulate`] and [`Conceal::Data`] are right only for an instruction that writes nothing and makes one read that
//! lies wholly in the page. Besides, Xen gives *every* read of the instruction the same data, and zeros where they end
//! (`set_context_data`, xen/arch/x86/hvm/emulate.c): those of a descriptor, too. And the CPU may have made the access for
//! itself, when it delivers an exception. So the instruction is decoded first, and the address of its operand compared
//! with that of the access ([`insn::operand_read`]). Nor does the emulator look at the guest's
//! own [data breakpoints](crate::dr7).

use iced_x86::InstructionInfoFactory;

use crate::breakpoint::Page;
use crate::dr7::Dr7;
use crate::insn::paging;
use crate::step::{self, Emulating, Vcpu};
use crate::views::Views;
use crate::{
    Action, Conceal, Event, Gpa, Hypervisor, Placement, READ_BYTES, ReadData, Reason, Registers, Reply, insn, placement,
};

/// Answers the access of an event, which the guard of `page` denied.
pub(crate) fn begin<H: Hypervisor>(
    hv: &mut H,
    views: Option<&Views>,
    vcpu: &mut Vcpu,
    factory: &mut InstructionInfoFactory,
    page: &mut Page,
    event: &Event,
    dr7: Dr7,
) -> Result<Reply, H::Error> {
    let Reason::Access(access) = &event.reason else { return Ok(Reply::default()) };
    let emulated = |vcpu: &mut Vcpu, action| {
        vcpu.emulating = Some(Emulating::Access(access.gpa.gfn()));
        Ok(Reply { action, ..Reply::default() })
    };
    // Without breakpoints it is to be given back, as soon as there is no answer that takes Xen a while.
    if !(access.write || access.page_walk || vcpu.stepping || page.breakpoints.is_empty()) {
        let registers = &event.registers;
        match (page.conceal, views) {
            // An INT3 that is executed once more in a fast step would end that, and would be interrupted again.
            (Conceal::ViewFastStep, Some(views)) if vcpu.interrupted.is_none() => {
                return Ok(step::fast_step_in_own_view(vcpu, views, registers.rip));
            }
            (Conceal::Emulate, Some(_))
                if insn::operand_read(hv, factory, registers, access.gpa).is_some()
                    && dr7.watches_nothing(hv, registers) =>
            {
                return emulated(vcpu, Action::Emulate);
            }
            (Conceal::Data, _) => {
                let size = insn::operand_read(hv, factory, registers, access.gpa);
                if let Some(size) = size.filter(|size| *size <= READ_BYTES)
                    && dr7.watches_nothing(hv, registers)
                {
                    let data = data(hv, page, access.gpa, size)?;
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
        (Placement::Shadow, Some(views)) if !write => Ok(step::step_on_own_pages(vcpu, views)),
        (Placement::Shadow, Some(views)) if vcpu.owe_page(page) => {
            views.permit_write(hv, page.gfn)?;
            Ok(step::step_on_own_pages(vcpu, views))
        }
        (Placement::InPlace, _) => {
            let lift = !vcpu.owes(page.gfn) || page.lifted == 0;
            if !vcpu.owe_page(page) {
                return Ok(Reply { action: Action::Emulate, ..Reply::default() });
            }
            if lift {
                let linear = registers.cs_base.wrapping_add(registers.rip);
                let within = paging::translate(hv, registers, linear).is_none_or(|gpa| gpa.gfn() == page.gfn);
                placement::lift(hv, views, page, within).inspect_err(|_| vcpu.forget_page(page))?;
            }
            Ok(Reply { step: vcpu.step(), ..Reply::default() })
        }
        (Placement::Shadow, _) => Ok(Reply { action: Action::Emulate, ..Reply::default() }),
    }
}

/// What the instruction is to read: the guest's own bytes.
fn data<H: Hypervisor>(hv: &mut H, page: &Page, gpa: Gpa, size: usize) -> Result<ReadData, H::Error> {
    let start = gpa.offset();
    let end = usize::from(start) + size;
    let mut bytes = [0; READ_BYTES];
    hv.read(gpa, &mut bytes[..size])?;
    if page.placement == Placement::InPlace {
        let read = usize::from(start)..end;
        for breakpoint in page.breakpoints.iter().filter(|b| read.contains(&b.offset().into())) {
            bytes[usize::from(breakpoint.offset() - start)] = breakpoint.displaced.byte();
        }
    }
    Ok(ReadData::new(bytes, size))
}
