/* A mutual exclusion of threads of one process, which spins for a moment before it sleeps.
 *
 * 0 is free, 1 is taken, 2 is taken and somebody may sleep. A thread must not be interrupted by a
 * signal handler that takes the same one: verbs are not to be called in signal handlers.
 */
#ifndef FREEFLOW_MUTEX_H
#define FREEFLOW_MUTEX_H

#include "../library/sys.h"

#include <linux/futex.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct mutex {
        _Atomic uint32_t word;
};

static inline bool mutex_try(struct mutex *mutex)
{
        uint32_t free = 0;

        return atomic_compare_exchange_strong_explicit(&mutex->word, &free, 1, memory_order_acquire,
                                                       memory_order_relaxed);
}

static inline void mutex_take(struct mutex *mutex)
{
        enum { SPINS = 100 };

        for (int i = 0; i < SPINS; i++) {
                if (!atomic_load_explicit(&mutex->word, memory_order_relaxed) && mutex_try(mutex))
                        return;
                relax();
        }
        while (atomic_exchange_explicit(&mutex->word, 2, memory_order_acquire))
                sys_4(SYS_futex, &mutex->word, FUTEX_WAIT_PRIVATE, 2, 0);
}

static inline void mutex_release(struct mutex *mutex)
{
        if (atomic_exchange_explicit(&mutex->word, 0, memory_order_release) == 2)
                sys_3(SYS_futex, &mutex->word, FUTEX_WAKE_PRIVATE, 1);
}

#endif
