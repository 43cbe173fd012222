/* A clock that is the same on all cores of a host, used only to say what came first. The library
 * and the relay stamp the rings of one host with it.
 */
#ifndef FREEFLOW_STAMP_H
#define FREEFLOW_STAMP_H

#include <stdint.h>

static inline uint64_t clock_stamp(void)
{
#if defined(__x86_64__)
        return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
        uint64_t count;

        __asm__ volatile("mrs %0, cntvct_el0" : "=r"(count));
        return count;
#else
#error "FreeFlow knows x86-64 and aarch64"
#endif
}

#endif
