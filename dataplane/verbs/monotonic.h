/* The monotonic clock, read without the functions of the C library, which programs may replace. */
#ifndef FREEFLOW_MONOTONIC_H
#define FREEFLOW_MONOTONIC_H

#include "../library/sys.h"

/* Nanoseconds. */
static inline uint64_t monotonic(void)
{
        struct timespec now = {0};

        sys_2(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

#endif
