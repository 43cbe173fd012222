/* Time, and the core that the thread runs on, by the cheapest means. */
#ifndef FREEFLOW_CLOCK_H
#define FREEFLOW_CLOCK_H

#include "real.h"
#include "stamp.h"

#include <stdint.h>

/* Nanoseconds of the monotonic clock. */
static inline uint64_t now(void)
{
        struct timespec time;

        real()->clock_gettime(CLOCK_MONOTONIC, &time);
        return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* Milliseconds of a clock that changes every 1 to 10 ms; reading it takes a few loads. */
static inline uint32_t ticks(void)
{
        struct timespec time;

        real()->clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
        return (uint32_t)time.tv_sec * 1000 + (uint32_t)(time.tv_nsec / 1000000);
}

/* 1 + the core, 0: not known. From rseq's area where the C library has one: a load. */
static inline uint32_t core(void)
{
        const struct real *functions = real();

        if (__builtin_expect(functions->rseq_offset != NULL, 1)) {
                const char *area = (const char *)__builtin_thread_pointer() + *functions->rseq_offset;
                int32_t cpu = *(const volatile int32_t *)(area + 4);

                return cpu < 0 ? 0 : (uint32_t)cpu + 1;
        }
        int cpu = functions->sched_getcpu ? functions->sched_getcpu() : -1;

        return cpu < 0 ? 0 : (uint32_t)cpu + 1;
}

#endif
