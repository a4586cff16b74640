#include "mailbox.h"

#include <string.h>

#include "platform.h"
#include "workload.h"

static __attribute__((aligned(PAGE_SIZE))) uint64_t samples[SAMPLES_MAX];
_Static_assert(sizeof(samples) == SAMPLE_PAGES * PAGE_SIZE, "nothing else is on these pages");

/* dom0 reads and writes the page at the same time. */
#define LOAD(field, order) __atomic_load_n(&hyperbp_control.control.field, order)
#define STORE(field, value, order) __atomic_store_n(&hyperbp_control.control.field, value, order)

/* Between two looks, in milliseconds: until there is something to do, others have the CPU. */
enum { PAUSE = 1 };

static void put_label(void* page, uint64_t tag, uint64_t index)
{
    const struct label label = {LABEL_MAGIC, tag, index};
    memcpy(page, &label, sizeof(label));
}

/* Labels our other pages, or takes the labels away. */
static void label_pages(uint64_t tag)
{
    if (!tag) {
        workload_fill();
        memset(samples, 0, sizeof(samples));
        return;
    }
    put_label(hyperbp_page, tag, 0);
    for (uint64_t page = 0; page < SAMPLE_PAGES; page++)
        put_label(samples + page * PAGE_SIZE / sizeof(*samples), tag, page + 1);
}

void mailbox_serve(void)
{
    memset(samples, 0, sizeof(samples));
    platform_lock(samples, sizeof(samples));
    STORE(version, VERSION, __ATOMIC_RELAXED);
    STORE(vcpus, platform_cpus(), __ATOMIC_RELAXED);
    STORE(target, (uintptr_t)hyperbp_page, __ATOMIC_RELAXED);
    STORE(process, platform_process(), __ATOMIC_RELAXED);
    STORE(magic, PROGRAM_MAGIC, __ATOMIC_RELEASE);
    for (uint32_t done = 0;;) {
        const uint32_t request = LOAD(request, __ATOMIC_ACQUIRE);
        if (request == done) {
            STORE(alive, LOAD(alive, __ATOMIC_RELAXED) + 1, __ATOMIC_RELAXED);
            platform_sleep(PAUSE);
            continue;
        }
        const enum workload workload = LOAD(workload, __ATOMIC_RELAXED);
        const uint32_t count = LOAD(count, __ATOMIC_RELAXED);
        if (workload == SHUTDOWN)
            STORE(magic, 0, __ATOMIC_RELAXED);
        else if (workload == LABEL)
            label_pages(LOAD(tag, __ATOMIC_RELAXED));
        else
            workload_run(workload, count < SAMPLES_MAX ? count : SAMPLES_MAX, samples);
        done = request;
        STORE(completed, done, __ATOMIC_RELEASE);
        if (workload == SHUTDOWN)
            return;
    }
}
