//! hyperbp for C and C++.
//!
//! A session is what a host in another language holds: the core's engine, the hypervisor it works on, and
//! the event between the two halves of its answer. The bridge shows it to C++, in the namespace `hyperbp::ffi`; `cpp-shim/`
//! has the C API, and the translation of LibVMI's events, on top of that.
//!
//! A hypervisor is LibVMI (feature `libvmi`), or whatever implements the C++ class `hyperbp::Hypervisor`.
//!
//! No unwinding leaves this library. What panics is caught where it was called from C++; the domain is then made the
//! guest's own again, and the session can only be closed.

mod bridge;
mod clock;
mod convert;
mod foreign;
#[cfg(feature = "libvmi")]
mod libvmi;
mod logger;
mod machine;
mod recorded;
mod session;
mod waiter;
