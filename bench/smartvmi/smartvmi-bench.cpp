/*
 * Serves the benchmark guest's breakpoints with vmicore's own classes, for the runner (bench/runner/src/elsewhere.rs).
 *
 * This file is ours (MIT or Apache-2.0) and calls what vmicore's headers declare. The program it becomes has SmartVMI
 * in it and falls under SmartVMI's licence: it is built where it is run, and not given away.
 *
 *   smartvmi-bench --backends
 *       The backends it has, one a line: `original`, and `hyperbp` where that is loaded in SmartVMI.
 *   smartvmi-bench --domain ID --gpa ADDRESS[,ADDRESS...] --backend B --mechanism M
 *       Sets a breakpoint at each address, says `ready`, and serves them until SIGTERM, SIGINT, or until its
 *       standard input, a pipe, closes. Then it takes them out and says how often each was hit, {"hits":[N,...]}.
 *       Exit codes: 0 fine, 2 bad arguments, 1 anything else; why is on standard error.
 *
 * vmicore wants a Linux or Windows guest with a profile, to find processes and their page tables. The benchmark guest
 * has neither, and is mapped one to one. So vmicore's start (`VmiHub::run`) is done here without what is about
 * processes, and its call of `vmi_init_complete` is led (by the linker's `--wrap`) to one that leaves out the operating
 * system. All that happens at a hit is vmicore's.
 */
#include <algorithm>
#include <cctype>
#include <cinttypes>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fcntl.h>
#include <iostream>
#include <memory>
#include <optional>
#include <poll.h>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <vector>

#include "lib/GlobalControl.h"
#include "lib/config/ConfigYAMLParser.h"
#include "lib/io/console/ConsoleLoggerBuilder.h"
#include "lib/io/console/DummyEventStream.h"
#include "lib/vmi/InterruptEventSupervisor.h"
#include "lib/vmi/LibvmiInterface.h"
#include "lib/vmi/RegisterEventSupervisor.h"
#include "lib/vmi/SingleStepSupervisor.h"
#ifdef VMICORE_HYPERBP
#include "lib/vmi/HyperbpEventSupervisor.h"
#include "lib/vmi/XenDomain.h"
#endif

namespace {

constexpr char ORIGINAL_BACKEND[] = "original";
constexpr char HYPERBP_BACKEND[] = "hyperbp";

/// The page table of the guest's first virtual CPU: all of them have the same.
std::uint64_t guest_page_table = 0;

bool is_number(const std::string& text)
{
    return !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c) != 0; });
}

} // namespace

/// What `vmi_init_complete` does before it looks for an operating system. Domains are named by number here.
extern "C" status_t __wrap_vmi_init_complete(vmi_instance_t* vmi, const void* domain, std::uint64_t flags,
                                             vmi_init_data_t* data, vmi_config_t, void*,
                                             vmi_init_error_t* error) noexcept
{
    const std::string name(static_cast<const char*>(domain));
    std::uint64_t number = 0;
    if (is_number(name)) {
        number = std::strtoull(name.c_str(), nullptr, 10);
        domain = &number;
        flags = (flags & ~static_cast<std::uint64_t>(VMI_INIT_DOMAINNAME)) | VMI_INIT_DOMAINID;
    }
    if (vmi_init(vmi, VMI_XEN, domain, flags, data, error) != VMI_SUCCESS)
        return VMI_FAILURE;
    if (vmi_init_paging(*vmi, 0) == VMI_PM_UNKNOWN || vmi_get_vcpureg(*vmi, &guest_page_table, CR3, 0) != VMI_SUCCESS) {
        if (error != nullptr)
            *error = VMI_INIT_ERROR_PAGING;
        return VMI_FAILURE;
    }
    return VMI_SUCCESS;
}

