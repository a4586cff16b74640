//! Why something failed, so that an operator knows what to do.

use std::ffi::c_int;
use std::io;

use hyperbp::ledger;
use hyperbp_xen_domain::FrameError;

use super::handle::PRIVCMD;

/// A call to one of Xen's libraries failed.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}")]
pub(crate) struct Error {
    /// The function.
    call: &'static str,
    /// Its `errno`.
    source: io::Error,
}

impl Error {
    /// `call` has just failed and set `errno`.
    pub(crate) fn last(call: &'static str) -> Self {
        Self { call, source: io::Error::last_os_error() }
    }

    /// Why `call` has failed.
    pub(crate) const fn of(call: &'static str, source: io::Error) -> Self {
        Self { call, source }
    }

    /// Whether this is why it failed, as an `errno`.
    pub(crate) fn is(&self, code: c_int) -> bool {
        self.source.raw_os_error() == Some(code)
    }

    /// Whether a frame could not be mapped because there is no memory at its number.
    pub(crate) fn is_no_memory(&self) -> bool {
        self.call == "xenforeignmemory_map"
            && [libc::EINVAL, libc::ENOENT, libc::EFAULT].iter().any(|code| self.is(*code))
    }

    /// What has failed.
    pub(super) const fn call(&self) -> &'static str {
        self.call
    }

    /// What kind of failure it was.
    pub(super) fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }

    /// Why it failed, without what.
    pub(super) fn into_source(self) -> io::Error {
        self.source
    }

    /// Somebody else has the domain's ring.
    pub(crate) fn busy(domain: u32) -> Self {
        let problem = format!(
            "another monitor is attached to domain {domain}: stop it; if there is none any more, `hyperbp-bench recover \
             --domain {domain}` takes away what it has left"
        );
        Self::invalid("xc_monitor_enable", problem)
    }

    pub(super) fn invalid(call: &'static str, problem: String) -> Self {
        Self { call, source: io::Error::other(problem) }
    }
}

impl From<FrameError> for Error {
    fn from(error: FrameError) -> Self {
        let call = match error {
            FrameError::NoneLeft => "find a frame for a shadow page",
            FrameError::NotOurs(_) => "free a shadow page's frame",
        };
        Self { call, source: io::Error::other(error) }
    }
}

/// `Ok` unless `result` is negative, as libxenctrl says that `call` failed.
pub(crate) fn check(call: &'static str, result: c_int) -> Result<(), Error> {
    if result < 0 { Err(Error::last(call)) } else { Ok(()) }
}

/// Why a domain cannot be benchmarked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// Hypercalls are not for us.
    #[error("cannot use {PRIVCMD} ({0}): run this as root in dom0 of a Xen host")]
    NotADom0(io::Error),
    /// Nothing has this name or number.
    #[error("there is no domain `{0}`: `xl list` shows those there are")]
    NoSuchDomain(String),
    /// The domain was made without altp2m.
    #[error(
        "domain `{0}` has no views: put altp2m=\"external\" into its configuration and `altp2m=1` on Xen's command line"
    )]
    NoAltp2m(String),
    /// The guest may change views itself.
    #[error(
        "domain `{domain}` has altp2m=\"{mode}\": the guest may make and switch views itself, and so leave those with the \
         breakpoints; put altp2m=\"external\" into its configuration, or insist with --allow-guest-altp2m"
    )]
    GuestAltp2m {
        /// The domain's name or number.
        domain: String,
        /// What its configuration says.
        mode: &'static str,
    },
    /// A monitor has died.
    #[error("{source}: run `hyperbp-bench recover --domain {domain}`")]
    Leftover {
        /// The domain's name or number.
        domain: String,
        /// What it has left.
        source: ledger::Error,
    },
    /// There is no ledger to write to.
    #[error(transparent)]
    Ledger(ledger::Error),
    /// Something else.
    #[error(transparent)]
    Other(#[from] Error),
}
