#include "libvmi.hpp"

#include <cstring>
#include <stdexcept>

#include <sys/mman.h>

namespace {

namespace ffi = fake::ffi;

// As Xen has them.
constexpr std::uint64_t LIMIT = 0xfffff;
constexpr std::uint64_t CODE_32 = 0xc9b;
constexpr std::uint64_t DATA_32 = 0xc93;

void fill(const ffi::Registers& from, x86_registers_t& x86)
{
    const auto& gpr = from.general.gpr;
    x86.rax = gpr[0];
    x86.rcx = gpr[1];
    x86.rdx = gpr[2];
    x86.rbx = gpr[3];
    x86.rsp = gpr[4];
    x86.rbp = gpr[5];
    x86.rsi = gpr[6];
    x86.rdi = gpr[7];
    std::uint64_t* high = &x86.r8;
    for (std::size_t n = 8; n < gpr.size(); ++n)
        *high++ = gpr[n];
    x86.rip = from.general.rip;
    x86.rflags = from.general.rflags;
    x86.cr0 = from.cr0;
    x86.dr7 = from.dr7;
    x86.cs_limit = x86.ss_limit = x86.ds_limit = x86.es_limit = LIMIT;
    x86.cs_arbytes = CODE_32;
    x86.ss_arbytes = x86.ds_arbytes = x86.es_arbytes = DATA_32;
}

ffi::General general(const x86_registers_t& x86)
{
    ffi::General into {};
    const std::uint64_t low[] = {x86.rax, x86.rcx, x86.rdx, x86.rbx, x86.rsp, x86.rbp, x86.rsi, x86.rdi};
    std::memcpy(into.gpr.data(), low, sizeof(low));
    std::memcpy(into.gpr.data() + 8, &x86.r8, 8 * sizeof(std::uint64_t));
    into.rip = x86.rip;
    into.rflags = x86.rflags;
    return into;
}

/// What a response says, as LibVMI reads it (`process_response`, driver/xen/xen_events.c) and Xen carries it out.
ffi::Reply reply_of(event_response_t response, const vmi_event_t& event, const x86_registers_t& x86, bool stepping)
{
    const auto has = [response](event_response_t flag) {
        return (response & flag) != 0;
    };
    ffi::Reply reply {};
    reply.switch_view = has(VMI_EVENT_RESPONSE_SLAT_ID);
    reply.view = event.slat_id;
    if (has(VMI_EVENT_RESPONSE_TOGGLE_SINGLESTEP))
        reply.step = stepping ? ffi::Step::Off : ffi::Step::On;
    if (has(VMI_EVENT_RESPONSE_NEXT_SLAT_ID)) {
        reply.step = ffi::Step::Fast;
        reply.fast_view = event.next_slat_id;
    }
    if (has(VMI_EVENT_RESPONSE_EMULATE))
        reply.action = ffi::Action::Emulate;
    if (has(VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA)) {
        reply.action = ffi::Action::EmulateRead;
        std::memcpy(reply.bytes.data(), event.emul_read->data, event.emul_read->size);
        if (event.emul_read->dont_free == 0)
            throw std::logic_error("LibVMI would free the data");
    }
    if (has(VMI_EVENT_RESPONSE_SET_EMUL_INSN)) {
        reply.action = ffi::Action::EmulateInstruction;
        std::memcpy(reply.bytes.data(), event.emul_insn->data, sizeof(event.emul_insn->data));
        if (event.emul_insn->dont_free == 0)
            throw std::logic_error("LibVMI would free the data");
    }
    if (has(VMI_EVENT_RESPONSE_SET_REGISTERS)) {
        if (reply.action == ffi::Action::EmulateRead || reply.action == ffi::Action::EmulateInstruction)
            throw std::logic_error("registers and data for the emulator are in one union");
        reply.action = ffi::Action::SetRegisters;
        reply.registers = general(x86);
    }
    if (event.type == VMI_EVENT_INTERRUPT) {
        if (event.interrupt_event.reinject != 0 && event.interrupt_event.reinject != 1)
            throw std::logic_error("LibVMI needs to know whether to reinject");
        if (event.interrupt_event.reinject == 1)
            reply.action = ffi::Action::Reinject;
    }
    return reply;
}

/// Does something on the machine, and says whether it did not throw.
template<typename Work>
status_t attempt(Work work)
{
    try {
        work();
        return VMI_SUCCESS;
    } catch (const std::runtime_error&) {
        return VMI_FAILURE;
    }
}

ffi::Rights left_of(vmi_mem_access_t trapped)
{
    switch (trapped) {
    case VMI_MEMACCESS_N:
        return ffi::Rights::All;
    case VMI_MEMACCESS_W:
        return ffi::Rights::ReadExecute;
    case VMI_MEMACCESS_X:
        return ffi::Rights::ReadWrite;
    case VMI_MEMACCESS_RW:
        return ffi::Rights::Execute;
    case VMI_MEMACCESS_WX:
        return ffi::Rights::Read;
    case VMI_MEMACCESS_RWX:
        return ffi::Rights::None;
    default:
        throw std::runtime_error("LibVMI does not know this combination");
    }
}

} // namespace

