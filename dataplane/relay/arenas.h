/* The arenas of this host's processes that the relay has mapped, and their bells.
 *
 * The relay is side 1 of each arena: it receives direction 0 and sends direction 1. It waits for
 * all slots of an arena with one bell, bell 0 of side 1; the bits in `dirty` say which slots a ring
 * was for. The process can write anything anywhere in the arena at any time, so every value read
 * from it is untrusted.
 */
#ifndef FREEFLOW_RELAY_ARENAS_H
#define FREEFLOW_RELAY_ARENAS_H

#include "../library/layout.h"
#include "context.h"
#include "list.h"
#include "usage.h"

struct mirror;

struct shared {
        struct watch bell;  /* receiving end of the relay's */
        struct node same;   /* in its hash bucket */
        struct node polled; /* in the list of those that cannot ring the relay's bell yet */
        struct node due;    /* in the list of those with bells to ring */
        uint64_t id, owner;
        bool guarded; /* the kernel refuses descriptors that are sent to the relay's bell */
        int memory;
        uint32_t size_of_ring;
        uint32_t share; /* thousandths of the time in which the relay works for it; 0: all of it */
        uint64_t works_until, rests_until; /* ns */
        size_t size;
        unsigned char *base;
        int bells[BELLS];               /* sending ends of side 0's; -1: not known */
        uint64_t due_bells[BELL_WORDS]; /* of these: to ring at the end of the turn */
        struct mirror *mirrors[SLOTS];
        struct usage usage;
};

/* `woken` is called for each connection in whose slot a process has done something. */
void arenas_start(void (*woken)(struct mirror *mirror));
/* R_ARENA; takes over both descriptors. NULL: it is not a remote arena of this version; `text` says
 * why. */
struct shared *arena_add(uint64_t id, uint64_t owner, uint32_t size_of_ring, int memory, int bell,
                         char *text);
struct shared *arena_find(uint64_t id);
/* R_BELL; takes over the descriptor. */
void arena_set_bell(struct shared *shared, uint32_t index, int bell);
/* R_SHARE. */
void arena_set_share(struct shared *shared, uint32_t share);
/* The relay does not send for it now, and takes no note of what its process has taken. */
bool arena_rests(struct shared *shared);
/* When the first of those that were found to rest is served again; 0: there are none. */
uint64_t arenas_resume_at(uint64_t present);
/* No connection may be in it any more. */
void arena_remove(struct shared *shared);
/* Checks the arenas whose processes cannot ring yet. True: one of them had work. */
bool arenas_poll(void);
/* Has arenas_poll() anything to check? */
bool arenas_need_polls(void);
/* A connection in it is idle from now on: poll it if its process cannot ring. */
void arena_becomes_idle(struct shared *shared);

static inline struct ring *arena_ring(const struct shared *shared, uint32_t slot, uint32_t direction)
{
        return (struct ring *)(void *)(shared->base + SLOT_OFFSET +
                                       ((size_t)slot * SIDES + direction) * PAGE);
}

static inline unsigned char *arena_bulk(const struct shared *shared, uint32_t slot, uint32_t direction)
{
        return shared->base + BULK_OFFSET + ((size_t)slot * SIDES + direction) * shared->size_of_ring;
}

/* The bells of all threads that wait here are due. */
void arena_ring_bells(struct shared *shared, struct waiters *waiters, uint32_t slot);
/* Rings all bells that are due, each once. The relay does this at the end of each turn, and before
 * it sleeps: a bell wakes a thread or an event loop for all of its connections. */
void arenas_ring(void);

/* Wakes the threads of side 0 that wait here, after something was published for them. The fence
 * pairs with wait_begin() of the library. */
static inline void arena_wake(struct shared *shared, struct waiters *waiters, uint32_t slot)
{
        atomic_thread_fence(memory_order_seq_cst);
        if (__builtin_expect(atomic_load_explicit(&waiters->any, memory_order_relaxed) != 0, 0))
                arena_ring_bells(shared, waiters, slot);
}

#endif
