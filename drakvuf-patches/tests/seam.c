/*
 * Tests of the seam in a patched libdrakvuf (vmi.c and hyperbp.c), over a LibVMI, a Xen and a hyperbp that only take
 * notes. No Xen is needed. `seam.sh` builds and runs it.
 *
 * This file is ours (MIT or Apache-2.0). The program it becomes has DRAKVUF in it and falls under DRAKVUF's licence: it
 * is built where it is run, and not given away.
 */
#include <config.h>

#include <assert.h>
#include <errno.h>

#include <sys/mman.h>

#include <libdrakvuf/hyperbp.h>
#include <libdrakvuf/private.h>
#include <libdrakvuf/vmi.h>
#include <xenforeignmemory.h>

/* -------- what the others note */

static char notes[4096];

#define NOTE(...) snprintf(notes + strlen(notes), sizeof notes - strlen(notes), __VA_ARGS__)

static void expect(const char* what, const char* noted)
{
    if (strcmp(notes, noted)) {
        fprintf(stderr, "%s:\n  noted    %s\n  expected %s\n", what, notes, noted);
        exit(1);
    }
    printf("ok: %s\n", what);
    notes[0] = 0;
}

/* -------- hyperbp */

struct hyperbp_session
{
    bool failed;
};

static struct hyperbp_session session;
static unsigned verified; // so often pages were compared
/* What it says of the next event, and whether it refuses everything else. */
static hyperbp_observed_t observed;
static hyperbp_what_t observed_what;
static event_response_t response;
static bool refuses;
/* Whether the last event was finished with registers. */
static bool sets_registers;
/* Whether the domain runs. */
static bool runs;

const char* hyperbp_error(void)
{
    return "it was told to refuse";
}

bool hyperbp_check_mechanism(const char* name)
{
    return !strcmp(name, "auto");
}

hyperbp_session_t* hyperbp_open(vmi_instance_t vmi, const char* mechanism, const hyperbp_memory_t* memory)
{
    NOTE("open %s;", mechanism);
    assert(!memory);
    return refuses ? NULL : &session;
}

bool hyperbp_verify(hyperbp_session_t* asked)
{
    assert(asked == &session);
    ++verified;
    return !refuses;
}

bool hyperbp_leave(hyperbp_session_t* left)
{
    assert(left == &session && runs);
    NOTE("leave;");
    return !refuses;
}

bool hyperbp_close(hyperbp_session_t* closed)
{
    assert(closed == &session);
    NOTE("close;");
    return true;
}

bool hyperbp_insert(hyperbp_session_t* unused, uint64_t pa)
{
    NOTE("insert %" PRIx64 ";", pa);
    return !refuses;
}

bool hyperbp_remove(hyperbp_session_t* unused, uint64_t pa)
{
    NOTE("remove %" PRIx64 ";", pa);
    return !refuses;
}

static const char* letters_of(vmi_mem_access_t access)
{
    static char letters[4];
    char* end = letters;
    if (access & VMI_MEMACCESS_R)
        *end++ = 'r';
    if (access & VMI_MEMACCESS_W)
        *end++ = 'w';
    if (access & VMI_MEMACCESS_X)
        *end++ = 'x';
    *end = 0;
    return access == VMI_MEMACCESS_N ? "none" : letters;
}

bool hyperbp_watch(hyperbp_session_t* unused, uint64_t gfn, vmi_mem_access_t access, bool after)
{
    NOTE("watch %" PRIx64 " %s%s;", gfn, letters_of(access), after ? " after" : "");
    return !refuses;
}

hyperbp_observed_t hyperbp_begin(hyperbp_session_t* unused, vmi_event_t* event, hyperbp_what_t* what,
                                 event_response_t* rsp)
{
    NOTE("begin;");
    *what = observed_what;
    *rsp = observed == HYPERBP_ANSWERED || observed == HYPERBP_FAILED ? response : VMI_EVENT_RESPONSE_NONE;
    return observed;
}

event_response_t hyperbp_finish(hyperbp_session_t* unused, vmi_event_t* event, event_response_t rsp)
{
    NOTE("finish;");
    sets_registers = rsp & VMI_EVENT_RESPONSE_SET_REGISTERS;
    return response;
}

static hyperbp_waited_t waited;

