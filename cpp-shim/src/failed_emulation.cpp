#include "failed_emulation.hpp"

#include <list>
#include <mutex>
#include <stdexcept>

namespace hyperbp {
namespace {

struct Registered
{
    vmi_instance_t vmi;
    vmi_event_t event;
};

/// LibVMI cannot clear this kind of event (`vmi_clear_event` does not know it), and refers to it until the instance is
/// gone. So none is ever freed; another session on the same instance has the same one. That is as many as the program
/// has instances at a time.
struct Events
{
    std::mutex mutex;
    std::list<Registered> list;
};

Events& events()
{
    // LibVMI may outlive our destructors.
    static auto* all = new Events;
    return *all;
}

event_response_t run_again(vmi_instance_t /*vmi*/, vmi_event_t* /*event*/)
{
    return VMI_EVENT_RESPONSE_NONE;
}

} // namespace

void answer_failed_emulations(vmi_instance_t vmi, event_callback_t callback, void* data)
{
    Events& all = events();
    const std::lock_guard lock(all.mutex);
    Registered* mine = nullptr;
    for (Registered& registered : all.list) {
        if (registered.vmi == vmi)
            mine = &registered;
    }
    const bool known = mine != nullptr;
    if (!known) {
        mine = &all.list.emplace_back();
        mine->vmi = vmi;
        mine->event.version = VMI_EVENTS_VERSION;
        mine->event.type = VMI_EVENT_FAILED_EMULATION;
    }
    mine->event.data = data;
    mine->event.callback = callback;
    // If it is registered already, this fails; if it was for another instance, at the same address, it does not.
    if (vmi_register_event(vmi, &mine->event) == VMI_SUCCESS || known)
        return;
    all.list.pop_back();
    throw std::runtime_error(
        "LibVMI does not report failed emulations: it needs Xen 4.11 or newer, was to be initialised "
        "with VMI_INIT_EVENTS, and nobody else in this program may have registered that event");
}

void forget_failed_emulations(vmi_instance_t vmi) noexcept
{
    Events& all = events();
    const std::lock_guard lock(all.mutex);
    for (Registered& registered : all.list) {
        if (registered.vmi == vmi) {
            registered.event.data = nullptr;
            registered.event.callback = run_again;
        }
    }
}

} // namespace hyperbp
