//! How [`Workload::Hostile`](crate::Workload::Hostile) uses the samples.
//!
//! | samples | the list | a probe |
//! |---|---|---|
//! | 0 | how many sites | how many notes |
//! | 1 | how many probes | |
//! | from [`FIRST_SITE`] on | guest-physical addresses of the sites, where the breakpoints go | how often the probe has executed each |
//! | from [`FIRST_PROBE`] on | [`PROBE_WORDS`] for each: its name in [`NAME_WORDS`], and how many vCPUs it needs | |
//! | from [`FIRST_NOTE`] on | | what it has seen: pairs of a name of eight bytes and a number |

use crate::SAMPLES_MAX;

/// The first sample of a site.
pub const FIRST_SITE: usize = 8;
/// Most sites.
pub const SITES_MAX: usize = 500;
/// The first sample of what is noted.
pub const FIRST_NOTE: usize = FIRST_SITE + SITES_MAX;
/// Most notes. The last is of all that come after it.
pub const NOTES_MAX: usize = (SAMPLES_MAX as usize - FIRST_NOTE) / 2;
/// The first sample of the list of probes.
pub const FIRST_PROBE: usize = FIRST_NOTE;
/// Samples of a name.
pub const NAME_WORDS: usize = 5;
/// Samples of a probe in the list.
pub const PROBE_WORDS: usize = NAME_WORDS + 1;
