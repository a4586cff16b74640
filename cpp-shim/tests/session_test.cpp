/// The bridge, driven from C++.

#include "host.hpp"

#include <cstdlib>

#include <gtest/gtest.h>

namespace {

namespace ffi = fake::ffi;
using ffi::Kind;

/// Where the guest's code is: NOPs, with this on it.
constexpr std::uint64_t CODE = 0x2000;
/// A MOV EAX, 0x44332211 in it.
constexpr std::uint64_t AT = 0x2010;
constexpr std::uint64_t AFTER = AT + 5;
constexpr std::uint64_t VALUE = 0x44332211;
/// A load of that instruction's first byte, and a store to its second.
constexpr std::uint64_t LOAD = 0x3000;
constexpr std::uint64_t STORE = 0x3005;

/// GoogleTest wants names without dashes.
std::string name_of(const testing::TestParamInfo<std::string>& test)
{
    std::string name = test.param;
    for (char& character : name)
        character = character == '-' ? '_' : character;
    return name;
}

/// With each mechanism that has a name.
class Mechanism : public testing::TestWithParam<std::string>
{
protected:
    Mechanism() : host(GetParam(), 2)
    {
        write_code(host.machine, AT, {fake::MOV_EAX, 0x11, 0x22, 0x33, 0x44});
        write_code(host.machine, LOAD, {fake::LOAD_AL, 0x10, 0x20, 0, 0});
        write_code(host.machine, STORE, {fake::STORE_AL, 0x11, 0x20, 0, 0});
        host.open();
        host.machine.vcpu(0).general.rip = CODE;
    }

    /// After the session is closed, the guest is as if there had not been one.
    void expect_restored()
    {
        EXPECT_EQ(host.machine.traces(), fake::Traces {});
        EXPECT_EQ(host.machine.memory(), host.before);
    }

    ffi::General& general(std::uint16_t vcpu = 0)
    {
        return host.machine.vcpu(vcpu).general;
    }

    ffi::Session& session()
    {
        return host.session();
    }

