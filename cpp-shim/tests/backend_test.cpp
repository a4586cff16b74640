/// The C API, and the connection through LibVMI, on a machine of ours.

#include "hyperbp/backend.h"

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "fake/libvmi.hpp"
#include "host.hpp"

namespace {

constexpr std::uint64_t CODE = 0x2000;
/// A MOV EAX, 0x44332211.
constexpr std::uint64_t AT = 0x2010;
constexpr std::uint64_t AFTER = AT + 5;
constexpr std::uint64_t VALUE = 0x44332211;
/// A load of that instruction's first byte.
constexpr std::uint64_t LOAD = 0x3000;
constexpr std::uint16_t VCPUS = 2;

/// What a callback was told.
struct Told
{
    hyperbp_observed_t observed;
    hyperbp_what_t what;
};

/// A host in C, as far as it goes: its callbacks, and its memory.
class Backend : public testing::Test
{
protected:
    Backend() : machine(VCPUS), vmi(machine)
    {
        write_code(machine, AT, {fake::MOV_EAX, 0x11, 0x22, 0x33, 0x44});
        write_code(machine, LOAD, {fake::LOAD_AL, 0x10, 0x20, 0, 0});
        before = machine.memory();
        SETUP_INTERRUPT_EVENT(&interrupt, on_event);
        memory.mem_event.in_access = VMI_MEMACCESS_RWX;
        SETUP_MEM_EVENT(&memory, ~0ULL, VMI_MEMACCESS_RWX, on_event, 1);
        // One for both.
        SETUP_SINGLESTEP_EVENT(&steps, 0x3, on_event, 0);
        for (vmi_event_t* event : {&interrupt, &memory, &steps}) {
            event->data = this;
            EXPECT_EQ(vmi_register_event(&vmi, event), VMI_SUCCESS);
        }
        host_memory.data = this;
        host_memory.add_page = [](void* data, std::uint64_t* gfn) {
            auto* self = static_cast<Backend*>(data);
            if (self->on_add_page)
                self->on_add_page();
            return !self->out_of_memory && attempt([&] { *gfn = self->machine.add_page(); });
        };
        host_memory.drop_page = [](void* data, std::uint64_t gfn) {
            auto* self = static_cast<Backend*>(data);
            return !self->keeps_pages && attempt([&] { self->machine.drop_page(gfn); });
        };
        if (!HAS_MMAP_GUEST_PA<vmi_instance_t>)
            host_memory.map_page = map_page;
    }

    template<typename Work>
    static bool attempt(Work work)
    {
        try {
            work();
            return true;
        } catch (const std::runtime_error&) {
            return false;
        }
    }

    static void* map_page(void* data, std::uint64_t gfn)
    {
        auto* self = static_cast<Backend*>(data);
        ++self->mapped_by_host;
        void* page = nullptr;
        if (!self->out_of_memory)
            attempt([&] { page = self->vmi.map(gfn, 1, PROT_READ | PROT_WRITE); });
        return page;
    }

    static bool create_view(void* data, std::uint16_t* view)
    {
        auto* self = static_cast<Backend*>(data);
        ++self->created_by_host;
        return !self->out_of_memory && attempt([&] { *view = self->machine.create_view(); });
    }

    static event_response_t on_event(vmi_instance_t /*vmi*/, vmi_event_t* event)
    {
        auto* self = static_cast<Backend*>(event->data);
        Told told {};
        event_response_t response = VMI_EVENT_RESPONSE_NONE;
        told.observed = hyperbp_begin(self->session, event, &told.what, &response);
        if (told.observed != HYPERBP_ANSWERED)
            self->told.push_back(told);
        if (told.observed == HYPERBP_ANSWERED || told.observed == HYPERBP_FAILED)
            return response;
        if (self->on_told)
            response = self->on_told(told, event);
        return hyperbp_finish(self->session, event, response);
    }

    void open(const char* mechanism)
    {
        session = hyperbp_open(&vmi, mechanism, &host_memory);
        ASSERT_NE(session, nullptr) << hyperbp_error();
        machine.vcpu(0).general.rip = CODE;
    }

