/*
 * Tests of a patched SmartVMI's HyperbpEventSupervisor over hyperbp itself, on a LibVMI and a machine of ours
 * (cpp-shim/tests/fake). No Xen is needed. `core.sh` builds and runs it.
 *
 * This file is ours (MIT or Apache-2.0). The program it becomes has SmartVMI in it and falls under SmartVMI's licence,
 * too: it is built where it is run, and not given away.
 */
#include "guest.hpp"

#include <cstdlib>
#include <vector>

#include <GlobalControl.h>
#include <gtest/gtest.h>
#include <lib/io/mock_EventStream.h>
#include <lib/io/mock_Logging.h>
#include <lib/vmi/mock_LibvmiInterface.h>
#include <vmi/HyperbpEventSupervisor.h>
#include <vmicore/vmi/VmiException.h>
#include <vmicore_test/io/mock_Logger.h>

using testing::_;
using testing::NiceMock;
using testing::Return;

namespace VmiCore {
namespace {

/// What XenDomain does, on our machine.
class Domain final : public IXenDomain
{
public:
    explicit Domain(Guest& guest) : guest_(guest) {}

    void enableViews() override
    {
        ++enabled;
    }
    void disableViews() override
    {
        --enabled;
    }
    addr_t addPage() override
    {
        return guest_.add_page();
    }
    void dropPage(addr_t gfn) override
    {
        guest_.drop_page(gfn);
    }
    void* mapPage(addr_t gfn) override
    {
        return guest_.map_page(gfn);
    }

    static inline int enabled = 0;

private:
    Guest& guest_;
};

class Core : public testing::TestWithParam<const char*>
{
protected:
    void SetUp() override
    {
        GlobalControl::endVmi = false;
        GlobalControl::init(std::make_unique<NiceMock<MockLogger>>(), std::make_shared<NiceMock<MockEventStream>>());
        ON_CALL(*logging, newNamedLogger(_)).WillByDefault([](std::string_view) {
            return std::make_unique<NiceMock<MockLogger>>();
        });
        ON_CALL(*libvmi, getNumberOfVCPUs()).WillByDefault(Return(Guest::VCPUS));
        ON_CALL(*libvmi, registerEvent(_)).WillByDefault([this](vmi_event_t& event) {
            if (vmi_register_event(guest.vmi(), &event) != VMI_SUCCESS)
                throw VmiException("LibVMI does not take this event");
        });
        ON_CALL(*libvmi, lockInstance()).WillByDefault([this] {
            return ILibvmiInterface::LockedInstance {std::unique_lock(instance_lock), guest.vmi()};
        });
        ON_CALL(*libvmi, pauseVm()).WillByDefault([this] { guest.pause(); });
        ON_CALL(*libvmi, resumeVm()).WillByDefault([this] { guest.resume(); });
        // One to one.
        ON_CALL(*libvmi, convertVAToPA(_, _)).WillByDefault([](addr_t va, addr_t) { return va; });
        supervisor =
            std::make_shared<HyperbpEventSupervisor>(libvmi, std::make_unique<Domain>(guest), GetParam(), logging);
    }

    void TearDown() override
    {
        supervisor.reset();
        EXPECT_EQ(guest.differences(), "");
        EXPECT_EQ(Domain::enabled, 0);
        GlobalControl::uninit();
    }

    std::shared_ptr<IBreakpoint> set_at(addr_t at, unsigned& hits, BpResponse response = BpResponse::Continue)
    {
        return supervisor->createBreakpoint(
            at, process,
            [&hits, response](IInterruptEvent& event) {
                EXPECT_EQ(event.getRip(), event.getGfn() * 0x1000 + event.getOffset());
                ++hits;
                return response;
            },
            true);
    }