namespace {

using namespace VmiCore;

/// The arguments make no sense.
class Usage : public std::runtime_error
{
    using std::runtime_error::runtime_error;
};

struct Arguments
{
    std::string domain, backend, mechanism;
    std::vector<std::uint64_t> addresses;
};

extern "C" void on_signal(int)
{
    GlobalControl::endVmi = true;
}

/// Asks for a signal when standard input closes: the loop that is measured waits for no file of ours, and has no second
/// thread for it, for both would cost it instructions. Where this does not work (a file, /dev/null), the other signals
/// remain.
void watch_input()
{
    const int flags = fcntl(STDIN_FILENO, F_GETFL);
    if (flags < 0 || fcntl(STDIN_FILENO, F_SETOWN, getpid()) < 0 || fcntl(STDIN_FILENO, F_SETFL, flags | O_ASYNC) < 0)
        return;
    // It may have been closed before.
    pollfd input {STDIN_FILENO, POLLIN, 0};
    if (poll(&input, 1, 0) == 1 && (input.revents & POLLHUP) != 0)
        GlobalControl::endVmi = true;
}

void handle_signals()
{
    struct sigaction action
    {
    };
    action.sa_handler = on_signal;
    for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGIO})
        sigaction(signal, &action, nullptr);
    // The count is said to whoever is left, and the breakpoint is taken out in any case.
    std::signal(SIGPIPE, SIG_IGN);
}

/// A configuration, of which the file is not read.
struct Configuration : ConfigYAMLParser
{
#ifdef VMICORE_HYPERBP
    std::optional<std::string> mechanism;

    std::optional<HyperbpConfig> getHyperbpConfig() const override
    {
        return mechanism ? std::make_optional(HyperbpConfig {.mechanism = *mechanism}) : std::nullopt;
    }
#endif
};

/// What vmicore's main() and VmiHub make, without what is about processes, plugins and gRPC.
struct Vmicore
{
    std::shared_ptr<Configuration> config = std::make_shared<Configuration>();
    std::shared_ptr<ILogging> logging;
    std::shared_ptr<IEventStream> events = std::make_shared<DummyEventStream>();
    std::shared_ptr<LibvmiInterface> vmi;
    std::shared_ptr<ISingleStepSupervisor> steps;
    std::shared_ptr<IRegisterEventSupervisor> registers;
    std::shared_ptr<IInterruptEventSupervisor> interrupts;
#ifdef VMICORE_HYPERBP
    /// The same, if it is hyperbp's.
    std::shared_ptr<HyperbpEventSupervisor> hyperbp;
#endif

    explicit Vmicore(const Arguments& arguments)
    {
        using Builder = ::rust::Box<::logging::console::ConsoleLoggerBuilder>;
        logging = std::make_shared<ConsoleLoggerBuilder>(
            std::make_shared<Builder>(::logging::console::new_console_logger_builder()));
        GlobalControl::init(logging->newLogger(), events);
        config->setVmName(arguments.domain);
#ifdef VMICORE_HYPERBP
        if (arguments.backend == HYPERBP_BACKEND)
            config->mechanism = arguments.mechanism;
#endif
        vmi = std::make_shared<LibvmiInterface>(config, logging, events);
        steps = std::make_shared<SingleStepSupervisor>(vmi, logging);
        registers = std::make_shared<RegisterEventSupervisor>(vmi, logging);
        vmi->initializeVmi();
        interrupts = supervisor(arguments);
    }

    Vmicore(const Vmicore&) = delete;
    Vmicore& operator=(const Vmicore&) = delete;

    /// As VmiHub does it.
    void wait_for_events()
    {
        while (!GlobalControl::endVmi) {
            vmi->eventsListen(500);
#ifdef VMICORE_HYPERBP
            if (hyperbp)
                hyperbp->checkSession();
#endif
        }
    }

    ~Vmicore()
    {
        // They say what they do.
#ifdef VMICORE_HYPERBP
        hyperbp.reset();
#endif
        interrupts.reset();
        registers.reset();
        steps.reset();
        vmi.reset();
        GlobalControl::uninit();
    }

private:
    std::shared_ptr<IInterruptEventSupervisor> supervisor(const Arguments& arguments)
    {
        // It keeps the list of processes, and never asks it anything.
        const std::shared_ptr<IActiveProcessesSupervisor> processes;
#ifdef VMICORE_HYPERBP
        if (arguments.backend == HYPERBP_BACKEND)
            return hyperbp = std::make_shared<HyperbpEventSupervisor>(
                       vmi, std::make_unique<XenDomain>(vmi->getCurrentVmId()), arguments.mechanism, logging);
#else
        (void)arguments;
#endif
        return std::make_shared<InterruptEventSupervisor>(vmi, steps, processes, registers, logging);
    }
};

