/* What this program needs of its operating system. What fails ends the program, and says what to do. */
#ifndef HYPERBP_PLATFORM_H
#define HYPERBP_PLATFORM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Makes pages of this program readable, writable and executable. */
void platform_executable(void* pages, size_t length);

/* Keeps pages where they are in memory, as far as the system lets it. They are there already, or come now. */
void platform_lock(void* pages, size_t length);

/* Keeps this thread on one CPU, and other threads off it as far as this user may. Whether its priority is as high as it
 * can be. */
bool platform_own_cpu(unsigned cpu);

/* CPUs this system has. */
unsigned platform_cpus(void);

/* Calls `told` when this program executes a 0xCC. That must not return. */
void platform_on_int3(void (*told)(void));

/* The number of this process. */
uint64_t platform_process(void);

/* Nanoseconds from some moment on, by a clock that goes on steadily. */
uint64_t platform_nanoseconds(void);

void platform_sleep(unsigned milliseconds);

/* Makes a directory, if it is not there. */
void platform_directory(const char* path);

#endif
