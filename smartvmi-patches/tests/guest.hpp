/// The machine of cpp-shim/tests/fake, and the LibVMI on it, without their headers: those have another cxx than
/// SmartVMI's.
#ifndef HYPERBP_SMARTVMI_TESTS_GUEST_HPP
#define HYPERBP_SMARTVMI_TESTS_GUEST_HPP

#include <cstdint>
#include <memory>
#include <string>

#include <libvmi/libvmi.h>

#include <libvmi/events.h>

class Guest
{
public:
    /// Virtual CPUs.
    static constexpr std::uint16_t VCPUS = 2;
    /// An instruction that loads VALUE into EAX.
    static constexpr std::uint64_t AT = 0x2010;
    static constexpr std::uint32_t VALUE = 0x44332211;
    /// An INT3 of the guest's own.
    static constexpr std::uint64_t OWN = 0x4000;

    Guest();
    ~Guest();

    vmi_instance_t vmi();

    /// Lets a virtual CPU execute what is at AT: what it has in EAX then.
    std::uint32_t execute(std::uint16_t vcpu);
    /// Lets it begin to, no more.
    void hit(std::uint16_t vcpu);
    /// Lets it finish what it has begun.
    void finish(std::uint16_t vcpu);
    /// Lets it read the byte at AT.
    std::uint8_t read(std::uint16_t vcpu);
    /// Lets it execute its own INT3: whether that was delivered to it.
    bool interrupt(std::uint16_t vcpu);

    std::uint64_t add_page();
    void drop_page(std::uint64_t gfn);
    void* map_page(std::uint64_t gfn);
    std::uint16_t create_view();
    void pause();
    void resume();

    /// What differs from how it was, or nothing.
    std::string differences();

private:
    struct Parts;
    std::unique_ptr<Parts> parts_;
};

#endif