/// Until a signal comes. Returns how often each was hit.
std::vector<std::uint64_t> serve(const Arguments& arguments)
{
    handle_signals();
    Vmicore vmicore(arguments);
    ActiveProcessInformation guest {};
    guest.processDtb = guest_page_table;
    guest.processUserDtb = guest_page_table;
    std::vector<std::uint64_t> hits(arguments.addresses.size());

    // As VmiHub does it.
    vmicore.vmi->pauseVm();
    vmicore.interrupts->initialize();
    std::vector<std::shared_ptr<IBreakpoint>> breakpoints;
    for (std::size_t n = 0; n < hits.size(); n++) {
        const std::uint64_t address = arguments.addresses[n];
        auto on_hit = [&count = hits[n]](IInterruptEvent&) {
            ++count;
            return BpResponse::Continue;
        };
        breakpoints.push_back(vmicore.interrupts->createBreakpoint(address, guest, on_hit, true));
        if (breakpoints.back()->getTargetPA() != address)
            throw std::runtime_error("the guest is not mapped one to one: is it the benchmark guest?");
    }
    vmicore.vmi->resumeVm();

    watch_input();
    std::puts("ready");
    std::fflush(stdout);
    vmicore.wait_for_events();

#ifdef VMICORE_HYPERBP
    if (vmicore.hyperbp)
        vmicore.hyperbp->leave();
#endif
    vmicore.vmi->pauseVm();
    for (const auto& breakpoint : breakpoints)
        breakpoint->remove();
    vmicore.interrupts->teardown();
    vmicore.vmi->resumeVm();
#ifdef VMICORE_HYPERBP
    if (vmicore.hyperbp && vmicore.hyperbp->hasFailed())
        throw std::runtime_error("hyperbp has failed");
#endif
    return hits;
}

/// Before anything is done to the domain.
void check(const Arguments& arguments)
{
    const std::string& mechanism = arguments.mechanism;
    if (arguments.backend == ORIGINAL_BACKEND) {
        if (mechanism != "repair")
            throw Usage("original SmartVMI has only repair, not " + mechanism);
    } else if (arguments.backend == HYPERBP_BACKEND) {
#ifdef VMICORE_HYPERBP
        if (!hyperbp_check_mechanism(mechanism.c_str()))
            throw Usage(hyperbp_error());
#else
        throw Usage("this SmartVMI was built without hyperbp, and has no " + mechanism);
#endif
    } else {
        throw Usage("there is no backend " + arguments.backend);
    }
}

Arguments parse(int argc, char** argv)
{
    Arguments arguments;
    std::string addresses;
    const struct
    {
        const char* name;
        std::string& value;
    } options[] = {{"--domain", arguments.domain},
                   {"--gpa", addresses},
                   {"--backend", arguments.backend},
                   {"--mechanism", arguments.mechanism}};
    for (int i = 1; i < argc; i += 2) {
        const std::string name(argv[i]);
        const auto* option =
            std::find_if(std::begin(options), std::end(options), [&](const auto& known) { return name == known.name; });
        if (option == std::end(options))
            throw Usage("unknown argument: " + name);
        if (i + 1 == argc)
            throw Usage("no value for " + name);
        option->value = argv[i + 1];
    }
    for (const auto& option : options)
        if (option.value.empty())
            throw Usage(std::string("missing: ") + option.name);
    for (std::size_t begin = 0, end = 0; end != std::string::npos; begin = end + 1) {
        end = addresses.find(',', begin);
        const std::string address = addresses.substr(begin, end - begin);
        char* rest = nullptr;
        arguments.addresses.push_back(std::strtoull(address.c_str(), &rest, 0));
        if (address.empty() || *rest != '\0')
            throw Usage("this is no address: " + address);
    }
    return arguments;
}

int run(int argc, char** argv)
{
    if (argc == 2 && std::string(argv[1]) == "--backends") {
        std::puts(ORIGINAL_BACKEND);
#ifdef VMICORE_HYPERBP
        std::puts(HYPERBP_BACKEND);
#endif
        return 0;
    }
    const Arguments arguments = parse(argc, argv);
    check(arguments);
    std::string counts;
    for (const std::uint64_t hits : serve(arguments))
        counts += (counts.empty() ? "" : ",") + std::to_string(hits);
    std::printf("{\"hits\":[%s]}\n", counts.c_str());
    return 0;
}

} // namespace

int main(int argc, char** argv)
{
    try {
        return run(argc, argv);
    } catch (const Usage& problem) {
        std::cerr << problem.what()
                  << "\nusage: smartvmi-bench --domain ID --gpa ADDRESS[,ADDRESS...] --backend original|hyperbp "
                     "--mechanism M\n";
        return 2;
    } catch (const std::exception& problem) {
        std::cerr << problem.what() << '\n';
    }
    return 1;
}
