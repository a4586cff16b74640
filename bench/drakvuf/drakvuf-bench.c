/*
 * Serves the benchmark guest's breakpoint from inside libdrakvuf, for the runner (bench/runner/src/elsewhere.rs).
 *
 * This file is ours (MIT or Apache-2.0) and calls the public functions of libdrakvuf.h only. The program it becomes has DRAKVUF in
 * it and falls under DRAKVUF's licence: it is built where it is run, and not given away.
 *
 *   drakvuf-bench --backends
 *       The backends it has, one a line: `original`, and `hyperbp` where that is loaded in DRAKVUF.
 *   drakvuf-bench --domain NAME --gpa ADDRESS --backend B --mechanism M [--watch page]
 *       Sets a breakpoint, says `ready`, and serves it until SIGTERM, SIGINT, or until its standard input, a pipe, closes. Then it
 *       takes the breakpoint out and says how often it was hit, {"hits":N,"before":N,"after":N}. With `--watch page`, memory traps on
 *       the page of the breakpoint are served, too: for reads and writes before they are made, and for writes after. With the profile
 *       of the guest's kernel in the environment's PROFILE, DRAKVUF looks up the process of each hit, as it does for its plugins.
 *       Exit codes: 0 fine, 2 bad arguments, 1 anything else; why is on standard error.
 */
#define _GNU_SOURCE
#include <config.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <libdrakvuf/libdrakvuf.h>

static volatile sig_atomic_t stop;
static drakvuf_t drakvuf;
static uint64_t hits, before, after;

static void on_signal(int sig)
{
    stop = 1;
    /* It may be about to wait. */
    if (drakvuf)
        drakvuf_interrupt(drakvuf, sig);
}

static bool is_over(drakvuf_t same, void* data)
{
    (void)data;
    /* drakvuf_loop itself stops when waiting for events fails. */
    return stop || drakvuf_is_interrupted(same);
}

/* Counts in what the trap points to. */
static event_response_t on_event(drakvuf_t same, drakvuf_trap_info_t* info)
{
    (void)same;
    ++*(uint64_t*)info->trap->data;
    return VMI_EVENT_RESPONSE_NONE;
}

/*
 * Asks for a signal when standard input closes: the loop that is measured waits for no file of ours, and has no second thread, for
 * both would cost it instructions. Where this does not work (a file, /dev/null), the other signals remain.
 */
static void watch_input(void)
{
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    int flags = fcntl(STDIN_FILENO, F_GETFL);
    if (flags < 0 || fcntl(STDIN_FILENO, F_SETOWN, getpid()) < 0 || fcntl(STDIN_FILENO, F_SETFL, flags | O_ASYNC) < 0)
        return;
    /* It may have been closed before. */
    if (poll(&input, 1, 0) == 1 && input.revents & POLLHUP)
        stop = 1;
}

static void handle_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal};
    const int signals[] = {SIGTERM, SIGINT, SIGHUP, SIGIO};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        sigaction(signals[i], &action, NULL);
    /* The count is said to whoever is left, and the breakpoint is taken out in any case. */
    signal(SIGPIPE, SIG_IGN);
}

static bool watch;

