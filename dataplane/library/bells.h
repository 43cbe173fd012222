/* Bells: how a waiter is woken.
 *
 * A bell is a pair of connected unix sockets for one waiter and one arena. The router makes it, and gives the
 * waiter's side the end that hears, the other side the end that rings by sending a byte. Not an eventfd: its
 * two holders share one file description, so either could make the other block in write(), or take the
 * other's wake-ups away; MSG_DONTWAIT is the call's own, and who fills or breaks his bell deafens nobody
 * else.
 *
 * A unix socket can carry descriptors, and the last close() of one that lingers waits. So nothing can be sent
 * to the end that rings (the router has shut that direction down), and no descriptor to the end that hears
 * (SO_PASSRIGHTS, Linux 6.16). Before Linux 6.16 a bell is looked into before it is read: one with a
 * descriptor in it is never read, and never closed either.
 */
#ifndef FREEFLOW_BELLS_H
#define FREEFLOW_BELLS_H

#include "mapping.h"

/* A bell for one wait of a thread, or one that an epoll instance keeps; -1: there is none now. */
int bell_take(uint32_t arena);
/* The same, and one more is ordered if there is none, whatever others have ordered. */
int bell_take_or_order(uint32_t arena);
/* After they had none: is one under way from the router? */
bool bell_is_ordered(uint32_t arena);
/* What the router has sent: an end of a bell, -1 if there is none to be had. Kept ones become -1. */
void bell_received(uint64_t id, uint32_t side, uint32_t bell, int *fd);
void bell_ringer_received(uint64_t id, uint32_t side, uint32_t bell, int *fd);
/* Close a descriptor that the router has sent and nobody wants. */
void bell_discard(int fd);
void bell_return(uint32_t arena, int bell);
int bell_descriptor(uint32_t arena, int bell);
/* Has the other side said that it can ring it? */
bool bell_is_known(uint32_t arena, uint32_t side, int bell);
/* Take the bytes out of a bell that rings. False: it isn't to be heard any more. */
bool bell_drain(uint32_t arena, int bell);
/* For who naps because he has no bell: a remote arena that has been deaf for long is broken. */
void arena_break_if_unreachable(uint32_t arena);

/* Say that this bell's waiter is about to sleep. The caller looks at the ring once more afterwards. */
static inline void wait_begin(struct waiters *waiters, int bell)
{
        atomic_fetch_or_explicit(&waiters->bells[bell / 64], UINT64_C(1) << (bell % 64),
                                 memory_order_relaxed);
        atomic_store_explicit(&waiters->any, 1, memory_order_relaxed);
        /* Pairs with wake(): either it sees `any`, or we see what it published. */
        atomic_thread_fence(memory_order_seq_cst);
}

static inline void wait_end(struct waiters *waiters, int bell)
{
        atomic_fetch_and_explicit(&waiters->bells[bell / 64], ~(UINT64_C(1) << (bell % 64)),
                                  memory_order_relaxed);
}

void ring_bells(struct waiters *waiters, const struct end *end);

/* Something was published in a ring of this end for those who wait here. */
static inline void wake(struct waiters *waiters, const struct end *end)
{
        atomic_thread_fence(memory_order_seq_cst);
        if (__builtin_expect(atomic_load_explicit(&waiters->any, memory_order_relaxed) != 0, 0))
                ring_bells(waiters, end);
}

/* Of the mapping of an arena whose bells are of no use any more. `others`: another process has them too. */
void bells_close(struct mapping *mapping, bool others);
void bells_close_peers(struct mapping *mapping);
/* A bell of ours has come from the router. `*hears` becomes -1 if it is kept. */
void bells_keep(struct mapping *mapping, uint32_t bell, int *hears);
/* An own descriptor has been closed by a call that nobody stands in front of: find the others that have.
 * Their numbers may be given again, to us or to the program. */
void own_lost(void);

#endif
