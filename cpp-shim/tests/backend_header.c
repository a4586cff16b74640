/* The C API, as C sees it. */
#include "hyperbp/backend.h"

/* In a C program these are what they are declared to be. */
_Static_assert(sizeof(bool) == 1, "C and C++ agree about it");

const char* why(const char* name);

const char* why(const char* name)
{
    return hyperbp_check_mechanism(name) ? NULL : hyperbp_error();
}
