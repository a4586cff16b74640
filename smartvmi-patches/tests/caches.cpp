/*
 * Tests of a patched SmartVMI's LibvmiInterface, over a LibVMI that only takes notes: once the caches have expired,
 * whatever uses them flushes them before, once, and nothing else does. Of the same licences as core.cpp.
 */
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>
#include <lib/io/mock_EventStream.h>
#include <lib/io/mock_Logging.h>
#include <vmi/LibvmiInterface.h>

namespace {

/// What was asked of LibVMI.
std::string notes;

status_t used()
{
    notes += "use;";
    return VMI_SUCCESS;
}

} // namespace

extern "C" {

void vmi_v2pcache_flush(vmi_instance_t, addr_t table) noexcept
{
    notes += table == VmiCore::ILibvmiInterface::flushAllPTs ? "translations;" : "some translations;";
}
void vmi_pagecache_flush(vmi_instance_t) noexcept
{
    notes += "pages;";
}

status_t vmi_read(vmi_instance_t, const access_context_t*, size_t, void*, size_t*) noexcept
{
    return used();
}
status_t vmi_read_8(vmi_instance_t, const access_context_t*, uint8_t*) noexcept
{
    return used();
}
status_t vmi_read_32(vmi_instance_t, const access_context_t*, uint32_t*) noexcept
{
    return used();
}
status_t vmi_read_64(vmi_instance_t, const access_context_t*, uint64_t*) noexcept
{
    return used();
}
char* vmi_read_str(vmi_instance_t, const access_context_t*) noexcept
{
    used();
    return static_cast<char*>(std::calloc(1, 1));
}
unicode_string_t* vmi_read_unicode_str(vmi_instance_t, const access_context_t*) noexcept
{
    used();
    return nullptr;
}
unicode_string_t* vmi_read_w_str(vmi_instance_t, const access_context_t*) noexcept
{
    used();
    return nullptr;
}
status_t vmi_convert_str_encoding(const unicode_string_t*, unicode_string_t*, const char*) noexcept
{
    return VMI_FAILURE;
}
void vmi_free_unicode_str(unicode_string_t*) noexcept {}
status_t vmi_write_8(vmi_instance_t, const access_context_t*, uint8_t*) noexcept
{
    return used();
}
status_t vmi_mmap_guest_2(vmi_instance_t, const access_context_t*, size_t, int, mapped_regions_t*) noexcept
{
    return used();
}
status_t vmi_translate_ksym2v(vmi_instance_t, const char*, addr_t*) noexcept
{
    return used();
}
status_t vmi_translate_sym2v(vmi_instance_t, const access_context_t*, const char*, addr_t*) noexcept
{
    return used();
}
status_t vmi_pagetable_lookup(vmi_instance_t, addr_t, addr_t, addr_t*) noexcept
{
    return used();
}
status_t vmi_pid_to_dtb(vmi_instance_t, vmi_pid_t, addr_t*) noexcept
{
    return used();
}
status_t vmi_dtb_to_pid(vmi_instance_t, addr_t, vmi_pid_t*) noexcept
{
    return used();
}

status_t vmi_events_listen(vmi_instance_t, uint32_t) noexcept
{
    return VMI_SUCCESS;
}
int vmi_are_events_pending(vmi_instance_t) noexcept
{
    return 0;
}
status_t vmi_pause_vm(vmi_instance_t) noexcept
{
    return VMI_SUCCESS;
}
status_t vmi_resume_vm(vmi_instance_t) noexcept
{
    return VMI_SUCCESS;
}
status_t vmi_destroy(vmi_instance_t) noexcept
{
    return VMI_SUCCESS;
}
}

namespace VmiCore {
namespace {

using testing::NiceMock;

/// A function of LibvmiInterface.
using Function = std::pair<const char*, std::function<void(LibvmiInterface&)>>;

class Caches : public testing::TestWithParam<Function>
{
protected:
    /// What is asked of LibVMI when the function is called.
    std::string notes_of_call()
    {
        notes.clear();
        GetParam().second(vmi);
        return notes;
    }

