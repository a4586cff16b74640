//! Counts that a program makes the same each time, as criterion's measurements.

use std::cell::LazyCell;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter};
use criterion::{BenchmarkGroup, BenchmarkId, SamplingMode, Throughput};

/// criterion takes no fewer samples.
pub(crate) const SAMPLES: usize = 10;
/// How long criterion believes to measure for each sample. It is given them at once, in less than that: with less, it would
/// warn that there is no time for one iteration.
const A_SAMPLE: Duration = Duration::from_micros(20);
/// What is added to every second sample when all are the same, and taken from the others.
const DITHER: f64 = 1.0 / 1024.0;

/// Counts of something.
pub(crate) struct Count(pub(crate) &'static str);

impl ValueFormatter for Count {
    fn scale_values(&self, _: f64, _: &mut [f64]) -> &'static str {
        self.0
    }

    fn scale_throughputs(&self, _: f64, _: &Throughput, _: &mut [f64]) -> &'static str {
        // No benchmark says how much it puts through.
        self.0
    }

    fn scale_for_machines(&self, _: &mut [f64]) -> &'static str {
        self.0
    }
}

/// Of what criterion can measure, only `iter_custom` makes sense with it.
impl Measurement for Count {
    type Intermediate = ();
    type Value = f64;

    fn start(&self) {}

    fn end(&self, (): ()) -> f64 {
        0.0
    }

    fn add(&self, first: &f64, second: &f64) -> f64 {
        first + second
    }

    fn zero(&self) -> f64 {
        0.0
    }

    fn to_f64(&self, value: &f64) -> f64 {
        *value
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        self
    }
}

/// Hands criterion `count` samples of what was counted, each once. (To warm up it takes one more, or a few; then it is given the
/// rest, and those again.) `samples` is called if the benchmark is selected; of fewer than `count`, some are there twice.
pub(crate) fn replay(
    group: &mut BenchmarkGroup<'_, Count>,
    id: BenchmarkId,
    count: usize,
    samples: impl FnOnce() -> Vec<u64>,
) {
    let values = LazyCell::new(|| with_variance(samples().iter().copied().cycle().take(count)));
    let mut next = 0;
    group.sample_size(count).sampling_mode(SamplingMode::Flat).nresamples(10_000);
    group.warm_up_time(Duration::from_nanos(1)).measurement_time(A_SAMPLE * count as u32);
    group.bench_function(id, |bencher| {
        bencher.iter_custom(|iterations| {
            next += 1;
            // Iterations are criterion's idea: whatever their number, it divides by it again.
            values[next % values.len()] * iterations as f64
        });
    });
}

/// The samples, as criterion can take them.
///
/// When all are the same, there is no variance, by which criterion divides to compare with a baseline (0.8.2 panics). A count is
/// a whole number, and so known to half of one; so such samples are spread by much less than that, evenly, so that their mean
/// and median are what was counted, exactly.
fn with_variance(samples: impl Iterator<Item = u64>) -> Vec<f64> {
    let mut values: Vec<f64> = samples.map(|sample| sample as f64).collect();
    if values.windows(2).all(|pair| pair[0] == pair[1]) {
        for (n, pair) in values.chunks_exact_mut(2).enumerate() {
            let sign = if n.is_multiple_of(2) { 1.0 } else { -1.0 };
            pair[0] += sign * DITHER;
            pair[1] -= sign * DITHER;
        }
    }
    values
}
