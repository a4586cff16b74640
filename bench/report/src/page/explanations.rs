//! Why a ratio differs from the published one: one place for all of them.
//!
//! They are about instructions, which is what a tick is in the emulator. On hardware none of them holds.

use super::published::{Ours, Published};
use crate::{TicksAre, Workload};

/// A cause, and what it explains.
struct Explanation {
    ours: &'static [Ours],
    mechanism: &'static str,
    workloads: &'static [Workload],
    /// Whether our ratio is the larger one.
    larger: bool,
    text: &'static str,
}

const EXECUTE: &[Workload] = &[Workload::ExecBp, Workload::ExecPage];
const READ: &[Workload] = &[Workload::ReadBp, Workload::ReadPage];

const EXPLANATIONS: [Explanation; 6] = [
    Explanation {
        ours: &[Ours::Floor, Ours::Hyperbp],
        mechanism: "repair",
        workloads: EXECUTE,
        larger: false,
        text: "Another repair. The published one is SmartVMI's, which besides its two events maps and unmaps the page and makes two \
               domctls at each hit; this one keeps the page mapped and toggles the step in the response. View-step takes two events \
               as well, so the two are close. And what makes repair dearer on hardware, the flushes after writing to code that \
               runs, is no instruction.",
    },
    Explanation {
        ours: &[Ours::Originals],
        mechanism: "repair",
        workloads: EXECUTE,
        larger: true,
        text: "Software weighs more here. SmartVMI's repair and DRAKVUF's view-step both take two events; what SmartVMI does \
               besides is mapping, domctls and system calls, thousands of instructions, while the exits and the changes of views \
               that the two have in common, which take long on hardware, are next to no instructions. So the denominator \
               shrinks more than the numerator.",
    },
    Explanation {
        ours: &[Ours::Floor, Ours::Hyperbp],
        mechanism: "emulate",
        workloads: EXECUTE,
        larger: true,
        text: "Emulation saves one of two events, so in instructions it is about half of view-step. On hardware it saves more: the \
               changes of views and the step's exit, with the TLB misses after them, are no instructions. (The published figures \
               compare two programs, too: emulation is SmartVMI's, view-step DRAKVUF's.) In exec_page the page's own \
               instructions, some 5 000, are in both; on hardware they take less than a microsecond.",
    },
    Explanation {
        ours: &[Ours::Originals, Ours::Floor, Ours::Hyperbp],
        mechanism: "repair",
        workloads: READ,
        larger: true,
        text: "Repair conceals a read with one event, which Xen answers by emulating the read with the monitor's bytes, where \
               view-step takes two events and a step. That is half in events, and Xen's emulator, thousands of instructions \
               that run from caches on hardware, comes on top; what view-step has on hardware, changes of views with the TLB \
               misses after them, is missing here.",
    },
    Explanation {
        ours: &[Ours::Floor, Ours::Hyperbp],
        mechanism: "view-fast-step",
        workloads: READ,
        larger: false,
        text: "DRAKVUF uses its fast single-step for executions only: reads take a whole view-step, published and here. The floor \
               and hyperbp answer reads with it, too: one event in the place of two.",
    },
    Explanation {
        ours: &[Ours::Floor, Ours::Hyperbp],
        mechanism: "emulate",
        workloads: READ,
        larger: true,
        text: "Another concealment. The published one, SmartVMI's, emulates the read with the monitor's bytes; here a read is \
               answered with a fast single-step. Each is one event where view-step takes two, so half in instructions; on \
               hardware view-step's changes of views, and the TLB misses after them, cost as well.",
    },
];

/// What explains a difference, numbered from 1 in the order of the page.
pub(super) fn explanation(ticks_are: TicksAre, ours: Ours, published: &Published, difference: f64) -> Option<usize> {
    let explains = |explanation: &Explanation| {
        ticks_are == TicksAre::Instructions
            && explanation.ours.contains(&ours)
            && explanation.mechanism == published.mechanism
            && explanation.workloads.contains(&published.workload)
            && explanation.larger == (difference > 0.0)
    };
    EXPLANATIONS.iter().position(explains).map(|n| n + 1)
}

/// The words with this number.
pub(super) fn text(number: usize) -> &'static str {
    number.checked_sub(1).and_then(|n| EXPLANATIONS.get(n)).map_or("", |explanation| explanation.text)
}

#[cfg(test)]
mod tests {
    use super::super::published::PUBLISHED;
    use super::*;

    #[test]
    fn only_what_has_the_same_direction_and_unit_is_explained() {
        let repair = &PUBLISHED[0];
        assert_eq!(explanation(TicksAre::Instructions, Ours::Floor, repair, -0.3), Some(1));
        assert_eq!(explanation(TicksAre::Instructions, Ours::Floor, repair, 0.3), None);
        assert_eq!(explanation(TicksAre::Instructions, Ours::Originals, repair, 0.3), Some(2));
        assert_eq!(explanation(TicksAre::Tsc, Ours::Floor, repair, -0.3), None);
        assert!(text(1).contains("SmartVMI") && text(0).is_empty() && text(99).is_empty());
    }
}
