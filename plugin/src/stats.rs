//! Figures of what the engine has done.

use std::fmt;

use hdrhistogram::Histogram;

use crate::StepOver;

/// How often what happened, since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
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
    /// The bytes of a page with breakpoints were not those that are known of it, though the guest has not written to it: a
    /// device has, another domain, or the device model. Its breakpoints were set on the new ones.
    pub resynced: u64,
    /// The guest, or somebody else, has put another page where breakpoints were, or Xen has reset the views: they were set
    /// again, before that page was executed.
    pub rearmed: u64,
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
#[non_exhaustive]
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
#[non_exhaustive]
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
///
/// Times are counted by their 8 highest bits: a figure is at most 0.8 % above the time that was measured. Times from
/// 2<sup>40</sup> on count as that.
///
/// [`Engine::handling_time`](crate::Engine::handling_time) returns what has been counted until then. To measure a part of a
/// run, take it at the beginning and at the end, and [`since`](Self::since) has the difference.
#[derive(Clone)]
pub struct HandlingTime(Box<[u64; HandlingTime::BUCKETS]>);

/// The usual figures of a [`HandlingTime`], in its units. All are 0 if nothing has been counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LatencySummary {
    /// Hits.
    pub count: u64,
    /// The shortest time.
    pub min: u64,
    /// Half of the hits took no longer.
    pub median: u64,
    /// 90 % of the hits took no longer.
    pub p90: u64,
    /// 99 % of the hits took no longer.
    pub p99: u64,
    /// The longest time.
    pub max: u64,
}

impl HandlingTime {
    /// The largest time that is told apart: longer ones count as this.
    const MOST: u64 = 1 << 40;
    /// Significant decimal digits: of 256 buckets, the upper half is one in 128 or less apart.
    const DIGITS: u8 = 2;
    const BITS: u32 = 8;
    /// Buckets of a power of two.
    const HALF: usize = 1 << (Self::BITS - 1);
    const BUCKETS: usize = Self::bucket(Self::MOST) + 1;

    pub(crate) fn new() -> Self {
        Self(Box::new([0; Self::BUCKETS]))
    }

    const fn bucket(time: u64) -> usize {
        let below = u64::BITS - Self::BITS - (time | (2 * Self::HALF as u64 - 1)).leading_zeros();
        below as usize * Self::HALF + (time >> below) as usize
    }

    /// The least time that is counted in a bucket.
    const fn least(bucket: usize) -> u64 {
        let below = (bucket / Self::HALF).saturating_sub(1);
        ((bucket - below * Self::HALF) as u64) << below
    }

    pub(crate) fn record(&mut self, time: u64) {
        self.0[Self::bucket(time).min(Self::BUCKETS - 1)] += 1;
    }

    /// What has been counted since `earlier`, an earlier state of the same engine's. (Of another engine's, what cannot be
    /// taken away is not.)
    #[must_use]
    pub fn since(mut self, earlier: &Self) -> Self {
        self.0.iter_mut().zip(earlier.0.iter()).for_each(|(now, earlier)| *now = now.saturating_sub(*earlier));
        self
    }

    /// What has been counted in both: by two engines, one after the other, for instance.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        self.0.iter_mut().zip(other.0.iter()).for_each(|(one, other)| *one = one.saturating_add(*other));
        self
    }

    /// The usual figures.
    #[must_use]
    pub fn summary(&self) -> LatencySummary {
        let times = self.histogram();
        let quantile = |quantile| times.value_at_quantile(quantile);
        LatencySummary {
            count: times.len(),
            min: times.min(),
            median: quantile(0.5),
            p90: quantile(0.9),
            p99: quantile(0.99),
            max: times.max(),
        }
    }

    fn histogram(&self) -> Histogram<u64> {
        let bounded = Histogram::new_with_bounds(1, Self::MOST, Self::DIGITS);
        let mut histogram = bounded.unwrap_or_else(|_| unreachable!("the bounds are constants that are right"));
        for (bucket, count) in (0..).zip(self.0.iter()).filter(|(_, count)| **count > 0) {
            histogram.saturating_record_n(Self::least(bucket), *count);
        }
        histogram
    }
}

impl fmt::Debug for HandlingTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.summary().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_run_is_what_has_come_since_its_beginning() {
        let mut times = HandlingTime::new();
        assert_eq!(times.summary(), LatencySummary::default());
        (1..=100).for_each(|time| times.record(time * 1000));
        let begin = times.clone();
        (1..=100).for_each(|time| times.record(time));
        let LatencySummary { count, min, median, p90, p99, max } = times.clone().since(&begin).summary();
        assert_eq!((count, min, median, p90, p99, max), (100, 1, 50, 90, 99, 100));
        assert_eq!(times.summary().count, 200);
        assert_eq!(begin.since(&times).summary().count, 0);
    }

    /// Every bucket is one of the histogram's: what it says is as if it had been told of each time.
    #[test]
    fn the_histogram_is_as_if_told_of_every_time() {
        let powers = (0..64).flat_map(|power| (-1..=1).map(move |off: i64| (1_u64 << power).wrapping_add_signed(off)));
        let times = (0..5_000).chain((0..2_000).map(|n| n * n * 1_777)).chain(powers);
        for time in times.map(|time| time.min(HandlingTime::MOST)) {
            let mut ours = HandlingTime::new();
            ours.record(time);
            let ours = ours.histogram();
            let mut theirs = ours.clone();
            theirs.reset();
            theirs.saturating_record(time);
            let times =
                |histogram: &Histogram<u64>| (histogram.len(), histogram.max(), histogram.value_at_quantile(0.5));
            assert_eq!(times(&ours), times(&theirs), "{time}");
        }
    }
}
