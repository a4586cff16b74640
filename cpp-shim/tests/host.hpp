/// A host program in small: it has a machine and a session, and answers the machine's events with it.
#ifndef HYPERBP_TESTS_HOST_HPP
#define HYPERBP_TESTS_HOST_HPP

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fake/machine.hpp"

/// All mechanisms that have a name.
inline const std::vector<std::string> NAMES {"auto", "repair", "view-step", "view-fast-step", "emulate", "interpret"};

class Host
{
public:
    /// What is called between the two halves: it may change the registers.
    using Callback = std::function<void(const fake::ffi::Observed&, fake::ffi::General&)>;

    explicit Host(const std::string& mechanism, std::uint16_t vcpus = 1) : machine(vcpus), mechanism_(mechanism) {}

    /// Not in the constructor: what the guest has in its memory is to be there before.
    void open()
    {
        before = machine.memory();
        opened_ = std::make_unique<rust::Box<fake::ffi::Session>>(
            fake::ffi::open(std::make_unique<fake::Connection>(machine), mechanism_));
    }

    fake::ffi::Session& session()
    {
        return **opened_;
    }

    /// Without closing it before.
    void drop()
    {
        opened_.reset();
    }

    /// Lets a virtual CPU run until it is at an address, and not in the middle of a step.
    void run_to(std::uint64_t rip, std::uint16_t vcpu = 0)
    {
        constexpr unsigned PATIENCE = 1000;
        for (unsigned n = 0; n < PATIENCE; ++n) {
            const fake::Vcpu& it = machine.vcpu(vcpu);
            if (it.general.rip == rip && !it.stepping && !it.emulation_failed)
                return;
            if (const auto event = machine.run(vcpu))
                answer(*event);
        }
        throw std::runtime_error("the guest does not arrive");
    }

    /// Answers an event.
    void answer(fake::ffi::Event event)
    {
        const auto observed = session().begin(event, reply_);
        if (observed.kind != fake::ffi::Kind::Answered)
            told.push_back(observed);
        if (observed.kind != fake::ffi::Kind::Answered && observed.kind != fake::ffi::Kind::Failed) {
            if (on_told)
                on_told(observed, event.registers.general);
            session().finish_with(event.registers.general, reply_);
        }
        machine.answer(event, reply_);
    }

    fake::Machine machine;
    /// The guest's memory before the session was opened.
    std::vector<std::uint8_t> before;
    /// What was not answered at once.
    std::vector<fake::ffi::Observed> told;
    Callback on_told;

private:
    std::string mechanism_;
    std::unique_ptr<rust::Box<fake::ffi::Session>> opened_;
    fake::ffi::Reply reply_ {};
};

/// Writes instructions into the guest's memory.
inline void write_code(fake::Machine& machine, std::uint64_t gpa, const std::vector<std::uint8_t>& bytes)
{
    for (const std::uint8_t byte : bytes) {
        machine.page(gpa >> fake::PAGE_SHIFT)[gpa % fake::PAGE_SIZE] = byte;
        ++gpa;
    }
}

#endif
