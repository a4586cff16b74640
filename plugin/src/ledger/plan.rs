//! What a recovery may do of all that a ledger says.
//!
//! A ledger may be torn, or of another version, or somebody may have written to it. Whatever it says, memory of the guest's
//! own is not freed, and nothing is counted to that the domain does not have.

use super::{Ledger, MemoryLimit, Note};
use crate::{Gfn, ViewId};

/// Frames below 4 GiB.
const BELOW_4G: u64 = 1 << 20;
/// Where domain builders put a domain's tables and what it shares with Xen: from here to 4 GiB.
const SPECIAL: u64 = 0xf_c000;
/// Pauses that a monitor has at the same time, at most.
const PAUSES: u64 = 16;

/// What a domain has, as Xen and its toolstack say it, and not its ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The highest number of a frame that it has had.
    pub last: Gfn,
    /// Pages of memory that it may have at most.
    pub most: u64,
    /// Whether it has a machine's devices (HVM): then some have memory in the hole below 4 GiB.
    pub has_devices: bool,
}

impl Limits {
    /// Whether a frame may be the guest's: memory, a device's, or one that it shares with Xen. Wherever the hole for devices
    /// below 4 GiB begins, memory is from 0 on, and what does not fit below it is from 4 GiB on.
    #[must_use]
    pub const fn may_be_the_guests(&self, gfn: Gfn) -> bool {
        if gfn.0 < BELOW_4G {
            self.has_devices || gfn.0 < self.most || gfn.0 >= SPECIAL
        } else {
            gfn.0 < BELOW_4G.saturating_add(self.most)
        }
    }
}

/// What a ledger says that can be true, and what is to be done about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What is to be undone. Bytes come first: nobody may read one of ours when the guards are gone.
    pub undo: Vec<Note>,
    /// How often the domain is paused by us, at most. None if what is noted cannot be true.
    pub pauses: u64,
    /// The memory limit to put back, if it is [still ours](MemoryLimit::is_ours).
    pub memory_limit: Option<MemoryLimit>,
    /// What is not believed, a line for each.
    pub refused: Vec<String>,
}

/// Memory limits, in KiB: Xen counts pages in 32 bits, and below this no guest starts.
const MEMORY_LIMITS: std::ops::RangeInclusive<u64> = 1024..=(u32::MAX as u64) << 2;

impl Ledger {
    /// What is to be undone in a domain with these limits.
    #[must_use]
    pub fn plan(&self, limits: &Limits) -> Plan {
        let mut refused = Vec::new();
        let mut undo = self.notes();
        undo.sort_by_key(|note| note.encode());
        undo.retain(|note| match problem(*note, limits) {
            None => true,
            Some(problem) => {
                refused.push(problem);
                false
            }
        });
        let pauses = self.pauses();
        if pauses > PAUSES {
            refused.push(format!("{pauses} pauses: if the domain is paused, `xl unpause` lets it run"));
        }
        let memory_limit = self.memory_limit().filter(|limit| {
            let sane = MEMORY_LIMITS.contains(&limit.found);
            if !sane {
                refused.push(format!("a memory limit of {} KiB: `xl mem-max` sets the right one", limit.found));
            }
            sane
        });
        Plan { undo, pauses: if pauses > PAUSES { 0 } else { pauses }, memory_limit, refused }
    }
}

