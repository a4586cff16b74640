//! The bridge's types are the core's, without what C++ does not know: enums with data, and options.

use hyperbp::{
    Access, Accesses, Action, CodeMode, Event, Figures, Gpa, Int3, Reason, Registers, Reply, Rights, Step, VcpuId,
    ViewId,
};

use crate::bridge::ffi;

/// Writes an event, all of it. (It is large, and is not to be moved about.)
pub(crate) fn event(event: &ffi::Event, into: &mut Event) {
    into.vcpu = VcpuId(event.vcpu);
    into.view = ViewId(event.view);
    into.reason = match event.reason {
        ffi::Reason::Int3 => Reason::Int3(Int3::new(Gpa(event.gpa), event.length)),
        ffi::Reason::Access => {
            Reason::Access(Access::new(Gpa(event.gpa), accesses(event.accesses)).with_page_walk(event.page_walk))
        }
        ffi::Reason::EmulationFailed => Reason::EmulationFailed,
        // And whatever a C++ program has made of it that is none of them: it is counted as unexplained.
        _ => Reason::Step,
    };
    let (from, into) = (&event.registers, &mut into.registers);
    into.gpr = from.general.gpr;
    into.rip = from.general.rip;
    into.rflags = from.general.rflags;
    into.cr0 = from.cr0;
    into.cr3 = from.cr3;
    into.cr4 = from.cr4;
    into.efer = from.efer;
    into.dr7 = from.dr7;
    into.cs_base = from.cs_base;
    into.cpl = from.cpl & 3;
    into.flat = from.flat;
    into.mode = match from.mode {
        ffi::CodeMode::Bits16 => CodeMode::Bits16,
        ffi::CodeMode::Bits32 => CodeMode::Bits32,
        _ => CodeMode::Bits64,
    };
}

/// Writes a reply, as far as what it holds counts.
pub(crate) fn reply(reply: &Reply, into: &mut ffi::Reply) {
    into.switch_view = reply.view.is_some();
    if let Some(view) = reply.view {
        into.view = view.0;
    }
    into.step = match reply.step {
        Step::Keep => ffi::Step::Keep,
        Step::On => ffi::Step::On,
        Step::Off => ffi::Step::Off,
        Step::Fast(back) => {
            into.fast_view = back.0;
            ffi::Step::Fast
        }
    };
    into.action = match &reply.action {
        Action::Resume => ffi::Action::Resume,
        Action::Emulate => ffi::Action::Emulate,
        Action::EmulateRead(data) => {
            let bytes = data.as_slice();
            into.bytes[..bytes.len()].copy_from_slice(bytes);
            into.length = bytes.len() as u8;
            ffi::Action::EmulateRead
        }
        Action::EmulateInstruction(bytes) => {
            into.bytes[..bytes.len()].copy_from_slice(bytes);
            into.length = bytes.len() as u8;
            ffi::Action::EmulateInstruction
        }
        Action::SetRegisters(registers) => {
            let &Registers { gpr, rip, rflags, .. } = registers;
            into.registers = ffi::General { gpr, rip, rflags };
            ffi::Action::SetRegisters
        }
        Action::Reinject => ffi::Action::Reinject,
    };
}

/// What an event is, nowhere.
pub(crate) const fn observed(kind: ffi::Kind) -> ffi::Observed {
    let accesses = ffi::Accesses { read: false, write: false, execute: false };
    ffi::Observed { kind, breakpoint: false, accesses, pa: 0, breakpoint_pa: 0 }
}

/// What an event is, that is about an access.
pub(crate) const fn observed_access(kind: ffi::Kind, access: &Access) -> ffi::Observed {
    let accesses = ffi::Accesses { read: access.read, write: access.write, execute: access.execute };
    ffi::Observed { accesses, pa: access.gpa.0, ..observed(kind) }
}

/// Kinds of accesses.
pub(crate) fn accesses(accesses: ffi::Accesses) -> Accesses {
    Accesses { read: accesses.read, write: accesses.write, execute: accesses.execute }
}

/// Rights.
pub(crate) fn rights(rights: Rights) -> ffi::Rights {
    match rights {
        Rights::All => ffi::Rights::All,
        Rights::Execute => ffi::Rights::Execute,
        Rights::ReadWrite => ffi::Rights::ReadWrite,
        Rights::ReadExecute => ffi::Rights::ReadExecute,
        Rights::Read => ffi::Rights::Read,
        Rights::None => ffi::Rights::None,
    }
}

/// What C++ says of rights. None if it is none of them.
pub(crate) fn rights_of(from: ffi::Rights) -> Option<Rights> {
    let all = [Rights::All, Rights::Execute, Rights::ReadWrite, Rights::ReadExecute, Rights::Read, Rights::None];
    all.into_iter().find(|known| rights(*known) == from)
}

/// What a breakpoint has done.
pub(crate) fn figures(pa: Gpa, figures: &Figures) -> ffi::Figures {
    ffi::Figures {
        pa: pa.0,
        hits: figures.hits,
        repair: figures.served.repair,
        view_step: figures.served.view_step,
        view_fast_step: figures.served.view_fast_step,
        emulate: figures.served.emulate,
        interpret: figures.served.interpret,
        fallbacks: figures.fallbacks,
        rewritten: figures.rewritten,
    }
}
