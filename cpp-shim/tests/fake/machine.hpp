/// A machine of our own: memory, views with rights, and virtual CPUs that know five instructions. It behaves as Xen's
/// documentation and sources say of the real thing, as far as breakpoints depend on it.
#ifndef HYPERBP_TESTS_FAKE_MACHINE_HPP
#define HYPERBP_TESTS_FAKE_MACHINE_HPP

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "hyperbp/session.hpp"

namespace fake {

namespace ffi = hyperbp::ffi;

constexpr std::uint64_t PAGE_SIZE = 4096;
constexpr unsigned PAGE_SHIFT = 12;
/// Pages the guest has, from frame 0 on.
constexpr std::uint64_t GUEST_PAGES = 8;
/// Where pages are added.
constexpr std::uint64_t FIRST_ADDED = 0x100;
/// Views that can be made, besides the host's.
constexpr std::size_t MOST_VIEWS = 9;

// What the virtual CPUs know. All is 32-bit code, flat, without paging: linear addresses are guest-physical ones.
constexpr std::uint8_t NOP = 0x90;
constexpr std::uint8_t BREAKPOINT = 0xcc;
/// MOV EAX, imm32.
constexpr std::uint8_t MOV_EAX = 0xb8;
/// MOV AL, [moffs32].
constexpr std::uint8_t LOAD_AL = 0xa0;
/// MOV [moffs32], AL.
constexpr std::uint8_t STORE_AL = 0xa2;

/// A virtual CPU.
struct Vcpu
{
    ffi::General general {};
    std::uint16_t view = 0;
    bool stepping = false;
    /// The view a fast step ends in.
    std::optional<std::uint16_t> fast;
    /// What the emulator could not do is to be reported.
    bool emulation_failed = false;
    /// Where it was when it was answered with what Xen does only when it goes on: it has not gone on yet.
    std::optional<std::uint64_t> held;
};

/// What changes in a domain that somebody looks into, but not by what the guest does.
struct Traces
{
    std::size_t views = 0;
    std::size_t added = 0;
    std::size_t restricted = 0;
    bool restricts_new = false;
    unsigned pauses = 0;
    unsigned vcpus_in_views = 0;
    unsigned vcpus_stepped = 0;

    bool operator==(const Traces& other) const noexcept;
};

class Machine
{
public:
    explicit Machine(std::uint16_t vcpus = 1);
    ~Machine();
    Machine(const Machine&) = delete;
    Machine& operator=(const Machine&) = delete;

    // The guest's side.

    /// Lets a virtual CPU execute an instruction: an event that comes of it, if one does. If it was not the end of the
    /// instruction, it has not been executed.
    std::optional<ffi::Event> run(std::uint16_t vcpu);

    /// Does what a reply to an event says.
    void answer(const ffi::Event& event, const ffi::Reply& reply);

    Vcpu& vcpu(std::uint16_t number);
    std::uint16_t vcpus() const noexcept;

    /// The guest's own INT3s that were delivered to it.
    unsigned delivered() const noexcept;

    /// What is at a guest-physical address in a view, whatever it permits.
    std::uint8_t shown(std::uint16_t view, std::uint64_t gpa);

    /// Instructions that begin with this byte are too much for the emulator.
    void cannot_emulate(std::uint8_t opcode);

    // The hypervisor's side. All of it throws std::runtime_error if it cannot be done.

    std::uint8_t* page(std::uint64_t gfn);
    std::uint64_t add_page();
    void drop_page(std::uint64_t gfn);
    std::uint16_t create_view();
    void switch_view(std::uint16_t view);
    void drop_view(std::uint16_t view);
    void remap(std::uint16_t view, std::uint64_t gfn, std::uint64_t to);
    void unmap(std::uint16_t view, std::uint64_t gfn);
    void set_rights(std::uint16_t view, std::uint64_t gfn, ffi::Rights rights);
    ffi::Rights rights(std::uint16_t view, std::uint64_t gfn) const;
    /// What the host view permits on pages that the guest gets from now on.
    void set_default_rights(ffi::Rights rights);
    /// DR7 as it is, whatever events say of it.
    std::uint64_t dr7();
    /// Where a virtual CPU is. If it has not gone on yet, it does so after this look.
    std::uint64_t rip(std::uint16_t vcpu);
    void stop_step(std::uint16_t vcpu);
    void pause();
    void resume();

