/*
 * A patched SmartVMI's HyperbpEventSupervisor over hyperbp itself, on a LibVMI and a machine of ours
 * (cpp-shim/tests/fake). Of the same licences as core.cpp.
 */
#pragma once

#include "guest.hpp"

#include <memory>
#include <mutex>
#include <string>

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
    uint16_t createView() override
    {
        return guest_.create_view();
    }

    static inline int enabled = 0;

private:
    Guest& guest_;
};

class OnMachine : public testing::TestWithParam<const char*>
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

/// What a mechanism is called in the name of a test.
inline std::string name_of_mechanism(const testing::TestParamInfo<const char*>& info)
{
    std::string name(info.param);
    std::erase(name, '-');
    return name;
}

} // namespace VmiCore
