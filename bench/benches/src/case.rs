//! What is measured of the core.

use std::fmt;

use hyperbp::Mechanism;

/// How many breakpoints are set.
pub const BREAKPOINTS: [u32; 3] = [1, 100, 10_000];

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum What {
    /// The guest executes a breakpoint over `push rbp`, which most functions begin with.
    Hit,
    /// The guest reads beside a breakpoint.
    Read,
    /// The guest writes beside a breakpoint.
    Write,
    /// A breakpoint is set, on a page that has none yet.
    Insert,
    /// It is taken out again.
    Remove,
}

impl What {
    /// All of it.
    pub const ALL: [Self; 5] = [Self::Hit, Self::Read, Self::Write, Self::Insert, Self::Remove];

    /// Its name in results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Read => "read",
            Self::Write => "write",
            Self::Insert => "insert",
            Self::Remove => "remove",
        }
    }

    /// Whether a virtual CPU of the guest waits meanwhile.
    #[must_use]
    pub fn is_an_event(self) -> bool {
        matches!(self, Self::Hit | Self::Read | Self::Write)
    }
}

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// What happens. If it happens at a breakpoint: at another one each time, at random.
    pub what: What,
    /// How the breakpoints work: its name, of [`Mechanism::NAMED`].
    pub mechanism: &'static str,
    /// How many breakpoints are set.
    pub breakpoints: u32,
}

/// Every mechanism that has a name, with each number of breakpoints.
pub fn scenes() -> impl Iterator<Item = (&'static str, Mechanism, u32)> {
    let with = |(name, mechanism)| BREAKPOINTS.into_iter().map(move |breakpoints| (name, mechanism, breakpoints));
    Mechanism::NAMED.into_iter().flat_map(with)
}

impl Case {
    /// All cases: for each of the [`scenes`] everything that can happen.
    pub fn all() -> impl Iterator<Item = Self> {
        scenes().flat_map(|(mechanism, _, breakpoints)| {
            What::ALL.into_iter().map(move |what| Self { what, mechanism, breakpoints })
        })
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} with {} breakpoints", self.mechanism, self.what.name(), self.breakpoints)
    }
}
