/* A lock over one direction of one connection. It is held for a copy at most, never during a wait.
 *
 * Its holders may be threads of several processes (fork), may be killed, and may be interrupted by
 * a signal handler that uses the same connection. So the lock's word names the holder:
 *
 *      - A handler that finds its own thread's lock goes on inside it (LOCK_NESTED). The
 *        interrupted call commits by compare-and-swap, finds what the handler did, and begins
 *        again.
 *      - A waiter checks now and then whether the holder is alive, and takes the lock over from a
 *        dead one. That is safe because each critical section commits by a single store.
 */
#ifndef FREEFLOW_LOCK_H
#define FREEFLOW_LOCK_H

#include "atomics.h"

#include <stdbool.h>
#include <stdint.h>

#define LOCK_WAITERS UINT32_C(0x80000000)

struct lock {
        _Atomic uint32_t word; /* thread id of the holder, LOCK_WAITERS */
};

enum taken { LOCK_TAKEN = 0, LOCK_NESTED = 1 };

/* The slow paths of lock_take() and lock_release(). `me` is the thread's id. */
enum taken lock_wait(struct lock *lock, uint32_t me);
void lock_wake(struct lock *lock);

static inline enum taken lock_take(struct lock *lock, uint32_t me)
{
        uint32_t free = 0;

        if (__builtin_expect(atomic_compare_exchange_strong_explicit(
                                 &lock->word, &free, me, memory_order_acquire, memory_order_relaxed),
                             1))
                return LOCK_TAKEN;
        return lock_wait(lock, me);
}

static inline void lock_release(struct lock *lock, enum taken taken)
{
        if (taken == LOCK_NESTED)
                return;
        if (__builtin_expect(atomic_exchange_explicit(&lock->word, 0, memory_order_release) & LOCK_WAITERS,
                             0))
                lock_wake(lock);
}

#endif
