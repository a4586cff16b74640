//! Single instructions, and all of the guest's memory: with breakpoints, everything must be as it is without.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyperbp::{Figures, Gpa, Mechanism, Placement, StepOver};
use hyperbp_bench_abi::{Needs, SAMPLES_MAX, SCAN_CHUNK, SNIPPET_RUNS, SNIPPETS, Snippet, Workload, snippet_offset};

use crate::core::{self, Outcome};
use crate::guest::Guest;
use crate::ring::{Monitor, PATIENCE};
use crate::storm;
use crate::xen::Domain;

/// The guest is given up after this.
const STUCK: Duration = Duration::from_secs(60);

/// Most instructions that a failure names.
const NAMED: usize = 8;

/// A breakpoint on one of the snippets.
struct Site {
    snippet: usize,
    /// Which byte of it.
    byte: usize,
    at: Gpa,
    /// How often it is to be hit.
    hits: u64,
}

/// What the guest has made of the snippets.
#[derive(PartialEq, Eq)]
struct Seen {
    digests: Vec<u64>,
    own_int3s: u64,
    /// The snippet pages after it.
    code: Vec<u8>,
}

/// Has the guest execute the snippets without breakpoints and with one on each, and compares what they do. Returns what the
/// breakpoints' figures are.
///
/// # Errors
/// If anything differs, if a hit was lost or doubled, or if an instruction that Xen's emulator does not know was not stepped.
pub(crate) fn check(domain: &mut Domain, guest: &Guest, mechanism: Mechanism, seed: u32) -> Result<String> {
    // A view learns of the guest's pages one by one. When that interrupts the delivery of an INT3, Xen lets the CPU execute
    // the INT3 again (`hvm_event_needs_reinjection`, xen/arch/x86/hvm/hvm.c), and a breakpoint on it is hit a second time.
    // So there is one elsewhere before.
    let program = [(Workload::OwnInt3, 1), (Workload::Snippets, seed)];
    let ((), expected) = seen(domain, guest, |_| run_without(guest, &program))?;
    let sites: Vec<Site> =
        SNIPPETS.iter().enumerate().flat_map(|(n, s)| sites(guest, n, s, expected.digests[n])).collect();
    let at: Vec<Gpa> = sites.iter().map(|site| site.at).collect();
    let (outcome, seen) = seen(domain, guest, |domain| serve(domain, guest, mechanism, &at, &program))?;

    let differing = SNIPPETS.iter().zip(expected.digests.iter().zip(&seen.digests)).filter(|(_, (a, b))| a != b);
    let wrong = differing.map(|(snippet, _)| hex(snippet));
    let miscounted = sites.iter().zip(&outcome.figures).filter(|(site, figures)| figures.hits != site.hits).map(
        |(site, figures)| {
            format!(
                "{} at byte {} with {} hits, not {}",
                hex(&SNIPPETS[site.snippet]),
                site.byte,
                figures.hits,
                site.hits
            )
        },
    );
    let problems: Vec<String> = wrong.chain(miscounted).collect();
    ensure!(problems.is_empty(), "{} differ: {}", problems.len(), problems[..problems.len().min(NAMED)].join("; "));
    let (int3s, own) = (seen.own_int3s, expected.own_int3s);
    ensure!(int3s == own, "{int3s} of the guest's own INT3s arrived, not {own}");
    ensure!(seen.code == expected.code, "the code is another than it was");
    unknown_to_xen(mechanism, &sites, &outcome)?;
    is_what_was_chosen(mechanism, &outcome)?;
    Ok(figures(&outcome))
}

/// The chosen step-over serves most hits. Otherwise something is left to a step that need not be, and what this check is about
/// is not checked.
fn is_what_was_chosen(mechanism: Mechanism, outcome: &Outcome) -> Result<()> {
    let served = storm::served(outcome);
    let (serves, percent) = match (mechanism.step_over(), mechanism.placement()) {
        (StepOver::Emulate, _) => (served.emulate, 75),
        (StepOver::Interpret, _) | (StepOver::Auto, Placement::InPlace) => (served.interpret, 60),
        // What accesses memory is fast-stepped.
        (StepOver::Auto, Placement::Shadow) => (served.interpret, 40),
        _ => return Ok(()),
    };
    let hits = outcome.hits();
    ensure!(
        serves * 100 >= hits * percent,
        "only {serves} of {hits} hits were not stepped, of which {percent} % are to be"
    );
    Ok(())
}

/// What goes to Xen's emulator and is nothing it knows must come back, once, and be stepped from then on.
fn unknown_to_xen(mechanism: Mechanism, sites: &[Site], outcome: &Outcome) -> Result<()> {
    let of_it = |(site, _): &(&Site, &Figures)| SNIPPETS[site.snippet].needs == Needs::Hypercall;
    for (site, figures) in sites.iter().zip(&outcome.figures).filter(of_it) {
        let name = hex(&SNIPPETS[site.snippet]);
        ensure!(figures.served.emulate + figures.served.interpret == 0, "{name} was served by {:?}", figures.served);
        if asks_xen(mechanism) {
            ensure!(figures.fallbacks == site.hits, "{name} fell back {} times", figures.fallbacks);
            let failures = outcome.counters.emulation_failures;
            ensure!(failures > 0, "Xen's emulator has not said that it does not know {name}");
            ensure!(failures < site.hits, "Xen's emulator was asked again, {failures} times");
        }
    }
    Ok(())
}

