#include <stdio.h>
#include <stdlib.h>

#include <windows.h>

#include "platform.h"

/* More than all our pages, in bytes: what a process may lock is a little less than its least working set. */
#define WORKING_SET (16 << 20)

static void fail(const char* what, const char* help)
{
    fprintf(stderr, "error: %s: code %lu%s\n", what, GetLastError(), help);
    exit(1);
}

void platform_executable(void* pages, size_t length)
{
    DWORD before;
    if (!VirtualProtect(pages, length, PAGE_EXECUTE_READWRITE, &before))
        fail("VirtualProtect", ": Arbitrary Code Guard may forbid memory that is both writable and executable");
}

void platform_lock(void* pages, size_t length)
{
    if (!SetProcessWorkingSetSize(GetCurrentProcess(), WORKING_SET, 2 * WORKING_SET))
        fail("SetProcessWorkingSetSize", ": run this as an administrator");
    if (!VirtualLock(pages, length))
        fail("VirtualLock", ": run this as an administrator");
}

bool platform_own_cpu(unsigned cpu)
{
    if (!SetThreadAffinityMask(GetCurrentThread(), (DWORD_PTR)1 << cpu))
        fail("SetThreadAffinityMask", "");
    /* Without the right to it, Windows gives HIGH_PRIORITY_CLASS instead, and no error. */
    return SetPriorityClass(GetCurrentProcess(), REALTIME_PRIORITY_CLASS)
           && GetPriorityClass(GetCurrentProcess()) == REALTIME_PRIORITY_CLASS
           && SetThreadPriority(GetCurrentThread(), THREAD_PRIORITY_TIME_CRITICAL);
}

unsigned platform_cpus(void)
{
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwNumberOfProcessors;
}

static void (*on_int3)(void);

static LONG CALLBACK on_exception(EXCEPTION_POINTERS* what)
{
    if (what->ExceptionRecord->ExceptionCode == EXCEPTION_BREAKPOINT)
        on_int3();
    return EXCEPTION_CONTINUE_SEARCH;
}

void platform_on_int3(void (*told)(void))
{
    on_int3 = told;
    AddVectoredExceptionHandler(1, on_exception);
}

uint64_t platform_process(void)
{
    return GetCurrentProcessId();
}

uint64_t platform_nanoseconds(void)
{
    LARGE_INTEGER now, frequency;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&frequency);
    const uint64_t ticks = (uint64_t)now.QuadPart, hertz = (uint64_t)frequency.QuadPart;
    return ticks / hertz * 1000000000 + ticks % hertz * 1000000000 / hertz;
}

void platform_sleep(unsigned milliseconds)
{
    Sleep(milliseconds);
}

void platform_directory(const char* path)
{
    if (!CreateDirectoryA(path, NULL) && GetLastError() != ERROR_ALREADY_EXISTS)
        fail(path, "");
}
