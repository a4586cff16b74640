//! Reads all that the guest can see of physical memory, as somebody does who looks for a monitor.

use core::ops::Range;
use core::sync::atomic::Ordering::Relaxed;

use hyperbp_bench_abi::{CONTROL_GPA, PAGE_SIZE, SAMPLES_MAX, SCAN_CHUNK};
use hyperbp_bench_guest::Digest;

use crate::page::{SAMPLES, read};
use crate::{STACK_SIZE, control, xen};

const PAGE: u64 = PAGE_SIZE as u64;

unsafe extern "C" {
    /// In `boot.s`.
    static boot_stack_top: u8;
}

/// The workload.
pub(crate) fn run(frames: u64) {
    let (first, digests) = SAMPLES.0.split_at(1);
    digests.iter().for_each(|sample| sample.store(Digest::new().value(), Relaxed));
    let mut memory = [const { 0..0 }; xen::REGIONS];
    for region in xen::memory(&mut memory) {
        for page in pages(region).filter(|page| !is_changed(*page)) {
            let chunk = (page / SCAN_CHUNK as u64) as usize;
            let sample = &digests[chunk.min(digests.len() - 1)];
            let mut digest = Digest::new();
            digest.add(sample.load(Relaxed));
            words(page).for_each(|at| digest.add(read(at)));
            sample.store(digest.value(), Relaxed);
        }
    }
    let start = control::scan_gpa();
    let found = pages(&(start..start + frames * PAGE)).flat_map(words).filter(|at| read(*at) != u64::MAX).count();
    first[0].store(found as u64, Relaxed);
}

/// Whether a page has other contents each time, by the guest's own doing.
fn is_changed(page: u64) -> bool {
    let samples = SAMPLES.0.as_ptr() as u64;
    let stack = &raw const boot_stack_top as u64;
    page == CONTROL_GPA
        || (samples..samples + u64::from(SAMPLES_MAX) * 8).contains(&page)
        || (stack - STACK_SIZE..stack).contains(&page)
}

fn pages(region: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
    region.clone().step_by(PAGE_SIZE)
}

fn words(page: u64) -> impl Iterator<Item = u64> {
    (page..page + PAGE).step_by(8)
}