hyperbp_waiter_t* hyperbp_waiter_open(vmi_instance_t vmi, int device, const hyperbp_ways_t* ways)
{
    NOTE("waiter %u%s;", ways->watch_us, ways->halt ? " halt" : "");
    return (hyperbp_waiter_t*)&session;
}

void hyperbp_waiter_close(hyperbp_waiter_t* closed)
{
    if (closed)
        NOTE("no waiter;");
}

hyperbp_waited_t hyperbp_wait(hyperbp_waiter_t* unused, int timeout)
{
    NOTE("wait;");
    return waited;
}

bool hyperbp_stop_waiting(hyperbp_waiter_t* unused)
{
    NOTE("stop waiting;");
    return true;
}

bool hyperbp_waiter_figures(const hyperbp_waiter_t* unused, hyperbp_waits_t* into)
{
    *into = (hyperbp_waits_t) {.slept = 7};
    return true;
}

bool hyperbp_failed(const hyperbp_session_t* asked)
{
    return asked->failed;
}

enum { VIEW = 7, OWN_VIEW = 8 };

bool hyperbp_monitor(hyperbp_session_t* unused, uint16_t vcpu, bool monitored, uint16_t* view)
{
    NOTE("monitor %d %d;", vcpu, monitored);
    *view = monitored ? VIEW : OWN_VIEW;
    return !refuses;
}

bool hyperbp_monitor_all(hyperbp_session_t* unused, bool monitored)
{
    NOTE("monitor all %d;", monitored);
    return !refuses;
}

uint16_t hyperbp_view(const hyperbp_session_t* unused)
{
    return VIEW;
}

/* -------- LibVMI */

static vmi_event_t *int3, *memory, *cr3, *steps[2];

status_t vmi_init(vmi_instance_t* vmi, vmi_mode_t mode, const void* domain, uint64_t flags, vmi_init_data_t* data,
                  vmi_init_error_t* error)
{
    *vmi = (vmi_instance_t)1;
    return VMI_SUCCESS;
}

unsigned int vmi_get_num_vcpus(vmi_instance_t vmi)
{
    return NUMBER_OF(steps);
}

addr_t vmi_get_max_physical_address(vmi_instance_t vmi)
{
    return 0x100000;
}

status_t vmi_register_event(vmi_instance_t vmi, vmi_event_t* event)
{
    switch (event->type) {
    case VMI_EVENT_INTERRUPT:
        int3 = event;
        break;
    case VMI_EVENT_MEMORY:
        memory = event;
        break;
    case VMI_EVENT_SINGLESTEP:
        steps[event->ss_event.vcpus == 1 ? 0 : 1] = event;
        break;
    case VMI_EVENT_REGISTER:
        NOTE("CR3 on;");
        cr3 = event;
        break;
    default:
        assert(!"an event nobody needs");
    }
    return VMI_SUCCESS;
}

status_t vmi_clear_event(vmi_instance_t vmi, vmi_event_t* event, vmi_event_free_t free_routine)
{
    if (event == cr3)
        NOTE("CR3 off;");
    return VMI_SUCCESS;
}

status_t vmi_slat_control(vmi_instance_t vmi, bool state)
{
    NOTE("altp2m %d;", state);
    return VMI_SUCCESS;
}

status_t vmi_slat_switch(vmi_instance_t vmi, uint16_t view)
{
    NOTE("view %d;", view);
    return VMI_SUCCESS;
}

status_t vmi_events_listen(vmi_instance_t vmi, uint32_t timeout)
{
    NOTE("listen;");
    return VMI_SUCCESS;
}

status_t vmi_destroy(vmi_instance_t vmi)
{
    return VMI_SUCCESS;
}
void vmi_v2pcache_flush(vmi_instance_t vmi, addr_t pt) {}
void vmi_pidcache_flush(vmi_instance_t vmi) {}
void vmi_rvacache_flush(vmi_instance_t vmi) {}
void vmi_symcache_flush(vmi_instance_t vmi) {}

/* -------- Xen */

xc_evtchn* xen_get_evtchn(xen_interface_t* xen)
{
    return NULL;
}
static int channel[2] = {-1, -1};

int xen_get_evtchn_fd(xen_interface_t* xen)
{
    return channel[0];
}

