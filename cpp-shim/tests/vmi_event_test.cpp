/// LibVMI's events as hyperbp's, and hyperbp's replies as LibVMI's.

#include "hyperbp/vmi_event.hpp"

#include <algorithm>

#include <gtest/gtest.h>

namespace {

namespace ffi = hyperbp::ffi;

// As Xen has them.
constexpr std::uint64_t CODE_64 = 0xa9b;
constexpr std::uint64_t CODE_32 = 0xc9b;
constexpr std::uint64_t CODE_16 = 0x09b;
constexpr std::uint64_t DATA_32_USER = 0xcf3;
constexpr std::uint64_t LIMIT = 0xfffff;
constexpr std::uint64_t EFER_LMA = 0x400;
constexpr std::uint64_t GFN = 0x101;

class VmiEvent : public testing::Test
{
protected:
    VmiEvent()
    {
        std::uint64_t value = 1;
        for (const auto name : GENERAL)
            x86.*name = value++;
        x86.rip = 0x7fff12345ff8;
        x86.rflags = 0x246;
        x86.cr0 = 0x80000011;
        x86.cr3 = 0x1000;
        x86.cr4 = 0x20;
        x86.msr_efer = EFER_LMA;
        x86.dr7 = 0x400;
        x86.cs_arbytes = CODE_64;
        event.x86_regs = &x86;
        event.vcpu_id = 3;
        event.slat_id = 2;
    }

    /// In the order instructions encode them.
    static constexpr std::uint64_t x86_registers_t::*GENERAL[16] = {
        &x86_registers_t::rax, &x86_registers_t::rcx, &x86_registers_t::rdx, &x86_registers_t::rbx,
        &x86_registers_t::rsp, &x86_registers_t::rbp, &x86_registers_t::rsi, &x86_registers_t::rdi,
        &x86_registers_t::r8,  &x86_registers_t::r9,  &x86_registers_t::r10, &x86_registers_t::r11,
        &x86_registers_t::r12, &x86_registers_t::r13, &x86_registers_t::r14, &x86_registers_t::r15};

    void interrupt()
    {
        event.type = VMI_EVENT_INTERRUPT;
        event.interrupt_event.intr = INT3;
        event.interrupt_event.gfn = GFN;
        event.interrupt_event.insn_length = 2;
        event.interrupt_event.reinject = -1;
    }

    void memory(vmi_mem_access_t access)
    {
        event.type = VMI_EVENT_MEMORY;
        event.mem_event.gfn = GFN;
        event.mem_event.offset = 0xff8;
        event.mem_event.out_access = access;
        event.mem_event.gla_valid = 1;
        event.mem_event.gla = x86.rip;
    }

    event_response_t respond()
    {
        return hyperbp::respond(reply, event, data);
    }

