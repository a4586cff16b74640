//! How to wait for the next event.
//!
//! A third of what a hit costs is falling asleep and waking up in the monitor's own kernel. Where events come one after
//! another that is spared by [halting](Wait::Halt). Where they do not, halting is given up: after each wait that it has not
//! shortened the next try comes twice as late.

/// How a monitor waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// In its kernel, which lets others run meanwhile.
    Sleep,
    /// In the hypervisor, which lets other domains run, as if this domain was idle. To its kernel it seems to go on: until
    /// the next interrupt, its timer's at the latest, nobody else in this domain does.
    Halt,
}

/// Decides how to wait, by what came of it before: it needs no clock.
#[derive(Clone, Debug, Default)]
pub struct Waiting {
    /// Halts in a row that no event has ended.
    misses: u32,
    /// Sleeps until the next one is tried.
    sleeps: u32,
}

impl Waiting {
    /// One halt in 1 + 2^6 waits is still tried where none has paid.
    const MOST: u32 = 6;

    /// How to wait now.
    pub fn choose(&mut self) -> Wait {
        match self.sleeps.checked_sub(1) {
            None => Wait::Halt,
            Some(sleeps) => {
                self.sleeps = sleeps;
                Wait::Sleep
            }
        }
    }

    /// It has halted, and this was ended by an event, or by something else.
    pub fn halted(&mut self, by_event: bool) {
        match by_event {
            true => self.misses = 0,
            false => {
                self.misses = (self.misses + 1).min(Self::MOST);
                self.sleeps = 1 << self.misses;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The time between two of the kernel's timer interrupts, in microseconds: what ends a halt if nothing else does.
    const TICK: u64 = 4_000;

    #[derive(Debug, Default)]
    struct Tally {
        paid: u64,
        futile: u64,
        slept: u64,
    }

    /// Waits for events that come with these gaps between them, in microseconds.
    fn replay(gaps: impl IntoIterator<Item = u64>) -> Tally {
        let (mut waiting, mut tally) = (Waiting::default(), Tally::default());
        for gap in gaps {
            if waiting.choose() == Wait::Sleep {
                tally.slept += 1;
                continue;
            }
            waiting.halted(gap < TICK);
            match gap < TICK {
                true => tally.paid += 1,
                false => tally.futile += 1,
            }
        }
        tally
    }

    #[test]
    fn a_storm_of_events_is_never_slept_through() {
        let tally = replay([50; 10_000]);
        assert_eq!((tally.paid, tally.futile, tally.slept), (10_000, 0, 0));
    }

    #[test]
    fn where_events_are_rare_it_sleeps() {
        let tally = replay([1_000_000; 6_500]);
        assert!(tally.futile <= 6_500 / 65 + 6, "{tally:?}");
        assert_eq!(tally.paid, 0);
    }

    #[test]
    fn a_burst_is_noticed_soon() {
        // A system call of a busy second, then nothing for a while, again and again.
        let tally = replay((0..100).flat_map(|_| std::iter::repeat_n(50, 1_000).chain([500_000])));
        assert!(tally.paid > 99_000, "{tally:?}");
        // And after a long time without.
        let tally = replay(std::iter::repeat_n(1_000_000, 1_000).chain([50; 1_000]));
        assert!(tally.paid > 930, "{tally:?}");
    }

    #[test]
    fn whoever_knows_the_policy_cannot_make_it_halt_in_vain_for_long() {
        // The guest raises an event at once after each sleep, and then none for a while.
        let mut waiting = Waiting::default();
        let (mut futile, mut slept) = (0_u64, 0_u64);
        for _ in 0..10_000 {
            match waiting.choose() {
                Wait::Halt => {
                    waiting.halted(false);
                    futile += 1;
                }
                Wait::Sleep => slept += 1,
            }
        }
        assert!(futile * 60 < slept, "{futile} halts in vain, {slept} sleeps");
        // Or lets every second one pay: then there are no more that do not.
        let tally = replay((0..10_000).map(|n| if n % 2 == 0 { 50 } else { 1_000_000 }));
        assert!(tally.futile <= tally.paid + tally.slept / 2, "{tally:?}");
    }
}