uint64_t xen_get_maxmemkb(xen_interface_t* xen, domid_t domain)
{
    return 1;
}
bool xen_set_maxmemkb(xen_interface_t* xen, domid_t domain, uint64_t memkb)
{
    return true;
}
bool xen_set_altp2m_params(xen_interface_t* xen, domid_t domain)
{
    return true;
}
bool xen_pause(xen_interface_t* xen, domid_t domain)
{
    runs = false;
    return true;
}
void xen_resume(xen_interface_t* xen, domid_t domain) {}
int xen_version(void)
{
    return 17;
}

/* -------- the rest of libdrakvuf */

void free_wrapper(gpointer wrapper)
{
    g_slice_free(struct wrapper, wrapper);
}
void free_remapped_gfn(gpointer remapped)
{
    assert(!"DRAKVUF's own shadow pages are not made");
}
void drakvuf_force_resume(drakvuf_t drakvuf)
{
    runs = true;
}
bool drakvuf_pause(drakvuf_t drakvuf)
{
    runs = false;
    return true;
}
bool drakvuf_resume(drakvuf_t drakvuf)
{
    return true;
}
vmi_instance_t drakvuf_lock_and_get_vmi(drakvuf_t drakvuf)
{
    return drakvuf->vmi;
}
void drakvuf_release_vmi(drakvuf_t drakvuf) {}
addr_t drakvuf_get_current_process(drakvuf_t drakvuf, drakvuf_trap_info_t* info)
{
    return 1;
}
addr_t drakvuf_get_current_attached_process(drakvuf_t drakvuf, drakvuf_trap_info_t* info)
{
    return 0;
}
bool drakvuf_is_ignored_process(drakvuf_t drakvuf, vmi_pid_t pid)
{
    return false;
}
bool drakvuf_is_active_callback(drakvuf_t drakvuf, drakvuf_trap_info_t* info)
{
    return true;
}
uint64_t drakvuf_get_limited_traps_ttl(drakvuf_t drakvuf)
{
    return 100;
}
void drakvuf_copy_gpr_registers(x86_registers_t* into, x86_registers_t* from)
{
    into->rip = from->rip;
}

bool drakvuf_get_current_thread_id(drakvuf_t drakvuf, drakvuf_trap_info_t* info, uint32_t* thread)
{
    *thread = 3;
    return true;
}

bool drakvuf_get_process_data_priv(drakvuf_t drakvuf, addr_t process, proc_data_priv_t* data)
{
    data->name = g_strdup("init");
    return true;
}

char* drakvuf_get_current_process_name(drakvuf_t drakvuf, drakvuf_trap_info_t* info, bool full)
{
    return g_strdup("init");
}

/* As it does: at the end of the event, if there is one. */
static void remove_soon(drakvuf_t drakvuf, drakvuf_trap_t* trap)
{
    if (!drakvuf->in_callback) {
        remove_trap(drakvuf, trap);
        return;
    }
    struct free_trap_wrapper* request = g_slice_new0(struct free_trap_wrapper);
    request->trap = trap;
    g_hash_table_insert(drakvuf->remove_traps, trap, request);
}

/* -------- the tests */

static struct drakvuf drakvuf;
static x86_registers_t registers = {.rip = 0x1000};

/* What the next callback does besides. */
static drakvuf_trap_t *removes, *inserts;
static addr_t sets_rip;

static event_response_t callback(drakvuf_t drakvuf, drakvuf_trap_info_t* info)
{
    NOTE("%s at %" PRIx64 " in %s, %" PRIu64 ";", info->trap->name, info->trap_pa, info->proc_data.name,
         info->event_uid);
    if (removes)
        remove_soon(drakvuf, removes);
    if (inserts)
        inject_trap_pa(drakvuf, inserts, inserts->breakpoint.addr);
    if (sets_rip) {
        drakvuf->vmi_response_set_registers[info->vcpu] = true;
        drakvuf->regs_modified[info->vcpu].rip = sets_rip;
    }
    removes = inserts = NULL;
    sets_rip = 0;
    return VMI_EVENT_RESPONSE_NONE;
}

static drakvuf_trap_t on(const char* name, addr_t pa)
{
    return (drakvuf_trap_t) {.type = BREAKPOINT, .cb = callback, .name = name, .breakpoint.addr = pa};
}

