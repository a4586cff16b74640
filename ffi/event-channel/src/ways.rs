//! What a monitor may do instead of sleeping.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::watch;

/// What a monitor may do instead of sleeping. Of that, it does what pays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ways {
    /// Watch the ring for about so long each time, at most: on a CPU that nobody else has meanwhile. Not at all if it is zero.
    pub watch: Duration,
    /// Have Xen wait.
    pub halt: bool,
}

impl Ways {
    /// The longest it may watch. What has taken as long as this would have been no dearer asleep.
    pub const LONGEST: Duration = Duration::from_millis(10);

    /// Only sleep, as everyone does.
    pub const SLEEP: Self = Self { watch: Duration::ZERO, halt: false };

    /// How often it can look in the time it may watch: on this machine, and only about.
    pub(crate) fn looks(self) -> u32 {
        const TRIES: u32 = 1_000;
        if self.watch.is_zero() {
            return 0;
        }
        let nothing = AtomicU32::new(0);
        // As what it looks at is: in memory, and written by somebody else.
        let try_out = || {
            let start = Instant::now();
            watch(TRIES, || nothing.load(Ordering::Acquire) != 0);
            start.elapsed()
        };
        // Whatever interrupts one of them makes it longer.
        let took = (0..3).map(|_| try_out()).min().unwrap_or_default().as_nanos().max(1);
        let looks = self.watch.min(Self::LONGEST).as_nanos() * u128::from(TRIES) / took;
        u32::try_from(looks).unwrap_or(u32::MAX).max(1)
    }
}

impl Default for Ways {
    /// Both; watching as long as a hit may take.
    fn default() -> Self {
        Self { watch: Duration::from_micros(200), halt: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_for_about_as_long_as_it_may() {
        let ways = |watch| Ways { watch, halt: false };
        assert_eq!(Ways::SLEEP.looks(), 0);
        assert!(ways(Duration::from_nanos(1)).looks() >= 1);
        let looks = ways(Ways::LONGEST).looks();
        let start = Instant::now();
        watch(looks, || false);
        // The machine may be busy with something else.
        assert!(start.elapsed() > Ways::LONGEST / 10, "{looks} looks took {:?}", start.elapsed());
        assert!(ways(Duration::MAX).looks() < looks.saturating_mul(100));
    }
}