static int serve(const char* domain, addr_t gpa, bool fast)
{
    /* The benchmark guest has no operating system. */
    const char* profile = getenv("PROFILE");
    const addr_t gfn = gpa >> 12;
    drakvuf_trap_t traps[] =
    {
        {
            .type = BREAKPOINT,
            .cb = on_event,
            .data = &hits,
            .name = "benchmark",
            .ttl = UNLIMITED_TTL,
            .breakpoint = {.lookup_type = LOOKUP_NONE, .addr_type = ADDR_PA, .addr = gpa},
        },
        {
            .type = MEMACCESS,
            .cb = on_event,
            .data = &before,
            .name = "before",
            .ttl = UNLIMITED_TTL,
            .memaccess = {.gfn = gfn, .type = PRE, .access = VMI_MEMACCESS_RW},
        },
        {
            .type = MEMACCESS,
            .cb = on_event,
            .data = &after,
            .name = "after",
            .ttl = UNLIMITED_TTL,
            .memaccess = {.gfn = gfn, .type = POST, .access = VMI_MEMACCESS_W},
        },
    };
    const size_t count = watch ? sizeof traps / sizeof *traps : 1;
    handle_signals();
    if (!drakvuf_init(&drakvuf, domain, profile, NULL, false, 0, fast, UNLIMITED_TTL, NULL, false, false))
    {
        fprintf(stderr, "DRAKVUF cannot attach to the domain %s\n", domain);
        return 1;
    }
    size_t added = 0;
    while (added < count && drakvuf_add_trap(drakvuf, &traps[added]))
        added++;
    bool set = added == count;
    if (set)
    {
        watch_input();
        puts("ready");
        fflush(stdout);
        /* The domain is paused until then. */
        drakvuf_loop(drakvuf, is_over, NULL);
    }
    else
        fprintf(stderr, "DRAKVUF cannot set the trap `%s` at %#" PRIx64 "\n", traps[added].name, gpa);
    while (added)
        drakvuf_remove_trap(drakvuf, &traps[--added], NULL);
    bool broken = !stop && drakvuf_is_interrupted(drakvuf);
    drakvuf_t open = drakvuf;
    drakvuf = NULL;
    drakvuf_close(open, false);
    if (broken)
        fprintf(stderr, "DRAKVUF's loop has broken off\n");
    if (set)
        printf("{\"hits\":%" PRIu64 ",\"before\":%" PRIu64 ",\"after\":%" PRIu64 "}\n", hits, before, after);
    return set && !broken ? 0 : 1;
}

static int usage(const char* problem, const char* what)
{
    fprintf(stderr, "%s%s\nusage: drakvuf-bench --domain NAME --gpa ADDRESS --backend original|hyperbp --mechanism M [--watch page]\n", problem,
        what);
    return 2;
}

/* Original DRAKVUF has two ways, and hyperbp's names for them. */
static int serve_original(const char* domain, addr_t gpa, const char* mechanism)
{
    if (!strcmp(mechanism, "view-step"))
        return serve(domain, gpa, false);
    if (!strcmp(mechanism, "view-fast-step"))
        return serve(domain, gpa, true);
    return usage("original DRAKVUF has only view-step and view-fast-step, not ", mechanism);
}

static int serve_hyperbp(const char* domain, addr_t gpa, const char* mechanism)
{
#ifdef HYPERBP
    /* DRAKVUF says itself what is wrong with a name. */
    if (!drakvuf_use_hyperbp(mechanism))
        return 2;
    return serve(domain, gpa, false);
#else
    (void)domain;
    (void)gpa;
    return usage("this DRAKVUF was built without hyperbp, and has no ", mechanism);
#endif
}

int main(int argc, char** argv)
{
    const char *domain = NULL, *gpa = NULL, *backend = NULL, *mechanism = NULL, *watched = "nothing";
    const struct
    {
        const char* name;
        const char** value;
    } options[] = {{"--domain", &domain}, {"--gpa", &gpa}, {"--backend", &backend}, {"--mechanism", &mechanism}, {"--watch", &watched}};

    if (argc == 2 && !strcmp(argv[1], "--backends"))
    {
        puts("original");
#ifdef HYPERBP
        puts("hyperbp");
#endif
        return 0;
    }
    for (int i = 1; i < argc; i += 2)
    {
        size_t n = 0;
        while (n < sizeof options / sizeof *options && strcmp(argv[i], options[n].name))
            n++;
        if (n == sizeof options / sizeof *options)
            return usage("unknown argument: ", argv[i]);
        if (i + 1 == argc)
            return usage("no value for ", argv[i]);
        *options[n].value = argv[i + 1];
    }
    for (size_t n = 0; n < sizeof options / sizeof *options; n++)
        if (!*options[n].value)
            return usage("missing: ", options[n].name);
    char* end;
    addr_t address = strtoull(gpa, &end, 0);
    if (end == gpa || *end)
        return usage("this is no address: ", gpa);
    watch = !strcmp(watched, "page");
    if (!watch && strcmp(watched, "nothing"))
        return usage("this cannot be watched: ", watched);
    if (!strcmp(backend, "original"))
        return serve_original(domain, address, mechanism);
    if (!strcmp(backend, "hyperbp"))
        return serve_hyperbp(domain, address, mechanism);
    return usage("there is no backend ", backend);
}
