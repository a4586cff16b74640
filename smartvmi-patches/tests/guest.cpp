#include "guest.hpp"

#include <stdexcept>
#include <vector>

#include <sys/mman.h>

#include "../../cpp-shim/tests/fake/libvmi.hpp"
#include "../../cpp-shim/tests/host.hpp"

namespace {

constexpr std::uint64_t LOAD = 0x3000;
constexpr std::uint64_t LENGTH = 5;

} // namespace

struct Guest::Parts
{
    fake::Machine machine {VCPUS};
    vmi_instance vmi {machine};
    std::vector<std::uint8_t> before;

    void run(std::uint16_t vcpu, std::uint64_t from, std::uint64_t to)
    {
        machine.vcpu(vcpu).general.rip = from;
        finish(vcpu, to);
    }

    void finish(std::uint16_t vcpu, std::uint64_t to)
    {
        for (unsigned n = 0; n < 1000; ++n) {
            const fake::Vcpu& it = machine.vcpu(vcpu);
            if (it.general.rip == to && !it.stepping && !it.emulation_failed)
                return;
            vmi.run(vcpu);
        }
        throw std::runtime_error("the guest does not arrive");
    }
};

Guest::Guest() : parts_(std::make_unique<Parts>())
{
    write_code(parts_->machine, AT, {fake::MOV_EAX, 0x11, 0x22, 0x33, 0x44});
    write_code(parts_->machine, LOAD, {fake::LOAD_AL, AT & 0xff, AT >> 8, 0, 0});
    write_code(parts_->machine, OWN, {fake::BREAKPOINT});
    parts_->before = parts_->machine.memory();
}

Guest::~Guest() = default;

vmi_instance_t Guest::vmi()
{
    return &parts_->vmi;
}

std::uint32_t Guest::execute(std::uint16_t vcpu)
{
    parts_->machine.vcpu(vcpu).general.gpr[0] = 0;
    parts_->run(vcpu, AT, AT + LENGTH);
    return static_cast<std::uint32_t>(parts_->machine.vcpu(vcpu).general.gpr[0]);
}

void Guest::hit(std::uint16_t vcpu)
{
    parts_->machine.vcpu(vcpu).general.rip = AT;
    parts_->vmi.run(vcpu);
}

void Guest::finish(std::uint16_t vcpu)
{
    parts_->finish(vcpu, AT + LENGTH);
}

std::uint8_t Guest::read(std::uint16_t vcpu)
{
    parts_->run(vcpu, LOAD, LOAD + LENGTH);
    return static_cast<std::uint8_t>(parts_->machine.vcpu(vcpu).general.gpr[0]);
}

bool Guest::interrupt(std::uint16_t vcpu)
{
    const unsigned before = parts_->machine.delivered();
    parts_->machine.vcpu(vcpu).general.rip = OWN;
    parts_->vmi.run(vcpu);
    return parts_->machine.delivered() == before + 1;
}

std::uint64_t Guest::add_page()
{
    return parts_->machine.add_page();
}

void Guest::drop_page(std::uint64_t gfn)
{
    parts_->machine.drop_page(gfn);
}

void* Guest::map_page(std::uint64_t gfn)
{
    const auto offset = static_cast<off_t>(parts_->machine.offset_of(gfn));
    void* page = mmap(nullptr, fake::PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, parts_->machine.file(), offset);
    if (page == MAP_FAILED)
        throw std::runtime_error("mmap");
    return page;
}

std::uint16_t Guest::create_view()
{
    return parts_->machine.create_view();
}

void Guest::pause()
{
    parts_->machine.pause();
}

void Guest::resume()
{
    parts_->machine.resume();
}

std::string Guest::differences()
{
    std::string differences;
    if (!(parts_->machine.traces() == fake::Traces {}))
        differences += "something of the monitor's is left in the domain; ";
    if (parts_->machine.memory() != parts_->before)
        differences += "memory is another; ";
    return differences;
}