/// Whether Xen's emulator is tried with whatever there is.
fn asks_xen(mechanism: Mechanism) -> bool {
    match mechanism.step_over() {
        StepOver::Emulate => true,
        StepOver::Interpret | StepOver::Auto => mechanism.placement() == Placement::InPlace,
        _ => false,
    }
}

fn sites(guest: &Guest, snippet: usize, code: &Snippet, digest: u64) -> impl Iterator<Item = Site> {
    let start = snippet_offset(snippet);
    // One that this CPU does not have is not executed.
    let runs = if digest == 0 { 0 } else { SNIPPET_RUNS as u64 };
    code.breakpoints_and_hits().map(move |(byte, hit)| Site {
        snippet,
        byte,
        at: guest.snippet_byte(start + byte),
        hits: if hit { runs } else { 0 },
    })
}

fn seen<T>(domain: &mut Domain, guest: &Guest, run: impl FnOnce(&mut Domain) -> Result<T>) -> Result<(T, Seen)> {
    guest.wait_until_done(STUCK)?;
    let before = guest.counts().own_int3s;
    let result = run(domain)?;
    let mut digests = Vec::new();
    guest.samples(SNIPPETS.len() as u32, &mut digests);
    let own_int3s = guest.counts().own_int3s - before;
    Ok((result, Seen { digests, own_int3s, code: guest.snippet_pages(domain)? }))
}

/// Has the guest work on requests, without a monitor.
///
/// # Errors
/// If it does not get through.
pub(crate) fn run_without(guest: &Guest, program: &[(Workload, u32)]) -> Result<()> {
    guest.wait_until_done(STUCK)?;
    program.iter().try_for_each(|(workload, count)| {
        guest.request(*workload, *count);
        guest.wait_until_done(STUCK)
    })
}

/// Serves breakpoints while the guest works on requests.
///
/// # Errors
/// If the guest does not get through, or the core has failures, or events that nobody explains.
pub(crate) fn serve(
    domain: &mut Domain,
    guest: &Guest,
    mechanism: Mechanism,
    at: &[Gpa],
    program: &[(Workload, u32)],
) -> Result<Outcome> {
    let (start, mut program, mut stuck) = (Instant::now(), program.iter(), false);
    let mut idle = || {
        if !guest.is_done() {
            stuck = start.elapsed() > STUCK;
            return (!stuck).then_some(PATIENCE);
        }
        let (workload, count) = program.next()?;
        guest.request(*workload, *count);
        Some(PATIENCE)
    };
    let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
    let outcome = core::run(domain, &mut monitor, mechanism, at, &mut idle)?;
    if stuck && domain.has_crashed()? {
        anyhow::bail!("the guest has crashed: `xl dmesg` shows what its last words were");
    }
    ensure!(!stuck, "the guest does not come back");
    let (failures, unexplained) = (outcome.counters.failures, outcome.counters.unexplained);
    ensure!(failures + unexplained == 0, "{failures} failures, {unexplained} events that nobody explains");
    Ok(outcome)
}

/// `48 89 e5`.
fn hex(snippet: &Snippet) -> String {
    let mut hex = String::new();
    for byte in snippet.bytes() {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{}{byte:02x}", if hex.is_empty() { "" } else { " " });
    }
    hex
}

pub(crate) fn figures(outcome: &Outcome) -> String {
    let served = storm::served(outcome);
    let all = [
        ("interpreted", served.interpret),
        ("emulated", served.emulate),
        ("fast-stepped", served.view_fast_step),
        ("stepped", served.view_step),
        ("repaired", served.repair),
        ("fell back", outcome.figures.iter().map(|figures| figures.fallbacks).sum()),
        ("given back by Xen's emulator", outcome.counters.emulation_failures),
        ("rewritten", outcome.figures.iter().map(|figures| figures.rewritten).sum()),
    ];
    let counts: Vec<_> = all.iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{n} {what}")).collect();
    format!("{} hits, {}", outcome.hits(), counts.join(", "))
}

/// Has the guest read all of its memory, and the frames where the shadows are, with breakpoints and without.
///
/// # Errors
/// If there is a difference.
pub(crate) fn scan(domain: &mut Domain, guest: &Guest, mechanism: Mechanism) -> Result<()> {
    /// Those of the two sinks, the shadow, and one without any page. Each word of such a one is emulated by Xen.
    const FRAMES: u32 = 4;
    guest.set_scan(domain.first_shadow_gfn()?);
    guest.wait_until_done(STUCK)?;
    let result = || {
        let mut samples = Vec::new();
        guest.samples(SAMPLES_MAX, &mut samples);
        samples
    };
    guest.request(Workload::Scan, FRAMES);
    guest.wait_until_done(STUCK)?;
    let expected = result();
    serve(domain, guest, mechanism, &guest.sites(), &[(Workload::Scan, FRAMES)])?;
    let seen = result();
    ensure!(expected[0] == 0, "there are {} words where the guest has no memory, and no monitor either", expected[0]);
    ensure!(seen[0] == 0, "the guest finds {} words where it has no memory", seen[0]);
    let differing = |n: &usize| seen[n + 1] != expected[n + 1];
    if let Some(chunk) = (0..seen.len() - 1).find(differing) {
        let (at, chunks) = (chunk * SCAN_CHUNK, (chunk..seen.len() - 1).filter(differing).count());
        anyhow::bail!(
            "the guest's memory reads otherwise than without a monitor, in {chunks} places, first at {at:#x}"
        );
    }
    guest.check(domain)
}
