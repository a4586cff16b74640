//! How to wait for the next event.
//!
//! A third of what a hit costs, and where the guest has a CPU of its own more than half, is falling asleep and waking up in the
//! monitor's own kernel. Where events come one after another that is spared: by looking for the next one until it is there,
//! or by having the hypervisor wait. Neither is tried before an event has come soon after another; and whatever has not paid is
//! given up: each time the next try comes twice as late.

/// How a monitor waits.
///
/// This enum is exhaustive: a host must be able to wait in each of these ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "it says how to wait now"]
pub enum Wait {
    /// It looks again and again, for the time it may, halved so often: the fastest, if the guest runs meanwhile on another CPU.
    Watch(u32),
    /// In the hypervisor, which lets other domains run, as if this domain was idle. To its kernel it seems to go on: until
    /// the next interrupt, its timer's at the latest, nobody else on this virtual CPU does.
    Halt,
    /// In its kernel, which lets others run meanwhile.
    Sleep,
}

/// How often it has waited, and whether that has paid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Waits {
    /// It has watched, and there was an event.
    pub watched: u64,
    /// It has watched for nothing, and went on to halt or to sleep.
    pub watched_in_vain: u64,
    /// It has halted, and an event has ended that.
    pub halted: u64,
    /// It has halted until something else ended that, and went on to sleep.
    pub halted_in_vain: u64,
    /// It has slept.
    pub slept: u64,
}

/// Decides how to wait, by what came of it before. It has no clock: who sleeps tells it whether that was long.
#[derive(Clone, Debug)]
pub struct Waiting {
    can_watch: bool,
    /// The last event came soon.
    soon: bool,
    watch: Trial,
    halt: Trial,
    waits: Waits,
}

/// A way to wait that pays, or does not.
#[derive(Clone, Debug, Default)]
struct Trial {
    /// How often in a row it has not.
    misses: u32,
    /// How often it is passed over until it is tried again.
    rest: u32,
}

impl Trial {
    fn is_due(&self) -> bool {
        self.rest == 0
    }

    fn pass(&mut self) {
        self.rest = self.rest.saturating_sub(1);
    }

    /// Where it never pays, one in 1 + 2^`most` is still tried.
    fn note(&mut self, paid: bool, most: u32) {
        match paid {
            true => self.misses = 0,
            false => {
                self.misses = (self.misses + 1).min(most);
                self.rest = 1 << self.misses;
            }
        }
    }
}

impl Waiting {
    /// On one CPU it is always in vain, and is to take no more than the thousandth part of all hits.
    const RARE_WATCH: u32 = 10;
    const RARE_HALT: u32 = 6;

    /// `can_watch`: it is possible, and permitted.
    #[must_use]
    pub fn new(can_watch: bool) -> Self {
        Self { can_watch, soon: false, watch: Trial::default(), halt: Trial::default(), waits: Waits::default() }
    }

    /// What came of it so far.
    #[must_use]
    pub fn waits(&self) -> Waits {
        self.waits
    }

    /// How to wait now. `can_halt`: it is possible.
    pub fn choose(&mut self, can_halt: bool) -> Wait {
        if !self.soon {
            return Wait::Sleep;
        }
        if self.can_watch && self.watch.is_due() {
            return Wait::Watch(self.watch.misses.min(2));
        }
        self.watch.pass();
        self.choose_again(can_halt)
    }

    /// How to wait on, after watching was in vain.
    pub fn choose_again(&mut self, can_halt: bool) -> Wait {
        if can_halt && self.halt.is_due() {
            return Wait::Halt;
        }
        self.halt.pass();
        Wait::Sleep
    }

    /// It has watched, and there was an event, or not.
    pub fn watched(&mut self, event: bool) {
        self.watch.note(event, Self::RARE_WATCH);
        match event {
            true => self.waits.watched += 1,
            false => self.waits.watched_in_vain += 1,
        }
    }

    /// It has halted, and this was ended by an event, or by something else.
    pub fn halted(&mut self, event: bool) {
        self.halt.note(event, Self::RARE_HALT);
        match event {
            true => self.waits.halted += 1,
            false => self.waits.halted_in_vain += 1,
        }
    }

    /// Whether it matters how long the sleep takes that it has chosen. Else no clock needs to be read.
    #[must_use]
    pub fn times_sleep(&self, can_halt: bool) -> bool {
        let matters = |possible, way: &Trial| possible && (!self.soon || way.is_due());
        matters(self.can_watch, &self.watch) || matters(can_halt, &self.halt)
    }