    void run_to(std::uint64_t rip, std::uint16_t vcpu = 0)
    {
        for (unsigned n = 0; n < 1000; ++n) {
            const fake::Vcpu& it = machine.vcpu(vcpu);
            if (it.general.rip == rip && !it.stepping && !it.emulation_failed)
                return;
            vmi.run(vcpu);
        }
        FAIL() << "the guest does not arrive";
    }

    void expect_restored()
    {
        EXPECT_EQ(machine.traces(), fake::Traces {});
        EXPECT_EQ(machine.memory(), before);
        // Single-steps are still the host's.
        for (std::uint32_t vcpu = 0; vcpu < VCPUS; ++vcpu)
            EXPECT_EQ(vmi_get_singlestep_event(&vmi, vcpu), &steps);
        EXPECT_EQ(steps.ss_event.vcpus, 0x3U);
        EXPECT_EQ(steps.ss_event.enable, 0);
    }

    void close()
    {
        EXPECT_TRUE(hyperbp_close(session)) << hyperbp_error();
        expect_restored();
    }

    fake::Machine machine;
    vmi_instance vmi;
    vmi_event_t interrupt {};
    vmi_event_t memory {};
    vmi_event_t steps {};
    hyperbp_memory_t host_memory {};
    hyperbp_session_t* session = nullptr;
    std::vector<std::uint8_t> before;
    std::vector<Told> told;
    std::function<event_response_t(const Told&, vmi_event_t*)> on_told;
    std::function<void()> on_add_page;
    bool out_of_memory = false;
    bool keeps_pages = false;
    unsigned mapped_by_host = 0;
    unsigned created_by_host = 0;
};

/// Every function that takes a session, as a host may call it where it is not to. Expects it to be refused.
void expect_refused(hyperbp_session_t* session, vmi_event_t& event, const std::string& why)
{
    const auto refused = [&](const char* what, bool result) {
        EXPECT_FALSE(result) << what;
        EXPECT_NE(std::string(hyperbp_error()).find(why), std::string::npos) << what << ": " << hyperbp_error();
    };
    refused("insert", hyperbp_insert(session, AT));
    refused("remove", hyperbp_remove(session, AT));
    refused("watch", hyperbp_watch(session, 3, VMI_MEMACCESS_W, false));
    std::uint16_t view = 0;
    refused("monitor", hyperbp_monitor(session, 0, true, &view));
    refused("verify", hyperbp_verify(session));
    refused("monitor_all", hyperbp_monitor_all(session, true));
    hyperbp_counters_t counters {};
    refused("counters", hyperbp_counters(session, &counters));
    hyperbp_figures_t figures {};
    refused("breakpoints", hyperbp_breakpoints(session, &figures, 1) != 0);
    hyperbp_what_t what;
    event_response_t response = VMI_EVENT_RESPONSE_EMULATE;
    refused("begin", hyperbp_begin(session, &event, &what, &response) != HYPERBP_FAILED);
    EXPECT_EQ(response, VMI_EVENT_RESPONSE_NONE);
    refused("finish", hyperbp_finish(session, &event, VMI_EVENT_RESPONSE_NONE) != VMI_EVENT_RESPONSE_NONE);
}

TEST_F(Backend, NoSessionIsAnErrorInEveryFunction)
{
    expect_refused(nullptr, interrupt, "there is no session");
    EXPECT_TRUE(hyperbp_failed(nullptr));
    EXPECT_EQ(hyperbp_view(nullptr), 0);
    // It has left, and is closed, already.
    EXPECT_TRUE(hyperbp_leave(nullptr));
    EXPECT_TRUE(hyperbp_close(nullptr));
    EXPECT_EQ(hyperbp_wait(nullptr, 0), HYPERBP_NOT_WAITED);
    EXPECT_FALSE(hyperbp_stop_waiting(nullptr));
    hyperbp_waits_t waits {};
    EXPECT_FALSE(hyperbp_waiter_figures(nullptr, &waits));
}

TEST_F(Backend, ACallbackOfTheSessionCannotCallTheSession)
{
    open("auto");
    unsigned called = 0;
    on_add_page = [&] {
        ++called;
        expect_refused(session, interrupt, "in use");
        EXPECT_FALSE(hyperbp_leave(session));
        EXPECT_FALSE(hyperbp_close(session));
        EXPECT_FALSE(hyperbp_failed(session));
    };
    ASSERT_TRUE(hyperbp_insert(session, AT)) << hyperbp_error();
    EXPECT_GT(called, 0U);
    on_add_page = nullptr;
    run_to(AFTER);
    EXPECT_EQ(told.size(), 1U);
    close();
}

TEST_F(Backend, ASecondThreadCannotCallTheSessionAtTheSameTime)
{
    open("auto");
    on_add_page = [&] {
        std::thread([&] { expect_refused(session, interrupt, "in use"); }).join();
    };
    ASSERT_TRUE(hyperbp_insert(session, AT)) << hyperbp_error();
    on_add_page = nullptr;
    // One after the other they may.
    std::thread([&] { EXPECT_TRUE(hyperbp_remove(session, AT)) << hyperbp_error(); }).join();
    close();
}

class BackendMechanism : public Backend, public testing::WithParamInterface<std::string>
{
};

std::string name_of(const testing::TestParamInfo<std::string>& test)
{
    std::string name = test.param;
    for (char& character : name)
        character = character == '-' || character == '+' ? '_' : character;
    return name;
}

/// Those with a name, and one for each action that these do not have.
std::vector<std::string> mechanisms()
{
    auto all = NAMES;
    all.insert(all.end(), {"shadow+emulate+data", "shadow+interpret+emulate", "in-place+emulate+data"});
    return all;
}

INSTANTIATE_TEST_SUITE_P(Named, BackendMechanism, testing::ValuesIn(mechanisms()), name_of);

TEST_P(BackendMechanism, ReportsEveryExecutionOnceAndTheGuestDoesNotNotice)
{
    open(GetParam().c_str());
    ASSERT_TRUE(hyperbp_insert(session, AT));
    for (int n = 0; n < 3; ++n) {
        machine.vcpu(0).general = {};
        machine.vcpu(0).general.rip = CODE;
        run_to(AFTER + 1);
        EXPECT_EQ(machine.vcpu(0).general.gpr[0], VALUE);
    }
    ASSERT_EQ(told.size(), 3U);
    for (const Told& it : told) {
        EXPECT_EQ(it.observed, HYPERBP_HIT);
        EXPECT_EQ(it.what.pa, AT);
    }
    machine.vcpu(0).general.rip = LOAD;
    run_to(LOAD + 5);
    EXPECT_EQ(machine.vcpu(0).general.gpr[0] & 0xff, fake::MOV_EAX);

    hyperbp_counters_t counters {};
    ASSERT_TRUE(hyperbp_counters(session, &counters));
    EXPECT_EQ(counters.hits, 3U);
    EXPECT_EQ(counters.reads, 1U);
    EXPECT_GT(counters.max_ns, 0U);
    hyperbp_figures_t figures {};
    ASSERT_EQ(hyperbp_breakpoints(session, &figures, 1), 1U);
    EXPECT_EQ(figures.pa, AT);
    EXPECT_EQ(figures.mechanism, GetParam());
    EXPECT_EQ(figures.hits, 3U);
    EXPECT_EQ(hyperbp_breakpoints(session, nullptr, 0), 1U);

    ASSERT_TRUE(hyperbp_remove(session, AT));
    EXPECT_FALSE(hyperbp_remove(session, AT));
    EXPECT_NE(std::string(hyperbp_error()).find("no breakpoint"), std::string::npos) << hyperbp_error();
    close();
}

TEST_P(BackendMechanism, WithoutXensTableAPageThatTheGuestReplacesIsMappedAnew)
{
    open(GetParam().c_str());
    const unsigned mapped = vmi.mapped;
    machine.replace(AT >> fake::PAGE_SHIFT, AT % fake::PAGE_SIZE, {fake::MOV_EAX, 1, 2, 3, 4});
    ASSERT_TRUE(hyperbp_insert(session, AT));
    EXPECT_GT(vmi.mapped, mapped);
    run_to(AFTER);
    EXPECT_EQ(machine.vcpu(0).general.gpr[0], 0x04030201U);
    EXPECT_EQ(told.size(), 1U);
    before = machine.memory();
    ASSERT_TRUE(hyperbp_remove(session, AT));
    EXPECT_TRUE(hyperbp_close(session)) << hyperbp_error();
    EXPECT_EQ(machine.traces(), fake::Traces {});
}

TEST_P(BackendMechanism, WhatADeviceWritesIsFoundByVerify)
{
    open(GetParam().c_str());
    ASSERT_TRUE(hyperbp_insert(session, AT));
    ASSERT_TRUE(hyperbp_verify(session)) << hyperbp_error();
    machine.write_as_device(AT, {fake::MOV_EAX, 1, 2, 3, 4});
    ASSERT_TRUE(hyperbp_verify(session)) << hyperbp_error();
    hyperbp_counters_t counters {};
    ASSERT_TRUE(hyperbp_counters(session, &counters));
    EXPECT_EQ(counters.resynced, 1U);
    EXPECT_EQ(counters.rearmed, 0U);
    run_to(AFTER);
    EXPECT_EQ(machine.vcpu(0).general.gpr[0], 0x04030201U);
    EXPECT_EQ(told.size(), 1U);
    EXPECT_TRUE(hyperbp_close(session)) << hyperbp_error();
    EXPECT_EQ(machine.traces(), fake::Traces {});
}

TEST_P(BackendMechanism, WhatCallbacksChangeCountsIfTheySaySo)
{
    open(GetParam().c_str());
    ASSERT_TRUE(hyperbp_insert(session, AT));
    for (const event_response_t response : {0U, VMI_EVENT_RESPONSE_SET_REGISTERS}) {
        // And one that is not for us, and one that is not theirs.
        on_told = [response](const Told&, vmi_event_t* event) {
            event->x86_regs->r15 = 15;
            return response | VMI_EVENT_RESPONSE_GET_NEXT_INTERRUPT | VMI_EVENT_RESPONSE_EMULATE;
        };
        machine.vcpu(0).general = {};
        machine.vcpu(0).general.rip = AT;
        vmi.run(0);
        EXPECT_NE(vmi.last & VMI_EVENT_RESPONSE_GET_NEXT_INTERRUPT, 0U);
        EXPECT_EQ(vmi.last & VMI_EVENT_RESPONSE_EMULATE, 0U);
        run_to(AFTER);
        EXPECT_EQ(machine.vcpu(0).general.gpr[15], response != 0 ? 15U : 0U);
        EXPECT_EQ(machine.vcpu(0).general.gpr[0], VALUE);
    }
    close();
}

TEST_P(BackendMechanism, WhatXenCannotEmulateIsSteppedOver)
{
    machine.cannot_emulate(fake::MOV_EAX);
    machine.cannot_emulate(fake::LOAD_AL);
    open(GetParam().c_str());
    ASSERT_TRUE(hyperbp_insert(session, AT));
    run_to(AFTER + 1);
    EXPECT_EQ(machine.vcpu(0).general.gpr[0], VALUE);
    EXPECT_EQ(told.size(), 1U);
    machine.vcpu(0).general.rip = LOAD;
    run_to(LOAD + 5);
    EXPECT_EQ(machine.vcpu(0).general.gpr[0] & 0xff, fake::MOV_EAX);
    close();
}

TEST_P(BackendMechanism, TheGuestsOwnInt3IsDelivered)
{
    write_code(machine, CODE, {fake::BREAKPOINT});
    before = machine.memory();
    open(GetParam().c_str());
    ASSERT_TRUE(hyperbp_insert(session, AT));
    run_to(AFTER);
    EXPECT_EQ(machine.delivered(), 1U);
    close();
}

TEST_P(BackendMechanism, LeavesBeforeItIsClosed)
{
    open(GetParam().c_str());
    ASSERT_TRUE(hyperbp_insert(session, AT));
    run_to(AFTER);
    EXPECT_TRUE(hyperbp_leave(session)) << hyperbp_error();
    EXPECT_FALSE(hyperbp_insert(session, AT));
    EXPECT_FALSE(hyperbp_remove(session, AT));
    machine.vcpu(0).general.rip = CODE;
    run_to(AFTER);
    EXPECT_EQ(told.size(), 1U) << "there are no breakpoints any more";
    EXPECT_TRUE(hyperbp_leave(session)) << hyperbp_error();
    close();
    EXPECT_TRUE(hyperbp_leave(nullptr));
}

TEST_P(BackendMechanism, ClosedInTheMiddleOfAStep)
{
    open(GetParam().c_str());
    ASSERT_TRUE(hyperbp_insert(session, AT));
    machine.vcpu(0).general.rip = AT;
    vmi.run(0);
    close();
}

TEST_P(BackendMechanism, APanicEndsTheSessionAndTheGuestGoesOn)
{
    setenv("HYPERBP_PANIC_AT_HIT", "2", 1);
    open(GetParam().c_str());
    unsetenv("HYPERBP_PANIC_AT_HIT");
    ASSERT_TRUE(hyperbp_insert(session, AT));
    run_to(AFTER);
    EXPECT_FALSE(hyperbp_failed(session));
    machine.vcpu(0).general.rip = CODE;
    machine.vcpu(0).general.gpr[0] = 0;
    run_to(AFTER + 1);
    EXPECT_EQ(machine.vcpu(0).general.gpr[0], VALUE);
    ASSERT_EQ(told.size(), 2U);
    EXPECT_EQ(told[1].observed, HYPERBP_FAILED);
    EXPECT_TRUE(hyperbp_failed(session));
    expect_restored();
    EXPECT_FALSE(hyperbp_insert(session, AT));
    EXPECT_NE(std::string(hyperbp_error()).find("HYPERBP_PANIC_AT_HIT"), std::string::npos) << hyperbp_error();
    close();
}

TEST_F(Backend, WatchesReportBeforeAndAfter)
{
    open("auto");
    ASSERT_TRUE(hyperbp_watch(session, AT >> fake::PAGE_SHIFT, VMI_MEMACCESS_R, true));
    machine.vcpu(0).general.rip = LOAD;
    run_to(LOAD + 5);
    ASSERT_EQ(told.size(), 2U);
    EXPECT_EQ(told[0].observed, HYPERBP_ACCESS);
    EXPECT_EQ(told[0].what.access, VMI_MEMACCESS_R);
    EXPECT_EQ(told[0].what.pa, AT);
    EXPECT_EQ(told[1].observed, HYPERBP_ACCESSED);
    ASSERT_TRUE(hyperbp_watch(session, AT >> fake::PAGE_SHIFT, VMI_MEMACCESS_N, false));
    machine.vcpu(0).general.rip = LOAD;
    run_to(LOAD + 5);
    EXPECT_EQ(told.size(), 2U);
    close();
}

TEST_F(Backend, VirtualCpusOfNoInterestRunElsewhere)
{
    open(nullptr);
    std::uint16_t view = 0;
    ASSERT_TRUE(hyperbp_monitor(session, 1, false, &view));
    EXPECT_NE(view, hyperbp_view(session));
    EXPECT_FALSE(hyperbp_monitor(session, VCPUS, false, &view));
    ASSERT_TRUE(hyperbp_monitor_all(session, true));
    EXPECT_EQ(machine.vcpu(1).view, hyperbp_view(session));
    close();
}

TEST_F(Backend, EventsThatAreNotForUsAreAnsweredWithNothing)
{
    open(nullptr);
    vmi_event_t other {};
    x86_registers_t registers {};
    other.type = VMI_EVENT_CPUID;
    other.x86_regs = &registers;
    hyperbp_what_t what {};
    event_response_t response = VMI_EVENT_RESPONSE_EMULATE;
    EXPECT_EQ(hyperbp_begin(session, &other, &what, &response), HYPERBP_ANSWERED);
    EXPECT_EQ(response, event_response_t {VMI_EVENT_RESPONSE_NONE});
    close();
}

TEST_F(Backend, SessionsFollowOneAnother)
{
    for (int n = 0; n < 3; ++n) {
        open("emulate");
        ASSERT_TRUE(hyperbp_insert(session, AT));
        machine.cannot_emulate(fake::MOV_EAX);
        run_to(AFTER);
        close();
        // LibVMI still has the event.
        ASSERT_NE(vmi.failed_emulation, nullptr);
        EXPECT_EQ(vmi.failed_emulation->callback(&vmi, vmi.failed_emulation),
                  event_response_t {VMI_EVENT_RESPONSE_NONE});
    }
    EXPECT_EQ(told.size(), 3U);
}

TEST_F(Backend, WhoseFailedEmulationsAreSomebodyElsesIsRefused)
{
    // Not where an instance with an event of ours has been.
    vmi_instance another(machine);
    ASSERT_EQ(vmi_register_event(&another, &memory), VMI_SUCCESS);
    vmi_event_t others {};
    others.version = VMI_EVENTS_VERSION;
    others.type = VMI_EVENT_FAILED_EMULATION;
    others.callback = on_event;
    ASSERT_EQ(vmi_register_event(&another, &others), VMI_SUCCESS);
    EXPECT_EQ(hyperbp_open(&another, nullptr, &host_memory), nullptr);
    EXPECT_NE(std::string(hyperbp_error()).find("failed emulations"), std::string::npos) << hyperbp_error();
    expect_restored();
}

TEST_F(Backend, WithoutMemoryThereAreNoShadows)
{
    out_of_memory = true;
    EXPECT_EQ(hyperbp_open(&vmi, nullptr, &host_memory), nullptr);
    EXPECT_NE(std::string(hyperbp_error()).find("could not add a page"), std::string::npos) << hyperbp_error();
    expect_restored();
    out_of_memory = false;
    open(nullptr);
    out_of_memory = true;
    EXPECT_FALSE(hyperbp_insert(session, AT));
    out_of_memory = false;
    EXPECT_TRUE(hyperbp_insert(session, AT));
    close();
}

TEST_F(Backend, TheHostMayMapPagesItself)
{
    host_memory.map_page = map_page;
    open("view-step");
    ASSERT_TRUE(hyperbp_insert(session, AT));
    run_to(AFTER);
    EXPECT_EQ(told.size(), 1U);
    EXPECT_GT(mapped_by_host, 0U);
    EXPECT_EQ(mapped_by_host, vmi.mapped) << "and LibVMI maps none";
    close();

    open("repair");
    out_of_memory = true;
    EXPECT_FALSE(hyperbp_insert(session, AT));
    EXPECT_NE(std::string(hyperbp_error()).find("could not map a page"), std::string::npos) << hyperbp_error();
    out_of_memory = false;
    EXPECT_TRUE(hyperbp_insert(session, AT));
    close();
}

TEST_F(Backend, TheHostMayMakeViewsItself)
{
    host_memory.create_view = create_view;
    open("view-step");
    EXPECT_GT(created_by_host, 0U);
    EXPECT_EQ(created_by_host, machine.traces().views) << "and LibVMI makes none";
    ASSERT_TRUE(hyperbp_insert(session, AT));
    run_to(AFTER);
    EXPECT_EQ(told.size(), 1U);
    close();

    out_of_memory = true;
    EXPECT_EQ(hyperbp_open(&vmi, nullptr, &host_memory), nullptr);
    EXPECT_NE(std::string(hyperbp_error()).find("could not make a view"), std::string::npos) << hyperbp_error();
    expect_restored();
}

TEST_F(Backend, WhatIsRefusedWhenItIsClosedIsSaid)
{
    open(nullptr);
    keeps_pages = true;
    EXPECT_FALSE(hyperbp_close(session));
    EXPECT_NE(std::string(hyperbp_error()).find("could not take a page"), std::string::npos) << hyperbp_error();
    EXPECT_EQ(machine.traces().views, 0U) << "the rest is undone";
    EXPECT_EQ(machine.traces().pauses, 0U);
    EXPECT_EQ(machine.memory(), before);
    EXPECT_TRUE(hyperbp_close(nullptr));
}

TEST_F(Backend, BadArgumentsAreErrors)
{
    EXPECT_EQ(hyperbp_open(nullptr, nullptr, &host_memory), nullptr);
    // Not on Xen, nobody else adds pages.
    EXPECT_EQ(hyperbp_open(&vmi, nullptr, nullptr), nullptr);
    EXPECT_NE(std::string(hyperbp_error()).find("hyperbp_memory_t"), std::string::npos) << hyperbp_error();
    hyperbp_memory_t half = host_memory;
    half.drop_page = nullptr;
    EXPECT_EQ(hyperbp_open(&vmi, nullptr, &half), nullptr);
    EXPECT_NE(std::string(hyperbp_error()).find("hyperbp_memory_t"), std::string::npos) << hyperbp_error();
    EXPECT_EQ(hyperbp_open(&vmi, "ept", &host_memory), nullptr);
    EXPECT_FALSE(hyperbp_check_mechanism("ept"));
    for (const std::string& name : NAMES) {
        EXPECT_NE(std::string(hyperbp_error()).find(name), std::string::npos) << hyperbp_error();
        EXPECT_TRUE(hyperbp_check_mechanism(name.c_str()));
    }
    expect_restored();
}

/// What the kernel keeps at the other end of an event channel's device.
class Device
{
public:
    Device()
    {
        EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    }
    ~Device()
    {
        close(ends[0]);
        close(ends[1]);
    }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    int host() const
    {
        return ends[0];
    }

