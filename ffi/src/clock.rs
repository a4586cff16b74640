//! How long a tick is.

use std::time::Instant;

/// Tells how long a tick of a clock is, once some time has passed: nothing is done for it meanwhile.
#[derive(Debug)]
pub(crate) struct Clock {
    ticks: u64,
    at: Instant,
}

impl Clock {
    /// Begins to compare, with a clock that is at `ticks` now.
    pub(crate) fn new(ticks: u64) -> Self {
        Self { ticks, at: Instant::now() }
    }

    /// Nanoseconds a tick takes, by what has passed since it was made: its `ticks` are that many now.
    pub(crate) fn nanoseconds_per_tick(&self, ticks: u64) -> f64 {
        let ticks = ticks.saturating_sub(self.ticks);
        if ticks == 0 { 0.0 } else { self.at.elapsed().as_nanos() as f64 / ticks as f64 }
    }
}
