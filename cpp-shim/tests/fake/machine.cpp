#include "machine.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <tuple>

#include <sys/mman.h>
#include <unistd.h>

namespace fake {
namespace {

/// Pages of the file: the guest's, and those that may be added.
constexpr std::uint64_t FILE_PAGES = 128;
constexpr std::size_t LONGEST_INSTRUCTION = 5;
constexpr std::uint64_t CR0_PE = 1;
constexpr std::uint64_t DR7_NONE = 0x400;

std::size_t length_of(std::uint8_t opcode)
{
    switch (opcode) {
    case NOP:
        return 1;
    case MOV_EAX:
    case LOAD_AL:
    case STORE_AL:
        return LONGEST_INSTRUCTION;
    default:
        throw std::logic_error("the guest executes something that the machine does not know");
    }
}

std::uint32_t number(const std::uint8_t* bytes)
{
    std::uint32_t number = 0;
    std::memcpy(&number, bytes, sizeof(number));
    return number;
}

bool includes(ffi::Rights rights, bool read, bool write, bool execute)
{
    switch (rights) {
    case ffi::Rights::All:
        return true;
    case ffi::Rights::Execute:
        return !read && !write;
    case ffi::Rights::ReadWrite:
        return !execute;
    case ffi::Rights::ReadExecute:
        return !write;
    case ffi::Rights::Read:
        return !write && !execute;
    case ffi::Rights::None:
        return !read && !write && !execute;
    }
    return false;
}

} // namespace

bool Traces::operator==(const Traces& other) const noexcept
{
    const auto all = [](const Traces& traces) {
        return std::tie(traces.views, traces.added, traces.restricted, traces.restricts_new, traces.pauses,
                        traces.vcpus_in_views, traces.vcpus_stepped);
    };
    return all(*this) == all(other);
}

Machine::Machine(std::uint16_t vcpus) : file_(memfd_create("guest", MFD_CLOEXEC)), cpus_(vcpus)
{
    if (file_ < 0 || ftruncate(file_, FILE_PAGES * PAGE_SIZE) != 0)
        throw std::system_error(errno, std::generic_category(), "memory for the guest");
    void* memory = mmap(nullptr, FILE_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    if (memory == MAP_FAILED)
        throw std::system_error(errno, std::generic_category(), "memory for the guest");
    memory_ = static_cast<std::uint8_t*>(memory);
    for (std::uint64_t page = 0; page < FILE_PAGES; ++page) {
        if (page < GUEST_PAGES)
            frames_[page] = page;
        else
            free_.push_back(page);
    }
    std::memset(memory_, NOP, GUEST_PAGES * PAGE_SIZE);
    for (Vcpu& vcpu : cpus_)
        vcpu.general.rflags = 2;
}

Machine::~Machine()
{
    munmap(memory_, FILE_PAGES * PAGE_SIZE);
    close(file_);
}

std::optional<ffi::Event> Machine::run(std::uint16_t number)
{
    Vcpu& vcpu = cpus_.at(number);
    vcpu.held.reset();
    if (std::exchange(vcpu.emulation_failed, false))
        return event(number, ffi::Reason::EmulationFailed);
    if (auto instead = execute(number))
        return instead;
    if (vcpu.fast)
        vcpu.view = *std::exchange(vcpu.fast, std::nullopt);
    if (vcpu.stepping)
        return event(number, ffi::Reason::Step);
    return std::nullopt;
}

/// One instruction, unless it is an event before it has had any effect.
std::optional<ffi::Event> Machine::execute(std::uint16_t number)
{
    Vcpu& vcpu = cpus_.at(number);
    const std::uint64_t at = vcpu.general.rip;
    if (auto instead = denied(number, at, Access::Execute))
        return instead;
    const std::uint8_t opcode = byte(vcpu.view, at);
    if (opcode == BREAKPOINT) {
        ffi::Event int3 = event(number, ffi::Reason::Int3);
        int3.gpa = at;
        int3.length = 1;
        return int3;
    }
    const std::size_t length = length_of(opcode);
    const std::uint32_t value = length > 1 ? operand(vcpu.view, at + 1) : 0;
    std::uint64_t& rax = vcpu.general.gpr[0];
    if (opcode == MOV_EAX)
        rax = value;
    if (opcode == LOAD_AL) {
        if (auto instead = denied(number, value, Access::Read))
            return instead;
        rax = (rax & ~0xffULL) | byte(vcpu.view, value);
    }
    if (opcode == STORE_AL) {
        if (auto instead = denied(number, value, Access::Write))
            return instead;
        byte(vcpu.view, value) = static_cast<std::uint8_t>(rax);
    }
    vcpu.general.rip += length;
    return std::nullopt;
}

std::optional<ffi::Event> Machine::denied(std::uint16_t number, std::uint64_t gpa, Access access)
{
    const Vcpu& vcpu = cpus_.at(number);
    if (permits(vcpu.view, gpa >> PAGE_SHIFT, access))
        return std::nullopt;
    ffi::Event denied = event(number, ffi::Reason::Access);
    denied.gpa = gpa;
    denied.accesses = {access == Access::Read, access == Access::Write, access == Access::Execute};
    return denied;
}

ffi::Event Machine::event(std::uint16_t number, ffi::Reason reason)
{
    const Vcpu& vcpu = cpus_.at(number);
    ffi::Event event {};
    event.registers.general = vcpu.general;
    event.registers.cr0 = CR0_PE;
    event.registers.dr7 = DR7_NONE;
    event.registers.flat = true;
    event.registers.mode = ffi::CodeMode::Bits32;
    event.vcpu = number;
    event.view = vcpu.view;
    event.reason = reason;
    return event;
}

void Machine::answer(const ffi::Event& event, const ffi::Reply& reply)
{
    Vcpu& vcpu = cpus_.at(event.vcpu);
    if (reply.action != ffi::Action::Resume)
        vcpu.held = vcpu.general.rip;
    std::uint8_t instruction[LONGEST_INSTRUCTION];
    for (std::size_t n = 0; n < LONGEST_INSTRUCTION; ++n)
        instruction[n] = shown(0, vcpu.general.rip + n);
    switch (reply.action) {
    case ffi::Action::Resume:
        break;
    case ffi::Action::Emulate:
        // For an INT3, Xen does nothing then.
        if (event.reason != ffi::Reason::Int3)
            emulate(vcpu, instruction, nullptr);
        break;
    case ffi::Action::EmulateRead:
        emulate(vcpu, instruction, reply.bytes.data());
        break;
    case ffi::Action::EmulateInstruction:
        emulate(vcpu, reply.bytes.data(), nullptr);
        break;
    case ffi::Action::SetRegisters:
        vcpu.general = reply.registers;
        break;
    case ffi::Action::Reinject:
        ++delivered_;
        vcpu.general.rip += event.length;
        break;
    }
    switch (reply.step) {
    case ffi::Step::Keep:
        break;
    case ffi::Step::On:
    case ffi::Step::Off:
        if (vcpu.stepping == (reply.step == ffi::Step::On))
            throw std::logic_error("stepping was switched to what it was: Xen would have toggled it");
        vcpu.stepping = !vcpu.stepping;
        break;
    case ffi::Step::Fast:
        must_exist(reply.fast_view);
        vcpu.fast = reply.fast_view;
        break;
    }
    if (reply.switch_view) {
        must_exist(reply.view);
        vcpu.view = reply.view;
    }
}

/// Xen's emulator works on the guest's own pages, whatever a view permits.
void Machine::emulate(Vcpu& vcpu, const std::uint8_t* instruction, const std::uint8_t* read)
{
    const std::uint8_t opcode = instruction[0];
    if (not_emulable_.count(opcode) != 0) {
        vcpu.emulation_failed = true;
        return;
    }
    const std::size_t length = length_of(opcode);
    std::uint64_t& rax = vcpu.general.gpr[0];
    if (opcode == MOV_EAX)
        rax = number(instruction + 1);
    if (opcode == LOAD_AL)
        rax = (rax & ~0xffULL) | (read != nullptr ? *read : byte(0, number(instruction + 1)));
    if (opcode == STORE_AL)
        byte(0, number(instruction + 1)) = static_cast<std::uint8_t>(rax);
    vcpu.general.rip += length;
}

Vcpu& Machine::vcpu(std::uint16_t number)
{
    return cpus_.at(number);
}

std::uint16_t Machine::vcpus() const noexcept
{
    return static_cast<std::uint16_t>(cpus_.size());
}

unsigned Machine::delivered() const noexcept
{
    return delivered_;
}

std::uint8_t Machine::shown(std::uint16_t view, std::uint64_t gpa)
{
    return byte(view, gpa);
}

void Machine::cannot_emulate(std::uint8_t opcode)
{
    not_emulable_.insert(opcode);
}

std::uint8_t& Machine::byte(std::uint16_t view, std::uint64_t gpa)
{
    return memory_[offset_of(backing(view, gpa >> PAGE_SHIFT)) + gpa % PAGE_SIZE];
}

std::uint32_t Machine::operand(std::uint16_t view, std::uint64_t gpa)
{
    std::uint8_t bytes[sizeof(std::uint32_t)];
    for (std::size_t n = 0; n < sizeof(bytes); ++n)
        bytes[n] = byte(view, gpa + n);
    return number(bytes);
}

std::uint64_t Machine::backing(std::uint16_t view, std::uint64_t gfn) const
{
    const auto found = remapped_.find({view, gfn});
    return found != remapped_.end() ? found->second : gfn;
}

bool Machine::permits(std::uint16_t view, std::uint64_t gfn, Access access) const
{
    const auto found = rights_.find({view, gfn});
    return found == rights_.end()
           || includes(found->second, access == Access::Read, access == Access::Write, access == Access::Execute);
}

void Machine::allowed(const char* what)
{
    if (!refuse_after_)
        return;
    if (*refuse_after_ == 0) {
        refuse_after_.reset();
        throw std::runtime_error(std::string(what) + " was refused, as the test wants it");
    }
    --*refuse_after_;
}

void Machine::must_exist(std::uint16_t view) const
{
    if (view != 0 && views_.count(view) == 0)
        throw std::runtime_error("there is no such view");
}

std::uint8_t* Machine::page(std::uint64_t gfn)
{
    allowed("an access to memory");
    return memory_ + offset_of(gfn);
}

std::uint64_t Machine::add_page()
{
    allowed("another page");
    if (free_.empty())
        throw std::runtime_error("there is no memory left");
    std::uint64_t gfn = FIRST_ADDED;
    while (frames_.count(gfn) != 0)
        ++gfn;
    frames_[gfn] = free_.front();
    free_.pop_front();
    return gfn;
}

void Machine::drop_page(std::uint64_t gfn)
{
    allowed("a page less");
    const auto found = frames_.find(gfn);
    if (gfn < FIRST_ADDED || found == frames_.end())
        throw std::runtime_error("that is no page that was added");
    for (const auto& [at, shows] : remapped_) {
        if (shows == gfn)
            throw std::logic_error("a view shows a page that goes");
    }
    free_.push_back(found->second);
    frames_.erase(found);
}

std::uint16_t Machine::create_view()
{
    allowed("another view");
    if (views_.size() == MOST_VIEWS)
        throw std::runtime_error("there is no view left");
    std::uint16_t view = 1;
    while (views_.count(view) != 0)
        ++view;
    views_.insert(view);
    return view;
}

void Machine::switch_view(std::uint16_t view)
{
    allowed("another view for all");
    must_exist(view);
    for (Vcpu& vcpu : cpus_)
        vcpu.view = view;
}

void Machine::drop_view(std::uint16_t view)
{
    allowed("a view less");
    if (views_.count(view) == 0)
        throw std::runtime_error("there is no such view");
    for (const Vcpu& vcpu : cpus_) {
        if (vcpu.view == view || vcpu.fast == view)
            throw std::runtime_error("a virtual CPU is in the view, or will be");
    }
    views_.erase(view);
    const auto clear = [view](auto& map) {
        for (auto at = map.begin(); at != map.end();)
            at = at->first.first == view ? map.erase(at) : std::next(at);
    };
    clear(remapped_);
    clear(rights_);
}

void Machine::remap(std::uint16_t view, std::uint64_t gfn, std::uint64_t to)
{
    allowed("a page for another");
    must_exist(view);
    offset_of(gfn);
    const std::uint64_t shows = backing(view, to);
    offset_of(shows);
    remapped_[{view, gfn}] = shows;
    rights_.erase({view, gfn});
}

void Machine::unmap(std::uint16_t view, std::uint64_t gfn)
{
    allowed("a page for itself");
    must_exist(view);
    for (const Vcpu& vcpu : cpus_)
        if (vcpu.held)
            throw std::logic_error("a virtual CPU has not gone on: Xen would be late with its answer");
    remapped_.erase({view, gfn});
    rights_.erase({view, gfn});
}

void Machine::set_rights(std::uint16_t view, std::uint64_t gfn, ffi::Rights rights)
{
    allowed("other rights");
    must_exist(view);
    offset_of(gfn);
    // Xen carries a change of the host view into the others: there the page is the host view's again.
    for (std::uint16_t other = 1; view == 0 && other <= MOST_VIEWS; ++other)
        remapped_.erase({other, gfn});
    if (rights == ffi::Rights::All)
        rights_.erase({view, gfn});
    else
        rights_[{view, gfn}] = rights;
}

ffi::Rights Machine::rights(std::uint16_t view, std::uint64_t gfn) const
{
    must_exist(view);
    const auto found = rights_.find({view, gfn});
    return found != rights_.end() ? found->second : ffi::Rights::All;
}

void Machine::set_default_rights(ffi::Rights rights)
{
    allowed("other rights for pages to come");
    default_rights_.reset();
    if (rights != ffi::Rights::All)
        default_rights_ = rights;
}

std::uint64_t Machine::dr7()
{
    allowed("a debug register");
    return dr7_;
}

void Machine::set_dr7(std::uint64_t dr7) noexcept
{
    dr7_ = dr7;
}

void Machine::replace(std::uint64_t gfn, std::uint64_t offset, const std::vector<std::uint8_t>& bytes)
{
    const std::uint64_t page = free_.front();
    free_.pop_front();
    free_.push_back(std::exchange(frames_.at(gfn), page));
    std::memset(memory_ + offset_of(gfn), NOP, PAGE_SIZE);
    std::copy(bytes.begin(), bytes.end(), memory_ + offset_of(gfn) + offset);
    for (std::uint16_t view = 0; view <= MOST_VIEWS; ++view) {
        remapped_.erase({view, gfn});
        rights_.erase({view, gfn});
        if (default_rights_ && (view == 0 || views_.count(view) != 0))
            rights_[{view, gfn}] = *default_rights_;
    }
}

void Machine::write_as_device(std::uint64_t gpa, const std::vector<std::uint8_t>& bytes)
{
    std::copy(bytes.begin(), bytes.end(), memory_ + offset_of(gpa >> PAGE_SHIFT) + gpa % PAGE_SIZE);
}

std::uint64_t Machine::rip(std::uint16_t vcpu)
{
    allowed("a register");
    auto& held = cpus_.at(vcpu).held;
    return held ? *std::exchange(held, std::nullopt) : cpus_.at(vcpu).general.rip;
}

void Machine::stop_step(std::uint16_t vcpu)
{
    allowed("the end of a step");
    cpus_.at(vcpu).stepping = false;
    cpus_.at(vcpu).fast.reset();
}

void Machine::pause()
{
    allowed("a pause");
    ++pauses_;
}

void Machine::resume()
{
    allowed("the end of a pause");
    if (pauses_ == 0)
        throw std::logic_error("it was not paused");
    --pauses_;
}

Traces Machine::traces() const
{
    Traces traces;
    traces.views = views_.size();
    traces.added = frames_.size() - GUEST_PAGES;
    traces.restricted = rights_.size();
    traces.restricts_new = default_rights_.has_value();
    traces.pauses = pauses_;
    for (const Vcpu& vcpu : cpus_) {
        traces.vcpus_in_views += vcpu.view != 0 ? 1 : 0;
        traces.vcpus_stepped += vcpu.stepping || vcpu.fast ? 1 : 0;
    }
    return traces;
}

std::vector<std::uint8_t> Machine::memory()
{
    return {memory_, memory_ + GUEST_PAGES * PAGE_SIZE};
}

void Machine::refuse_after(std::optional<unsigned> calls) noexcept
{
    refuse_after_ = calls;
}

int Machine::file() const noexcept
{
    return file_;
}

std::uint64_t Machine::offset_of(std::uint64_t gfn) const
{
    const auto found = frames_.find(gfn);
    if (found == frames_.end())
        throw std::runtime_error("the guest has no memory there");
    return found->second * PAGE_SIZE;
}

std::uint16_t Connection::vcpus() const
{
    return machine_.vcpus();
}

std::uint64_t Connection::now() const noexcept
{
    timespec time {};
    clock_gettime(CLOCK_MONOTONIC, &time);
    constexpr std::uint64_t NANOSECONDS = 1000000000;
    return static_cast<std::uint64_t>(time.tv_sec) * NANOSECONDS + static_cast<std::uint64_t>(time.tv_nsec);
}

void Connection::read(std::uint64_t gpa, rust::Slice<std::uint8_t> into)
{
    std::memcpy(into.data(), machine_.page(gpa >> PAGE_SHIFT) + gpa % PAGE_SIZE, into.size());
}

void Connection::write(std::uint64_t gpa, rust::Slice<const std::uint8_t> bytes)
{
    std::memcpy(machine_.page(gpa >> PAGE_SHIFT) + gpa % PAGE_SIZE, bytes.data(), bytes.size());
}

std::uint64_t Connection::add_page()
{
    return machine_.add_page();
}

void Connection::drop_page(std::uint64_t gfn)
{
    machine_.drop_page(gfn);
}

std::uint16_t Connection::create_view()
{
    return machine_.create_view();
}

void Connection::switch_view(std::uint16_t view)
{
    machine_.switch_view(view);
}

void Connection::drop_view(std::uint16_t view)
{
    machine_.drop_view(view);
}

void Connection::remap(std::uint16_t view, std::uint64_t gfn, std::uint64_t to)
{
    machine_.remap(view, gfn, to);
}

void Connection::unmap(std::uint16_t view, std::uint64_t gfn)
{
    machine_.unmap(view, gfn);
}

void Connection::set_rights(std::uint16_t view, std::uint64_t gfn, ffi::Rights rights)
{
    machine_.set_rights(view, gfn, rights);
}

bool Connection::write_ram(std::uint64_t gpa, rust::Slice<const std::uint8_t> bytes)
{
    if (machine_.roms.count(gpa >> PAGE_SHIFT) != 0)
        return false;
    write(gpa, bytes);
    return true;
}

bool Connection::rights(std::uint16_t view, std::uint64_t gfn, ffi::Rights& into)
{
    into = machine_.rights(view, gfn);
    return true;
}

void Connection::set_default_rights(ffi::Rights rights)
{
    machine_.set_default_rights(rights);
}

bool Connection::debug_control(std::uint16_t /*vcpu*/, std::uint64_t& dr7)
{
    dr7 = machine_.dr7();
    return true;
}

std::uint64_t Connection::rip(std::uint16_t vcpu)
{
    return machine_.rip(vcpu);
}

void Connection::stop_step(std::uint16_t vcpu)
{
    machine_.stop_step(vcpu);
}

void Connection::pause()
{
    machine_.pause();
}

void Connection::resume()
{
    machine_.resume();
}

} // namespace fake
