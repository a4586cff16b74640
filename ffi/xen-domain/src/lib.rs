//! What Xen says of a domain, and does with it, that LibVMI offers no function for: by hypercalls of our own.
//!
//! Needs a dom0 with Linux 4.18 or newer. All calls are of those parts of Xen's interface that stay as they are, so this
//! works with any version of Xen that has altp2m.

mod domain;
mod frames;
mod store;

pub use domain::{Altp2m, Domain, Error};
pub use frames::{FrameError, Frames, GuestMemory, PAGE_KIB, Usage};
