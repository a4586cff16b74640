/// LibVMI's event for failed emulations.
#ifndef HYPERBP_FAILED_EMULATION_HPP
#define HYPERBP_FAILED_EMULATION_HPP

#include <libvmi/libvmi.h>

#include <libvmi/events.h>

namespace hyperbp {

/// Has `callback` called, with `data` in the event, when Xen's emulator gives an instruction back. Throws if LibVMI
/// refuses.
void answer_failed_emulations(vmi_instance_t vmi, event_callback_t callback, void* data);

/// Has it called no more.
void forget_failed_emulations(vmi_instance_t vmi) noexcept;

} // namespace hyperbp

#endif