static drakvuf_trap_t watching(const char* name, addr_t gfn, vmi_mem_access_t access, memaccess_type_t when)
{
    drakvuf_trap_t trap = {.type = MEMACCESS, .cb = callback, .name = name};
    trap.memaccess.gfn = gfn;
    trap.memaccess.access = access;
    trap.memaccess.type = when;
    return trap;
}

/* An event of which hyperbp says this. */
static event_response_t happens(vmi_event_t* event, hyperbp_observed_t what, uint64_t pa)
{
    observed = what;
    observed_what = (hyperbp_what_t) {.pa = pa};
    event->x86_regs = &registers;
    return event->callback(drakvuf.vmi, event);
}

/* An access of which hyperbp says so, and, if `breakpoint` is not 0, that it fetches the instruction there. */
static void accesses(vmi_mem_access_t access, uint64_t pa, uint64_t breakpoint)
{
    memory->mem_event.gfn = pa >> 12;
    memory->mem_event.offset = pa & 0xfff;
    memory->mem_event.out_access = access;
    memory->x86_regs = &registers;
    observed = HYPERBP_ACCESS;
    observed_what =
        (hyperbp_what_t) {.pa = pa, .access = access, .breakpoint = breakpoint != 0, .breakpoint_pa = breakpoint};
    memory->callback(drakvuf.vmi, memory);
}

static void opens(void)
{
    assert(!drakvuf_use_hyperbp("nonsense"));
    assert(drakvuf_use_hyperbp("auto"));
    assert(init_vmi(&drakvuf, true));
    assert(drakvuf_get_hyperbp(&drakvuf) == &session && drakvuf.altp2m_idx == VIEW);
    assert(int3 && memory && steps[0] && steps[1]);
    expect("no view and no sink page of DRAKVUF's is made", "altp2m 1;open auto;");
}

static void breakpoints(void)
{
    drakvuf_trap_t a = on("a", 0x5004), b = on("b", 0x5004), c = on("c", 0x7008);
    assert(inject_trap_pa(&drakvuf, &a, 0x5004) && inject_trap_pa(&drakvuf, &b, 0x5004) && a.last_ttl_rst);
    expect("two traps at an address are one breakpoint", "insert 5004;");
    response = VMI_EVENT_RESPONSE_NEXT_SLAT_ID;
    assert(happens(int3, HYPERBP_HIT, 0x5004) == VMI_EVENT_RESPONSE_NEXT_SLAT_ID);
    expect("both are told, the newer one first", "begin;b at 5004 in init, 1;a at 5004 in init, 1;finish;");
    assert(happens(int3, HYPERBP_ANSWERED, 0) == VMI_EVENT_RESPONSE_NEXT_SLAT_ID);
    expect("an INT3 that is answered is told nobody", "begin;");
    removes = &b;
    happens(int3, HYPERBP_HIT, 0x5004);
    expect("a trap is removed in its callback, and the other stays",
           "begin;b at 5004 in init, 2;a at 5004 in init, 2;finish;");
    removes = &a;
    inserts = &c;
    happens(int3, HYPERBP_HIT, 0x5004);
    expect("the last one is removed in its callback, and another set",
           "begin;a at 5004 in init, 3;insert 7008;remove 5004;finish;");
    happens(int3, HYPERBP_HIT, 0x5004);
    expect("a hit that nobody waits for any more is finished", "begin;finish;");
    sets_rip = 0x2000;
    happens(int3, HYPERBP_HIT, 0x7008);
    assert(registers.rip == 0x2000 && sets_registers && !drakvuf.vmi_response_set_registers[0]);
    expect("an injection's registers are set", "begin;c at 7008 in init, 4;finish;");
    c.ttl = 1;
    c.ah_cb = remove_soon;
    happens(int3, HYPERBP_HIT, 0x7008);
    expect("a trap that is hit too often goes", "begin;c at 7008 in init, 5;remove 7008;finish;");
    remove_soon(&drakvuf, &c);
    expect("a trap that is gone is not removed again", "");
}