    void signals(std::uint32_t port) const
    {
        EXPECT_EQ(write(ends[1], &port, sizeof(port)), sizeof(port));
    }

    /// The port that was unmasked since, or 0.
    std::uint32_t unmasked() const
    {
        std::uint32_t port = 0;
        return recv(ends[1], &port, sizeof(port), MSG_DONTWAIT) == sizeof(port) ? port : 0;
    }

private:
    int ends[2] = {-1, -1};
};

TEST_F(Backend, WaitsForEvents)
{
    constexpr std::uint32_t PORT = 9;
    const Device device;
    hyperbp_waiter_t* waiter = hyperbp_waiter_open(&vmi, device.host(), nullptr);
    ASSERT_NE(waiter, nullptr) << hyperbp_error();
    // Until events come one after another, it sleeps.
    vmi.pending = true;
    device.signals(PORT);
    EXPECT_EQ(hyperbp_wait(waiter, -1), HYPERBP_WOKEN);
    EXPECT_EQ(device.unmasked(), 0U) << "that can wait until it sleeps again";

    vmi.pending = false;
    device.signals(PORT);
    EXPECT_EQ(hyperbp_wait(waiter, -1), HYPERBP_WOKEN) << "for nothing";
    EXPECT_EQ(device.unmasked(), PORT) << "before it slept";
    EXPECT_EQ(device.unmasked(), PORT) << "for there was no event";
    EXPECT_TRUE(hyperbp_stop_waiting(waiter));
    EXPECT_EQ(device.unmasked(), 0U);
    hyperbp_waits_t waits = {};
    EXPECT_TRUE(hyperbp_waiter_figures(waiter, &waits));
    EXPECT_EQ(waits.watched + waits.watched_in_vain + waits.halted + waits.halted_in_vain, 0U);
    EXPECT_EQ(waits.slept, 2U);
    hyperbp_waiter_close(waiter);
}

TEST_F(Backend, ItOnlySleepsIfThatIsAskedFor)
{
    constexpr std::uint32_t PORT = 9;
    const Device device;
    const hyperbp_ways_t asleep = {0, false};
    hyperbp_waiter_t* waiter = hyperbp_waiter_open(&vmi, device.host(), &asleep);
    ASSERT_NE(waiter, nullptr) << hyperbp_error();
    vmi.pending = true;
    device.signals(PORT);
    EXPECT_EQ(hyperbp_wait(waiter, -1), HYPERBP_WOKEN);
    hyperbp_waits_t waits = {};
    EXPECT_TRUE(hyperbp_waiter_figures(waiter, &waits));
    EXPECT_EQ(waits.watched + waits.watched_in_vain + waits.halted + waits.halted_in_vain, 0U);
    EXPECT_EQ(waits.slept, 1U);
    hyperbp_waiter_close(waiter);

    const hyperbp_ways_t too_long = {HYPERBP_WATCH_LONGEST + 1, false};
    EXPECT_EQ(hyperbp_waiter_open(&vmi, device.host(), &too_long), nullptr);
    EXPECT_NE(std::string(hyperbp_error()).find("10000"), std::string::npos) << hyperbp_error();
}

TEST_F(Backend, WhoHasSleptIsToldBeforeItIsWaitedForInAnotherWay)
{
    constexpr std::uint32_t PORT = 9;
    const Device device;
    hyperbp_waiter_t* waiter = hyperbp_waiter_open(&vmi, device.host(), nullptr);
    ASSERT_NE(waiter, nullptr) << hyperbp_error();
    std::thread guest([&] {
        // Until it is asleep.
        std::this_thread::sleep_for(std::chrono::milliseconds(200));
        vmi.pending = true;
        device.signals(PORT);
    });
    EXPECT_EQ(hyperbp_wait(waiter, -1), HYPERBP_WOKEN);
    guest.join();
    EXPECT_EQ(device.unmasked(), 0U) << "that can wait until it is waited for";
    EXPECT_TRUE(hyperbp_stop_waiting(waiter));
    EXPECT_EQ(device.unmasked(), PORT);
    EXPECT_TRUE(hyperbp_stop_waiting(waiter));
    EXPECT_EQ(device.unmasked(), 0U);
    hyperbp_waiter_close(waiter);
}

TEST_F(Backend, AWaitEnds)
{
    const Device device;
    hyperbp_waiter_t* waiter = hyperbp_waiter_open(&vmi, device.host(), nullptr);
    ASSERT_NE(waiter, nullptr) << hyperbp_error();
    struct sigaction usual = {};
    struct sigaction action = {};
    action.sa_handler = [](int) {
    };
    ASSERT_EQ(sigaction(SIGALRM, &action, &usual), 0);
    const itimerval soon = {{0, 10'000}, {0, 10'000}};
    const itimerval never = {};
    setitimer(ITIMER_REAL, &soon, nullptr);
    EXPECT_EQ(hyperbp_wait(waiter, -1), HYPERBP_INTERRUPTED);
    setitimer(ITIMER_REAL, &never, nullptr);
    sigaction(SIGALRM, &usual, nullptr);

    EXPECT_EQ(hyperbp_wait(waiter, 5), HYPERBP_TIMED_OUT);
    EXPECT_EQ(fcntl(device.host(), F_SETFL, O_NONBLOCK), 0);
    EXPECT_EQ(hyperbp_wait(waiter, -1), HYPERBP_NOT_WAITED);
    EXPECT_NE(std::string(hyperbp_error()).find("waiting for events"), std::string::npos) << hyperbp_error();
    hyperbp_waiter_close(waiter);

    EXPECT_EQ(hyperbp_waiter_open(&vmi, -1, nullptr), nullptr);
    EXPECT_NE(std::string(hyperbp_error()).find("event channel"), std::string::npos) << hyperbp_error();
    EXPECT_EQ(hyperbp_waiter_open(nullptr, device.host(), nullptr), nullptr);
    hyperbp_waiter_close(nullptr);
}

TEST_F(Backend, MoreVirtualCpusThanLibVmiStepsAreRefused)
{
    fake::Machine large(33);
    vmi_instance instance(large);
    EXPECT_EQ(hyperbp_open(&instance, nullptr, &host_memory), nullptr);
    EXPECT_NE(std::string(hyperbp_error()).find("33 virtual CPUs"), std::string::npos) << hyperbp_error();
}

TEST_F(Backend, WithoutAHandlerForMemoryThereAreNoGuards)
{
    vmi.memory = nullptr;
    EXPECT_EQ(hyperbp_open(&vmi, nullptr, &host_memory), nullptr);
    EXPECT_NE(std::string(hyperbp_error()).find("vmi_set_mem_event"), std::string::npos) << hyperbp_error();
    expect_restored();
}

} // namespace
