/* How a thread says that it is about to sleep until something is published in a ring, and how the
 * thread that publishes it finds out whom to wake.
 */
#ifndef FREEFLOW_WAITERS_H
#define FREEFLOW_WAITERS_H

#include "layout.h"

#include <stdbool.h>

/* Say that this bell's waiter is about to sleep. The caller checks the ring once more afterwards.
 */
static inline void wait_begin(struct waiters *waiters, int bell)
{
        atomic_fetch_or_explicit(&waiters->bells[bell / 64], UINT64_C(1) << (bell % 64),
                                 memory_order_relaxed);
        store_relaxed(&waiters->any, 1);
        /* Pairs with waiters_sleep(): either it sees `any`, or we see what was published. */
        atomic_thread_fence(memory_order_seq_cst);
}

/* Has somebody said so since the bell was rung last? Then nothing that is published from now on is
 * missed. */
static inline bool wait_has_begun(const struct waiters *waiters, int bell)
{
        return load_relaxed(&waiters->any) && load_relaxed(&waiters->bells[bell / 64]) >> (bell % 64) & 1;
}

static inline void wait_end(struct waiters *waiters, int bell)
{
        atomic_fetch_and_explicit(&waiters->bells[bell / 64], ~(UINT64_C(1) << (bell % 64)),
                                  memory_order_relaxed);
}

/* Something was published in the ring. True: somebody sleeps, or is about to, and has to be woken.
 */
static inline bool waiters_sleep(const struct waiters *waiters)
{
        atomic_thread_fence(memory_order_seq_cst);
        return __builtin_expect(load_relaxed(&waiters->any) != 0, 0);
}

#endif
