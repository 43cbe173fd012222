/* A lock over one direction of one connection, held for a copy at most, never while waiting.
 *
 * Holders may be threads of several processes (fork), may be killed, and may be interrupted by a signal
 * handler that uses the same connection. So the word says who: a handler finds its own thread's lock and goes
 * on inside it (LOCK_NESTED; what it did is found by the outer call, which commits by compare-and-swap and
 * begins again); a waiter looks now and then whether the holder still lives, and takes the lock over from a
 * dead one. That is safe because everything under such a lock is committed by a single store.
 */
#ifndef FREEFLOW_LOCK_H
#define FREEFLOW_LOCK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define LOCK_WAITERS UINT32_C(0x80000000)

struct lock {
        _Atomic uint32_t word; /* thread id of the holder, LOCK_WAITERS */
};

enum taken { LOCK_TAKEN, LOCK_NESTED };

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
