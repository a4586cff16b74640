/// LibVMI's events, as hyperbp's, and hyperbp's replies, as LibVMI's responses. Nothing here knows which program the
/// events are in.
#ifndef HYPERBP_VMI_EVENT_HPP
#define HYPERBP_VMI_EVENT_HPP

#include <libvmi/libvmi.h>

#include <libvmi/events.h>

#include "hyperbp/session.hpp"

namespace hyperbp {

/// What LibVMI reads after a callback has returned: it must live until then.
struct EmulationData
{
    /// LibVMI is not to free them.
    EmulationData() noexcept;

    emul_insn_t instruction {};
    emul_read_t read {};
};

/// Kinds of accesses, from LibVMI's flags. VMI_MEMACCESS_N, and what is none of read, write and execute, is no access.
ffi::Accesses accesses_of(vmi_mem_access_t access) noexcept;

/// Kinds of accesses, as LibVMI's flags.
vmi_mem_access_t flags_of(ffi::Accesses accesses) noexcept;

/// Translates an event, field by field, into one that is there already: an event is large, and no field is left out.
/// Returns whether it is one for hyperbp: an interrupt event for INT3, a memory event, a single-step or a failed
/// emulation.
bool translate(const vmi_event_t& event, ffi::Event& into) noexcept;

/// Where an INT3 is: guest-physical, prefixes included.
std::uint64_t address_of(const vmi_event_t& event) noexcept;

/// Reads the registers a host may have changed.
void general_of(const x86_registers_t& registers, ffi::General& into) noexcept;

/// Translates a reply to `event`: returns the response, and sets the fields of the event that go with it. `data` is
/// filled if the response refers to it.
event_response_t respond(const ffi::Reply& reply, vmi_event_t& event, EmulationData& data) noexcept;

/// The responses that hyperbp decides on. What a host wants besides can be added to what `respond` returns.
constexpr event_response_t OURS = VMI_EVENT_RESPONSE_EMULATE | VMI_EVENT_RESPONSE_EMULATE_NOWRITE
                                  | VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA | VMI_EVENT_RESPONSE_TOGGLE_SINGLESTEP
                                  | VMI_EVENT_RESPONSE_SLAT_ID | VMI_EVENT_RESPONSE_SET_REGISTERS
                                  | VMI_EVENT_RESPONSE_SET_EMUL_INSN | VMI_EVENT_RESPONSE_NEXT_SLAT_ID;

} // namespace hyperbp

#endif
