/*
 * Tests of the plugin libhyperbp_smartvmi.so, loaded by a patched SmartVMI's plugin system, over hyperbp itself. As
 * core.cpp, on a LibVMI and a machine of ours, and under the same licences. `core.sh` builds and runs it.
 */
#include "machine.hpp"

#include <cstdlib>
#include <map>
#include <sstream>

#include <json/json.h>
#include <lib/config/mock_ConfigInterface.h>
#include <lib/io/file/mock_LegacyLogging.h>
#include <lib/os/windows/mock_ActiveProcessesSupervisor.h>
#include <plugins/PluginSystem.h>
#include <vmicore_test/plugins/mock_PluginConfig.h>

using testing::ReturnRef;

namespace VmiCore {
namespace {

constexpr auto PLUGIN = "libhyperbp_smartvmi.so";

class OfPlugin : public OnMachine
{
protected:
    void SetUp() override
    {
        OnMachine::SetUp();
        ON_CALL(*config, getPluginDirectory()).WillByDefault(Return(std::getenv("HYPERBP_PLUGIN_DIRECTORY")));
        ON_CALL(*config, getPlugins()).WillByDefault(ReturnRef(plugins));
        ON_CALL(*of_plugin, rootNode()).WillByDefault(ReturnRef(root));
        ON_CALL(*of_plugin, configFilePath()).WillByDefault(Return(std::nullopt));
        ON_CALL(*processes, getActiveProcesses()).WillByDefault([] {
            auto all = std::make_unique<std::vector<std::shared_ptr<const ActiveProcessInformation>>>();
            // CR3 is 0 on this machine.
            all->push_back(std::make_shared<ActiveProcessInformation>(
                ActiveProcessInformation {.processDtb = 0, .processUserDtb = 0, .pid = 7, .name = "bpbench"}));
            all->push_back(std::make_shared<ActiveProcessInformation>(
                ActiveProcessInformation {.processDtb = 0x5000, .processUserDtb = 0x6000, .pid = 8, .name = "other"}));
            return all;
        });
        ON_CALL(*files, saveBinaryToFile(std::string_view("hyperbp.jsonl"), _))
            .WillByDefault([this](std::string_view, const std::vector<std::uint8_t>& data) {
                std::istringstream lines(std::string(data.begin(), data.end()));
                for (std::string line; std::getline(lines, line);)
                    std::istringstream(line) >> written.emplace_back();
            });
    }

    void load(std::shared_ptr<IInterruptEventSupervisor> interrupts)
    {
        system = std::make_unique<PluginSystem>(config, libvmi, processes, std::move(interrupts), files, logging,
                                                std::make_shared<NiceMock<MockEventStream>>());
        system->initializePlugins({});
    }

    YAML::Node root = YAML::Load("{process: bpbench, address: " + std::to_string(Guest::AT) + "}");
    std::shared_ptr<NiceMock<Plugin::MockPluginConfig>> of_plugin =
        std::make_shared<NiceMock<Plugin::MockPluginConfig>>();
    std::map<const std::string, const std::shared_ptr<Plugin::IPluginConfig>> plugins {{PLUGIN, of_plugin}};
    std::shared_ptr<NiceMock<MockConfigInterface>> config = std::make_shared<NiceMock<MockConfigInterface>>();
    std::shared_ptr<NiceMock<MockActiveProcessesSupervisor>> processes =
        std::make_shared<NiceMock<MockActiveProcessesSupervisor>>();
    std::shared_ptr<NiceMock<MockLegacyLogging>> files = std::make_shared<NiceMock<MockLegacyLogging>>();
    std::unique_ptr<PluginSystem> system;
    std::vector<Json::Value> written;
};

TEST_P(OfPlugin, ItReportsWhatItsBreakpointHasDone)
{
    supervisor->initialize();
    load(supervisor);
    for (unsigned n = 0; n < 10; ++n) {
        EXPECT_EQ(guest.execute(0), Guest::VALUE);
        EXPECT_EQ(guest.execute(1), Guest::VALUE);
    }
    system->unloadPlugins();
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    supervisor->teardown();

    ASSERT_EQ(written.size(), 2U);
    const Json::Value& one = written[0];
    EXPECT_EQ(one["Type"], "Breakpoint");
    EXPECT_EQ(one["PID"], 7);
    EXPECT_EQ(one["Callbacks"], 20);
    EXPECT_EQ(one["Hits"], 20);
    EXPECT_EQ(one["Mechanism"], GetParam());
    const auto stepped = one["Repair"].asUInt() + one["ViewStep"].asUInt() + one["ViewFastStep"].asUInt()
                         + one["Emulate"].asUInt() + one["Interpret"].asUInt();
    EXPECT_EQ(stepped, 20U);
    EXPECT_EQ(one["Fallbacks"], 0);
    const Json::Value& total = written[1];
    EXPECT_EQ(total["Type"], "Total");
    EXPECT_EQ(total["Backend"], "hyperbp");
    EXPECT_EQ(total["Breakpoints"], 1);
    EXPECT_EQ(total["Hits"], 20);
    EXPECT_GT(total["HandlingP50Ns"].asUInt64(), 0U);
    EXPECT_GE(total["HandlingP90Ns"].asUInt64(), total["HandlingP50Ns"].asUInt64());
    EXPECT_GE(total["HandlingP99Ns"].asUInt64(), total["HandlingP90Ns"].asUInt64());
    EXPECT_GE(total["HandlingMaxNs"].asUInt64(), total["HandlingP99Ns"].asUInt64());
    EXPECT_EQ(total["Failed"], false);
}

TEST_P(OfPlugin, ItSaysWhenHyperbpHasFailed)
{
    setenv("HYPERBP_PANIC_AT_HIT", "2", 1);
    supervisor->initialize();
    unsetenv("HYPERBP_PANIC_AT_HIT");
    load(supervisor);
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    EXPECT_EQ(guest.execute(0), Guest::VALUE);
    const bool failed = supervisor->hasFailed();
    system->unloadPlugins();
    supervisor->teardown();
    if (!failed)
        GTEST_SKIP() << "this libhyperbp was installed without --features fault-injection";
    ASSERT_EQ(written.size(), 2U);
    EXPECT_EQ(written[0]["Callbacks"], 1);
    EXPECT_EQ(written[1]["Failed"], true);
}

TEST_P(OfPlugin, WithAWrongConfigurationItDoesNothing)
{
    supervisor->initialize();
    root = YAML::Load("{process: bpbench}");
    load(supervisor);
    EXPECT_EQ(vmicore_hyperbp_figures_1()->breakpoints.size(), 0U);
    system->unloadPlugins();
    supervisor->teardown();
    EXPECT_EQ(written.size(), 0U);
}

INSTANTIATE_TEST_SUITE_P(Mechanisms, OfPlugin,
                         testing::Values("auto", "repair", "view-step", "view-fast-step", "emulate", "interpret"),
                         name_of_mechanism);

} // namespace
} // namespace VmiCore