    // The test's side.

    /// The guest switches its data breakpoints on or off. Events go on to say that there are none.
    void set_dr7(std::uint64_t dr7) noexcept;

    /// The guest puts another page, with these bytes from `offset` on, in place of one: Xen resets the views there.
    void replace(std::uint64_t gfn, std::uint64_t offset, const std::vector<std::uint8_t>& bytes);

    /// Writes that no view sees: a device's.
    void write_as_device(std::uint64_t gpa, const std::vector<std::uint8_t>& bytes);

    /// Frames that are no plain memory.
    std::set<std::uint64_t> roms;

    /// What is left in the domain of whoever looked into it.
    Traces traces() const;

    /// The guest's memory.
    std::vector<std::uint8_t> memory();

    /// Lets the call of the hypervisor's side that comes after `calls` more fail, and no other. Without a number, none.
    void refuse_after(std::optional<unsigned> calls) noexcept;

    /// A file with all memory, for who maps it himself, and where a frame is in it.
    int file() const noexcept;
    std::uint64_t offset_of(std::uint64_t gfn) const;

private:
    enum class Access { Read, Write, Execute };

    /// A view and a frame.
    using At = std::pair<std::uint16_t, std::uint64_t>;

    void allowed(const char* what);
    void must_exist(std::uint16_t view) const;
    std::uint64_t backing(std::uint16_t view, std::uint64_t gfn) const;
    bool permits(std::uint16_t view, std::uint64_t gfn, Access access) const;
    std::uint8_t& byte(std::uint16_t view, std::uint64_t gpa);
    std::uint32_t operand(std::uint16_t view, std::uint64_t gpa);
    ffi::Event event(std::uint16_t number, ffi::Reason reason);
    std::optional<ffi::Event> denied(std::uint16_t number, std::uint64_t gpa, Access access);
    std::optional<ffi::Event> execute(std::uint16_t number);
    void emulate(Vcpu& vcpu, const std::uint8_t* instruction, const std::uint8_t* read);

    int file_;
    std::uint8_t* memory_;
    /// Where in the file a frame is, in pages.
    std::map<std::uint64_t, std::uint64_t> frames_;
    std::deque<std::uint64_t> free_;
    std::set<std::uint16_t> views_;
    std::map<At, std::uint64_t> remapped_;
    std::map<At, ffi::Rights> rights_;
    std::vector<Vcpu> cpus_;
    std::set<std::uint8_t> not_emulable_;
    std::optional<ffi::Rights> default_rights_;
    std::uint64_t dr7_ = 0x400;
    unsigned pauses_ = 0;
    unsigned delivered_ = 0;
    std::optional<unsigned> refuse_after_;
};

/// A connection to such a machine, which outlives it.
class Connection final : public hyperbp::Hypervisor
{
public:
    explicit Connection(Machine& machine) : machine_(machine) {}

    std::uint16_t vcpus() const override;
    std::uint64_t now() const noexcept override;
    void read(std::uint64_t gpa, rust::Slice<std::uint8_t> into) override;
    void write(std::uint64_t gpa, rust::Slice<const std::uint8_t> bytes) override;
    std::uint64_t add_page() override;
    void drop_page(std::uint64_t gfn) override;
    std::uint16_t create_view() override;
    void switch_view(std::uint16_t view) override;
    void drop_view(std::uint16_t view) override;
    void remap(std::uint16_t view, std::uint64_t gfn, std::uint64_t to) override;
    void unmap(std::uint16_t view, std::uint64_t gfn) override;
    void set_rights(std::uint16_t view, std::uint64_t gfn, ffi::Rights rights) override;
    bool write_ram(std::uint64_t gpa, rust::Slice<const std::uint8_t> bytes) override;
    bool rights(std::uint16_t view, std::uint64_t gfn, ffi::Rights& into) override;
    void set_default_rights(ffi::Rights rights) override;
    bool debug_control(std::uint16_t vcpu, std::uint64_t& dr7) override;
    std::uint64_t rip(std::uint16_t vcpu) override;
    void stop_step(std::uint16_t vcpu) override;
    void pause() override;
    void resume() override;

private:
    Machine& machine_;
};

} // namespace fake

#endif