static void watches(void)
{
    drakvuf_trap_t r = watching("r", 7, VMI_MEMACCESS_R, PRE), w = watching("w", 7, VMI_MEMACCESS_W, POST);
    drakvuf_trap_t x = watching("x", 7, VMI_MEMACCESS_X, PRE), c = on("c", 0x7008), d = on("d", 0x5004);
    assert(inject_trap_mem(&drakvuf, &r, false) && inject_trap_mem(&drakvuf, &w, false));
    expect("a page is watched for all that its traps want", "watch 7 r;watch 7 rw after;");
    accesses(VMI_MEMACCESS_R, 0x7010, 0);
    expect("a read is told the trap for reads", "begin;r at 7010 in init, 6;finish;");
    accesses(VMI_MEMACCESS_W, 0x7010, 0);
    expect("a write is not told a POST trap before it is made", "begin;finish;");
    happens(steps[0], HYPERBP_ACCESSED, 0x7010);
    expect("but then, with the process of before", "begin;w at 7010 in init, 0;finish;");
    happens(steps[0], HYPERBP_ACCESSED, 0x7010);
    happens(steps[1], HYPERBP_ANSWERED, 0);
    expect("a step of nobody's is told nobody", "begin;finish;begin;");
    assert(inject_trap_mem(&drakvuf, &x, false) && inject_trap_pa(&drakvuf, &c, 0x7008));
    expect("one for execution, and a breakpoint in the page", "watch 7 rwx after;insert 7008;");
    accesses(VMI_MEMACCESS_X, 0x7008, 0);
    expect("a fetch at its address that is not of it", "begin;x at 7008 in init, 8;finish;");
    accesses(VMI_MEMACCESS_X, 0x7010, 0x7008);
    expect("a fetch of it", "begin;x at 7010 in init, 9;c at 7008 in init, 9;finish;");

    assert(inject_trap_pa(&drakvuf, &d, 0x5004));
    memory->mem_event.gfn = 5;
    sets_rip = 0x3000;
    happens(memory, HYPERBP_HIT, 0x5004);
    assert(registers.rip == 0x3000 && sets_registers && !drakvuf.vmi_response_set_registers[0]);
    expect("a hit by a fetch, in a page that nobody watches", "insert 5004;begin;d at 5004 in init, 10;finish;");

    removes = &w;
    accesses(VMI_MEMACCESS_R, 0x7010, 0);
    expect("a watch removed in a callback", "begin;r at 7010 in init, 11;watch 7 rx;finish;");
    accesses(VMI_MEMACCESS_W, 0x9000, 0);
    expect("an access that nobody waits for any more is finished", "begin;finish;");
    remove_soon(&drakvuf, &r);
    remove_soon(&drakvuf, &x);
    remove_soon(&drakvuf, &x);
    remove_soon(&drakvuf, &c);
    remove_soon(&drakvuf, &d);
    expect("nothing is left", "watch 7 x;watch 7 none;remove 7008;remove 5004;");
}

static void contexts(void)
{
    intercept_process_t process = {.name = (char*)"init", .strict = MATCH_NAME};
    drakvuf.context_switch_intercept_processes = g_slist_prepend(NULL, &process);
    drakvuf_toggle_context_based_interception(&drakvuf);
    expect("context based interception", "monitor all 0;CR3 on;");
    assert(happens(cr3, HYPERBP_ANSWERED, 0) == VMI_EVENT_RESPONSE_SLAT_ID && cr3->slat_id == VIEW);
    process.name = (char*)"other";
    assert(happens(cr3, HYPERBP_ANSWERED, 0) == VMI_EVENT_RESPONSE_SLAT_ID && cr3->slat_id == OWN_VIEW);
    expect("a vCPU is monitored while it runs such a process", "monitor 0 1;monitor 0 0;");
    drakvuf_toggle_context_based_interception(&drakvuf);
    expect("and the end of it", "monitor all 1;CR3 off;");
    g_slist_free(drakvuf.context_switch_intercept_processes);
}

static void refusals(void)
{
    drakvuf_trap_t a = on("a", 0x5004), b = on("b", 0x6000), r = watching("r", 7, VMI_MEMACCESS_R, PRE);
    assert(inject_trap_pa(&drakvuf, &a, 0x5004));
    refuses = true;
    assert(!inject_trap_pa(&drakvuf, &b, 0x6000) && !inject_trap_mem(&drakvuf, &r, false));
    remove_soon(&drakvuf, &a);
    refuses = false;
    assert(!drakvuf.interrupted && !drakvuf_hyperbp_failed(&drakvuf));
    happens(int3, HYPERBP_HIT, 0x5004);
    expect("DRAKVUF goes on after refusals", "insert 5004;insert 6000;watch 7 r;remove 5004;begin;finish;");
}

static int rounds;