vmi_event_t* vmi_instance::registered_for(const ffi::Event& event)
{
    switch (event.reason) {
    case ffi::Reason::Int3:
        interrupt->interrupt_event.gfn = event.gpa >> fake::PAGE_SHIFT;
        interrupt->interrupt_event.insn_length = event.length;
        interrupt->interrupt_event.reinject = -1;
        return interrupt;
    case ffi::Reason::Access:
        memory->mem_event.gfn = event.gpa >> fake::PAGE_SHIFT;
        memory->mem_event.offset = event.gpa % fake::PAGE_SIZE;
        memory->mem_event.gla = event.gpa;
        memory->mem_event.gla_valid = 1;
        memory->mem_event.out_access = static_cast<vmi_mem_access_t>((event.accesses.read ? VMI_MEMACCESS_R : 0)
                                                                     | (event.accesses.write ? VMI_MEMACCESS_W : 0)
                                                                     | (event.accesses.execute ? VMI_MEMACCESS_X : 0));
        return memory;
    case ffi::Reason::Step:
        return steps.at(event.vcpu);
    case ffi::Reason::EmulationFailed:
        return failed_emulation;
    }
    return nullptr;
}

void vmi_instance::run(std::uint16_t vcpu)
{
    const auto event = machine.run(vcpu);
    if (!event)
        return;
    vmi_event_t* registered = registered_for(*event);
    if (registered == nullptr)
        throw std::logic_error("nobody has registered for this event");
    x86_registers_t x86 {};
    fill(event->registers, x86);
    registered->x86_regs = &x86;
    registered->slat_id = event->view;
    registered->vcpu_id = vcpu;
    last = registered->callback(this, registered);
    // That a step is stopped in the callback counts, too.
    machine.answer(*event, reply_of(last, *registered, x86, machine.vcpu(vcpu).stepping));
}

void* vmi_instance::map(std::uint64_t gfn, std::size_t pages, int prot)
{
    machine.page(gfn);
    const auto offset = static_cast<off_t>(machine.offset_of(gfn));
    void* page = mmap(nullptr, pages * fake::PAGE_SIZE, prot, MAP_SHARED, machine.file(), offset);
    if (page == MAP_FAILED)
        throw std::runtime_error("mmap");
    ++mapped;
    return page;
}

