/*
 * The benchmark guest as a program for Linux and Windows: bpbench's workloads on a page for a breakpoint that is set
 * from outside. `hyperbp-guest --help` tells how it is used, docs/real-machines.md where.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "alone.h"
#include "mailbox.h"
#include "platform.h"
#include "workload.h"

static const char help[] =
    "Measures what a breakpoint costs that a monitor sets from outside of this virtual machine: bpbench's workloads.\n"
    "\n"
    "Usage: hyperbp-guest [OPTIONS]\n"
    "\n"
    "When the breakpoint is set:\n"
    "      (nothing)          hyperbp-bench in dom0 sets it, and says what to measure\n"
    "      --wait SECONDS     By somebody else within this time, where this program says; then measure\n"
    "      --enter            By somebody else; then measure when Enter is pressed\n"
    "      --baseline         Never: measure at once\n"
    "\n"
    "Options:\n"
    "      --cpu N            Run on this virtual CPU [default: 0]\n"
    "  -h, --help             Print help\n"
    "\n"
    "Options of --wait, --enter and --baseline (hyperbp-bench has its own):\n"
    "      --workload W       Measure only this: timer, exec_bp, exec_page, read_bp, read_page; may be repeated\n"
    "      --samples N        Samples of each [default: 100000]\n"
    "      --page-samples N   Samples of read_page, which takes 512 hits a sample [default: 1000]\n"
    "      --out DIR          Directory for summary.csv, in ticks of the time-stamp counter, and a file with the "
    "samples of\n"
    "                         each workload as the study's scripts read them: a number of nanoseconds a line\n"
    "\n"
    "Examples:\n"
    "  hyperbp-guest\n"
    "      As root or administrator. Then, in dom0: hyperbp-bench run --domain NAME --out DIR\n"
    "  hyperbp-guest --enter --out result_2026-01-31_ept\n"
    "      For DRAKVUF, SmartVMI or another monitor.\n"
    "\n"
    "Exit codes: 0 fine, 2 bad arguments, 3 the breakpoint was not hidden from this program, 1 anything else.\n";

struct options
{
    struct plan plan;
    unsigned cpu;
    enum { MAILBOX, WAIT, ENTER, BASELINE } when;
    uint32_t seconds;
};

static void usage(const char* problem, const char* argument)
{
    fprintf(stderr, "error: %s `%s`; --help tells what there is\n", problem, argument);
    exit(2);
}

static uint32_t number(const char* text, uint32_t least, uint32_t most)
{
    char* end;
    errno = 0;
    const unsigned long long value = strtoull(text, &end, 10);
    if (errno || end == text || *end || *text == '-' || value < least || value > most)
        usage("this number is too small, too large or none:", text);
    return (uint32_t)value;
}

static void want(struct plan* plan, const char* name)
{
    for (int n = 0; n < MEASURED; n++) {
        if (!strcmp(measured[n].name, name)) {
            plan->wanted[n] = true;
            return;
        }
    }
    usage("there is no workload", name);
}

static struct options parse(int argc, char** argv)
{
    struct options options = {.plan = {.samples = 100000, .page_samples = 1000}};
    const char* alone = NULL;
    bool some = false;
    for (int n = 1; n < argc; n++) {
        const char *name = argv[n], *value = n + 1 < argc ? argv[n + 1] : NULL;
        if (!strcmp(name, "-h") || !strcmp(name, "--help")) {
            fputs(help, stdout);
            exit(0);
        }
        if (!strcmp(name, "--enter") || !strcmp(name, "--baseline")) {
            options.when = name[2] == 'e' ? ENTER : BASELINE;
            continue;
        }
        static const char* const with_value[] = {"--wait",    "--cpu",          "--workload",
                                                 "--samples", "--page-samples", "--out"};
        const int known = sizeof(with_value) / sizeof(*with_value);
        int which = 0;
        while (which < known && strcmp(name, with_value[which]))
            which++;
        if (which == known)
            usage("there is no option", name);
        if (!value)
            usage("a value is missing after", name);
        n++;
        if (which > 1)
            alone = name;
        switch (which) {
        case 0:
            options.when = WAIT;
            options.seconds = number(value, 0, 1000000);
            break;
        case 1:
            options.cpu = number(value, 0, 63);
            break;
        case 2:
            want(&options.plan, value);
            some = true;
            break;
        case 3:
            options.plan.samples = number(value, 1, 100000000);
            break;
        case 4:
            options.plan.page_samples = number(value, 1, 100000000);
            break;
        default:
            options.plan.out = value;
        }
    }
    if (alone && options.when == MAILBOX)
        usage("only with --wait, --enter or --baseline:", alone);
    for (int n = 0; n < MEASURED && !some; n++)
        options.plan.wanted[n] = true;
    return options;
}

static void on_int3(void)
{
    static const char text[] = "error: the breakpoint reached this program: no monitor serves it\n";
    /* Nothing else can be relied on in here. */
    fputs(text, stderr);
    fflush(stderr);
    _Exit(3);
}

int main(int argc, char** argv)
{
    const struct options options = parse(argc, argv);
    if (options.cpu >= platform_cpus())
        usage("there is no such CPU:", "--cpu");
    workload_prepare();
    platform_on_int3(on_int3);
    if (!platform_own_cpu(options.cpu))
        fprintf(
            stderr,
            "warning: without the highest priority, others disturb the figures: run this as root or administrator\n");
    printf("Process %" PRIu64
           ", on virtual CPU %u. The page is at %p, the breakpoint goes to %p (hyperbp_breakpoint).\n",
           platform_process(), options.cpu, (void*)hyperbp_page, (void*)hyperbp_breakpoint);
    switch (options.when) {
    case MAILBOX:
        printf("ready: in dom0, run hyperbp-bench run --domain NAME --out DIR; Ctrl-C ends this.\n");
        fflush(stdout);
        mailbox_serve();
        return 0;
    case WAIT:
        printf("Measuring begins in %" PRIu32 " s.\n", options.seconds);
        fflush(stdout);
        for (uint32_t second = 0; second < options.seconds; second++)
            platform_sleep(1000);
        break;
    case ENTER:
        printf("Press Enter when it is set.\n");
        fflush(stdout);
        for (int c = 0; c != '\n' && c != EOF;)
            c = getchar();
        break;
    case BASELINE:
        break;
    }
    return alone_measure(&options.plan) ? 0 : 3;
}
