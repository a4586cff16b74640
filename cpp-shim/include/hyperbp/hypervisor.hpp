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

    /// Reads guest memory: what a virtual CPU would read at this moment, also if the guest has put another page there
    /// since the last access. The range lies within one page.
    virtual void read(std::uint64_t gpa, rust::Slice<std::uint8_t> into) = 0;

    /// Writes guest memory, whatever a view permits. The range lies within one page.
    virtual void write(std::uint64_t gpa, rust::Slice<const std::uint8_t> bytes) = 0;

    /// Writes what an instruction of the guest would write, if the page is plain memory: readable, writable, and nobody
    /// keeps a record of what is written to it (a ROM, log-dirty mode). False, and nothing is written, if it is not, or
    /// if that is not known: then the instruction is stepped.
    virtual bool write_ram(std::uint64_t gpa, rust::Slice<const std::uint8_t> bytes)
    {
        (void)gpa;
        (void)bytes;
        return false;
    }

    /// Adds a page of memory to the domain, at a frame number where nothing is, and returns that.
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

    /// What a view permits on a page. False if that is not known.
    virtual bool rights(std::uint16_t view, std::uint64_t gfn, ffi::Rights& into)
    {
        (void)view;
        (void)gfn;
        (void)into;
        return false;
    }

    /// Sets what the host view permits on every page that the guest gets, or moves, from now on. Where it does nothing,
    /// breakpoints in a page that the guest replaces are gone.
    virtual void set_default_rights(ffi::Rights rights)
    {
        (void)rights;
    }

    /// DR7 as a virtual CPU that waits has it now: what an event says of it may be older. False if that is not known:
    /// then instructions that access memory are stepped.
    virtual bool debug_control(std::uint16_t vcpu, std::uint64_t& dr7)
    {
        (void)vcpu;
        (void)dr7;
        return false;
    }

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

/// What a host does itself of what LibVMI cannot do, or some of its forks not rightly, for `hyperbp::ffi::open_libvmi`.
/// What it does not, hyperbp does by hypercalls of its own, in a dom0 with Linux 4.18 or newer.
class Memory
{
public:
    virtual ~Memory() = default;

    /// Whether `add_page` and `drop_page` add pages and take them away.
    virtual bool adds_pages() const noexcept
    {
        return false;
    }

    /// Adds a page of memory to the domain, at a frame number where nothing is, and returns that.
    virtual std::uint64_t add_page()
    {
        throw std::logic_error("there is no add_page");
    }

    /// Takes such a page away again.
    virtual void drop_page(std::uint64_t gfn)
    {
        (void)gfn;
        throw std::logic_error("there is no drop_page");
    }

    /// Whether `map_page` maps pages.
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

    /// Whether `create_view` makes views.
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