extern "C" {

unsigned int vmi_get_num_vcpus(vmi_instance_t vmi) noexcept
{
    return vmi->machine.vcpus();
}

uint64_t vmi_get_vmid(vmi_instance_t /*vmi*/) noexcept
{
    return 1;
}

int vmi_are_events_pending(vmi_instance_t vmi) noexcept
{
    return vmi->pending ? 1 : 0;
}

status_t vmi_mmap_guest_pa(vmi_instance_t vmi, addr_t paddr, size_t num_pages, int prot, void** access_ptrs) noexcept
{
    return attempt([&] { *access_ptrs = vmi->map(paddr >> fake::PAGE_SHIFT, num_pages, prot); });
}

status_t vmi_pause_vm(vmi_instance_t vmi) noexcept
{
    return attempt([&] { vmi->machine.pause(); });
}

status_t vmi_resume_vm(vmi_instance_t vmi) noexcept
{
    return attempt([&] { vmi->machine.resume(); });
}

status_t vmi_slat_create(vmi_instance_t vmi, uint16_t* slat_id) noexcept
{
    return attempt([&] { *slat_id = vmi->machine.create_view(); });
}

status_t vmi_slat_destroy(vmi_instance_t vmi, uint16_t slat_idx) noexcept
{
    return attempt([&] { vmi->machine.drop_view(slat_idx); });
}

status_t vmi_slat_switch(vmi_instance_t vmi, uint16_t slat_idx) noexcept
{
    return attempt([&] { vmi->machine.switch_view(slat_idx); });
}

status_t vmi_slat_change_gfn(vmi_instance_t vmi, uint16_t slat_idx, addr_t old_gfn, addr_t new_gfn) noexcept
{
    return attempt([&] {
        if (new_gfn == ~addr_t {0})
            vmi->machine.unmap(slat_idx, old_gfn);
        else
            vmi->machine.remap(slat_idx, old_gfn, new_gfn);
    });
}

status_t vmi_set_mem_event(vmi_instance_t vmi, addr_t gfn, vmi_mem_access_t access, uint16_t vmm_pagetable_id) noexcept
{
    // "It is unsafe to set mem access without a handler being registered!"
    if (access != VMI_MEMACCESS_N && vmi->memory == nullptr)
        return VMI_FAILURE;
    return attempt([&] { vmi->machine.set_rights(vmm_pagetable_id, gfn, left_of(access)); });
}

vmi_event_t* vmi_get_singlestep_event(vmi_instance_t vmi, uint32_t vcpu) noexcept
{
    const auto found = vmi->steps.find(vcpu);
    return found != vmi->steps.end() ? found->second : nullptr;
}

status_t vmi_get_vcpureg(vmi_instance_t vmi, uint64_t* value, reg_t reg, unsigned long vcpu) noexcept
{
    if (reg != RIP)
        return VMI_FAILURE;
    return attempt([&] { *value = vmi->machine.rip(static_cast<std::uint16_t>(vcpu)); });
}

status_t vmi_stop_single_step_vcpu(vmi_instance_t vmi, vmi_event_t* event, uint32_t vcpu) noexcept
{
    event->ss_event.vcpus &= ~(1U << vcpu);
    vmi->steps.erase(vcpu);
    return attempt([&] { vmi->machine.stop_step(static_cast<std::uint16_t>(vcpu)); });
}

status_t vmi_register_event(vmi_instance_t vmi, vmi_event_t* event) noexcept
{
    if (event->version != VMI_EVENTS_VERSION || event->callback == nullptr)
        return VMI_FAILURE;
    const auto once = [event](vmi_event_t*& registered) {
        if (registered != nullptr)
            return VMI_FAILURE;
        registered = event;
        return VMI_SUCCESS;
    };
    switch (event->type) {
    case VMI_EVENT_INTERRUPT:
        return once(vmi->interrupt);
    case VMI_EVENT_MEMORY:
        return once(vmi->memory);
    case VMI_EVENT_FAILED_EMULATION:
        return once(vmi->failed_emulation);
    case VMI_EVENT_SINGLESTEP:
        for (std::uint32_t vcpu = 0; vcpu < vmi->machine.vcpus(); ++vcpu) {
            if ((event->ss_event.vcpus & 1U << vcpu) != 0 && vmi->steps.count(vcpu) != 0)
                return VMI_FAILURE;
        }
        for (std::uint32_t vcpu = 0; vcpu < vmi->machine.vcpus(); ++vcpu) {
            if ((event->ss_event.vcpus & 1U << vcpu) != 0) {
                vmi->steps[vcpu] = event;
                vmi->machine.vcpu(static_cast<std::uint16_t>(vcpu)).stepping |= event->ss_event.enable != 0;
            }
        }
        return VMI_SUCCESS;
    default:
        return VMI_FAILURE;
    }
}

} // extern "C"