/// Why a note cannot be true.
fn problem(note: Note, limits: &Limits) -> Option<String> {
    let has = |gfn: Gfn| gfn <= limits.last;
    match note {
        Note::Displaced { gpa, .. } if !has(gpa.gfn()) => Some(format!("a breakpoint at {gpa}: there is no memory")),
        Note::Guard(gfn) if !has(gfn) => Some(format!("a guard of {gfn}: there is no memory")),
        Note::Frame(gfn) if limits.may_be_the_guests(gfn) => {
            Some(format!("a shadow in {gfn}: the guest may have memory of its own there"))
        }
        Note::Frame(gfn) if !has(gfn) => Some(format!("a shadow in {gfn}: there is no memory")),
        Note::View(ViewId::HOST) => Some("the host view as one of ours".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gpa;
    use crate::ledger::tests::ID;
    use proptest::prelude::*;

    /// Where a guest with so much memory has it, if the hole for its devices begins there.
    fn is_memory(gfn: u64, most: u64, hole: u64) -> bool {
        gfn < most.min(hole) || (BELOW_4G..BELOW_4G + most.saturating_sub(hole)).contains(&gfn)
    }

    /// Words as they are, and words that are notes of places that matter.
    fn any_word() -> impl Strategy<Value = u64> {
        let gfn = prop_oneof![0..0x10_0000_u64, 0xf_0000..0x20_0000_u64, any::<u64>()];
        prop_oneof![
            any::<u64>(),
            gfn.clone().prop_map(|gfn| Note::Frame(Gfn(gfn)).encode()),
            gfn.clone().prop_map(|gfn| Note::Guard(Gfn(gfn)).encode()),
            gfn.prop_map(|gfn| Note::Displaced { gpa: Gpa(gfn << 12), original: 0x55 }.encode()),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// Whatever is in the file, no memory of the guest's is freed.
        #[test]
        fn no_ledger_has_the_guests_memory_freed(
            header in prop::collection::vec(any::<u64>(), 5),
            words in prop::collection::vec(any_word(), 0..40),
            most in prop_oneof![1..0x40_0000_u64, 0xf_0000..0x11_0000_u64],
            hole in 0x4_0000..0xf_c000_u64,
            last in any::<u64>(),
            has_devices: bool,
        ) {
            let _alone = crate::FORKING.lock();
            let dir = tempfile::tempdir().unwrap();
            drop(Ledger::create(dir.path(), 3, ID).unwrap());
            let file = crate::ledger::path(dir.path(), 3);
            let mut bytes = std::fs::read(&file).unwrap();
            let all = header.iter().chain(&words).flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
            bytes[24..24 + all.len()].copy_from_slice(&all);
            std::fs::write(&file, &bytes).unwrap();

            let ledger = Ledger::leftover(dir.path(), 3, ID).unwrap().unwrap();
            let limits = Limits { last: Gfn(last), most, has_devices };
            let plan = ledger.plan(&limits);
            for note in &plan.undo {
                match *note {
                    Note::Frame(gfn) => {
                        prop_assert!(gfn.0 <= last && !is_memory(gfn.0, most, hole), "{gfn}");
                        prop_assert!(!has_devices || gfn.0 >= BELOW_4G);
                    }
                    Note::Guard(gfn) => prop_assert!(gfn.0 <= last),
                    Note::Displaced { gpa, .. } => prop_assert!(gpa.gfn().0 <= last),
                    Note::View(view) => prop_assert_ne!(view, ViewId::HOST),
                    Note::Altp2m => {}
                }
            }
            prop_assert!(plan.pauses <= PAUSES);
            prop_assert!(plan.memory_limit.is_none_or(|limit| MEMORY_LIMITS.contains(&limit.found)));
        }
    }

    #[test]
    fn what_a_monitor_has_noted_is_believed() {
        let _alone = crate::FORKING.lock();
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::create(dir.path(), 3, ID).unwrap();
        let notes = [
            Note::Displaced { gpa: Gpa(0x1000), original: 0x55 },
            Note::Frame(Gfn(0xf_0000)),
            Note::Guard(Gfn(0x7fff)),
        ];
        for note in notes {
            ledger.note(note).unwrap();
        }
        ledger.note_pause();
        let limit = MemoryLimit { found: 131_072, raised: 131_076 };
        ledger.note_memory_limit(Some(limit));
        let limits = Limits { last: Gfn(0xf_efff), most: 0x8000, has_devices: false };
        let plan = ledger.plan(&limits);
        let expected = Plan { undo: notes.to_vec(), pauses: 1, memory_limit: Some(limit), refused: Vec::new() };
        assert_eq!(plan, expected);
        // The same frame in a domain whose memory goes that far, and in one with devices.
        for limits in [Limits { most: 0x10_0000, ..limits }, Limits { has_devices: true, ..limits }] {
            let plan = ledger.plan(&limits);
            assert_eq!(plan.undo, [notes[0], notes[2]]);
            assert!(plan.refused[0].contains("0xf0000"), "{:?}", plan.refused);
        }
    }
}
