//! We compute what the instruction does: one event, no step, and no emulator.

use crate::breakpoint::Claims;
use crate::insn::interpret::{Memory, Op};
use crate::insn::paging::{self, Intent};
use crate::views::Views;
use crate::{Action, Gfn, Gpa, Hypervisor, Registers, Reply};

pub(super) fn begin<H: Hypervisor>(guest: &mut Guest<'_, H>, op: &Op, reply: &mut Reply) -> Option<()> {
    let registers = guest.registers;
    // There, and nowhere else before: they are large.
    let done = op.run(registers, reply.set_registers(registers), guest);
    if done.is_none() {
        reply.action = Action::Resume;
    }
    done
}

/// The guest's memory, as the virtual CPU would access it with these registers.
///
/// Only what is nobody's business is accessed: not a page with breakpoints (one in place shows 0xCC, and a write must be
/// followed), not our own frames, and not a page that somebody watches.
pub(super) struct Guest<'a, H> {
    pub(super) hv: &'a mut H,
    pub(super) claims: &'a Claims,
    pub(super) views: Option<&'a Views>,
    pub(super) registers: &'a Registers,
}

impl<H: Hypervisor> Guest<'_, H> {
    fn locate(&mut self, linear: u64, length: usize, intent: Intent) -> Option<Gpa> {
        let gpa = paging::access(self.hv, self.registers, linear, length, intent)?;
        self.is_plain(gpa.gfn()).then_some(gpa)
    }

    fn is_plain(&self, gfn: Gfn) -> bool {
        self.claims.spare(gfn) && !self.views.is_some_and(|views| views.hides(gfn))
    }
}

impl<H: Hypervisor> Memory for Guest<'_, H> {
    fn read(&mut self, linear: u64, into: &mut [u8]) -> Option<()> {
        let gpa = self.locate(linear, into.len(), Intent::Read)?;
        self.hv.read(gpa, into).ok()
    }

    #[inline(always)]
    fn write(&mut self, linear: u64, bytes: &[u8]) -> Option<()> {
        let gpa = self.locate(linear, bytes.len(), Intent::Write)?;
        self.hv.write(gpa, bytes).ok()
    }
}

/// The same, but what is written goes nowhere: to see whether an instruction would go through.
pub(super) struct Rehearsal<'a, 'g, H>(pub(super) &'a mut Guest<'g, H>);

impl<H: Hypervisor> Memory for Rehearsal<'_, '_, H> {
    fn read(&mut self, linear: u64, into: &mut [u8]) -> Option<()> {
        self.0.read(linear, into)
    }

    fn write(&mut self, linear: u64, bytes: &[u8]) -> Option<()> {
        self.0.locate(linear, bytes.len(), Intent::Write).map(|_| ())
    }
}
