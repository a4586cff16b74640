#include "hyperbp/backend.h"

#include <atomic>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "failed_emulation.hpp"
#include "hyperbp/vmi_event.hpp"

namespace ffi = hyperbp::ffi;

struct hyperbp_session
{
    vmi_instance_t vmi;
    rust::Box<ffi::Session> session;
    std::string mechanism;
    bool hits_need_registers;
    // Each event is translated into the same place.
    ffi::Event event {};
    ffi::Reply reply {};
    hyperbp::EmulationData data {};
    // Somebody is in one of the functions below.
    mutable std::atomic<bool> in_use {false};
};

struct hyperbp_waiter
{
    rust::Box<ffi::Waiter> waiter;
};

namespace {

/// Why the last call failed. Of a fixed size, so that saying so cannot fail.
constexpr std::size_t LONGEST_ERROR = 1024;
thread_local char last_error[LONGEST_ERROR] = "nothing has failed";

void remember(const char* message) noexcept
{
    const std::size_t length = std::char_traits<char>::length(message);
    const std::size_t kept = length < LONGEST_ERROR ? length : LONGEST_ERROR - 1;
    std::char_traits<char>::copy(last_error, message, kept);
    last_error[kept] = '\0';
}

/// Calls `work`, and returns what it returns, or, if it throws, `otherwise`.
template<typename T, typename Work>
T guarded(T otherwise, Work work) noexcept
{
    try {
        return work();
    } catch (const std::exception& error) {
        remember(error.what());
    } catch (...) {
        remember("something that is no std::exception was thrown");
    }
    return otherwise;
}

/// The use of a session by one function. It is refused where there is no session, and where it is in use: a callback of
/// the session's own, or another thread, would find it in the middle of something.
class Use
{
public:
    explicit Use(const hyperbp_session_t* session) noexcept : session_(session)
    {
        if (session_ == nullptr) {
            remember("there is no session: NULL was given");
        } else if (session_->in_use.exchange(true, std::memory_order_acquire)) {
            session_ = nullptr;
            remember("the session is in use: neither a callback of its own, nor another thread at the same time, may "
                     "call it");
        }
    }

    ~Use()
    {
        if (session_ != nullptr)
            session_->in_use.store(false, std::memory_order_release);
    }

    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

    explicit operator bool() const noexcept
    {
        return session_ != nullptr;
    }

    /// The session is about to be freed.
    void forget() noexcept
    {
        session_ = nullptr;
    }

private:
    const hyperbp_session_t* session_;
};

/// Calls `work` with a session, and returns what it returns, or, if it is refused or throws, `otherwise`.
template<typename T, typename Work>
T with(const hyperbp_session_t* session, T otherwise, Work work) noexcept
{
    const Use use(session);
    return use ? guarded(otherwise, work) : otherwise;
}

/// The host's functions, as a class.
class HostMemory final : public hyperbp::Memory
{
public:
    explicit HostMemory(const hyperbp_memory_t& memory) : memory_(memory) {}

    bool adds_pages() const noexcept override
    {
        return memory_.add_page != nullptr;
    }

    std::uint64_t add_page() override
    {
        std::uint64_t gfn = 0;
        if (!memory_.add_page(memory_.data, &gfn))
            throw std::runtime_error("the host program could not add a page of memory to the domain");
        return gfn;
    }

    void drop_page(std::uint64_t gfn) override
    {
        if (!memory_.drop_page(memory_.data, gfn))
            throw std::runtime_error("the host program could not take a page of memory away from the domain");
    }

    bool maps_pages() const noexcept override
    {
        return memory_.map_page != nullptr;
    }

    std::uint8_t* map_page(std::uint64_t gfn) override
    {
        void* page = memory_.map_page(memory_.data, gfn);
        if (page == nullptr)
            throw std::runtime_error("the host program could not map a page of the domain's memory");
        return static_cast<std::uint8_t*>(page);
    }

    bool creates_views() const noexcept override
    {
        return memory_.create_view != nullptr;
    }

    std::uint16_t create_view() override
    {
        std::uint16_t view = 0;
        if (!memory_.create_view(memory_.data, &view))
            throw std::runtime_error("the host program could not make a view of the domain's memory");
        return view;
    }

private:
    hyperbp_memory_t memory_;
};

/// Writes the last reply where LibVMI looks for it.
event_response_t respond(hyperbp_session_t& session, vmi_event_t& event) noexcept
{
    return hyperbp::respond(session.reply, event, session.data);
}

event_response_t on_failed_emulation(vmi_instance_t /*vmi*/, vmi_event_t* event) noexcept
{
    hyperbp_what_t what;
    event_response_t response = VMI_EVENT_RESPONSE_NONE;
    auto* session = static_cast<hyperbp_session_t*>(event->data);
    // It is never anything that somebody would have to be told.
    hyperbp_begin(session, event, &what, &response);
    return response;
}

/// An INT3 without prefixes.
bool is_plain_int3(const vmi_event_t& event) noexcept
{
    return event.type == VMI_EVENT_INTERRUPT && event.interrupt_event.intr == INT3
           && event.interrupt_event.insn_length == 1;
}

hyperbp_observed_t kind_of(ffi::Kind kind) noexcept
{
    switch (kind) {
    case ffi::Kind::Answered:
        return HYPERBP_ANSWERED;
    case ffi::Kind::Hit:
        return HYPERBP_HIT;
    case ffi::Kind::Access:
        return HYPERBP_ACCESS;
    case ffi::Kind::Accessed:
        return HYPERBP_ACCESSED;
    case ffi::Kind::Failed:
        break;
    }
    return HYPERBP_FAILED;
}

} // namespace

