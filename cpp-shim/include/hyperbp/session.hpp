/// hyperbp for C++: sessions, events and replies, in the namespace `hyperbp::ffi`. What fails throws `rust::Error`.
///
///     auto session = hyperbp::ffi::open(std::make_unique<MyHypervisor>(), "auto");
///     session->insert(0x104ff8);
///     hyperbp::ffi::Reply reply {};
///     auto observed = session->begin(event, reply);
///     if (observed.kind == hyperbp::ffi::Kind::Hit)
///         session->finish_with(event.registers.general, reply);
///     // `reply` is the answer.
///     session->close();
///
/// An event is answered in two halves. Between them breakpoints and watches may be inserted and removed, and the
/// general registers, RIP and RFLAGS be changed. A session is used by one thread at a time.
#ifndef HYPERBP_SESSION_HPP
#define HYPERBP_SESSION_HPP

#include "hyperbp/hypervisor.hpp"
// Made by cxx from ffi/src/bridge.rs, which documents it.
#include "hyperbp/src/bridge.rs.h"

#endif
