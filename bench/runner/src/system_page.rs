//! A page that holds code with breakpoints, and the guest's descriptors, gates, TSS, stack and page table.

use anyhow::{Result, ensure};
use hyperbp::{Gpa, Mechanism};
use hyperbp_bench_abi::{
    SYSTEM_CASES, SYSTEM_HANDLER, SYSTEM_PARTS, SYSTEM_SAMPLES, SYSTEM_SLOT, SYSTEM_WORDS, Workload, system_hits,
};

use crate::guest::Guest;
use crate::snippets::{figures, run_without, serve};
use crate::xen::Domain;

/// Most cases that a failure names.
const NAMED: usize = 8;

/// Has the guest use the page without breakpoints and with them, and compares what it leaves. Returns what the breakpoints'
/// figures are.
///
/// # Errors
/// If anything differs, or if a hit was lost or doubled.
pub(crate) fn check(domain: &mut Domain, guest: &Guest, mechanism: Mechanism) -> Result<String> {
    // A view learns of the guest's pages one by one, and that may double a hit: see `snippets::check`.
    let program = [(Workload::OwnInt3, 1), (Workload::SystemPage, 1)];
    let slots: Vec<usize> = (0..SYSTEM_CASES.len()).chain([SYSTEM_HANDLER]).collect();
    let samples = || {
        let mut samples = Vec::new();
        guest.samples(SYSTEM_SAMPLES as u32, &mut samples);
        samples
    };
    run_without(guest, &program)?;
    let expected = samples();
    let page = guest.system_page();
    let at: Vec<Gpa> = slots.iter().map(|slot| page.at((slot * SYSTEM_SLOT) as u16)).collect();
    let outcome = serve(domain, guest, mechanism, &at, &program)?;
    let seen = samples();

    let differing = (0..expected.len()).filter(|n| expected[*n] != seen[*n]).map(|n| {
        let (was, is) = (expected[n], seen[n]);
        format!("{}: {is:#x}, not {was:#x}", name(n))
    });
    let miscounted = slots.iter().zip(&outcome.figures).filter(|(slot, figures)| figures.hits != system_hits(**slot));
    let miscounted = miscounted.map(|(slot, figures)| {
        let hits = system_hits(*slot);
        let code = SYSTEM_CASES.get(*slot).map_or("the handler of #UD", |case| case.name);
        format!("{code} with {} hits, not {hits}", figures.hits)
    });
    let problems: Vec<String> = differing.chain(miscounted).collect();
    ensure!(problems.is_empty(), "{} differ: {}", problems.len(), problems[..problems.len().min(NAMED)].join("; "));
    let counters = outcome.counters;
    Ok(format!("{}, {} reads, {} writes", figures(&outcome), counters.reads, counters.writes))
}

/// What a sample is of.
fn name(sample: usize) -> String {
    let (copy, sample) = (sample / (SYSTEM_SAMPLES / 2), sample % (SYSTEM_SAMPLES / 2));
    let place = ["in the page", "elsewhere"][copy.min(1)];
    if let Some(case) = SYSTEM_CASES.get(sample / SYSTEM_WORDS.len()) {
        return format!("{}, {place}, {}", case.name, SYSTEM_WORDS[sample % SYSTEM_WORDS.len()]);
    }
    let word = sample - SYSTEM_CASES.len() * SYSTEM_WORDS.len();
    match SYSTEM_PARTS.iter().flat_map(|(begin, end)| (*begin..*end).step_by(8)).nth(word) {
        Some(offset) => format!("byte {offset:#x} of the page after the code {place}"),
        None => format!("what the page table maps after the code {place}"),
    }
}