    Guest guest;
    std::mutex instance_lock;
    std::shared_ptr<NiceMock<MockLibvmiInterface>> libvmi = std::make_shared<NiceMock<MockLibvmiInterface>>();
    std::shared_ptr<NiceMock<MockLogging>> logging = std::make_shared<NiceMock<MockLogging>>();
    ActiveProcessInformation process {.processDtb = 0x1000, .processUserDtb = 0x2000};
    std::shared_ptr<HyperbpEventSupervisor> supervisor;
};

TEST_P(Core, EveryHitIsTold)
{
    supervisor->initialize();
    unsigned first = 0, second = 0;
    const auto one = set_at(Guest::AT, first);
    const auto another = set_at(Guest::AT, second);
    for (unsigned n = 0; n < 10; ++n) {
        EXPECT_EQ(guest.execute(0), Guest::VALUE);
        EXPECT_EQ(guest.execute(1), Guest::VALUE);
    }
    EXPECT_EQ(first, 20U);
    one->remove();
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    another->remove();
    EXPECT_EQ(guest.execute(1), Guest::VALUE);
    EXPECT_EQ(first, 20U);
    EXPECT_EQ(second, 21U);
    supervisor->teardown();
}

TEST_P(Core, TheGuestSeesNothing)
{
    supervisor->initialize();
    const std::uint8_t byte = guest.read(0);
    unsigned hits = 0;
    const auto breakpoint = set_at(Guest::AT, hits);
    EXPECT_EQ(guest.read(0), byte);
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    EXPECT_EQ(guest.read(1), byte);
    EXPECT_TRUE(guest.interrupt(0)) << "its own INT3 is delivered";
    EXPECT_EQ(hits, 1U);
}

TEST_P(Core, OneOnTheGuestsOwnIsTheGuestsToo)
{
    supervisor->initialize();
    unsigned hits = 0;
    const auto breakpoint = set_at(Guest::OWN, hits);
    EXPECT_TRUE(guest.interrupt(0));
    EXPECT_EQ(hits, 1U);
}

TEST_P(Core, ADeactivatedOneIsGone)
{
    supervisor->initialize();
    unsigned hits = 0;
    const auto breakpoint = set_at(Guest::AT, hits, BpResponse::Deactivate);
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    EXPECT_EQ(hits, 1U);
    breakpoint->remove();
}

TEST_P(Core, AnotherProcessRunsOn)
{
    supervisor->initialize();
    unsigned hits = 0;
    // CR3 is 0 on this machine.
    const auto breakpoint = supervisor->createBreakpoint(
        Guest::AT, process,
        [&hits](IInterruptEvent&) {
            ++hits;
            return BpResponse::Continue;
        },
        false);
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    EXPECT_EQ(guest.execute(1), Guest::VALUE);
    EXPECT_EQ(hits, 0U);
}

TEST_P(Core, ItIsTornDownInTheMiddleOfAStep)
{
    supervisor->initialize();
    unsigned hits = 0;
    const auto breakpoint = set_at(Guest::AT, hits);
    guest.hit(0);
    supervisor->teardown();
    EXPECT_EQ(guest.differences(), "");
    guest.finish(0);
    EXPECT_EQ(hits, 1U);
}

TEST_P(Core, AFailureEndsVmicoreAndTheGuestGoesOn)
{
    setenv("HYPERBP_PANIC_AT_HIT", "2", 1);
    supervisor->initialize();
    unsetenv("HYPERBP_PANIC_AT_HIT");
    unsigned hits = 0;
    const auto breakpoint = set_at(Guest::AT, hits);
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    EXPECT_FALSE(GlobalControl::endVmi);
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    if (!supervisor->hasFailed())
        GTEST_SKIP() << "this libhyperbp was installed without --features fault-injection";
    EXPECT_TRUE(GlobalControl::endVmi);
    EXPECT_EQ(guest.differences(), "");
    EXPECT_EQ(guest.execute(1), Guest::VALUE);
    EXPECT_THROW(set_at(Guest::OWN, hits), VmiException);
    breakpoint->remove();
    supervisor->teardown();
    EXPECT_EQ(hits, 1U);
}

INSTANTIATE_TEST_SUITE_P(Mechanisms, Core,
                         testing::Values("auto", "repair", "view-step", "view-fast-step", "emulate", "interpret"),
                         [](const auto& info) {
                             std::string name(info.param);
                             std::erase(name, '-');
                             return name;
                         });

} // namespace
} // namespace VmiCore
