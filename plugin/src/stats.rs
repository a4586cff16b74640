//! Figures of what the engine has done.

use hdrhistogram::Histogram;

use crate::StepOver;

/// How often what happened, since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Breakpoints were hit.
    pub hits: u64,
    /// Reads of a page with breakpoints were answered.
    pub reads: u64,
    /// The guest wrote to a page with breakpoints.
    pub writes: u64,
    /// A virtual CPU was about to execute an in-place page while another one accessed it, and had to try again.
    pub held: u64,
    /// The guest wrote to a frame where there is none of its own: where the engine keeps a shadow.
    pub discarded: u64,
    /// The guest's own INT3s were delivered to it.
    pub reinjected: u64,
    /// The hypervisor was told to emulate an instruction and could not; it was stepped.
    pub emulation_failures: u64,
    /// Events arrived that no breakpoint explains (any more); the guest went on.
    pub unexplained: u64,
    /// The hypervisor refused something in the middle of a hit; the guest went on.
    pub failures: u64,
}

/// What a breakpoint has done since it was set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// It was hit.
    pub hits: u64,
    /// Which step-over served the hits. The rest of them were the guest's own INT3s, or the breakpoint was removed.
    pub served: Served,
    /// The step-over that was chosen could not do the instruction, or Xen would have carried it out too late, and another one
    /// did.
    pub fallbacks: u64,
    /// The guest has changed the instruction under it; it is set on the new one.
    pub rewritten: u64,
}

/// Which step-over served how many hits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// [`StepOver::Repair`].
    pub repair: u64,
    /// [`StepOver::ViewStep`].
    pub view_step: u64,
    /// [`StepOver::ViewFastStep`].
    pub view_fast_step: u64,
    /// [`StepOver::Emulate`].
    pub emulate: u64,
    /// [`StepOver::Interpret`].
    pub interpret: u64,
}

impl Served {
    /// Counts a hit. [`StepOver::Auto`] serves none itself.
    pub(crate) fn count(&mut self, step_over: StepOver) {
        match step_over {
            StepOver::Repair => self.repair += 1,
            StepOver::ViewStep => self.view_step += 1,
            StepOver::ViewFastStep => self.view_fast_step += 1,
            StepOver::Emulate => self.emulate += 1,
            StepOver::Interpret => self.interpret += 1,
            StepOver::Auto => {}
        }
    }

    /// All hits that were served.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.repair + self.view_step + self.view_fast_step + self.emulate + self.interpret
    }
}

/// How long handling a hit took, subscribers included, in units of [`Hypervisor::now`](crate::Hypervisor::now).
#[derive(Clone, Debug)]
pub(crate) struct HandlingTime(Histogram<u64>);

impl HandlingTime {
    /// The largest time that is told apart: longer ones count as this.
    const MOST: u64 = 1 << 40;
    /// Significant decimal digits.
    const DIGITS: u8 = 2;

    pub(crate) fn new() -> Self {
        // Bounded, so that recording never allocates.
        let histogram = Histogram::new_with_bounds(1, Self::MOST, Self::DIGITS);
        Self(histogram.unwrap_or_else(|_| unreachable!("the bounds are constants that are right")))
    }

    pub(crate) fn record(&mut self, time: u64) {
        self.0.saturating_record(time);
    }

    pub(crate) fn histogram(&self) -> &Histogram<u64> {
        &self.0
    }
}
