/// LibVMI, as far as hyperbp needs it, on a machine of ours: an instance is connected to one, and delivers its events.
/// The functions of LibVMI's API are defined beside it, so that a program with this is not linked with LibVMI.
#ifndef HYPERBP_TESTS_FAKE_LIBVMI_HPP
#define HYPERBP_TESTS_FAKE_LIBVMI_HPP

#include <atomic>
#include <map>
#include <type_traits>
#include <utility>

#include <libvmi/libvmi.h>

#include <libvmi/events.h>
#include <libvmi/slat.h>

#include "machine.hpp"

struct vmi_instance
{
    explicit vmi_instance(fake::Machine& it) : machine(it) {}

    /// Lets a virtual CPU execute an instruction; if that is an event, calls who has registered for it and does what
    /// the response says.
    void run(std::uint16_t vcpu);

    /// Maps pages of the guest, until the caller unmaps them.
    ///
    /// @throws std::runtime_error if there are none.
    void* map(std::uint64_t gfn, std::size_t pages, int prot);

    fake::Machine& machine;
    vmi_event_t* interrupt = nullptr;
    vmi_event_t* memory = nullptr;
    vmi_event_t* failed_emulation = nullptr;
    std::map<std::uint32_t, vmi_event_t*> steps;
    /// Events are in the ring.
    std::atomic<bool> pending = false;
    /// Pages mapped so far.
    unsigned mapped = 0;
    /// What the last response was.
    event_response_t last = VMI_EVENT_RESPONSE_NONE;

private:
    vmi_event_t* registered_for(const fake::ffi::Event& event);
};

/// Whether this LibVMI has `vmi_mmap_guest_pa`: it got it late. With one that lacks it, the host must map pages.
template<typename Vmi, typename = void>
constexpr bool HAS_MMAP_GUEST_PA = false;

template<typename Vmi>
constexpr bool HAS_MMAP_GUEST_PA<Vmi, std::void_t<decltype(vmi_mmap_guest_pa(std::declval<Vmi>(), 0, 1, 0, nullptr))>> =
    true;

#endif