extern "C" {

const char* hyperbp_error(void) noexcept
{
    return last_error;
}

bool hyperbp_check_mechanism(const char* name) noexcept
{
    return guarded(false, [&] {
        ffi::check_mechanism(name);
        return true;
    });
}

hyperbp_session_t* hyperbp_open(vmi_instance_t vmi, const char* mechanism, const hyperbp_memory_t* memory) noexcept
{
    return guarded(static_cast<hyperbp_session_t*>(nullptr), [&] {
        const hyperbp_memory_t nothing {};
        if (memory == nullptr)
            memory = &nothing;
        if (vmi == nullptr)
            throw std::invalid_argument("hyperbp_open needs an instance of LibVMI: NULL was given");
        if ((memory->add_page == nullptr) != (memory->drop_page == nullptr))
            throw std::invalid_argument("hyperbp_memory_t has to have both add_page and drop_page, or neither");
        const char* name = mechanism != nullptr ? mechanism : "auto";
        auto opened = ffi::open_libvmi(vmi, std::make_unique<HostMemory>(*memory), name);
        std::string canonical(opened->mechanism());
        const bool hits_need_registers = opened->hits_need_registers();
        std::unique_ptr<hyperbp_session_t> session(
            new hyperbp_session_t {vmi, std::move(opened), std::move(canonical), hits_need_registers});
        hyperbp::answer_failed_emulations(vmi, on_failed_emulation, session.get());
        return session.release();
    });
}

bool hyperbp_leave(hyperbp_session_t* session) noexcept
{
    if (session == nullptr)
        return true;
    return with(session, false, [&] {
        session->session->leave();
        return true;
    });
}

bool hyperbp_close(hyperbp_session_t* session) noexcept
{
    if (session == nullptr)
        return true;
    Use use(session);
    if (!use)
        return false;
    use.forget();
    const std::unique_ptr<hyperbp_session_t> owned(session);
    hyperbp::forget_failed_emulations(owned->vmi);
    return guarded(false, [&] {
        owned->session->close();
        return true;
    });
}

bool hyperbp_insert(hyperbp_session_t* session, uint64_t pa) noexcept
{
    return with(session, false, [&] {
        session->session->insert(pa);
        return true;
    });
}

bool hyperbp_remove(hyperbp_session_t* session, uint64_t pa) noexcept
{
    return with(session, false, [&] {
        session->session->remove(pa);
        return true;
    });
}

bool hyperbp_watch(hyperbp_session_t* session, uint64_t gfn, vmi_mem_access_t access, bool after) noexcept
{
    return with(session, false, [&] {
        session->session->watch(gfn, hyperbp::accesses_of(access), after);
        return true;
    });
}

bool hyperbp_verify(hyperbp_session_t* session) noexcept
{
    return with(session, false, [&] {
        session->session->verify();
        return true;
    });
}

hyperbp_observed_t hyperbp_begin(hyperbp_session_t* session, vmi_event_t* event, hyperbp_what_t* what,
                                 event_response_t* response) noexcept
{
    *what = {};
    *response = VMI_EVENT_RESPONSE_NONE;
    const Use use(session);
    if (!use)
        return HYPERBP_FAILED;
    if (event->vcpu_id > UINT16_MAX) {
        remember("there are no virtual CPUs with such a number");
        return HYPERBP_FAILED;
    }
    if (event->type == VMI_EVENT_SINGLESTEP
        && session->session->step(static_cast<std::uint16_t>(event->vcpu_id), session->reply)) {
        *response = respond(*session, *event);
        return HYPERBP_ANSWERED;
    }
    const bool plain = !session->hits_need_registers && is_plain_int3(*event);
    if (!plain && !hyperbp::translate(*event, session->event))
        return HYPERBP_ANSWERED;
    const ffi::Observed observed =
        plain ? session->session->begin_int3(static_cast<std::uint16_t>(event->vcpu_id), event->slat_id,
                                             hyperbp::address_of(*event), event->x86_regs->rip, session->reply)
              : session->session->begin(session->event, session->reply);
    what->pa = observed.pa;
    if (observed.kind == ffi::Kind::Access || observed.kind == ffi::Kind::Accessed) {
        what->access = hyperbp::flags_of(observed.accesses);
        what->breakpoint = observed.breakpoint;
        what->breakpoint_pa = observed.breakpoint_pa;
    }
    if (observed.kind == ffi::Kind::Answered || observed.kind == ffi::Kind::Failed)
        *response = respond(*session, *event);
    return kind_of(observed.kind);
}

event_response_t hyperbp_finish(hyperbp_session_t* session, vmi_event_t* event, event_response_t response) noexcept
{
    const Use use(session);
    if (!use)
        return response & ~hyperbp::OURS;
    if ((response & VMI_EVENT_RESPONSE_SET_REGISTERS) != 0) {
        hyperbp::general_of(*event->x86_regs, session->event.registers.general);
        session->session->finish_with(session->event.registers.general, session->reply);
    } else {
        session->session->finish(session->reply);
    }
    return (response & ~hyperbp::OURS) | respond(*session, *event);
}

bool hyperbp_failed(const hyperbp_session_t* session) noexcept
{
    // One that is not there cannot be used either.
    return session == nullptr || session->session->failed();
}

bool hyperbp_monitor(hyperbp_session_t* session, uint16_t vcpu, bool monitored, uint16_t* view) noexcept
{
    return with(session, false, [&] {
        *view = session->session->monitor(vcpu, monitored);
        return true;
    });
}

bool hyperbp_monitor_all(hyperbp_session_t* session, bool monitored) noexcept
{
    return with(session, false, [&] {
        session->session->monitor_all(monitored);
        return true;
    });
}

uint16_t hyperbp_view(const hyperbp_session_t* session) noexcept
{
    return session == nullptr ? std::uint16_t {0} : session->session->view();
}

size_t hyperbp_breakpoints(const hyperbp_session_t* session, hyperbp_figures_t* into, size_t room) noexcept
{
    return with(session, std::size_t {0}, [&] {
        std::vector<ffi::Figures> figures(into != nullptr ? room : 0);
        const std::size_t count = session->session->breakpoints({figures.data(), figures.size()});
        for (std::size_t n = 0; n < figures.size() && n < count; ++n) {
            const ffi::Figures& from = figures[n];
            into[n] = {from.pa,        session->mechanism.c_str(),
                       from.hits,      from.repair,
                       from.view_step, from.view_fast_step,
                       from.emulate,   from.interpret,
                       from.fallbacks, from.rewritten};
        }
        return count;
    });
}

bool hyperbp_counters(const hyperbp_session_t* session, hyperbp_counters_t* into) noexcept
{
    return with(session, false, [&] {
        const ffi::Counters from = session->session->counters();
        *into = {from.hits,        from.reads,      from.writes,
                 from.held,        from.discarded,  from.resynced,
                 from.rearmed,     from.reinjected, from.emulation_failures,
                 from.unexplained, from.failures,   from.p50_ns,
                 from.p90_ns,      from.p99_ns,     from.max_ns};
        return true;
    });
}

hyperbp_waiter_t* hyperbp_waiter_open(vmi_instance_t vmi, int device, const hyperbp_ways_t* ways) noexcept
{
    const hyperbp_ways_t usual = {HYPERBP_WATCH_DEFAULT, true};
    const hyperbp_ways_t& how = ways == nullptr ? usual : *ways;
    return guarded(static_cast<hyperbp_waiter_t*>(nullptr),
                   [&] { return new hyperbp_waiter_t {ffi::open_waiter(vmi, device, how.watch_us, how.halt)}; });
}

void hyperbp_waiter_close(hyperbp_waiter_t* waiter) noexcept
{
    delete waiter;
}

hyperbp_waited_t hyperbp_wait(hyperbp_waiter_t* waiter, int timeout) noexcept
{
    return guarded(HYPERBP_NOT_WAITED, [&] {
        if (waiter == nullptr)
            throw std::invalid_argument("there is no waiter: NULL was given");
        switch (waiter->waiter->wait(timeout)) {
        case ffi::Waited::TimedOut:
            return HYPERBP_TIMED_OUT;
        case ffi::Waited::Interrupted:
            return HYPERBP_INTERRUPTED;
        case ffi::Waited::Woken:
            break;
        }
        return HYPERBP_WOKEN;
    });
}

bool hyperbp_stop_waiting(hyperbp_waiter_t* waiter) noexcept
{
    return guarded(false, [&] {
        if (waiter == nullptr)
            throw std::invalid_argument("there is no waiter: NULL was given");
        waiter->waiter->stop();
        return true;
    });
}

bool hyperbp_waiter_figures(const hyperbp_waiter_t* waiter, hyperbp_waits_t* into) noexcept
{
    return guarded(false, [&] {
        if (waiter == nullptr)
            throw std::invalid_argument("there is no waiter: NULL was given");
        const ffi::Waits from = waiter->waiter->waits();
        *into = {from.watched, from.watched_in_vain, from.halted, from.halted_in_vain, from.slept};
        return true;
    });
}

} // extern "C"
