/* Measuring without hyperbp-bench: the breakpoint is somebody else's, or there is none. */
#ifndef HYPERBP_ALONE_H
#define HYPERBP_ALONE_H

#include <stdbool.h>
#include <stdint.h>

#include "workload.h"

struct plan
{
    bool wanted[MEASURED];
    uint32_t samples;
    uint32_t page_samples; /* of read_page */
    const char* out;       /* a directory, or NULL */
};

/* Measures, prints a table, and writes the samples and summary.csv. Whether the page always read as it should. */
bool alone_measure(const struct plan* plan);

#endif
