#include "alone.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "platform.h"

/* How long the time-stamp counter is compared with the system's clock, in nanoseconds. */
#define CALIBRATION UINT64_C(200000000)

static uint64_t time_stamp(void)
{
    uint64_t low, high;
    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high));
    return high << 32 | low;
}

/* What one tick is, in nanoseconds. */
static double nanoseconds_per_tick(void)
{
    const uint64_t begin = platform_nanoseconds(), from = time_stamp();
    uint64_t now;
    do
        now = platform_nanoseconds();
    while (now - begin < CALIBRATION);
    return (double)(now - begin) / (double)(time_stamp() - from);
}

static int by_size(const void* one, const void* other)
{
    const uint64_t a = *(const uint64_t*)one, b = *(const uint64_t*)other;
    return (a > b) - (a < b);
}

static FILE* create(const char* out, const char* name)
{
    char path[4096];
    if ((size_t)snprintf(path, sizeof(path), "%s/%s.csv", out, name) >= sizeof(path))
        path[0] = 0;
    FILE* file = fopen(path, "wb");
    if (!file) {
        fprintf(stderr, "error: cannot create %s: %s\n", path, strerror(errno));
        exit(1);
    }
    return file;
}

static void close_or_fail(FILE* file)
{
    if (ferror(file) | fclose(file)) {
        fprintf(stderr, "error: cannot write the results: %s\n", strerror(errno));
        exit(1);
    }
}

/* The value that so many hundredths of the samples do not exceed: nearest rank. */
static uint64_t percentile(const uint64_t* sorted, uint32_t count, unsigned percent)
{
    const uint64_t rank = ((uint64_t)count * percent + 99) / 100;
    return sorted[rank ? rank - 1 : 0];
}

bool alone_measure(const struct plan* plan)
{
    const struct control* counted = &hyperbp_control.control;
    const double nanoseconds = nanoseconds_per_tick();
    FILE* summary = NULL;
    if (plan->out) {
        platform_directory(plan->out);
        summary = create(plan->out, "summary");
        fprintf(summary, "workload,samples,min,p10,median,p90,max,median_ns,executions,mismatches\n");
    }
    printf("A tick is %.4f ns.\n%-10s %8s %12s %12s %12s %12s\n", nanoseconds, "workload", "samples", "min ticks",
           "median", "p90", "median ns");
    for (int n = 0; n < MEASURED; n++) {
        if (!plan->wanted[n])
            continue;
        const struct measured what = measured[n];
        const uint32_t count = what.workload == READ_PAGE ? plan->page_samples : plan->samples;
        uint64_t* samples = calloc(count, sizeof(*samples));
        if (!samples) {
            fprintf(stderr, "error: no memory for %" PRIu32 " samples\n", count);
            exit(1);
        }
        memset(samples, 0xff, count * sizeof(*samples)); /* no page of it is missing when the clock runs */
        const uint64_t executions = counted->executions, mismatches = counted->mismatches;
        workload_run(what.workload, count, samples);
        if (plan->out) {
            FILE* file = create(plan->out, what.file);
            for (uint32_t sample = 0; sample < count; sample++)
                fprintf(file, "%.0f\n", (double)samples[sample] * nanoseconds);
            close_or_fail(file);
        }
        qsort(samples, count, sizeof(*samples), by_size);
        const uint64_t median = percentile(samples, count, 50), p90 = percentile(samples, count, 90);
        const double median_ns = (double)median * nanoseconds;
        printf("%-10s %8" PRIu32 " %12" PRIu64 " %12" PRIu64 " %12" PRIu64 " %12.0f\n", what.name, count, samples[0],
               median, p90, median_ns);
        fflush(stdout);
        if (summary)
            fprintf(summary,
                    "%s,%" PRIu32 ",%" PRIu64 ",%" PRIu64 ",%" PRIu64 ",%" PRIu64 ",%" PRIu64 ",%.0f,%" PRIu64
                    ",%" PRIu64 "\n",
                    what.name, count, samples[0], percentile(samples, count, 10), median, p90, samples[count - 1],
                    median_ns, counted->executions - executions, counted->mismatches - mismatches);
        free(samples);
    }
    if (summary)
        close_or_fail(summary);
    if (counted->mismatches)
        printf("%" PRIu64 " reads of the page were not its own: the first, at offset %" PRIu64 ", was %016" PRIx64
               ".\n",
               counted->mismatches, counted->mismatch_offset, counted->mismatch_seen);
    else
        printf("Every read of the page was its own.\n");
    return !counted->mismatches;
}
