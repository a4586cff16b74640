//! We compute what the instruction does: one event, no step, and no emulator.

use crate::breakpoint::Claims;
use crate::dr7::Dr7;
use crate::insn::interpret::{Memory, Op, Operand};
use crate::insn::paging::Intent;
use crate::insn::{LOOK_BACK, Walks, is_plain_after};
use crate::views::Views;
use crate::{Action, CodeMode, Gfn, Gpa, Hypervisor, Registers, Reply};

#[inline(never)]
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
    pub(super) walks: &'a mut Walks,
    pub(super) dr7: Dr7,
    /// It was found that none of the guest's own breakpoints is on data.
    pub(super) unwatched: bool,
}

impl<H: Hypervisor> Guest<'_, H> {
    #[inline(always)]
    fn locate(&mut self, linear: u64, length: usize, intent: Intent) -> Option<Gpa> {
        match self.walks.again(self.hv, self.registers, linear, length, intent) {
            Some(gpa) => self.is_plain(gpa.gfn()).then_some(gpa),
            None => self.locate_anew(linear, length, intent),
        }
    }

    #[cold]
    #[inline(never)]
    fn locate_anew(&mut self, linear: u64, length: usize, intent: Intent) -> Option<Gpa> {
        let (claims, views) = (self.claims, self.views);
        let is_plain = |gfn| is_plain(claims, views, gfn);
        let gpa = self.walks.anew(self.hv, self.registers, linear, length, intent, &is_plain)?;
        is_plain(gpa.gfn()).then_some(gpa)
    }

    /// Whether an instruction's operand could be accessed. A write is not made.
    #[inline(always)]
    pub(super) fn is_accessible(&mut self, operand: Operand) -> bool {
        let (linear, size) = (operand.linear, usize::from(operand.size));
        match operand.intent {
            Intent::Read => [0; 8].get_mut(..size).and_then(|into| self.read(linear, into)).is_some(),
            // It is not tried: what can be read there is memory.
            Intent::Write => {
                let gpa = self.locate(linear, size, Intent::Write);
                gpa.is_some_and(|gpa| self.hv.read_word(Gpa(gpa.0 & !7)).is_ok()) && self.is_unwatched()
            }
        }
    }

    /// Whether the bytes before RIP are known, and leave no [interrupt shadow](crate::insn::is_plain_after).
    #[cold]
    pub(super) fn is_out_of_shadow(&mut self) -> bool {
        let Registers { rip, cs_base, mode, .. } = *self.registers;
        let linear = cs_base.wrapping_add(rip).wrapping_sub(LOOK_BACK as u64);
        let linear = if mode == CodeMode::Bits64 { linear } else { linear & u64::from(u32::MAX) };
        let mut before = [0; LOOK_BACK];
        // No access of the guest's: its data breakpoints do not matter.
        let gpa = self.locate(linear, before.len(), Intent::Read);
        gpa.is_some_and(|gpa| self.hv.read(gpa, &mut before).is_ok()) && is_plain_after(before)
    }

    /// Whether the guest has no [data breakpoint](crate::dr7) on. It is asked once a hit, and only right before an access.
    #[inline(always)]
    pub(super) fn is_unwatched(&mut self) -> bool {
        self.unwatched |= !self.unwatched && self.dr7.watches_nothing(self.hv, self.registers);
        self.unwatched
    }

    #[inline(always)]
    fn is_plain(&self, gfn: Gfn) -> bool {
        is_plain(self.claims, self.views, gfn)
    }
}

#[inline(always)]
fn is_plain(claims: &Claims, views: Option<&Views>, gfn: Gfn) -> bool {
    claims.spare(gfn) && !views.is_some_and(|views| views.hides(gfn))
}

impl<H: Hypervisor> Memory for Guest<'_, H> {
    fn read(&mut self, linear: u64, into: &mut [u8]) -> Option<()> {
        let gpa = self.locate(linear, into.len(), Intent::Read)?;
        self.is_unwatched().then_some(())?;
        self.hv.read(gpa, into).ok()
    }

    #[inline(always)]
    fn write(&mut self, linear: u64, bytes: &[u8]) -> Option<()> {
        let gpa = self.locate(linear, bytes.len(), Intent::Write)?;
        self.is_unwatched().then_some(())?;
        self.hv.write_ram(gpa, bytes).ok()?.then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::insn::tables::Tables;
    use crate::watch::Watch;
    use crate::{Accesses, PAGE_SIZE, VcpuId};

    const ALL: u64 = 0x67;

    /// Four levels of tables in frames 0 to 3, and a page in frame 4; paging is on, in long mode.
    fn guest() -> (Tables, Registers) {
        let mut tables = Tables(vec![0; 5 * PAGE_SIZE / 8]);
        for frame in 0..4 {
            tables.0[frame * PAGE_SIZE / 8] = (frame as u64 + 1) << 12 | ALL;
        }
        let registers =
            Registers { cr0: 1 << 31 | 1 << 16, cr4: 1 << 5, efer: 1 << 10, cpl: 3, ..Registers::default() };
        (tables, registers)
    }

    /// In a page that somebody watches, or that has breakpoints, a walk is something to be told, or reads an INT3 of ours.
    #[test]
    fn a_walk_through_a_page_that_is_not_plain_is_left_to_the_cpu() {
        let (mut tables, registers) = guest();
        for frame in 0..5 {
            let (mut claims, mut walks) = (Claims::default(), Walks::NONE);
            let mut locate = |claims: &Claims, walks: &mut Walks| {
                let dr7 = Dr7 { vcpu: VcpuId(0), trust_event: true, ask: false };
                let (hv, registers) = (&mut tables, &registers);
                Guest { hv, claims, views: None, registers, walks, dr7, unwatched: false }.locate(8, 8, Intent::Read)
            };
            assert_eq!(locate(&claims, &mut walks), Some(Gfn(4).at(8)));
            claims.watch(Gfn(frame), Watch { accesses: Accesses { read: true, ..Accesses::NONE }, after: false });
            walks.forget();
            assert_eq!(locate(&claims, &mut walks), None, "frame {frame}");
        }
    }
}
