/*
 * What this program and the runner in dom0 agree on: bench/abi in C. That one is the original, with the reasons; a test
 * there has the same offsets.
 */
#ifndef HYPERBP_ABI_H
#define HYPERBP_ABI_H

#include <stddef.h>
#include <stdint.h>

enum {
    PAGE_SIZE = 4096,
    VERSION = 6,
    SAMPLES_MAX = 4096,
    SAMPLE_PAGES = SAMPLES_MAX * sizeof(uint64_t) / PAGE_SIZE,
    BREAKPOINT_OFFSET = PAGE_SIZE - 8,
};

/* Little-endian numbers, as text in memory. */
#define PROGRAM_MAGIC UINT64_C(0x53434f5250504248) /* HBPPROCS */
#define LABEL_MAGIC UINT64_C(0x4c4542414c504248)   /* HBPLABEL */

enum workload {
    TIMER = 1,
    EXEC_BP = 2,
    EXEC_PAGE = 3,
    READ_BP = 4,
    READ_PAGE = 5,
    SHUTDOWN = 8,
    LABEL = 12,
};

struct control
{
    uint64_t magic;
    uint32_t version;
    uint32_t vcpus;
    uint64_t target;  /* the virtual address: we do not know another */
    uint64_t samples; /* stays 0 */
    uint32_t request;
    uint32_t workload;
    uint32_t count;
    uint32_t completed;
    uint64_t executions;
    uint64_t own_int3s;
    uint64_t mismatches;
    uint64_t mismatch_offset;
    uint64_t mismatch_seen;
    uint64_t kernel_only[3];
    uint64_t alive;
    uint64_t process;
    uint64_t tag;
    uint64_t kernel_only_too[2];
};

struct label
{
    uint64_t magic;
    uint64_t tag;
    uint64_t index;
};

_Static_assert(offsetof(struct control, request) == 0x20, "as in bench/abi");
_Static_assert(offsetof(struct control, executions) == 0x30, "as in bench/abi");
_Static_assert(offsetof(struct control, mismatch_seen) == 0x50, "as in bench/abi");
_Static_assert(offsetof(struct control, alive) == 0x70, "as in bench/abi");
_Static_assert(sizeof(struct control) == 0x98, "as in bench/abi");
_Static_assert(sizeof(struct label) == 24, "as in bench/abi");

#endif