    x86_registers_t x86 {};
    vmi_event_t event {};
    ffi::Event translated {};
    ffi::Reply reply {};
    hyperbp::EmulationData data;
};

TEST_F(VmiEvent, AnInt3IsInTheFrameXenNamesAtTheOffsetOfItsLinearAddress)
{
    interrupt();
    ASSERT_TRUE(hyperbp::translate(event, translated));
    EXPECT_EQ(translated.reason, ffi::Reason::Int3);
    EXPECT_EQ(translated.gpa, 0x101ff8U);
    EXPECT_EQ(translated.length, 2);
    EXPECT_EQ(translated.vcpu, 3);
    EXPECT_EQ(translated.view, 2);

    x86.rip = 0x10;
    x86.cs_base = 0xff8;
    x86.cs_arbytes = CODE_32;
    ASSERT_TRUE(hyperbp::translate(event, translated));
    EXPECT_EQ(translated.gpa, 0x101008U);
    EXPECT_EQ(translated.registers.cs_base, 0xff8U);

    event.interrupt_event.intr = INT_NEXT;
    EXPECT_FALSE(hyperbp::translate(event, translated));
}

TEST_F(VmiEvent, RegistersAreInTheOrderInstructionsEncodeThem)
{
    event.type = VMI_EVENT_SINGLESTEP;
    ASSERT_TRUE(hyperbp::translate(event, translated));
    EXPECT_EQ(translated.reason, ffi::Reason::Step);
    const ffi::Registers& registers = translated.registers;
    for (std::size_t n = 0; n < 16; ++n)
        EXPECT_EQ(registers.general.gpr[n], n + 1);
    EXPECT_EQ(registers.general.rip, x86.rip);
    EXPECT_EQ(registers.general.rflags, x86.rflags);
    EXPECT_EQ(registers.cr0, x86.cr0);
    EXPECT_EQ(registers.cr3, x86.cr3);
    EXPECT_EQ(registers.cr4, x86.cr4);
    EXPECT_EQ(registers.efer, x86.msr_efer);
    EXPECT_EQ(registers.dr7, x86.dr7);
}

TEST_F(VmiEvent, SegmentsSayHowInstructionsAreDecoded)
{
    event.type = VMI_EVENT_FAILED_EMULATION;
    // In 64-bit code the CPU ignores it.
    x86.cs_base = 0x1000;
    ASSERT_TRUE(hyperbp::translate(event, translated));
    EXPECT_EQ(translated.reason, ffi::Reason::EmulationFailed);
    EXPECT_EQ(translated.registers.mode, ffi::CodeMode::Bits64);
    EXPECT_EQ(translated.registers.cs_base, 0U);
    EXPECT_EQ(translated.registers.cpl, 0);

    // L counts in long mode only.
    x86.msr_efer = 0;
    hyperbp::translate(event, translated);
    EXPECT_EQ(translated.registers.mode, ffi::CodeMode::Bits16);

    x86.cs_base = 0;
    x86.cs_arbytes = CODE_32;
    x86.ss_arbytes = x86.ds_arbytes = x86.es_arbytes = DATA_32_USER;
    x86.cs_limit = x86.ss_limit = x86.ds_limit = x86.es_limit = LIMIT;
    hyperbp::translate(event, translated);
    EXPECT_EQ(translated.registers.mode, ffi::CodeMode::Bits32);
    EXPECT_EQ(translated.registers.cpl, 3);
    EXPECT_TRUE(translated.registers.flat);

    x86.ss_base = 0x1000;
    hyperbp::translate(event, translated);
    EXPECT_FALSE(translated.registers.flat);
    x86.ss_base = 0;
    // It grows downwards.
    x86.ss_arbytes = DATA_32_USER | 4;
    hyperbp::translate(event, translated);
    EXPECT_FALSE(translated.registers.flat);
    x86.ss_arbytes = DATA_32_USER;
    x86.es_limit = LIMIT - 1;
    hyperbp::translate(event, translated);
    EXPECT_FALSE(translated.registers.flat);

    x86.cs_arbytes = CODE_16;
    hyperbp::translate(event, translated);
    EXPECT_EQ(translated.registers.mode, ffi::CodeMode::Bits16);
}

TEST_F(VmiEvent, AnAccessSaysWhereAndHow)
{
    memory(VMI_MEMACCESS_R | VMI_MEMACCESS_W);
    ASSERT_TRUE(hyperbp::translate(event, translated));
    EXPECT_EQ(translated.reason, ffi::Reason::Access);
    EXPECT_EQ(translated.gpa, 0x101ff8U);
    EXPECT_EQ(translated.accesses, (ffi::Accesses {true, true, false}));
    EXPECT_FALSE(translated.page_walk);

    event.mem_event.out_access = VMI_MEMACCESS_X;
    event.mem_event.gptw = 1;
    hyperbp::translate(event, translated);
    EXPECT_EQ(translated.accesses, (ffi::Accesses {false, false, true}));
    EXPECT_TRUE(translated.page_walk);

    // LibVMI leaves in the event what it was the last time.
    respond();
    hyperbp::translate(event, translated);
    EXPECT_FALSE(translated.page_walk);
}

TEST_F(VmiEvent, NoFieldIsLeftFromTheEventBefore)
{
    memory(VMI_MEMACCESS_R);
    event.mem_event.gptw = 1;
    hyperbp::translate(event, translated);
    event.type = VMI_EVENT_SINGLESTEP;
    hyperbp::translate(event, translated);
    EXPECT_EQ(translated.accesses, (ffi::Accesses {false, false, false}));
    EXPECT_FALSE(translated.page_walk);
    EXPECT_EQ(translated.gpa, 0U);
}

TEST_F(VmiEvent, OtherEventsAreNone)
{
    for (const int type : {VMI_EVENT_REGISTER, VMI_EVENT_CPUID, VMI_EVENT_DEBUG_EXCEPTION}) {
        event.type = static_cast<vmi_event_type_t>(type);
        EXPECT_FALSE(hyperbp::translate(event, translated));
    }
}

TEST_F(VmiEvent, AccessesAndFlagsAreTheSame)
{
    for (const int flags : {VMI_MEMACCESS_R, VMI_MEMACCESS_W, VMI_MEMACCESS_X, VMI_MEMACCESS_RWX})
        EXPECT_EQ(hyperbp::flags_of(hyperbp::accesses_of(static_cast<vmi_mem_access_t>(flags))), flags);
    EXPECT_EQ(hyperbp::accesses_of(VMI_MEMACCESS_N), (ffi::Accesses {false, false, false}));
}

TEST_F(VmiEvent, AViewAndAStepAreFields)
{
    interrupt();
    EXPECT_EQ(respond(), event_response_t {VMI_EVENT_RESPONSE_NONE});
    EXPECT_EQ(event.interrupt_event.reinject, 0);
    EXPECT_EQ(event.slat_id, 2) << "which counts only with the response that goes with it";

    reply.switch_view = true;
    reply.view = 5;
    reply.step = ffi::Step::Fast;
    reply.fast_view = 4;
    EXPECT_EQ(respond(), VMI_EVENT_RESPONSE_SLAT_ID | VMI_EVENT_RESPONSE_NEXT_SLAT_ID);
    EXPECT_EQ(event.slat_id, 5);
    EXPECT_EQ(event.next_slat_id, 4);

    for (const ffi::Step step : {ffi::Step::On, ffi::Step::Off}) {
        reply.step = step;
        EXPECT_EQ(respond(), VMI_EVENT_RESPONSE_SLAT_ID | VMI_EVENT_RESPONSE_TOGGLE_SINGLESTEP);
    }
}

TEST_F(VmiEvent, TheGuestsOwnInt3IsReinjected)
{
    interrupt();
    reply.action = ffi::Action::Reinject;
    EXPECT_EQ(respond(), event_response_t {VMI_EVENT_RESPONSE_NONE});
    EXPECT_EQ(event.interrupt_event.reinject, 1);
    EXPECT_EQ(event.interrupt_event.insn_length, 2U);
}

TEST_F(VmiEvent, NewRegistersReplaceTheEventsAndNoOthers)
{
    interrupt();
    reply.action = ffi::Action::SetRegisters;
    for (std::size_t n = 0; n < 16; ++n)
        reply.registers.gpr[n] = 0x100 + n;
    reply.registers.rip = 0x1234;
    reply.registers.rflags = 0x2;
    EXPECT_EQ(respond(), event_response_t {VMI_EVENT_RESPONSE_SET_REGISTERS});
    for (std::size_t n = 0; n < 16; ++n)
        EXPECT_EQ(x86.*GENERAL[n], 0x100 + n);
    EXPECT_EQ(x86.rip, 0x1234U);
    EXPECT_EQ(x86.rflags, 0x2U);
    EXPECT_EQ(x86.cr3, 0x1000U);
    EXPECT_EQ(event.x86_regs, &x86);

    reply.step = ffi::Step::Fast;
    reply.switch_view = true;
    EXPECT_EQ(respond(),
              VMI_EVENT_RESPONSE_SET_REGISTERS | VMI_EVENT_RESPONSE_NEXT_SLAT_ID | VMI_EVENT_RESPONSE_SLAT_ID);
}

TEST_F(VmiEvent, AnInstructionForTheEmulatorIsOurs)
{
    interrupt();
    reply.action = ffi::Action::EmulateInstruction;
    for (std::size_t n = 0; n < 16; ++n)
        reply.bytes[n] = static_cast<std::uint8_t>(n);
    reply.length = 16;
    EXPECT_EQ(respond(), event_response_t {VMI_EVENT_RESPONSE_SET_EMUL_INSN});
    ASSERT_EQ(event.emul_insn, &data.instruction);
    EXPECT_EQ(event.emul_insn->dont_free, 1);
    EXPECT_TRUE(std::equal(reply.bytes.begin(), reply.bytes.begin() + 16, event.emul_insn->data));
}

TEST_F(VmiEvent, WhatTheEmulatorReadsIsOurs)
{
    memory(VMI_MEMACCESS_R);
    reply.action = ffi::Action::EmulateRead;
    reply.bytes.fill(0x5a);
    reply.length = 8;
    EXPECT_EQ(respond(), event_response_t {VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA});
    ASSERT_EQ(event.emul_read, &data.read);
    EXPECT_EQ(event.emul_read->dont_free, 1);
    EXPECT_EQ(event.emul_read->size, 8U);
    EXPECT_EQ(event.emul_read->data[7], 0x5a);

    reply.action = ffi::Action::Emulate;
    EXPECT_EQ(respond(), event_response_t {VMI_EVENT_RESPONSE_EMULATE});
}

} // namespace
