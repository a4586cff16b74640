//! What the hypervisor could not do.

use super::Engine;
use crate::error::WithCauses;
use crate::placement::INT3;
use crate::step::Emulating;
use crate::{Action, Event, Figures, Hypervisor, Reason, Reply, StepOver, conceal};

impl Engine {
    /// Nothing has happened yet; it is done in another way, and the emulator is not asked again.
    pub(super) fn on_emulation_failed<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        index: usize,
        event: &Event,
    ) -> Result<Reply, H::Error> {
        let emulating = self.vcpus[index].emulating.take();
        self.counters.emulation_failures += u64::from(emulating.is_some());
        match emulating {
            Some(Emulating::Displaced(gpa)) => {
                if let Some(breakpoint) = self.registry.at_mut(gpa) {
                    if breakpoint.displaced.byte() == INT3 {
                        // Another virtual CPU has just written it: it will be met again.
                        return Ok(Reply::default());
                    }
                    log::info!("Xen cannot emulate the instruction at {gpa}: it is stepped from now on");
                    // The hit counts again, as what serves it now.
                    let fallback = breakpoint.is_fallback(&event.registers, StepOver::Emulate);
                    breakpoint.not_emulable = true;
                    let Figures { served, fallbacks, .. } = &mut breakpoint.figures;
                    served.emulate = served.emulate.saturating_sub(1);
                    *fallbacks = fallbacks.saturating_sub(u64::from(fallback));
                }
                let mut reply = Reply::default();
                if let Some(found) = self.registry.locate(gpa) {
                    self.step_over::<_, true>(hv, index, found, event, None, &mut reply)?;
                }
                Ok(reply)
            }
            Some(Emulating::Access(gfn)) => {
                let (vcpu, views) = (&mut self.vcpus[index], self.views.as_ref());
                match self.registry.page_mut(gfn) {
                    Some(page) => conceal::on_own_bytes(hv, views, vcpu, page, &event.registers, false),
                    None => Ok(Reply::default()),
                }
            }
            None => {
                self.counters.unexplained += 1;
                Ok(Reply::default())
            }
        }
    }

    /// The hypervisor refused something in the middle of a hit: the guest goes on without it.
    #[cold]
    pub(super) fn give_way(&mut self, event: &Event, error: &(dyn std::error::Error + 'static)) -> Reply {
        if self.counters.failures == 0 {
            log::error!("virtual CPU {} goes on without its breakpoint: {}", event.vcpu.0, WithCauses(error));
        }
        self.counters.failures += 1;
        let instruction = match &event.reason {
            Reason::Int3(int3) => self.registry.at(int3.gpa).map(|(_, breakpoint)| breakpoint.displaced.bytes()),
            Reason::Step | Reason::Access(_) | Reason::EmulationFailed => None,
        };
        Reply { action: instruction.map_or(Action::Emulate, Action::EmulateInstruction), ..Reply::default() }
    }
}