    /// It has slept, and an event has ended that soon: before a tick of the kernel's timer would have ended a halt. None if it
    /// was not timed.
    pub fn slept(&mut self, soon: Option<bool>) {
        self.soon = soon.unwrap_or(self.soon);
        self.waits.slept += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ends a halt if nothing else does: the time between two of the kernel's timer interrupts, in microseconds.
    const TICK: u64 = 4_000;
    /// How long it watches.
    const WATCH: u64 = 100;

    /// Where the monitor and the guest run.
    #[derive(Clone, Copy)]
    enum On {
        /// No event comes while the monitor runs.
        OneCpu,
        TwoCpus,
        /// And the monitor's kernel has more virtual CPUs: it cannot halt.
        ManyCpus,
    }

    /// Waits for events that come with these gaps between them, in microseconds.
    fn replay(on: On, gaps: impl IntoIterator<Item = u64>) -> Waits {
        let mut waiting = Waiting::new(true);
        let can_halt = !matches!(on, On::ManyCpus);
        for gap in gaps {
            let mut how = waiting.choose(can_halt);
            if matches!(how, Wait::Watch(_)) {
                let paid = gap < WATCH && !matches!(on, On::OneCpu);
                waiting.watched(paid);
                if paid {
                    continue;
                }
                how = waiting.choose_again(can_halt);
            }
            if how == Wait::Halt {
                let paid = gap < TICK;
                waiting.halted(paid);
                if paid {
                    continue;
                }
            }
            let timed = waiting.times_sleep(can_halt);
            waiting.slept(timed.then_some(gap < TICK));
        }
        waiting.waits()
    }

    #[test]
    fn a_storm_of_events_is_not_slept_through() {
        let waits = replay(On::OneCpu, [50; 10_000]);
        assert_eq!((waits.halted, waits.slept), (9_999, 1));
        assert!(waits.watched_in_vain < 20, "{waits:?}");
        let waits = replay(On::TwoCpus, [50; 10_000]);
        assert_eq!((waits.watched, waits.slept), (9_999, 1));
        let waits = replay(On::ManyCpus, [50; 10_000]);
        assert_eq!((waits.watched, waits.slept), (9_999, 1));
        // Too far apart to watch, and near enough to halt.
        let waits = replay(On::TwoCpus, [1_000; 10_000]);
        assert_eq!((waits.halted, waits.slept), (9_999, 1));
        assert!(waits.watched_in_vain < 20, "{waits:?}");
    }

    #[test]
    fn where_events_are_rare_it_only_sleeps() {
        for on in [On::OneCpu, On::TwoCpus, On::ManyCpus] {
            let waits = replay(on, [1_000_000; 6_500]);
            assert_eq!(waits, Waits { slept: 6_500, ..Waits::default() });
        }
    }

    #[test]
    fn where_nothing_pays_it_tries_seldom_and_seldom_looks_at_the_clock() {
        // One CPU, and several virtual CPUs in dom0.
        let mut waiting = Waiting::new(true);
        let mut timed = 0;
        for _ in 0..10_300 {
            if matches!(waiting.choose(false), Wait::Watch(_)) {
                waiting.watched(false);
            }
            let time = waiting.times_sleep(false);
            timed += u32::from(time);
            waiting.slept(time.then_some(true));
        }
        assert!(waiting.waits().watched_in_vain <= 10 + 10, "{:?}", waiting.waits());
        assert!(timed <= 1 + 10 + 10, "{timed}");
    }

    #[test]
    fn a_burst_is_noticed_soon() {
        // A busy second, then nothing for a while, again and again.
        let bursts = || (0..100).flat_map(|_| std::iter::repeat_n(50, 1_000).chain([500_000]));
        let waits = replay(On::OneCpu, bursts());
        assert!(waits.halted > 99_000, "{waits:?}");
        let waits = replay(On::ManyCpus, bursts());
        assert!(waits.watched > 99_000, "{waits:?}");
        // And after a long time without.
        let late = || std::iter::repeat_n(1_000_000, 10_000).chain([50; 10_000]);
        let waits = replay(On::OneCpu, late());
        assert_eq!((waits.halted, waits.slept), (9_999, 10_001));
        let waits = replay(On::ManyCpus, late());
        assert_eq!((waits.watched, waits.slept), (9_999, 10_001));
    }

    #[test]
    fn whoever_knows_the_policy_cannot_have_it_waste_more_than_it_has_saved() {
        for on in [On::OneCpu, On::TwoCpus, On::ManyCpus] {
            // Every second event comes at once, the others after a while; and whatever else has a short period.
            for period in 2..20 {
                let waits = replay(on, (0..10_000).map(|n| if n % period == 0 { 50 } else { 1_000_000 }));
                assert!(waits.watched_in_vain <= waits.watched + waits.slept / 2 + 10, "{period}: {waits:?}");
                assert!(waits.halted_in_vain <= waits.halted + waits.slept / 2 + 6, "{period}: {waits:?}");
            }
        }
    }

    #[test]
    fn it_can_be_told_not_to_watch() {
        let mut waiting = Waiting::new(false);
        waiting.slept(Some(true));
        assert_eq!(waiting.choose(true), Wait::Halt);
        assert_eq!(waiting.choose(false), Wait::Sleep);
    }
}