    LibvmiInterface vmi {nullptr, std::make_shared<NiceMock<MockLogging>>(),
                         std::make_shared<NiceMock<MockEventStream>>()};
};

using CachesInUse = Caches;
using CachesNotInUse = Caches;

TEST_P(CachesInUse, AreFlushedOnceAfterTheyHaveExpired)
{
    EXPECT_EQ(notes_of_call(), "use;");
    vmi.expireCaches();
    vmi.expireCaches();
    EXPECT_EQ(notes_of_call(), "translations;pages;use;");
    EXPECT_EQ(notes_of_call(), "use;");
}

TEST_P(CachesNotInUse, StayAsTheyAre)
{
    vmi.expireCaches();
    EXPECT_EQ(notes_of_call(), "");
}

const std::string symbol("symbol");

const std::vector<Function> users {
    {"read8PA",
     [](auto& vmi) {
         static_cast<void>(vmi.read8PA(0x1000));
     }},
    {"read64PA",
     [](auto& vmi) {
         static_cast<void>(vmi.read64PA(0x1000));
     }},
    {"read8VA",
     [](auto& vmi) {
         static_cast<void>(vmi.read8VA(0x1000, 0x2000));
     }},
    {"read32VA",
     [](auto& vmi) {
         static_cast<void>(vmi.read32VA(0x1000, 0x2000));
     }},
    {"read64VA",
     [](auto& vmi) {
         static_cast<void>(vmi.read64VA(0x1000, 0x2000));
     }},
    {"readVA",
     [](auto& vmi) {
         static_cast<void>(vmi.readVA(0x1000, 0x2000, 4));
     }},
    {"readXVA",
     [](auto& vmi) {
         std::vector<uint8_t> content(4);
         static_cast<void>(vmi.readXVA(0x1000, 0x2000, content, 4));
     }},
    {"mmapGuest",
     [](auto& vmi) {
         static_cast<void>(vmi.mmapGuest(0x1000, 0x2000, 1));
     }},
    {"write8PA",
     [](auto& vmi) {
         vmi.write8PA(0x1000, 1);
     }},
    {"translateKernelSymbolToVA",
     [](auto& vmi) {
         static_cast<void>(vmi.translateKernelSymbolToVA(symbol));
     }},
    {"translateUserlandSymbolToVA",
     [](auto& vmi) {
         static_cast<void>(vmi.translateUserlandSymbolToVA(0x1000, 0x2000, symbol));
     }},
    {"convertVAToPA",
     [](auto& vmi) {
         static_cast<void>(vmi.convertVAToPA(0x1000, 0x2000));
     }},
    {"convertPidToDtb",
     [](auto& vmi) {
         static_cast<void>(vmi.convertPidToDtb(1));
     }},
    {"convertDtbToPid",
     [](auto& vmi) {
         static_cast<void>(vmi.convertDtbToPid(0x2000));
     }},
    {"extractUnicodeStringAtVA",
     [](auto& vmi) {
         // Nothing was read.
         EXPECT_THROW(static_cast<void>(vmi.extractUnicodeStringAtVA(0x1000, 0x2000)), std::exception);
     }},
    {"tryExtractUnicodeStringAtVA",
     [](auto& vmi) {
         static_cast<void>(vmi.tryExtractUnicodeStringAtVA(0x1000, 0x2000));
     }},
    {"extractWStringAtVA",
     [](auto& vmi) {
         static_cast<void>(vmi.extractWStringAtVA(0x1000, 0x2000));
     }},
    {"extractStringAtVA",
     [](auto& vmi) {
         static_cast<void>(vmi.extractStringAtVA(0x1000, 0x2000));
     }},
};

const std::vector<Function> others {
    {"eventsListen",
     [](auto& vmi) {
         vmi.eventsListen(0);
     }},
    {"areEventsPending",
     [](auto& vmi) {
         static_cast<void>(vmi.areEventsPending());
     }},
    {"pauseVm",
     [](auto& vmi) {
         vmi.pauseVm();
     }},
    {"resumeVm",
     [](auto& vmi) {
         vmi.resumeVm();
     }},
    {"lockInstance",
     [](auto& vmi) {
         static_cast<void>(vmi.lockInstance());
     }},
};

std::string name_of(const testing::TestParamInfo<Function>& info)
{
    return info.param.first;
}

INSTANTIATE_TEST_SUITE_P(Functions, CachesInUse, testing::ValuesIn(users), name_of);
INSTANTIATE_TEST_SUITE_P(Functions, CachesNotInUse, testing::ValuesIn(others), name_of);

} // namespace
} // namespace VmiCore
