//! What can go wrong when a breakpoint is set, and what to do about it.

use std::fmt;

use crate::{Gfn, Gpa};

/// Why the engine could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name of a mechanism is not known.
    #[error(
        "there is no mechanism {0:?}: use auto, repair, view-step, view-fast-step, emulate, interpret, or \
         PLACEMENT+STEP-OVER+CONCEALMENT of in-place, shadow + auto, repair, view-step, view-fast-step, emulate, interpret + \
         view-step, view-fast-step, emulate, data"
    )]
    UnknownMechanism(String),
    /// Three choices that do not fit together.
    #[error("these do not work together: {0}")]
    Combination(&'static str),
    /// The breakpoint at this address has another step-over.
    #[error("the breakpoint at {0} has another step-over: use its, or remove it first")]
    StepOverConflict(Gpa),
    /// The page has breakpoints with another placement or concealment.
    #[error("the page of {0} has breakpoints with another placement or concealment: use theirs, or remove them first")]
    PageConflict(Gpa),
    /// The page had breakpoints with another placement or concealment, and is not given back yet.
    #[error("the page of {0} has had breakpoints with another placement or concealment until a moment ago: try again")]
    NotGivenBack(Gpa),
    /// What a watch and breakpoints want of a page cannot be had together.
    #[error(
        "{0} cannot have breakpoints in place while somebody watches what is executed there: use the placement shadow, or \
         remove one of them first"
    )]
    WatchConflict(Gfn),
    /// The guest has no memory at this address: the engine keeps a shadow there.
    #[error("the guest has no memory at {0}")]
    NoMemory(Gpa),
    /// The domain has fewer virtual CPUs.
    #[error("there is no virtual CPU {0}")]
    NoSuchVcpu(u16),
    /// There is no such breakpoint, or it has been removed.
    #[error("there is no such breakpoint: it has been removed, or belongs to another engine")]
    NoSuchBreakpoint,
    /// The engine is being taken down.
    #[error("the engine is leaving the domain, and sets no more breakpoints")]
    Leaving,
    /// The hypervisor refused something.
    #[error("cannot {doing}")]
    Hypervisor {
        /// What was tried.
        doing: &'static str,
        /// What the hypervisor said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// The error and its causes, in one line, for a host that prints no chain of
    /// [sources](std::error::Error::source).
    ///
    /// ```
    /// # use hyperbp::Error;
    /// let source = Box::new(std::io::Error::other("the domain is gone"));
    /// let error = Error::Hypervisor { doing: "read the page", source };
    /// assert_eq!(error.to_string(), "cannot read the page");
    /// assert_eq!(error.with_causes().to_string(), "cannot read the page: the domain is gone");
    /// ```
    #[must_use]
    pub fn with_causes(&self) -> impl fmt::Display + '_ {
        WithCauses(self)
    }
}

/// An error and its causes, in one line.
pub(crate) struct WithCauses<'a>(pub(crate) &'a (dyn std::error::Error + 'static));

impl fmt::Display for WithCauses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        std::iter::successors(self.0.source(), |error| error.source()).try_for_each(|cause| write!(f, ": {cause}"))
    }
}

/// Says what was tried when the hypervisor refuses.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, Error>;
}

impl<T, E: std::error::Error + Send + Sync + 'static> Doing<T> for Result<T, E> {
    fn doing(self, doing: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error::Hypervisor { doing, source: Box::new(source) })
    }
}
