#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "platform.h"

static void fail(const char* what, const char* help)
{
    fprintf(stderr, "error: %s: %s%s\n", what, strerror(errno), help);
    exit(1);
}

void platform_executable(void* pages, size_t length)
{
    if (mprotect(pages, length, PROT_READ | PROT_WRITE | PROT_EXEC))
        fail("mprotect", ": a security module may forbid memory that is both writable and executable");
}

void platform_lock(void* pages, size_t length)
{
    if (mlock(pages, length))
        fail("mlock", ": run this as root, or raise the limit (ulimit -l)");
}

bool platform_own_cpu(unsigned cpu)
{
    const struct sched_param highest = {.sched_priority = sched_get_priority_max(SCHED_FIFO)};
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(cpu, &only);
    if (sched_setaffinity(0, sizeof(only), &only))
        fail("sched_setaffinity", "");
    return !sched_setscheduler(0, SCHED_FIFO, &highest);
}

unsigned platform_cpus(void)
{
    const long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    return cpus > 0 ? (unsigned)cpus : 1;
}

static void (*on_int3)(void);

static void on_signal(int signal)
{
    (void)signal;
    on_int3();
}

void platform_on_int3(void (*told)(void))
{
    on_int3 = told;
    signal(SIGTRAP, on_signal);
}

uint64_t platform_process(void)
{
    return (uint64_t)getpid();
}

uint64_t platform_nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

void platform_sleep(unsigned milliseconds)
{
    const struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
    nanosleep(&time, NULL);
}

void platform_directory(const char* path)
{
    if (mkdir(path, 0777) && errno != EEXIST)
        fail(path, "");
}