static bool is_over_soon(drakvuf_t same, void* data)
{
    return ++rounds == 3;
}

static void waits(hyperbp_waited_t how, int fds, const char* what, const char* noted)
{
    waited = how;
    rounds = 0;
    drakvuf.event_fd_cnt = fds;
    drakvuf_loop(&drakvuf, is_over_soon, NULL);
    expect(what, noted);
}

static void waiting(void)
{
    assert(pipe(channel) == 0 && write(channel[1], "", 1) == 1);
    struct pollfd polled[2] = {{.fd = channel[0], .events = POLLIN}, {.fd = channel[0], .events = POLLIN}};
    struct fd_info told[2] = {{.fd = channel[0], .event_cb = drakvuf_vmi_event_callback, .data = &drakvuf}};
    told[1] = told[0];
    drakvuf.event_fds = polled;
    drakvuf.fd_info_lookup = told;
    hyperbp_waits_t figures;
    assert(!drakvuf_hyperbp_waits(&drakvuf, &figures));
    assert(!drakvuf_hyperbp_ways("10001", true) && !drakvuf_hyperbp_ways("", true) && !drakvuf_hyperbp_ways("-1", true));
    assert(drakvuf_hyperbp_ways(NULL, true) && drakvuf_hyperbp_ways("0", false));
    // The last one is to empty the ring, without waiting.
    waits(HYPERBP_WOKEN, 1, "hyperbp waits as it may", "waiter 0;wait;listen;wait;listen;listen;");
    assert(drakvuf_hyperbp_waits(&drakvuf, &figures) && figures.slept == 7);
    waits(HYPERBP_INTERRUPTED, 1, "a signal has the loop look around", "wait;wait;listen;");
    waits(HYPERBP_NOT_WAITED, 1, "what hyperbp does not wait for is polled", "wait;listen;wait;listen;listen;");
    waits(HYPERBP_WOKEN, 2, "so are several files",
          "stop waiting;listen;listen;stop waiting;listen;listen;listen;listen;");
    drakvuf.event_fd_cnt = 0;
    rounds = 0;
}

static bool is_over(drakvuf_t drakvuf, void* data)
{
    return *(int*)data == 3 || ++rounds == 3;
}

static void failures(void)
{
    drakvuf_trap_t a = on("a", 0x5004);
    assert(inject_trap_pa(&drakvuf, &a, 0x5004));
    drakvuf_loop(&drakvuf, is_over, &rounds);
    assert(rounds == 3 && !drakvuf_hyperbp_failed(&drakvuf));
    assert(verified > 0); // at once, and then when 50 ms are over
    rounds = 0;
    response = VMI_EVENT_RESPONSE_SLAT_ID;
    assert(happens(int3, HYPERBP_FAILED, 0) == VMI_EVENT_RESPONSE_SLAT_ID);
    assert(drakvuf_hyperbp_failed(&drakvuf) && drakvuf.interrupted == SIGDRAKVUFERROR);
    drakvuf_loop(&drakvuf, is_over, &rounds);
    assert(rounds == 0);
    remove_soon(&drakvuf, &a);
    expect("a failure ends every loop, and nothing more is asked", "insert 5004;stop waiting;stop waiting;begin;");
    close_vmi(&drakvuf);
    assert(!drakvuf_get_hyperbp(&drakvuf) && !drakvuf_hyperbp_failed(&drakvuf));
    expect("it is closed while its views are there", "listen;close;no waiter;view 0;altp2m 0;");

    drakvuf = (struct drakvuf) {0};
    refuses = true;
    assert(!init_vmi(&drakvuf, false));
    close_vmi(&drakvuf);
    expect("it could not be opened", "altp2m 1;open auto;listen;view 0;altp2m 0;");
    refuses = false;
}

static void closes(void)
{
    drakvuf = (struct drakvuf) {0};
    assert(init_vmi(&drakvuf, false));
    drakvuf_pause(&drakvuf);
    expect("it is opened again", "altp2m 1;open auto;");
    close_vmi(&drakvuf);
    assert(!runs);
    expect("before it is closed the domain runs without breakpoints",
           "leave;listen;close;view 0;altp2m 0;");
}

int main(void)
{
    opens();
    breakpoints();
    watches();
    contexts();
    refusals();
    waiting();
    failures();
    closes();
    return 0;
}
