/* Ringing a bell at most once until its waiter looks.
 *
 * Each bell has a word in the arena (`rung` of struct arena):
 *
 *      0       its waiter does not say when it looks: ring each time
 *      even    its waiter has looked since the last ring that counts: ring
 *      odd     somebody has rung since the waiter looked: nobody needs to ring again
 *
 * The ringing side:                       The waiter:
 *
 *      publish                                 takes the ring (an event, or the bytes)
 *      `dirty` of the bell    (or)             rung_look()       next even number
 *      rung_seen()            odd: skip        `dirty`           (exchange), and checks what it says
 *      send a byte
 *      rung_sent()            odd, if the number is still the same
 *
 * All four accesses are sequentially consistent, so there is one order of them. A ringer that skips
 * has read an odd number, so its read comes before the waiter's next rung_look(), and its `dirty`
 * comes before the exchange that follows this look: the waiter finds it. And the waiter does look
 * again. The number became odd after a byte that was sent while the number before it was current,
 * that is, after the last look; so that byte was not taken before that look, and it wakes the
 * waiter.
 *
 * The number becomes odd only after the byte is sent. A ringer that is killed, stopped or
 * interrupted by a signal handler in between makes nobody skip; `dirty` alone could not say this.
 * Nor can a late rung_sent(): the number has changed if the waiter has looked meanwhile.
 *
 * Each side may write anything here at any time. Who does so makes the other side ring it more
 * often, or not at all: it only harms its own waiters.
 */
#ifndef FREEFLOW_RUNG_H
#define FREEFLOW_RUNG_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* The waiter's side has got a bell under this number, perhaps in place of an older one: what was
 * sent to that one counts no more. */
static inline void rung_look(_Atomic uint32_t *rung);
static inline void rung_start(_Atomic uint32_t *rung)
{
        uint32_t never = 0;

        if (!atomic_compare_exchange_strong(rung, &never, 2))
                rung_look(rung);
}

/* The waiter has taken what its bell had, or its event. What `dirty` and the rings say has to be
 * read after this. */
static inline void rung_look(_Atomic uint32_t *rung)
{
        enum { TRIES = 64 }; /* more than there are honest writers at one time */
        uint32_t seen = atomic_load(rung);

        for (int i = 0; i < TRIES && seen; i++) {
                uint32_t next = (seen | 1) + 1;

                if (atomic_compare_exchange_strong(rung, &seen, next ? next : 2))
                        break;
                if (i == TRIES - 1)
                        atomic_store(rung, 0);
        }
        /* For a waiter that reads the rings without `dirty`. Pairs with the fence in wake(). */
        atomic_thread_fence(memory_order_seq_cst);
}

/* For rung_sent(). True: the bell has been rung, and its waiter hasn't looked yet. */
static inline bool rung_seen(_Atomic uint32_t *rung, uint32_t *seen)
{
        *seen = atomic_load(rung);
        return *seen & 1;
}

/* A byte has been sent after rung_seen(). */
static inline void rung_sent(_Atomic uint32_t *rung, uint32_t seen)
{
        if (seen)
                atomic_compare_exchange_strong(rung, &seen, seen | 1);
}

#endif
