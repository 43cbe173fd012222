/* One direction of a connection as bytes in shared memory: one sender, one receiver.
 *
 * Positions only grow: `tail` counts what was put in, `head` what was taken out. Each side keeps
 * its own index in private memory (`struct flow`.edge) and only publishes it in the ring. It checks
 * the other side's index: tail - head must not exceed the ring's size, and the offset into the ring
 * is masked. So whatever the other side writes, nothing outside the ring is read or written.
 *
 * Byte p lies at offset (p - base) mod size. The sender moves `base` to `tail` only while the ring
 * is empty, so a receiver that loads it after a tail that says "not empty" has the one that holds
 * for these bytes.
 *
 * All functions are called under the flow's lock. A signal handler may have used the ring inside
 * it: the commit compares the index, fails, and the caller begins again.
 */
#ifndef FREEFLOW_RING_H
#define FREEFLOW_RING_H

#include "budget.h"
#include "clock.h"
#include "cursor.h"
#include "family.h"
#include "view.h"

#define RING_CORRUPT (-1)

/* Bytes of a ring that may be used: all of a remote one. Its memory is there already, and the
 * relays report what has been read in steps of half a ring: a sender that used less might wait for
 * ever. */
static inline uint64_t ring_limit(const struct view *view)
{
        return view_remote(view) ? view_size(view) : settings.ring_limit;
}

/* Offset in the ring that the sender doesn't go beyond. */
static inline uint64_t ring_extent(const struct flow *flow, const struct view *view)
{
        return view_remote(view) ? view_size(view) : budget_extent(flow);
}

/* The ring is empty: start again at its first byte. */
static inline void ring_restart(struct flow *flow, const struct view *view, uint64_t tail)
{
        store_relaxed(&flow->base, tail);
        store_relaxed(&view->ring->base, tail);
        store_relaxed(&flow->stopped, 0);
}

/* How many of `space` bytes from `tail` on the sender may use. If it may not use the whole ring, it
 * only starts again at the first byte when the ring is empty. */
static inline uint64_t ring_within(struct flow *flow, const struct view *view, uint64_t tail, uint64_t space)
{
        uint64_t extent = ring_extent(flow, view);
        uint64_t offset = tail - load_relaxed(&flow->base);

        if (__builtin_expect(extent >= view_size(view), 1))
                return space;
        if (offset < extent)
                return space < extent - offset ? space : extent - offset;
        store_relaxed(&flow->stopped, 1);
        return 0;
}

/* Bytes that may be put in now, for a message of `want`; RING_CORRUPT: the receiver's index is
 * invalid. */
static inline int64_t ring_space(struct flow *flow, const struct view *view, size_t want, uint64_t limit)
{
        uint64_t tail = load_relaxed(&flow->edge);
        uint64_t used = tail - load_acquire(&view->ring->head);

        if (__builtin_expect(used > view_size(view), 0))
                return RING_CORRUPT;
        if (!used && load_relaxed(&flow->base) != tail &&
            (want <= SMALL_SIZE || ring_extent(flow, view) < view_size(view)))
                ring_restart(flow, view, tail);
        return used < limit ? (int64_t)ring_within(flow, view, tail, limit - used) : 0;
}

/* Where byte `tail` goes, and how many bytes fit there in one piece. */
static inline unsigned char *ring_to_put(const struct flow *flow, const struct view *view, uint64_t tail,
                                         size_t *run)
{
        return ring_at(view, tail - load_relaxed(&flow->base), run);
}

/* Stamp an empty ring, before something is published: a thread that waits for several rings reports
 * them in the order of their stamps. */
static inline void ring_stamp(const struct view *view, uint64_t tail, uint64_t stamp)
{
        if (load_relaxed(&view->ring->head) == tail)
                store_relaxed(&view->ring->stamp, stamp);
}

/* Make bytes up to `tail + size` readable; `stamp`: when they were put. False: a signal handler has
 * put bytes there meanwhile. */
static inline bool ring_put(struct flow *flow, const struct view *view, uint64_t tail, size_t size,
                            uint64_t stamp)
{
        uint64_t end = (tail - load_relaxed(&flow->base)) + size;

        if (!atomic_compare_exchange_strong_explicit(&flow->edge, &tail, tail + size, memory_order_relaxed,
                                                     memory_order_relaxed))
                return false;
        if (!view_remote(view))
                budget_touch(flow, end);
        ring_stamp(view, tail, stamp);
        if (__builtin_expect(load_relaxed(&flow->clean) == tail, 1)) {
                store_relaxed(&flow->clean, tail + size);
                store_relaxed(&view->ring->clean, tail + size);
        }
        store_relaxed(&view->ring->messages, load_relaxed(&view->ring->messages) + 1);
        store_release(&view->ring->tail, tail + size);
        return true;
}

/* Bytes that can be taken, or RING_CORRUPT: the sender's index is invalid. */
static inline int64_t ring_ready(const struct flow *flow, const struct view *view)
{
        uint64_t tail = load_acquire(&view->ring->tail);
        uint64_t ready = tail - load_relaxed(&flow->edge);

        return __builtin_expect(ready > view_size(view), 0) ? RING_CORRUPT : (int64_t)ready;
}

/* Where byte `head` is, and how many follow it in one piece. After ring_ready() said that there is
 * one. */
static inline unsigned char *ring_to_take(const struct view *view, uint64_t head, size_t *run)
{
        return ring_at(view, head - load_relaxed(&view->ring->base), run);
}

/* Release the space below `head + size`. False: a signal handler has taken bytes meanwhile. */
static inline bool ring_take(struct flow *flow, const struct view *view, uint64_t head, size_t size)
{
        if (!atomic_compare_exchange_strong_explicit(&flow->edge, &head, head + size, memory_order_relaxed,
                                                     memory_order_relaxed))
                return false;
        store_release(&view->ring->head, head + size);
        return true;
}

#endif
