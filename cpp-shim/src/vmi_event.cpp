#include "hyperbp/vmi_event.hpp"

#include <cstring>

namespace hyperbp {
namespace {

/// EFER.LMA: long mode is active.
constexpr std::uint64_t EFER_LMA = 1U << 10;

// The attributes of a segment, in the 12 bits that Xen has of them (`vm_event_x86_selector_reg::ar`): those of a
// descriptor, without the unused ones.
constexpr std::uint64_t AR_CODE = 1U << 3;
constexpr std::uint64_t AR_DOWN = 1U << 2;
constexpr std::uint64_t AR_WRITABLE = 1U << 1;
constexpr std::uint64_t AR_L = 1U << 9;
constexpr std::uint64_t AR_D = 1U << 10;
/// Granularity 4 KiB, D or B, present, and a code or data segment.
constexpr std::uint64_t AR_FLAT = 1U << 11 | AR_D | 1U << 7 | 1U << 4;
constexpr unsigned AR_DPL_SHIFT = 5;

constexpr std::uint64_t FLAT_LIMIT = 0xfffff;
constexpr std::uint64_t PAGE_OFFSET = 0xfff;
constexpr unsigned PAGE_SHIFT = 12;

bool is_flat_code(std::uint64_t base, std::uint64_t limit, std::uint64_t ar) noexcept
{
    return base == 0 && limit == FLAT_LIMIT && (ar & (AR_FLAT | AR_CODE)) == (AR_FLAT | AR_CODE);
}

/// Writable, and it does not grow downwards.
bool is_flat_data(std::uint64_t base, std::uint64_t limit, std::uint64_t ar) noexcept
{
    return base == 0 && limit == FLAT_LIMIT
           && (ar & (AR_FLAT | AR_CODE | AR_DOWN | AR_WRITABLE)) == (AR_FLAT | AR_WRITABLE);
}

bool is_flat(const x86_registers_t& x86) noexcept
{
    return is_flat_code(x86.cs_base, x86.cs_limit, x86.cs_arbytes)
           && is_flat_data(x86.ss_base, x86.ss_limit, x86.ss_arbytes)
           && is_flat_data(x86.ds_base, x86.ds_limit, x86.ds_arbytes)
           && is_flat_data(x86.es_base, x86.es_limit, x86.es_arbytes);
}

ffi::CodeMode mode_of(const x86_registers_t& x86) noexcept
{
    if ((x86.msr_efer & EFER_LMA) != 0 && (x86.cs_arbytes & AR_L) != 0)
        return ffi::CodeMode::Bits64;
    return (x86.cs_arbytes & AR_D) != 0 ? ffi::CodeMode::Bits32 : ffi::CodeMode::Bits16;
}

void registers_of(const x86_registers_t& x86, ffi::Registers& into) noexcept
{
    general_of(x86, into.general);
    into.cr0 = x86.cr0;
    into.cr3 = x86.cr3;
    into.cr4 = x86.cr4;
    into.efer = x86.msr_efer;
    into.dr7 = x86.dr7;
    into.mode = mode_of(x86);
    const bool is_64_bit = into.mode == ffi::CodeMode::Bits64;
    into.cs_base = is_64_bit ? 0 : x86.cs_base;
    into.cpl = x86.ss_arbytes >> AR_DPL_SHIFT & 3;
    // In 64-bit code of no importance.
    into.flat = !is_64_bit && is_flat(x86);
}

void set_registers(const ffi::General& from, x86_registers_t& x86) noexcept
{
    x86.rax = from.gpr[0];
    x86.rcx = from.gpr[1];
    x86.rdx = from.gpr[2];
    x86.rbx = from.gpr[3];
    x86.rsp = from.gpr[4];
    x86.rbp = from.gpr[5];
    x86.rsi = from.gpr[6];
    x86.rdi = from.gpr[7];
    x86.r8 = from.gpr[8];
    x86.r9 = from.gpr[9];
    x86.r10 = from.gpr[10];
    x86.r11 = from.gpr[11];
    x86.r12 = from.gpr[12];
    x86.r13 = from.gpr[13];
    x86.r14 = from.gpr[14];
    x86.r15 = from.gpr[15];
    x86.rip = from.rip;
    x86.rflags = from.rflags;
}

/// Fills the emulator's data, for the event to point to. They take the place of its registers.
event_response_t emulate(const ffi::Reply& reply, vmi_event_t& event, EmulationData& data) noexcept
{
    if (reply.action == ffi::Action::EmulateInstruction) {
        static_assert(sizeof(data.instruction.data) <= sizeof(reply.bytes), "an instruction fits");
        std::memcpy(data.instruction.data, reply.bytes.data(), sizeof(data.instruction.data));
        event.emul_insn = &data.instruction;
        return VMI_EVENT_RESPONSE_SET_EMUL_INSN;
    }
    static_assert(sizeof(reply.bytes) <= sizeof(data.read.data), "what is read fits");
    data.read.size = reply.length;
    std::memcpy(data.read.data, reply.bytes.data(), reply.length);
    event.emul_read = &data.read;
    return VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA;
}

} // namespace

EmulationData::EmulationData() noexcept
{
    instruction.dont_free = 1;
    read.dont_free = 1;
}

ffi::Accesses accesses_of(vmi_mem_access_t access) noexcept
{
    return {(access & VMI_MEMACCESS_R) != 0, (access & VMI_MEMACCESS_W) != 0, (access & VMI_MEMACCESS_X) != 0};
}

vmi_mem_access_t flags_of(ffi::Accesses accesses) noexcept
{
    return static_cast<vmi_mem_access_t>((accesses.read ? VMI_MEMACCESS_R : 0) | (accesses.write ? VMI_MEMACCESS_W : 0)
                                         | (accesses.execute ? VMI_MEMACCESS_X : 0));
}

void general_of(const x86_registers_t& x86, ffi::General& into) noexcept
{
    // In the order instructions encode them.
    into.gpr[0] = x86.rax;
    into.gpr[1] = x86.rcx;
    into.gpr[2] = x86.rdx;
    into.gpr[3] = x86.rbx;
    into.gpr[4] = x86.rsp;
    into.gpr[5] = x86.rbp;
    into.gpr[6] = x86.rsi;
    into.gpr[7] = x86.rdi;
    into.gpr[8] = x86.r8;
    into.gpr[9] = x86.r9;
    into.gpr[10] = x86.r10;
    into.gpr[11] = x86.r11;
    into.gpr[12] = x86.r12;
    into.gpr[13] = x86.r13;
    into.gpr[14] = x86.r14;
    into.gpr[15] = x86.r15;
    into.rip = x86.rip;
    into.rflags = x86.rflags;
}

std::uint64_t address_of(const vmi_event_t& event) noexcept
{
    // LibVMI takes RIP for the linear address.
    const x86_registers_t& x86 = *event.x86_regs;
    const std::uint64_t linear = mode_of(x86) == ffi::CodeMode::Bits64 ? x86.rip : x86.cs_base + x86.rip;
    return event.interrupt_event.gfn << PAGE_SHIFT | (linear & PAGE_OFFSET);
}

bool translate(const vmi_event_t& event, ffi::Event& into) noexcept
{
    const x86_registers_t& x86 = *event.x86_regs;
    registers_of(x86, into.registers);
    into.vcpu = static_cast<std::uint16_t>(event.vcpu_id);
    into.view = event.slat_id;
    into.gpa = 0;
    into.length = 0;
    into.accesses = {};
    into.page_walk = false;
    switch (event.type) {
    case VMI_EVENT_INTERRUPT: {
        if (event.interrupt_event.intr != INT3)
            return false;
        into.reason = ffi::Reason::Int3;
        into.gpa = address_of(event);
        into.length = static_cast<std::uint8_t>(event.interrupt_event.insn_length);
        return true;
    }
    case VMI_EVENT_MEMORY:
        into.reason = ffi::Reason::Access;
        into.gpa = event.mem_event.gfn << PAGE_SHIFT | (event.mem_event.offset & PAGE_OFFSET);
        into.accesses = accesses_of(event.mem_event.out_access);
        into.page_walk = event.mem_event.gla_valid != 0 && event.mem_event.gptw != 0;
        return true;
    case VMI_EVENT_SINGLESTEP:
        into.reason = ffi::Reason::Step;
        return true;
    case VMI_EVENT_FAILED_EMULATION:
        into.reason = ffi::Reason::EmulationFailed;
        return true;
    default:
        return false;
    }
}

event_response_t respond(const ffi::Reply& reply, vmi_event_t& event, EmulationData& data) noexcept
{
    event_response_t response = VMI_EVENT_RESPONSE_NONE;
    if (event.type == VMI_EVENT_INTERRUPT)
        event.interrupt_event.reinject = reply.action == ffi::Action::Reinject ? 1 : 0;
    // LibVMI sets this, and what depends on it, but never resets it (`issue_mem_cb`, driver/xen/xen_events.c).
    if (event.type == VMI_EVENT_MEMORY)
        event.mem_event.gla_valid = 0;
    if (reply.switch_view) {
        event.slat_id = reply.view;
        response |= VMI_EVENT_RESPONSE_SLAT_ID;
    }
    switch (reply.step) {
    // It toggles; on and off are never asked for while it is so already.
    case ffi::Step::On:
    case ffi::Step::Off:
        response |= VMI_EVENT_RESPONSE_TOGGLE_SINGLESTEP;
        break;
    case ffi::Step::Fast:
        event.next_slat_id = reply.fast_view;
        response |= VMI_EVENT_RESPONSE_NEXT_SLAT_ID;
        break;
    case ffi::Step::Keep:
        break;
    }
    switch (reply.action) {
    case ffi::Action::Emulate:
        response |= VMI_EVENT_RESPONSE_EMULATE;
        break;
    case ffi::Action::EmulateRead:
    case ffi::Action::EmulateInstruction:
        response |= emulate(reply, event, data);
        break;
    case ffi::Action::SetRegisters:
        set_registers(reply.registers, *event.x86_regs);
        response |= VMI_EVENT_RESPONSE_SET_REGISTERS;
        break;
    case ffi::Action::Resume:
    case ffi::Action::Reinject:
        break;
    }
    return response;
}

} // namespace hyperbp
