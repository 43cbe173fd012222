#include "lock.h"

#include "sys.h"

#include <errno.h>
#include <linux/futex.h>
#include <time.h>

enum { TRIES = 200 }; /* before a waiter sleeps */

/* How long a waiter sleeps before it checks whether the holder is alive. */
static const struct timespec PATIENCE = {.tv_nsec = 20 * 1000 * 1000};

static bool is_dead(uint32_t tid)
{
        return sys_2(SYS_tkill, tid, 0) == -ESRCH;
}

enum taken lock_wait(struct lock *lock, uint32_t me)
{
        uint32_t waiters = 0;

        for (unsigned tries = 0;; tries++) {
                uint32_t seen = load_relaxed(&lock->word);

                if ((seen & ~LOCK_WAITERS) == me)
                        return LOCK_NESTED;
                if (!(seen & ~LOCK_WAITERS)) {
                        if (atomic_compare_exchange_weak_explicit(&lock->word, &seen, me | waiters,
                                                                  memory_order_acquire, memory_order_relaxed))
                                return LOCK_TAKEN;
                        continue;
                }
                if (tries < TRIES) {
                        relax();
                        continue;
                }
                if (!(seen & LOCK_WAITERS) &&
                    !atomic_compare_exchange_weak_explicit(&lock->word, &seen, seen | LOCK_WAITERS,
                                                           memory_order_relaxed, memory_order_relaxed))
                        continue;
                /* Others may wait as well: the next holder keeps the flag. */
                waiters = LOCK_WAITERS;
                if (sys_4(SYS_futex, &lock->word, FUTEX_WAIT, seen | LOCK_WAITERS, &PATIENCE) == -ETIMEDOUT &&
                    is_dead(seen & ~LOCK_WAITERS)) {
                        seen |= LOCK_WAITERS;
                        if (atomic_compare_exchange_strong_explicit(&lock->word, &seen, me | LOCK_WAITERS,
                                                                    memory_order_acquire,
                                                                    memory_order_relaxed))
                                return LOCK_TAKEN;
                }
        }
}

void lock_wake(struct lock *lock)
{
        sys_3(SYS_futex, &lock->word, FUTEX_WAKE, 1);
}
