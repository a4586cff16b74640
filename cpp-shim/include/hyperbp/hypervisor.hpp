/// The classes a host in C++ implements, for hyperbp to work through them.
#ifndef HYPERBP_HYPERVISOR_HPP
#define HYPERBP_HYPERVISOR_HPP

#include <cstdint>
#include <stdexcept>

#include "rust/cxx.h"

/// LibVMI's: `vmi_instance_t` points to it.
struct vmi_instance;

namespace hyperbp {

namespace ffi {
enum class Rights : std::uint8_t;
}

/// A connection to one domain, for `hyperbp::ffi::open`. Whatever it throws that derives from `std::exception` is an
/// error on the other side; anything else ends the program.
///
/// Memory addresses are guest-physical and go to the guest's own pages (the host view, number 0), whatever view a
/// virtual CPU is in. Single-step monitoring must be on for the whole life of the connection.
class Hypervisor
{
public:
    virtual ~Hypervisor() = default;

    /// Virtual CPUs of the domain.
    virtual std::uint16_t vcpus() const = 0;

    /// The time in nanoseconds, from any start. Called twice a hit. Must not throw.
    virtual std::uint64_t now() const noexcept = 0;

    /// Reads guest memory. The range lies within one page.
    virtual void read(std::uint64_t gpa, rust::Slice<std::uint8_t> into) = 0;

    /// Writes guest memory, whatever a view permits. The range lies within one page.
    virtual void write(std::uint64_t gpa, rust::Slice<const std::uint8_t> bytes) = 0;

    /// Adds a page of memory to the domain, at a frame number that the guest does not use, and returns that.
    virtual std::uint64_t add_page() = 0;

    /// Takes such a page away again.
    virtual void drop_page(std::uint64_t gfn) = 0;

    /// Makes a view in which everything is as in the host view.
    virtual std::uint16_t create_view() = 0;

    /// Switches all virtual CPUs to a view.
    virtual void switch_view(std::uint16_t view) = 0;

    /// Drops a view that no virtual CPU is in.
    virtual void drop_view(std::uint16_t view) = 0;

    /// Lets `gfn` show, in a view, what that view shows at `to`. The rights there are unspecified afterwards.
    virtual void remap(std::uint16_t view, std::uint64_t gfn, std::uint64_t to) = 0;

    /// Lets `gfn` show its own page again.
    virtual void unmap(std::uint16_t view, std::uint64_t gfn) = 0;

    /// Sets what a view permits on a page.
    virtual void set_rights(std::uint16_t view, std::uint64_t gfn, ffi::Rights rights) = 0;

    /// The instruction pointer of a virtual CPU. What a reply says counts only when it has gone on: until then it is
    /// that of the event.
    virtual std::uint64_t rip(std::uint16_t vcpu) = 0;

    /// Ends any single-step of a virtual CPU, fast or not, without an event.
    virtual void stop_step(std::uint16_t vcpu) = 0;

    /// Pauses the domain. Calls nest.
    virtual void pause() = 0;

    /// Undoes one `pause`.
    virtual void resume() = 0;
};

/// What LibVMI cannot do, or some of its forks not rightly, for `hyperbp::ffi::open_libvmi`.
class Memory
{
public:
    virtual ~Memory() = default;

    /// Adds a page of memory to the domain, at a frame number that the guest does not use, and returns that.
    virtual std::uint64_t add_page() = 0;

    /// Takes such a page away again.
    virtual void drop_page(std::uint64_t gfn) = 0;

    /// Whether `map_page` maps pages. If not, LibVMI does, with vmi_mmap_guest_pa.
    virtual bool maps_pages() const noexcept
    {
        return false;
    }

    /// Maps a page of the domain, for reading and writing, until munmap() of that one page.
    virtual std::uint8_t* map_page(std::uint64_t gfn)
    {
        (void)gfn;
        throw std::logic_error("there is no map_page");
    }

    /// Whether `create_view` makes views. If not, LibVMI does, with vmi_slat_create.
    virtual bool creates_views() const noexcept
    {
        return false;
    }

    /// Makes a view in which the guest may do everything, and returns its number.
    virtual std::uint16_t create_view()
    {
        throw std::logic_error("there is no create_view");
    }
};

} // namespace hyperbp

#endif
