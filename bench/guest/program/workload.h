/* bpbench's workloads, on a page of their own. */
#ifndef HYPERBP_WORKLOAD_H
#define HYPERBP_WORKLOAD_H

#include <stdbool.h>
#include <stdint.h>

#include "abi.h"

/* The page the breakpoint is on, and the place in it. */
extern unsigned char hyperbp_page[PAGE_SIZE];
extern unsigned char hyperbp_breakpoint[];

/* What the workloads count. */
extern union page_of_control {
    struct control control;
    unsigned char bytes[PAGE_SIZE];
} hyperbp_control;

/* The workloads that take samples, in bpbench's order. */
extern const struct measured
{
    enum workload workload;
    const char* name;
    const char* file; /* the study's name of its samples */
} measured[];
enum { MEASURED = 5 };

/* Makes the page executable, locks all there is, and fills it. */
void workload_prepare(void);

/* Fills the page under test: NOPs and a few others up to the breakpoint, which is on the last NOP, RET, six marked
 * bytes. */
void workload_fill(void);

/* Does this so many times, and leaves the ticks of each in `samples`. */
void workload_run(enum workload workload, uint32_t count, uint64_t* samples);

#endif