    Host host;
};

INSTANTIATE_TEST_SUITE_P(Named, Mechanism, testing::ValuesIn(NAMES), name_of);

TEST_P(Mechanism, ReportsEveryExecutionOnceAndTheGuestDoesNotNotice)
{
    session().insert(AT);
    for (int n = 0; n < 3; ++n) {
        general().rip = CODE;
        general().gpr[0] = 0;
        host.run_to(AFTER + 1);
        EXPECT_EQ(general().gpr[0], VALUE);
    }
    ASSERT_EQ(host.told.size(), 3U);
    for (const auto& observed : host.told) {
        EXPECT_EQ(observed.kind, Kind::Hit);
        EXPECT_EQ(observed.pa, AT);
    }
    EXPECT_EQ(session().counters().hits, 3U);

    general().rip = LOAD;
    host.run_to(LOAD + 5);
    EXPECT_EQ(general().gpr[0] & 0xff, fake::MOV_EAX) << "what is read is the guest's own byte";

    session().close();
    expect_restored();
}

TEST_P(Mechanism, FollowsWhatTheGuestWrites)
{
    session().insert(AT);
    general().rip = STORE;
    general().gpr[0] = 0x99;
    host.run_to(STORE + 5);
    EXPECT_EQ(host.machine.shown(0, AT + 1), 0x99);
    general().rip = CODE;
    host.run_to(AFTER);
    EXPECT_EQ(general().gpr[0], 0x44332299U) << "it is the new instruction that has run";
    EXPECT_EQ(host.told.size(), 1U);
    std::vector<ffi::Figures> figures(1);
    session().breakpoints({figures.data(), 1});
    EXPECT_EQ(figures[0].rewritten, 1U);
    host.before = host.machine.memory();
    host.before[AT] = fake::MOV_EAX;
    session().close();
    expect_restored();
}

TEST_P(Mechanism, RemovedBetweenTheHalves)
{
    session().insert(AT);
    host.on_told = [this](const ffi::Observed& observed, ffi::General&) {
        session().remove(observed.pa);
    };
    host.run_to(AFTER);
    EXPECT_EQ(general().gpr[0], VALUE);
    general().rip = CODE;
    host.run_to(AFTER);
    EXPECT_EQ(host.told.size(), 1U);
    session().close();
    expect_restored();
}

TEST_P(Mechanism, InsertedBetweenTheHalves)
{
    session().insert(AT);
    host.on_told = [this](const ffi::Observed&, ffi::General&) {
        session().insert(AFTER);
    };
    host.run_to(AFTER + 1);
    EXPECT_EQ(general().gpr[0], VALUE);
    ASSERT_EQ(host.told.size(), 2U);
    EXPECT_EQ(host.told[1].pa, AFTER);
    session().close();
    expect_restored();
}

TEST_P(Mechanism, InsertedTwiceIsInsertedOnce)
{
    session().insert(AT);
    session().insert(AT);
    host.run_to(AFTER);
    EXPECT_EQ(host.told.size(), 1U);
    session().remove(AT);
    EXPECT_THROW(session().remove(AT), rust::Error);
    EXPECT_EQ(host.machine.shown(session().view(), AT), fake::MOV_EAX);
    session().close();
    expect_restored();
}

TEST_P(Mechanism, RegistersThatWereChangedCount)
{
    session().insert(AT);
    host.on_told = [](const ffi::Observed&, ffi::General& registers) {
        registers.gpr[15] = 15;
    };
    host.run_to(AFTER);
    EXPECT_EQ(general().gpr[15], 15U);
    EXPECT_EQ(general().gpr[0], VALUE);
    session().close();
    expect_restored();
}

TEST_P(Mechanism, AnotherRipIsWhereItGoesOn)
{
    session().insert(AT);
    general().gpr[0] = 7;
    host.on_told = [](const ffi::Observed&, ffi::General& registers) {
        registers.rip = AFTER;
    };
    host.run_to(AFTER + 1);
    EXPECT_EQ(general().gpr[0], 7U) << "the instruction has not run";
    EXPECT_EQ(host.told.size(), 1U);
    session().close();
    expect_restored();
}

TEST_P(Mechanism, TheGuestsOwnInt3IsDelivered)
{
    write_code(host.machine, CODE, {fake::BREAKPOINT});
    host.before = host.machine.memory();
    session().insert(AT);
    host.run_to(AFTER);
    EXPECT_EQ(host.machine.delivered(), 1U);
    EXPECT_EQ(host.told.size(), 1U);
    session().close();
    expect_restored();
}

TEST_P(Mechanism, WhatXenCannotEmulateIsSteppedOver)
{
    host.machine.cannot_emulate(fake::MOV_EAX);
    session().insert(AT);
    host.run_to(AFTER + 1);
    EXPECT_EQ(general().gpr[0], VALUE);
    EXPECT_EQ(host.told.size(), 1U);
    session().close();
    expect_restored();
}

TEST_P(Mechanism, AVirtualCpuOfNoInterestMeetsNoShadow)
{
    if (GetParam() == "repair")
        GTEST_SKIP() << "a breakpoint in place is in every view";
    session().insert(AT);
    host.machine.vcpu(1).view = session().monitor(1, false);
    general(1).rip = CODE;
    host.run_to(AFTER, 1);
    EXPECT_TRUE(host.told.empty());
    host.run_to(AFTER, 0);
    EXPECT_EQ(host.told.size(), 1U);
    session().monitor_all(false);
    general().rip = CODE;
    host.run_to(AFTER);
    EXPECT_EQ(host.told.size(), 1U);
    session().monitor_all(true);
    general().rip = CODE;
    host.run_to(AFTER);
    EXPECT_EQ(host.told.size(), 2U);
    EXPECT_EQ(host.machine.vcpu(0).view, session().view());
    EXPECT_THROW(session().monitor(2, true), rust::Error);
    session().close();
    expect_restored();
}

TEST_P(Mechanism, FiguresSayWhatServedTheHits)
{
    session().insert(AFTER);
    session().insert(AT);
    host.run_to(AFTER + 1);
    std::vector<ffi::Figures> figures(3);
    ASSERT_EQ(session().breakpoints({figures.data(), figures.size()}), 2U);
    EXPECT_EQ(figures[0].pa, AT);
    EXPECT_EQ(figures[1].pa, AFTER);
    for (const auto* it : {&figures[0], &figures[1]}) {
        EXPECT_EQ(it->hits, 1U);
        EXPECT_EQ(it->repair + it->view_step + it->view_fast_step + it->emulate + it->interpret, 1U);
    }
    EXPECT_EQ(session().breakpoints({figures.data(), 1}), 2U) << "also when there is no room for all of them";
    EXPECT_EQ(session().mechanism(), GetParam());
    const auto counters = session().counters();
    EXPECT_LE(counters.p50_ns, counters.p99_ns);
    EXPECT_LE(counters.p99_ns, counters.max_ns);
    EXPECT_GT(counters.max_ns, 0U);
    session().close();
    expect_restored();
}

TEST_P(Mechanism, DroppedWithoutBeingClosed)
{
    session().insert(AT);
    host.run_to(AFTER);
    host.drop();
    expect_restored();
}

TEST_P(Mechanism, ClosedInTheMiddleOfAHit)
{
    session().insert(AT);
    host.run_to(AT);
    // The instruction that is stepped over has not run yet.
    host.answer(*host.machine.run(0));
    session().close();
    if (general().rip == AT) {
        EXPECT_FALSE(host.machine.run(0)) << "it is the guest's own now";
    }
    EXPECT_EQ(general().gpr[0], VALUE);
    expect_restored();
}

TEST_P(Mechanism, LeavesWhenEveryVirtualCpuHasGoneOn)
{
    session().insert(AT);
    host.run_to(AT);
    // It has not gone on yet with what it is answered.
    host.answer(*host.machine.run(0));
    session().remove(AT);
    session().insert(AT);
    session().leave();
    // Neither a breakpoint of ours nor anything that Xen could be late with: it is tried again.
    write_code(host.machine, AFTER, {fake::BREAKPOINT});
    host.before = host.machine.memory();
    general().rip = AFTER;
    host.machine.vcpu(0).stepping = false;
    const auto event = host.machine.run(0);
    ASSERT_TRUE(event);
    host.answer(*event);
    EXPECT_EQ(general().rip, AFTER);
    EXPECT_EQ(host.machine.delivered(), 0U);
    EXPECT_THROW(session().insert(AT), rust::Error);
    session().close();
    EXPECT_EQ(host.machine.traces(), fake::Traces {});
}

TEST_P(Mechanism, NothingIsDoneAfterItIsClosed)
{
    session().close();
    EXPECT_THROW(session().insert(AT), rust::Error);
    EXPECT_THROW(session().watch(AT >> fake::PAGE_SHIFT, {true, true, true}, false), rust::Error);
    session().close();
    EXPECT_FALSE(session().failed());
    expect_restored();
}

TEST_P(Mechanism, WhateverIsRefusedIsAnErrorAndClosingRestores)
{
    // As long as it takes until none is refused any more.
    for (unsigned calls = 0;; ++calls) {
        host.machine.refuse_after(calls);
        bool refused = false;
        try {
            session().insert(AT);
        } catch (const rust::Error& error) {
            refused = true;
            EXPECT_NE(std::string(error.what()).find("was refused"), std::string::npos) << error.what();
        }
        host.machine.refuse_after(std::nullopt);
        if (!refused)
            break;
        EXPECT_FALSE(session().failed());
    }
    host.run_to(AFTER);
    EXPECT_EQ(host.told.size(), 1U) << "and it works then";
    session().close();
    expect_restored();
}

TEST_P(Mechanism, WhateverIsRefusedDuringAHitTheGuestGoesOn)
{
    session().insert(AT);
    for (unsigned calls = 0; calls < 24; ++calls) {
        general().rip = CODE;
        host.machine.refuse_after(calls);
        host.run_to(AFTER + 1);
        host.machine.refuse_after(std::nullopt);
        EXPECT_EQ(general().gpr[0], VALUE);
    }
    session().close();
    expect_restored();
}

TEST_P(Mechanism, WhateverIsRefusedWhenItIsClosedTheRestIsUndone)
{
    for (unsigned calls = 0; calls < 40; ++calls) {
        session().insert(AT);
        host.machine.refuse_after(calls);
        try {
            session().close();
        } catch (const rust::Error&) {
            host.machine.refuse_after(std::nullopt);
            session().close();
        }
        host.machine.refuse_after(std::nullopt);
        expect_restored();
        host.open();
    }
}

TEST_P(Mechanism, WatchesReportBeforeAndAfter)
{
    if (GetParam() == "repair")
        GTEST_SKIP() << "a page with breakpoints in place is guarded itself";
    const std::uint64_t page = AT >> fake::PAGE_SHIFT;
    session().watch(page, {true, true, false}, true);
    general().rip = LOAD;
    host.run_to(STORE + 5);
    ASSERT_EQ(host.told.size(), 4U);
    EXPECT_EQ(host.told[0].kind, Kind::Access);
    EXPECT_TRUE(host.told[0].accesses.read);
    EXPECT_EQ(host.told[0].pa, AT);
    EXPECT_EQ(host.told[1].kind, Kind::Accessed);
    EXPECT_TRUE(host.told[2].accesses.write);
    EXPECT_EQ(host.told[2].pa, AT + 1);
    EXPECT_EQ(host.told[3].kind, Kind::Accessed);

    // Without `after`, and no reads.
    session().watch(page, {false, true, false}, false);
    general().rip = LOAD;
    host.run_to(STORE + 5);
    ASSERT_EQ(host.told.size(), 5U);
    EXPECT_TRUE(host.told[4].accesses.write);

    session().watch(page, {false, false, false}, false);
    general().rip = LOAD;
    host.run_to(STORE + 5);
    EXPECT_EQ(host.told.size(), 5U);
    host.before = host.machine.memory();
    session().close();
    expect_restored();
}

TEST_P(Mechanism, AWatchedFetchOfABreakpointIsBoth)
{
    if (GetParam() == "repair")
        GTEST_SKIP() << "what is executed in a page with breakpoints in place cannot be watched";
    session().insert(AT);
    session().watch(AT >> fake::PAGE_SHIFT, {false, false, true}, false);
    general().rip = AT;
    host.run_to(AFTER);
    ASSERT_EQ(host.told.size(), 1U);
    EXPECT_EQ(host.told[0].kind, Kind::Access);
    EXPECT_TRUE(host.told[0].accesses.execute);
    EXPECT_TRUE(host.told[0].breakpoint);
    EXPECT_EQ(host.told[0].breakpoint_pa, AT);
    session().close();
    expect_restored();
}

TEST_P(Mechanism, FinishedWithoutABeginningTheVirtualCpuGoesOn)
{
    session().insert(AT);
    ffi::Reply reply {};
    session().finish_with(general(), reply);
    EXPECT_EQ(reply.action, ffi::Action::Resume);
    EXPECT_EQ(reply.step, ffi::Step::Keep);
    session().close();
    expect_restored();
}

/// As many hits go well.
constexpr unsigned HITS = 2;

/// With the feature fault-injection, a hit panics.
class Panic : public Mechanism
{
protected:
    Panic()
    {
        setenv("HYPERBP_PANIC_AT_HIT", std::to_string(HITS + 1).c_str(), 1);
        host.drop();
        host.open();
        unsetenv("HYPERBP_PANIC_AT_HIT");
    }
};

INSTANTIATE_TEST_SUITE_P(Named, Panic, testing::ValuesIn(NAMES), name_of);

TEST_P(Panic, EndsTheSessionAndTheGuestGoesOn)
{
    session().insert(AT);
    session().insert(AFTER + 1);
    for (unsigned n = 0; n < HITS; ++n) {
        general().rip = CODE;
        host.run_to(AFTER);
    }
    EXPECT_FALSE(session().failed());
    general().rip = CODE;
    general().gpr[0] = 0;
    host.run_to(AFTER + 2);
    ASSERT_EQ(host.told.size(), HITS + 1);
    EXPECT_EQ(host.told.back().kind, Kind::Failed);
    EXPECT_EQ(general().gpr[0], VALUE) << "the instruction under the breakpoint has run";
    EXPECT_TRUE(session().failed());
    // Nothing is left in the domain, although the session is still there.
    expect_restored();

    try {
        session().insert(AT);
        FAIL() << "a session that has failed sets no breakpoints";
    } catch (const rust::Error& error) {
        EXPECT_NE(std::string(error.what()).find("HYPERBP_PANIC_AT_HIT"), std::string::npos) << error.what();
        EXPECT_NE(std::string(error.what()).find("close it"), std::string::npos) << error.what();
    }
    session().close();
    expect_restored();
}

TEST_P(Panic, OtherVirtualCpusAndTheGuestsOwnInt3sGoOn)
{
    write_code(host.machine, CODE, {fake::BREAKPOINT});
    host.before = host.machine.memory();
    session().insert(AT);
    // Of a breakpoint, by a virtual CPU that waits for its answer meanwhile.
    general(1).rip = AT;
    const auto queued = host.machine.run(1);
    ASSERT_TRUE(queued);
    for (unsigned n = 0; n <= HITS; ++n) {
        general().rip = AT;
        host.run_to(AFTER);
    }
    ASSERT_TRUE(session().failed());
    host.answer(*queued);
    host.run_to(AFTER, 1);
    EXPECT_EQ(general(1).gpr[0], VALUE);
    EXPECT_EQ(host.machine.delivered(), 0U);
    general().rip = CODE;
    host.run_to(AFTER);
    EXPECT_EQ(host.machine.delivered(), 1U);
    session().close();
    expect_restored();
}

TEST_P(Panic, StepsOfOthersAreEnded)
{
    session().insert(AT);
    session().insert(AFTER + 1);
    general(1).rip = AT;
    host.answer(*host.machine.run(1));
    // It is in the middle of that now, if it is stepped at all.
    for (unsigned n = 0; n < HITS; ++n) {
        general().rip = AFTER + 1;
        host.run_to(AFTER + 2);
    }
    ASSERT_TRUE(session().failed());
    expect_restored();
    host.run_to(AFTER, 1);
    EXPECT_EQ(general(1).gpr[0], VALUE);
    session().close();
    expect_restored();
}

TEST(Session, AnUnknownMechanismIsAnsweredWithThoseThereAre)
{
    try {
        ffi::check_mechanism("ept");
        FAIL() << "there is no such mechanism";
    } catch (const rust::Error& error) {
        for (const auto& name : NAMES)
            EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
    EXPECT_NO_THROW(ffi::check_mechanism("shadow+emulate+data"));
    EXPECT_THROW(ffi::check_mechanism("in-place+view-step+data"), rust::Error);

    Host host("ept");
    EXPECT_THROW(host.open(), rust::Error);
    EXPECT_EQ(host.machine.traces(), fake::Traces {});
}

TEST(Session, WhateverIsRefusedWhenItIsOpenedNothingIsLeft)
{
    for (unsigned calls = 0;; ++calls) {
        Host host("auto");
        host.machine.refuse_after(calls);
        try {
            host.open();
            break;
        } catch (const rust::Error& error) {
            EXPECT_NE(std::string(error.what()).find("was refused"), std::string::npos) << error.what();
        }
        host.machine.refuse_after(std::nullopt);
        EXPECT_EQ(host.machine.traces(), fake::Traces {}) << "after " << calls << " calls";
    }
}

TEST(Session, ThereMustBeAHypervisor)
{
    EXPECT_THROW(ffi::open(nullptr, "auto"), rust::Error);
    EXPECT_THROW(ffi::open_libvmi(nullptr, nullptr, "auto"), rust::Error);
}

TEST(Session, ASecondOneTakesItsPlace)
{
    Host host("auto");
    write_code(host.machine, AT, {fake::MOV_EAX, 0x11, 0x22, 0x33, 0x44});
    for (int n = 0; n < 3; ++n) {
        host.open();
        host.session().insert(AT);
        host.machine.vcpu(0).general.rip = CODE;
        host.run_to(AFTER);
        host.session().close();
        EXPECT_EQ(host.machine.traces(), fake::Traces {});
    }
    EXPECT_EQ(host.told.size(), 3U);
}

/// A domain in which an instruction that accesses memory has the breakpoint.
class OnMemory : public testing::TestWithParam<std::string>
{
protected:
    OnMemory() : host(GetParam())
    {
        write_code(host.machine, LOAD, {fake::LOAD_AL, 0x10, 0x20, 0, 0});
        write_code(host.machine, STORE, {fake::STORE_AL, 0, 0x40, 0, 0});
        host.open();
    }

    ffi::Figures run(std::uint64_t at)
    {
        host.session().insert(at);
        host.machine.vcpu(0).general.rip = at;
        host.run_to(at + 5);
        ffi::Figures figures {};
        host.session().breakpoints({&figures, 1});
        EXPECT_EQ(figures.hits, 1U);
        return figures;
    }

    Host host;
};

INSTANTIATE_TEST_SUITE_P(Named, OnMemory, testing::Values("interpret"), name_of);

TEST_P(OnMemory, IsInterpretedIfTheGuestHasNoDataBreakpointsNow)
{
    EXPECT_EQ(run(LOAD).interpret, 1U);
    host.session().close();
    EXPECT_EQ(host.machine.traces(), fake::Traces {});
}

TEST_P(OnMemory, IsSteppedIfTheGuestHasSwitchedOneOnSinceTheEvent)
{
    // On one byte, for reads and writes: DR0, enabled.
    host.machine.set_dr7(0x30401);
    EXPECT_EQ(run(LOAD).interpret, 0U);
    host.session().close();
}

TEST_P(OnMemory, WritesWhatIsPlainMemoryOnly)
{
    host.machine.vcpu(0).general.gpr[0] = 0x5a;
    EXPECT_EQ(run(STORE).interpret, 1U);
    EXPECT_EQ(host.machine.shown(0, 0x4000), 0x5a);
    host.session().close();
}

TEST_P(OnMemory, StepsAWriteToARom)
{
    host.machine.roms.insert(4);
    EXPECT_EQ(run(STORE).interpret, 0U);
    host.session().close();
}

/// Mechanisms of both placements.
class Changed : public Mechanism
{
};

INSTANTIATE_TEST_SUITE_P(Named, Changed, testing::Values("view-fast-step", "repair"), name_of);

TEST_P(Changed, WhatADeviceWritesIsFoundByVerify)
{
    session().insert(AT);
    EXPECT_EQ(session().verify(), 0U);
    // Beside the breakpoint, and on it.
    host.machine.write_as_device(AT, {fake::MOV_EAX, 1, 2, 3, 4});
    EXPECT_EQ(session().verify(), 1U);
    EXPECT_EQ(session().verify(), 0U);
    EXPECT_EQ(session().counters().resynced, 1U);
    general().rip = CODE;
    host.run_to(AFTER);
    EXPECT_EQ(general().gpr[0], 0x04030201U);
    EXPECT_EQ(host.told.size(), 1U);
    session().close();
    EXPECT_EQ(host.machine.traces(), fake::Traces {});
}

TEST_P(Changed, APageThatTheGuestReplacesHasItsBreakpointsAgainBeforeItIsExecuted)
{
    session().insert(AT);
    host.machine.replace(AT >> fake::PAGE_SHIFT, AT % fake::PAGE_SIZE, {fake::MOV_EAX, 1, 2, 3, 4});
    general().rip = CODE;
    host.run_to(AFTER);
    EXPECT_EQ(general().gpr[0], 0x04030201U);
    EXPECT_EQ(host.told.size(), 1U);
    EXPECT_EQ(session().counters().rearmed, 1U);
    session().close();
    EXPECT_EQ(host.machine.traces(), fake::Traces {});
}

} // namespace
