/*
 * Tests of a patched SmartVMI's HyperbpEventSupervisor over hyperbp itself, on a LibVMI and a machine of ours
 * (cpp-shim/tests/fake). No Xen is needed. `core.sh` builds and runs it.
 *
 * This file is ours (MIT or Apache-2.0). The program it becomes has SmartVMI in it and falls under SmartVMI's licence,
 * too: it is built where it is run, and not given away.
 */
#include "machine.hpp"

#include <cstdlib>

namespace VmiCore {
namespace {

using Core = OnMachine;

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

TEST_P(Core, ItLeavesBeforeItIsTornDown)
{
    supervisor->initialize();
    unsigned hits = 0;
    const auto breakpoint = set_at(Guest::AT, hits);
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    supervisor->leave();
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    EXPECT_EQ(guest.execute(1), Guest::VALUE);
    EXPECT_EQ(hits, 1U);
    const auto figures = supervisor->getFigures();
    ASSERT_NE(figures, nullptr);
    ASSERT_EQ(figures->breakpoints.size(), 1U);
    EXPECT_EQ(figures->breakpoints[0].hits, 1U);
    breakpoint->remove();
    EXPECT_THROW(set_at(Guest::AT, hits), VmiException);
    supervisor->teardown();
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
                         name_of_mechanism);

} // namespace
} // namespace VmiCore
