/* How much of the rings' shared memory this family's senders touch, and giving it back.
 *
 * What a sender touches counts for its own container. A connection with bulk data may use all of its ring
 * while all of them together use less than an eighth of what the container may have; after that, each stays
 * in its first part. What was used goes back when a ring has been empty for a second: only the sender can
 * know that nobody writes there, so it is the sender that does it, before a thread of its process sleeps;
 * while there is something to give back, sleepers wake for it.
 *
 * A page that nobody has written is made by who reads it, and counts for the reader: a peer may say that
 * bytes are there that it never wrote. So what all receivers have read of bulk areas is bounded too. Past
 * that they read the file by system calls, which makes no pages.
 */
#ifndef FREEFLOW_MEMORY_H
#define FREEFLOW_MEMORY_H

#include "family.h"
#include "settings.h"

enum { EXTENT_LEAST = 64 * 1024 };

/* Bytes that all rings together may use; set once. */
extern uint64_t memory_budget;

/* A number of one of the kernel's files; UINT64_MAX: there is none. */
uint64_t memory_number_in(const char *path);
/* Read how much this container may have. */
void memory_start(void);
/* Before a sleep of so many ns, negative: for ever. Returns how long to sleep instead. It looks after what
 * this thread has put, too (raw.h). */
int64_t memory_sleep(int64_t left);
/* The end's rings go. */
void memory_forget(struct flow *flow);
void memory_forget_read(struct flow *flow);
/* A receiver is going to read its ring up to this offset by the mapping. False: it must not. */
bool memory_read_more(struct flow *flow, uint64_t end);

static inline bool memory_may_read(struct flow *flow, uint64_t end)
{
        return __builtin_expect(end <= atomic_load_explicit(&flow->touched, memory_order_relaxed), 1) ||
               memory_read_more(flow, end);
}

/* Offset in the ring that a sender doesn't go beyond. */
static inline uint64_t memory_extent(const struct flow *flow)
{
        uint64_t touched = atomic_load_explicit(&flow->touched, memory_order_relaxed);

        if (__builtin_expect(atomic_load_explicit(&family->touched, memory_order_relaxed) < memory_budget, 1))
                return settings.ring_limit;
        if (touched < EXTENT_LEAST)
                touched = EXTENT_LEAST;
        return touched < settings.ring_limit ? touched : settings.ring_limit;
}

/* The sender has used its ring up to this offset. */
static inline void memory_touch(struct flow *flow, uint64_t end)
{
        uint64_t before = atomic_load_explicit(&flow->touched, memory_order_relaxed);

        if (end > RING_SIZE)
                end = RING_SIZE;
        if (__builtin_expect(end <= before, 1))
                return;
        atomic_store_explicit(&flow->touched, end, memory_order_relaxed);
        if (end > SMALL_SIZE) {
                atomic_fetch_add_explicit(&family->touched, end - (before > SMALL_SIZE ? before : SMALL_SIZE),
                                          memory_order_relaxed);
                atomic_store_explicit(&process.touched, true, memory_order_relaxed);
        }
}

#endif
