/* How much of the rings' shared memory the processes of a family may use.
 *
 * A page that a sender touches counts for the sender's container. While all senders of the family
 * together use less than an eighth of the container's memory, a connection with bulk data may use
 * all of its ring. Past that, each connection stays in the first part of its ring. reclaim.h
 * returns what was used.
 *
 * A page that was never written is made by the process that reads it, and counts for the reader: a
 * peer may announce bytes that it never wrote. So the bulk areas that all receivers have read are
 * bounded too. Past that bound a receiver reads the file by system calls, which make no pages.
 */
#ifndef FREEFLOW_BUDGET_H
#define FREEFLOW_BUDGET_H

#include "family.h"
#include "settings.h"

enum { EXTENT_LEAST = 64 * 1024 };

/* Bytes that all rings together may use. Set once. */
extern uint64_t budget_limit;

/* Read how much memory this container may have. */
void budget_start(void);
/* The end's ring goes: what its sender touched, or what its receiver read, counts no more. */
void budget_forget_sender(struct flow *flow);
void budget_forget_receiver(struct flow *flow);
/* Under the sender's lock: the bulk area has been returned to the kernel. */
void budget_reclaimed(struct flow *flow);
/* A receiver is about to read its ring up to this offset by the mapping. False: it must not. */
bool budget_read_more(struct flow *flow, uint64_t end);

static inline bool budget_may_read(struct flow *flow, uint64_t end)
{
        return __builtin_expect(end <= load_relaxed(&flow->touched), 1) || budget_read_more(flow, end);
}

/* The offset in the ring that a sender doesn't go beyond. */
static inline uint64_t budget_extent(const struct flow *flow)
{
        uint64_t touched = load_relaxed(&flow->touched);

        if (__builtin_expect(load_relaxed(&family->touched) < budget_limit, 1))
                return settings.ring_limit;
        if (touched < EXTENT_LEAST)
                touched = EXTENT_LEAST;
        return touched < settings.ring_limit ? touched : settings.ring_limit;
}

/* The sender has used its ring up to this offset. */
static inline void budget_touch(struct flow *flow, uint64_t end)
{
        uint64_t before = load_relaxed(&flow->touched);

        if (end > RING_SIZE)
                end = RING_SIZE;
        if (__builtin_expect(end <= before, 1))
                return;
        store_relaxed(&flow->touched, end);
        if (end > SMALL_SIZE) {
                atomic_fetch_add_explicit(&family->touched, end - (before > SMALL_SIZE ? before : SMALL_SIZE),
                                          memory_order_relaxed);
                store_relaxed(&process.touched, true);
        }
}

#endif
