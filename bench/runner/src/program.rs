//! Finds the benchmark's program (`bench/guest/program`) in a domain with any operating system, from outside and without any
//! knowledge of that system: by what is at the start of its pages.
//!
//! Memory is looked through twice: for control pages, of which one must be in use, and then for the pages that the program has
//! put labels on. What there may be of copies, of programs that have ended or pages that were moved, has no life or the
//! wrong label.

use std::hash::{BuildHasher, RandomState};
use std::mem::offset_of;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyperbp::Gfn;
use hyperbp_bench_abi::{LABEL_MAGIC, Label, PROGRAM_MAGIC, SAMPLE_PAGES, Workload};

use crate::guest::Guest;
use crate::xen::Domain;

/// Most control pages that are looked at: a guest may be full of what looks like one.
const CANDIDATES: usize = 256;
/// How long a control page may stand still before it is taken for one that nobody uses.
const STILL: Duration = Duration::from_secs(2);
/// How long the program may take for what needs no time.
const PATIENCE: Duration = Duration::from_secs(60);

/// What all of our pages begin with, but the control page has other numbers after its first.
const LENGTH: usize = size_of::<Label>();

/// Finds it. `progress` is told what comes next: looking through memory takes a second or so a GiB.
///
/// # Errors
/// If there is none, or several, or not all of its pages are in memory.
pub(crate) fn find(domain: &Domain, progress: &mut dyn FnMut(&str)) -> Result<Guest> {
    progress("looking for the program in the guest's memory");
    let mut candidates = Vec::new();
    domain.look_at_pages(&mut |gfn, start: &[u8; LENGTH]| {
        if number(start, 0) == PROGRAM_MAGIC && candidates.len() < CANDIDATES {
            candidates.push(gfn);
        }
    })?;
    let mut guest = one_alive(domain, candidates)?;
    guest.check_version()?;
    guest.wait_until_done(PATIENCE)?;

    // Nobody in the guest can know it before.
    let tag = RandomState::new().hash_one(domain.uuid()) | 1;
    label(&guest, tag)?;
    progress("looking for the program's pages");
    let mut pages = [const { None }; SAMPLE_PAGES + 1];
    let mut moved = false;
    let looked = domain.look_at_pages(&mut |gfn, start: &[u8; LENGTH]| {
        if let Some(index) = labelled(start, tag)
            && let Some(page) = pages.get_mut(index)
        {
            moved |= page.replace(gfn).is_some();
        }
    });
    label(&guest, 0)?;
    looked?;
    ensure!(!moved, "the guest moves the program's pages in its memory: try again");
    let pages = pages.into_iter().collect::<Option<Vec<Gfn>>>();
    let pages = pages.context("the program's pages are not all in the guest's memory: is it allowed to lock them?")?;
    let [target, samples @ ..] = &pages[..] else { bail!("there is no page under test") };
    let samples = samples.iter().map(|gfn| domain.map_page(*gfn)).collect::<Result<_, _>>();
    Ok(guest.with_pages(*target, samples.context("the program's sample pages cannot be mapped")?))
}

/// Has the program put labels on its pages, or take them away.
fn label(guest: &Guest, tag: u64) -> Result<()> {
    guest.set_tag(tag);
    guest.request(Workload::Label, 1);
    guest.wait_until_done(PATIENCE)
}

/// The only one of these control pages that is in use.
fn one_alive(domain: &Domain, candidates: Vec<Gfn>) -> Result<Guest> {
    // One that has gone meanwhile is none of ours.
    let mut guests: Vec<_> =
        candidates.into_iter().filter_map(|gfn| domain.map_page(gfn).ok()).map(Guest::at).collect();
    let before: Vec<_> = guests.iter().map(Guest::alive).collect();
    let begun = Instant::now();
    let mut alive = vec![false; guests.len()];
    while begun.elapsed() < STILL {
        std::thread::sleep(Duration::from_millis(10));
        for ((guest, before), alive) in guests.iter().zip(&before).zip(&mut alive) {
            *alive |= guest.magic() == PROGRAM_MAGIC && guest.alive() != *before;
        }
    }
    let mut alive = alive.into_iter();
    guests.retain(|_| alive.next() == Some(true));
    let processes: Vec<_> = guests.iter().map(|guest| guest.process().to_string()).collect();
    match guests.pop() {
        Some(guest) if guests.is_empty() => Ok(guest),
        Some(_) => bail!(
            "the program runs several times in the domain, as processes {}: end all but one",
            processes.join(", ")
        ),
        None => bail!(
            "the domain runs neither the benchmark guest (bench/guest) nor the program hyperbp-guest (bench/guest/program): \
             start one of them; docs/real-machines.md tells how"
        ),
    }
}

fn number(start: &[u8; LENGTH], offset: usize) -> u64 {
    let mut bytes = [0; size_of::<u64>()];
    bytes.iter_mut().zip(&start[offset..]).for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(bytes)
}

/// Which page this is the start of, if it is one with this tag.
fn labelled(start: &[u8; LENGTH], tag: u64) -> Option<usize> {
    let is_ours =
        number(start, offset_of!(Label, magic)) == LABEL_MAGIC && number(start, offset_of!(Label, tag)) == tag;
    is_ours.then(|| usize::try_from(number(start, offset_of!(Label, index))).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(words: [u64; 3]) -> [u8; LENGTH] {
        let mut start = [0; LENGTH];
        start.iter_mut().zip(words.map(u64::to_le_bytes).as_flattened()).for_each(|(to, from)| *to = *from);
        start
    }

    #[test]
    fn a_label_is_that_of_this_time_only() {
        assert_eq!(labelled(&start([LABEL_MAGIC, 7, 3]), 7), Some(3));
        assert_eq!(labelled(&start([LABEL_MAGIC, 6, 3]), 7), None);
        assert_eq!(labelled(&start([PROGRAM_MAGIC, 7, 3]), 7), None);
        assert_eq!(labelled(&start([0; 3]), 0), None);
    }
}
