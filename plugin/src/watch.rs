//! Watched pages: whoever set a watch is told of the guest's accesses to the page.
//!
//! A watch takes rights away in the execute view. What it reports then runs in a view that permits it: so an instruction
//! is reported once, whatever else it accesses; and one that is stepped over a breakpoint is not reported at all.

use std::collections::HashMap;

use rustc_hash::FxBuildHasher;

use crate::views::Views;
use crate::{Access, Gfn, Hypervisor, Rights};

/// Kinds of accesses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Accesses {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
    /// Fetches of instructions.
    pub execute: bool,
}

impl Accesses {
    /// None.
    pub const NONE: Self = Self { read: false, write: false, execute: false };
    /// All.
    pub const ALL: Self = Self { read: true, write: true, execute: true };
    /// Reads alone.
    pub const READ: Self = Self { read: true, ..Self::NONE };
    /// Writes alone.
    pub const WRITE: Self = Self { write: true, ..Self::NONE };
    /// Fetches of instructions alone.
    pub const EXECUTE: Self = Self { execute: true, ..Self::NONE };

    /// Whether an access is of one of these kinds.
    #[must_use]
    pub const fn include(self, access: &Access) -> bool {
        (self.read && access.read) || (self.write && access.write) || (self.execute && access.execute)
    }

    /// What is left of the rights to a page. No EPT entry permits writes but not reads (Intel SDM volume 3, section
    /// 29.3.3.1), so without reads there are no writes either.
    pub(crate) const fn taken_from(self, rights: Rights) -> Rights {
        let read = !self.read && matches!(rights, Rights::All | Rights::ReadWrite | Rights::ReadExecute | Rights::Read);
        let write = read && !self.write && matches!(rights, Rights::All | Rights::ReadWrite);
        let execute = !self.execute && matches!(rights, Rights::All | Rights::Execute | Rights::ReadExecute);
        match (read, write, execute) {
            (true, true, true) => Rights::All,
            (true, true, false) => Rights::ReadWrite,
            (true, false, true) => Rights::ReadExecute,
            (true, false, false) => Rights::Read,
            (false, _, true) => Rights::Execute,
            (false, _, false) => Rights::None,
        }
    }
}

/// What is to be reported of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Watch {
    pub(crate) accesses: Accesses,
    /// Also when the access has been made.
    pub(crate) after: bool,
}

/// All watches.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watches(HashMap<Gfn, Watch, FxBuildHasher>);

impl Watches {
    pub(crate) fn get(&self, gfn: Gfn) -> Option<Watch> {
        self.0.get(&gfn).copied()
    }

    pub(crate) fn set(&mut self, gfn: Gfn, watch: Watch) {
        self.0.insert(gfn, watch);
    }

    pub(crate) fn remove(&mut self, gfn: Gfn) -> Option<Watch> {
        self.0.remove(&gfn)
    }

    pub(crate) fn gfns(&self) -> Vec<Gfn> {
        self.0.keys().copied().collect()
    }
}

/// Takes the rights away that a watch wants to hear of, from those the page has in the execute view without one.
pub(crate) fn apply<H: Hypervisor>(
    hv: &mut H,
    views: &Views,
    gfn: Gfn,
    accesses: Accesses,
    rights: Rights,
) -> Result<(), H::Error> {
    hv.set_rights(views.exec, gfn, accesses.taken_from(rights))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_reads_there_are_no_writes() {
        let accesses = Accesses { read: true, ..Accesses::NONE };
        assert_eq!(accesses.taken_from(Rights::All), Rights::Execute);
        assert_eq!(accesses.taken_from(Rights::ReadWrite), Rights::None);
    }

    #[test]
    fn a_guard_stays_a_guard() {
        let accesses = Accesses { write: true, ..Accesses::NONE };
        assert_eq!(accesses.taken_from(Rights::All), Rights::ReadExecute);
        assert_eq!(accesses.taken_from(Rights::Execute), Rights::Execute);
        let accesses = Accesses { execute: true, ..Accesses::NONE };
        assert_eq!(accesses.taken_from(Rights::Execute), Rights::None);
        assert_eq!(accesses.taken_from(Rights::All), Rights::ReadWrite);
        let accesses = Accesses { write: true, execute: true, ..Accesses::NONE };
        assert_eq!(accesses.taken_from(Rights::All), Rights::Read);
        assert_eq!(Accesses::NONE.taken_from(Rights::All), Rights::All);
        assert_eq!(Accesses::ALL.taken_from(Rights::All), Rights::None);
    }
}
