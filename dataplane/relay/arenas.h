/* The arenas of this host's processes that the relay has mapped, and their bells.
 *
 * The relay is side 1 of each: it receives direction 0, sends direction 1, and waits with bell 0 of side 1
 * for everything in the arena; which slot it was stands in `dirty`. Everything in an arena can be written by
 * the process at any time.
 */
#ifndef FREEFLOW_RELAY_ARENAS_H
#define FREEFLOW_RELAY_ARENAS_H

#include "../library/layout.h"
#include "list.h"
#include "relay.h"

struct mirror;

struct shared {
        struct watch bell; /* receiving end of the relay's */
        struct node same;  /* in its hash bucket */
        struct node deaf;  /* nobody can ring the relay's bell yet */
        uint64_t id;
        bool guarded; /* no descriptor can be put into the relay's bell */
        int memory;
        uint32_t size_of_ring;
        size_t size;
        unsigned char *base;
        int bells[BELLS]; /* sending ends of side 0's; -1: not known */
        struct mirror *mirrors[SLOTS];
};

void arenas_start(void);
/* R_ARENA; takes over both descriptors. NULL: it isn't a remote arena of this version, with a text. */
struct shared *arena_take(uint64_t id, uint32_t size_of_ring, int memory, int bell, char *text);
struct shared *arena_find(uint64_t id);
void arena_bell(struct shared *shared, uint32_t index, int bell);
void arena_discard(struct shared *shared);
/* Those whose bell couldn't be rung until now are looked at. Did any have news? */
bool arenas_listen(void);
bool arenas_deaf(void);
/* A connection in it waits from now on. */
void arena_waits(struct shared *shared);

static inline struct ring *arena_ring(const struct shared *shared, uint32_t slot, uint32_t direction)
{
        return (struct ring *)(void *)(shared->base + SLOT_OFFSET +
                                       ((size_t)slot * SIDES + direction) * PAGE);
}

static inline unsigned char *arena_bulk(const struct shared *shared, uint32_t slot, uint32_t direction)
{
        return shared->base + BULK_OFFSET + ((size_t)slot * SIDES + direction) * shared->size_of_ring;
}

void arena_ring_bells(struct shared *shared, struct waiters *waiters, uint32_t slot);

/* Something was published for those of side 0 who wait here. Pairs with wait_begin() of the library. */
static inline void arena_wake(struct shared *shared, struct waiters *waiters, uint32_t slot)
{
        atomic_thread_fence(memory_order_seq_cst);
        if (__builtin_expect(atomic_load_explicit(&waiters->any, memory_order_relaxed) != 0, 0))
                arena_ring_bells(shared, waiters, slot);
}

#endif
