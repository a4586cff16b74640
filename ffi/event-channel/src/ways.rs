//! What a monitor may do instead of sleeping.

use std::time::{Duration, Instant};

use crate::look;

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

    /// How often it can look in the time it may watch: only about. What a look costs differs: it is tried out.
    pub(crate) fn looks(self, pending: impl Fn() -> bool) -> u32 {
        const TRIES: u32 = 256;
        let try_out = || {
            let start = Instant::now();
            (0..TRIES).for_each(|_| {
                look(&pending);
            });
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
    use crate::watch;

    #[test]
    fn it_looks_for_about_as_long_as_it_may() {
        let ways = |watch| Ways { watch, halt: false };
        assert!(ways(Duration::from_nanos(1)).looks(|| false) >= 1);
        // Cheap looks and dear ones.
        for work in [1, 1_000] {
            let pending = || (0..work).map(std::hint::black_box).sum::<u64>() == u64::MAX;
            let looks = ways(Ways::LONGEST).looks(pending);
            let start = Instant::now();
            assert!(!watch(looks, pending));
            // The machine may be busy with something else.
            assert!(start.elapsed() > Ways::LONGEST / 10, "{looks} looks took {:?}", start.elapsed());
            assert!(ways(Duration::MAX).looks(pending) < looks.saturating_mul(100));
        }
    }
}
