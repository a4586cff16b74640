/*
 * hyperbp in a program that has LibVMI: the breakpoints of a domain, set with any mechanism, unseen by the guest.
 *
 * The program owns the connection and the loop. It opens a session, and gives each event of LibVMI's that is about
 * breakpoints to it: in two halves, with its own callbacks between them.
 *
 *     static event_response_t on_event(vmi_instance_t vmi, vmi_event_t* event)
 *     {
 *         hyperbp_what_t what;
 *         event_response_t response;
 *         switch (hyperbp_begin(session, event, &what, &response)) {
 *         case HYPERBP_HIT:
 *             response = call_those_who_want_to_know(what.pa, event);
 *             return hyperbp_finish(session, event, response);
 *         ...
 *         default:
 *             return response;
 *         }
 *     }
 *
 * A session is used by one thread at a time, and not from within a function of it: what a callback of hyperbp_memory_t,
 * or a second thread, calls meanwhile fails (hyperbp_begin with HYPERBP_FAILED), and so does what is given no session.
 * It must not be closed while another thread may still call it. No exception, and no panic, leaves these functions.
 */
#ifndef HYPERBP_BACKEND_H
#define HYPERBP_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <libvmi/libvmi.h>

#include <libvmi/events.h>

#ifdef __cplusplus
extern "C" {
#define HYPERBP_NOEXCEPT noexcept
#else
#define HYPERBP_NOEXCEPT
#endif

/* The breakpoints and watches of one domain. */
typedef struct hyperbp_session hyperbp_session_t;

/* What a program does itself of what LibVMI cannot do, or some of its forks not rightly. A function that is NULL
 * hyperbp does by hypercalls of its own, which needs a dom0 with Linux 4.18 or newer: so most programs need none of
 * them. All are called with `data`, and may be called from within any function here. Those that return a bool say
 * whether they have succeeded. */
typedef struct hyperbp_memory
{
    void* data;
    /* Adds a page to the domain, at a frame number where nothing is, and says which. Xen replaces what is there. */
    bool (*add_page)(void* data, uint64_t* gfn);
    /* Takes such a page away again. */
    bool (*drop_page)(void* data, uint64_t gfn);
    /* Maps a page of the domain's memory for reading and writing, until munmap() of that one page; NULL if it fails. */
    void* (*map_page)(void* data, uint64_t gfn);
    /* Makes a view (altp2m) in which the guest may do everything, and says which. LibVMI destroys the view. */
    bool (*create_view)(void* data, uint16_t* view);
} hyperbp_memory_t;

/* What an event is. */
typedef enum hyperbp_observed {
    /* Nobody needs to be told: return the response. */
    HYPERBP_ANSWERED,
    /* The breakpoint at `pa` was hit; its instruction has not run. Tell whom it concerns, then finish. */
    HYPERBP_HIT,
    /* A watched page is about to be accessed, at `pa`. Tell whoever watches it, then finish. */
    HYPERBP_ACCESS,
    /* A watched page has been accessed. Tell whoever watches it, then finish. */
    HYPERBP_ACCESSED,
    /* The session has failed, with this event or before. The response lets the virtual CPU go on. Close the session. */
    HYPERBP_FAILED
} hyperbp_observed_t;

/* Where, and how. */
typedef struct hyperbp_what
{
    /* Guest-physical. */
    uint64_t pa;
    /* With HYPERBP_ACCESS and HYPERBP_ACCESSED: VMI_MEMACCESS_R, _W and _X. */
    vmi_mem_access_t access;
    /* With HYPERBP_ACCESS: it is made to fetch the instruction with the breakpoint at `breakpoint_pa`: tell its
     * subscribers, too. There will be no HYPERBP_HIT. */
    bool breakpoint;
    uint64_t breakpoint_pa;
} hyperbp_what_t;

/* How often what happened since the session was opened. */
typedef struct hyperbp_counters
{
    /* Breakpoints were hit. */
    uint64_t hits;
    /* Reads of, and writes to, a page with breakpoints were answered. */
    uint64_t reads;
    uint64_t writes;
    /* A virtual CPU was about to execute a page, with breakpoints in place, that another one was accessing: it had to
     * wait. */
    uint64_t held;
    /* The guest wrote to a frame where there is none of its own. */
    uint64_t discarded;
    /* A page with breakpoints had been written to, and by no virtual CPU: a device has, or another domain. */
    uint64_t resynced;
    /* Another page was where breakpoints were, or Xen had reset the views: they were set again. */
    uint64_t rearmed;
    /* The guest's own INT3s were delivered to it. */
    uint64_t reinjected;
    /* Xen could not emulate an instruction; it was stepped. */
    uint64_t emulation_failures;
    /* Events that no breakpoint explains (any more); the guest went on. */
    uint64_t unexplained;
    /* Xen refused something in the middle of a hit; the guest went on. */
    uint64_t failures;
    /* How long handling a hit took, from the beginning of the first half to the end of the second: the median, the 90th
     * and the 99th percentile, and the longest. In nanoseconds, by the TSC; with two significant digits. */
    uint64_t p50_ns;
    uint64_t p90_ns;
    uint64_t p99_ns;
    uint64_t max_ns;
} hyperbp_counters_t;

/* What a breakpoint has done since it was set. */
typedef struct hyperbp_figures
{
    uint64_t pa;
    /* Lives as long as the session. */
    const char* mechanism;
    uint64_t hits;
    /* What stepped over its instruction, so often. The rest were the guest's own INT3s, or the breakpoint was removed,
     * or a callback has changed RIP. */
    uint64_t repair;
    uint64_t view_step;
    uint64_t view_fast_step;
    uint64_t emulate;
    uint64_t interpret;
    /* It was not what the mechanism names, which could not do this instruction. */
    uint64_t fallbacks;
    /* The guest has changed the instruction; the breakpoint is on the new one. */
    uint64_t rewritten;
} hyperbp_figures_t;

/* Why the last call of this thread that failed did so: a sentence. Never NULL; good until the next call fails. */
const char* hyperbp_error(void) HYPERBP_NOEXCEPT;

/* Whether there is a mechanism with this name. If not, hyperbp_error() names those there are. */
bool hyperbp_check_mechanism(const char* name) HYPERBP_NOEXCEPT;

/* Begins to work on a domain: makes the views, and lets all virtual CPUs run in the one that shows breakpoints.
 *
 * Before, `vmi` must have altp2m switched on (vmi_slat_control), a generic event for memory accesses of all three kinds
 * registered, and, for each virtual CPU, one for single-steps with `enable` 0. Those for INT3s, memory and single-steps
 * are to be given to the session. The one for failed emulations is registered here, and answered here.
 *
 * A domain with altp2m="mixed" or "limited" is refused: its guest could leave the view with the breakpoints.
 *
 * `mechanism` is one for all breakpoints; NULL means "auto". `memory` is copied; NULL stands for one without functions.
 * NULL if it fails. */
hyperbp_session_t* hyperbp_open(vmi_instance_t vmi, const char* mechanism,
                                const hyperbp_memory_t* memory) HYPERBP_NOEXCEPT;

/* Takes all breakpoints and watches away, and gives their pages back. To be called before the domain is paused to close
 * the session: it is waited until every virtual CPU has gone on with what it was answered last, of which there is
 * seldom one that has not, and none for longer than a second. (Xen does what a response asks for when the virtual CPU
 * goes on, and too late if a page has been given back meanwhile: then the guest might crash.) Then pause the domain,
 * handle the events that are queued, as ever, and close. Until then, an INT3 of the guest's own is not delivered but
 * tried again. If it returns false, hyperbp_close tries the rest once more. NULL has left already. */
bool hyperbp_leave(hyperbp_session_t* session) HYPERBP_NOEXCEPT;

/* Gives everything back to the domain, and frees the session. hyperbp_leave is to have been called before (else it is
 * now), the domain to be paused, and the events that are queued to have been handled. Also after a failure. If it
 * returns false, the domain is not quite as it was, and there is nothing more that can be done; the session is freed
 * nevertheless. NULL is closed already. */
bool hyperbp_close(hyperbp_session_t* session) HYPERBP_NOEXCEPT;

/* Sets a breakpoint on the instruction at a guest-physical address. If there is one already, that is it: whoever has
 * several subscribers keeps the list of them. */
bool hyperbp_insert(hyperbp_session_t* session, uint64_t pa) HYPERBP_NOEXCEPT;

/* Removes it. The guest's own byte is back when this returns. */
bool hyperbp_remove(hyperbp_session_t* session, uint64_t pa) HYPERBP_NOEXCEPT;

/* Reports the guest's accesses of these kinds to a page: before, and, if `after`, also when they have been made.
 * Replaces the watch there; VMI_MEMACCESS_N ends it. */
bool hyperbp_watch(hyperbp_session_t* session, uint64_t gfn, vmi_mem_access_t access, bool after) HYPERBP_NOEXCEPT;

/* Looks after what no event tells. A program calls it every HYPERBP_VERIFY_MS milliseconds or so, whether there are
 * events or not, and not from within a callback. What a device, or another domain, writes to a page with breakpoints is
 * no event: until the page is compared, which this does for the next 16 of them, the guest executes what was there
 * before. False if a page could not be compared: the guest may have given it back, and hyperbp goes on. */
bool hyperbp_verify(hyperbp_session_t* session) HYPERBP_NOEXCEPT;

#define HYPERBP_VERIFY_MS 50

/* First half: what an event is (of an INT3, of memory, of a single-step). If that is HYPERBP_ANSWERED or
 * HYPERBP_FAILED,
 * `*response` is what the callback is to return. Else the callbacks it concerns are to be called, which may insert and
 * remove what they like, and then hyperbp_finish. `*what` and `*response` are always written. */
hyperbp_observed_t hyperbp_begin(hyperbp_session_t* session, vmi_event_t* event, hyperbp_what_t* what,
                                 event_response_t* response) HYPERBP_NOEXCEPT;

/* Second half: what the callback is to return. `response` is what the callbacks it concerned have returned. Of that,
 * what decides how the virtual CPU goes on is replaced; with VMI_EVENT_RESPONSE_SET_REGISTERS in it, as everywhere with
 * LibVMI, their changes to general registers, RIP and RFLAGS in `event->x86_regs` count. If RIP is another one, the
 * instruction at the old one does not run. If the session fails with this, hyperbp_failed() says so. */
event_response_t hyperbp_finish(hyperbp_session_t* session, vmi_event_t* event,
                                event_response_t response) HYPERBP_NOEXCEPT;

/* Whether a bug in hyperbp has ended the session: then it can only be closed. What it had done to the domain has been
 * undone. */
bool hyperbp_failed(const hyperbp_session_t* session) HYPERBP_NOEXCEPT;

/* Whether a virtual CPU is to meet breakpoints and watches. The program switches it to `*view`, with the response to
 * the event at hand. */
bool hyperbp_monitor(hyperbp_session_t* session, uint16_t vcpu, bool monitored, uint16_t* view) HYPERBP_NOEXCEPT;

/* The same for all virtual CPUs, which are switched here. */
bool hyperbp_monitor_all(hyperbp_session_t* session, bool monitored) HYPERBP_NOEXCEPT;

/* The view in which virtual CPUs meet breakpoints. */
uint16_t hyperbp_view(const hyperbp_session_t* session) HYPERBP_NOEXCEPT;

/* What the breakpoints have done, by address, for as many as there is `room` for. Returns how many there are. */
size_t hyperbp_breakpoints(const hyperbp_session_t* session, hyperbp_figures_t* into, size_t room) HYPERBP_NOEXCEPT;

/* What happened so far. */
bool hyperbp_counters(const hyperbp_session_t* session, hyperbp_counters_t* into) HYPERBP_NOEXCEPT;

/* What waits for a domain's events, in one thread: beside a session, or without one. */
typedef struct hyperbp_waiter hyperbp_waiter_t;

/* How a wait has ended. */
typedef enum hyperbp_waited {
    /* There may be events: call vmi_events_listen(vmi, 0). */
    HYPERBP_WOKEN,
    /* There were none, for about as long as was asked for. */
    HYPERBP_TIMED_OUT,
    /* A signal has come. */
    HYPERBP_INTERRUPTED,
    /* It cannot be waited for like this, or not now: hyperbp_error() says why. It can be in another way. */
    HYPERBP_NOT_WAITED
} hyperbp_waited_t;

/* How it may be waited. */
typedef struct hyperbp_ways
{
    /* Looking at the ring, for about so many microseconds before it sleeps, HYPERBP_WATCH_LONGEST at most: that takes a
     * CPU meanwhile. With 0, never. */
    uint32_t watch_us;
    /* In Xen. */
    bool halt;
} hyperbp_ways_t;

#define HYPERBP_WATCH_DEFAULT 200
#define HYPERBP_WATCH_LONGEST 10000

/* How often it was waited in which way, and whether that has paid. */
typedef struct hyperbp_waits
{
    /* It has looked at the ring, and there was an event; or not, and it went on in another way. */
    uint64_t watched;
    uint64_t watched_in_vain;
    /* Xen has waited until there was an event; or until something else ended that, and it slept. */
    uint64_t halted;
    uint64_t halted_in_vain;
    /* It has slept. */
    uint64_t slept;
} hyperbp_waits_t;

/* Begins to wait for events. `device` is the file descriptor of their event channel (xenevtchn_fd), a blocking one,
 * which has only LibVMI's port, and that nobody else reads from. `vmi` is an instance whose events are waited for by
 * its host: it was initialised with VMI_INIT_EVENTS and that event channel (VMI_INIT_DATA_XEN_EVTCHN). Both are to live
 * until the waiter is closed. Of what `ways` allows it does what pays; NULL allows HYPERBP_WATCH_DEFAULT, and to halt.
 * NULL if it fails. */
hyperbp_waiter_t* hyperbp_waiter_open(vmi_instance_t vmi, int device, const hyperbp_ways_t* ways) HYPERBP_NOEXCEPT;

/* Frees it. Nothing may be signalled any more until the event channel is closed. NULL is closed already. */
void hyperbp_waiter_close(hyperbp_waiter_t* waiter) HYPERBP_NOEXCEPT;

/* Waits, for so many milliseconds, or, if `timeout` is negative, which costs less, until there is something. Of the
 * ways to wait it finds out which takes the least time: docs/waiting.md says what they are. */
hyperbp_waited_t hyperbp_wait(hyperbp_waiter_t* waiter, int timeout) HYPERBP_NOEXCEPT;

/* Before the device is waited for in another way, with poll() for one: until this is called nothing may be readable
 * there. */
bool hyperbp_stop_waiting(hyperbp_waiter_t* waiter) HYPERBP_NOEXCEPT;

/* How it has waited so far. */
bool hyperbp_waiter_figures(const hyperbp_waiter_t* waiter, hyperbp_waits_t* into) HYPERBP_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#endif
