//! Samples in five numbers.

use serde::{Deserialize, Serialize};

/// Samples of one workload, summarised. What a tick is the [`Machine`](crate::Machine) says.
///
/// Percentiles are nearest-rank: each is a value that was measured, never one between two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ticks {
    /// The smallest sample.
    pub min: u64,
    /// At least 10 % of the samples are at most this.
    pub p10: u64,
    /// At least half of the samples are at most this.
    pub median: u64,
    /// At least 90 % of the samples are at most this.
    pub p90: u64,
    /// The largest sample.
    pub max: u64,
}

impl Ticks {
    /// Summarises samples, and sorts them to do so. `None` if there are none.
    #[must_use]
    pub fn of(samples: &mut [u64]) -> Option<Self> {
        samples.sort_unstable();
        let (&min, &max) = (samples.first()?, samples.last()?);
        let percentile = |percent| samples[nearest_rank(percent, samples.len())];
        Some(Self { min, p10: percentile(10), median: percentile(50), p90: percentile(90), max })
    }
}

/// Index of a percentile in `length` sorted samples; neither may be zero.
fn nearest_rank(percent: usize, length: usize) -> usize {
    (percent * length).div_ceil(100) - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_samples_no_summary() {
        assert_eq!(Ticks::of(&mut []), None);
    }

    #[test]
    fn ten_samples_in_any_order() {
        let ticks = Ticks::of(&mut [100, 20, 30, 50, 40, 60, 80, 70, 90, 10]);
        assert_eq!(ticks, Some(Ticks { min: 10, p10: 10, median: 50, p90: 90, max: 100 }));
    }

    proptest! {
        #[test]
        fn a_percentile_is_the_smallest_sample_that_enough_samples_do_not_exceed(
            samples in prop::collection::vec(prop_oneof![0..20_u64, any::<u64>()], 1..300)
        ) {
            let ticks = Ticks::of(&mut samples.clone()).unwrap();
            for (percent, value) in [(10, ticks.p10), (50, ticks.median), (90, ticks.p90)] {
                let at_most = |limit: u64| samples.iter().filter(|sample| **sample <= limit).count();
                let enough = |limit: u64| at_most(limit) * 100 >= percent * samples.len();
                prop_assert!(samples.contains(&value));
                prop_assert!(enough(value));
                prop_assert!(samples.iter().filter(|s| **s < value).all(|smaller| !enough(*smaller)));
            }
            prop_assert_eq!(Some(&ticks.min), samples.iter().min());
            prop_assert_eq!(Some(&ticks.max), samples.iter().max());
        }
    }
}
