#include "workload.h"

#include <string.h>

#include "platform.h"

#define ON_PAGES_OF_ITS_OWN __attribute__((aligned(PAGE_SIZE)))

ON_PAGES_OF_ITS_OWN unsigned char hyperbp_page[PAGE_SIZE];
ON_PAGES_OF_ITS_OWN union page_of_control hyperbp_control;

/* A name for who sets breakpoints by name. 4088 is BREAKPOINT_OFFSET. */
__asm__(".globl hyperbp_breakpoint\n.set hyperbp_breakpoint, hyperbp_page + 4088");
_Static_assert(BREAKPOINT_OFFSET == 4088, "as above");

const struct measured measured[MEASURED] = {
    {TIMER, "timer", "timing_overhead"}, {EXEC_BP, "exec_bp", "exec_bp"},       {EXEC_PAGE, "exec_page", "exec_page"},
    {READ_BP, "read_bp", "read_bp"},     {READ_PAGE, "read_page", "read_page"},
};

/* What the page must read as, where no breakpoint is ever set, and what `read_page` saw of it. */
static ON_PAGES_OF_ITS_OWN uint64_t pristine[PAGE_SIZE / 8];
static ON_PAGES_OF_ITS_OWN uint64_t seen[PAGE_SIZE / 8];

void workload_fill(void)
{
    /* bench/abi says what these are for: they change nothing. */
    static const struct
    {
        size_t at;
        unsigned char bytes[8];
        size_t length;
    } parts[] = {
        {4066, {0x0f, 0x28, 0xc0}, 3},                                          /* movaps xmm0, xmm0 */
        {4072, {0x48, 0x0f, 0xc8, 0x48, 0x0f, 0xc8}, 6},                        /* bswap rax, twice */
        {4080, {0x55, 0x5d}, 2},                                                /* push rbp; pop rbp */
        {BREAKPOINT_OFFSET + 1, {0xc3, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66}, 7}, /* ret, and what is only read */
    };
    memset(pristine, 0x90, PAGE_SIZE);
    for (size_t n = 0; n < sizeof(parts) / sizeof(*parts); n++)
        memcpy((unsigned char*)pristine + parts[n].at, parts[n].bytes, parts[n].length);
    memcpy(hyperbp_page, pristine, PAGE_SIZE);
}

void workload_prepare(void)
{
    workload_fill();
    platform_executable(hyperbp_page, PAGE_SIZE);
    platform_lock(hyperbp_page, PAGE_SIZE);
    platform_lock(&hyperbp_control, PAGE_SIZE);
    platform_lock(pristine, PAGE_SIZE);
    platform_lock(seen, PAGE_SIZE);
}

/*
 * What goes before and after what is measured, as in the benchmark's own kernel (bench/guest/src/workload.rs has the
 * reasons): LFENCE keeps RDTSC from running early, and what comes after it from starting before (Intel SDM, RDTSC). The
 * ticks between come out in RAX. What is measured ends with two NOPs or more, because a monitor's single step may end
 * an instruction late.
 *
 * What is measured may push, and on Linux the compiler may keep something below the stack pointer: hence the 128 bytes.
 */
#define BEGIN                                                                                                          \
    "lea -128(%%rsp), %%rsp\n\t"                                                                                       \
    "lfence\n\t"                                                                                                       \
    "rdtsc\n\t"                                                                                                        \
    "shl $32, %%rdx\n\t"                                                                                               \
    "or %%rax, %%rdx\n\t"                                                                                              \
    "mov %%rdx, %%r8\n\t"
#define END                                                                                                            \
    "lfence\n\t"                                                                                                       \
    "rdtsc\n\t"                                                                                                        \
    "shl $32, %%rdx\n\t"                                                                                               \
    "or %%rdx, %%rax\n\t"                                                                                              \
    "sub %%r8, %%rax\n\t"                                                                                              \
    "lea 128(%%rsp), %%rsp"
#define CLOBBERED "rdx", "r8", "cc", "memory"

/* Counts a read that is not what it must be. */
static void check(size_t offset, uint64_t value)
{
    struct control* control = &hyperbp_control.control;
    if (value == pristine[offset / 8])
        return;
    if (!control->mismatches++) {
        control->mismatch_offset = offset;
        control->mismatch_seen = value;
    }
}

static uint64_t timer(void)
{
    uint64_t ticks;
    __asm__ volatile(BEGIN END : "=&a"(ticks) : : CLOBBERED);
    return ticks;
}

/* Whatever the entry, the breakpointed instruction runs once. */
static uint64_t call(const unsigned char* entry)
{
    uint64_t ticks;
    __asm__ volatile(BEGIN "call *%[entry]\n\t"
                           "nop\n\t"
                           "nop\n\t" END
                     : "=&a"(ticks)
                     : [entry] "r"(entry)
                     : CLOBBERED);
    hyperbp_control.control.executions++;
    return ticks;
}

static uint64_t read_bp(void)
{
    uint64_t ticks, value;
    __asm__ volatile(BEGIN "mov (%[at]), %[value]\n\t"
                           "nop\n\t"
                           "nop\n\t" END
                     : "=&a"(ticks), [value] "=&r"(value)
                     : [at] "r"(hyperbp_breakpoint)
                     : CLOBBERED);
    check(BREAKPOINT_OFFSET, value);
    return ticks;
}

/* Eight bytes at a time, one read an instruction, as bpbench does it. What was read is checked when the clock has
 * stopped. */
static uint64_t read_page(void)
{
    uint64_t ticks, value, offset = 0;
    __asm__ volatile(BEGIN "1: mov (%[page],%[offset]), %[value]\n\t"
                           "mov %[value], (%[seen],%[offset])\n\t"
                           "add $8, %[offset]\n\t"
                           "cmp %[size], %[offset]\n\t"
                           "jb 1b\n\t" END
                     : "=&a"(ticks), [value] "=&r"(value), [offset] "+&r"(offset)
                     : [page] "r"(hyperbp_page), [seen] "r"(seen), [size] "i"(PAGE_SIZE)
                     : CLOBBERED);
    for (size_t at = 0; at < PAGE_SIZE; at += 8)
        check(at, seen[at / 8]);
    return ticks;
}

void workload_run(enum workload workload, uint32_t count, uint64_t* samples)
{
    for (uint32_t n = 0; n < count; n++) {
        switch (workload) {
        case TIMER:
            samples[n] = timer();
            break;
        case EXEC_BP:
            samples[n] = call(hyperbp_breakpoint);
            break;
        case EXEC_PAGE:
            samples[n] = call(hyperbp_page);
            break;
        case READ_BP:
            samples[n] = read_bp();
            break;
        case READ_PAGE:
            samples[n] = read_page();
            break;
        default:
            return;
        }
    }
}
