/* Is there something to read, or room to write? These functions take no lock. If the answer is out
 * of date, a caller that reads "yes" finds nothing and tries again, and a caller that reads "no" is
 * woken by a bell, since it has armed one before (sleep.h).
 */
#ifndef FREEFLOW_READY_H
#define FREEFLOW_READY_H

#include "arena.h"
#include "clock.h"
#include "family.h"

/* How often the kernel has reported something about a descriptor whose connection uses a ring. */
extern _Atomic uint32_t ready_kernel_reports;

static inline void ready_kernel_reported(void)
{
        atomic_fetch_add_explicit(&ready_kernel_reports, 1, memory_order_relaxed);
}

/* While this doesn't change, the kernel isn't polled again for a connection's end. It
 * changes with each tick, and when the kernel has reported something. */
static inline uint32_t ready_stamp(void)
{
        return ticks() + load_relaxed(&ready_kernel_reports) * UINT32_C(0x9e3779b1);
}

/* Nothing more comes in this remote ring. The relay writes that after the last byte and after
 * `start`. */
static inline bool ready_over(const struct view *view)
{
        return load_acquire(&view->ring->end) || load_acquire(&view->ring->over) ||
               load_acquire(&view->ring->stopped);
}

/* The connection of this attached end goes through a relay, and its path is lost. */
static inline bool ready_broken(const struct end *end)
{
        struct view view = end_receives(end);

        return view_remote(&view) &&
               (load_acquire(&view.ring->broken) || load_acquire(&end_sends(end).ring->broken));
}

/* The end's ring has ended and is empty: does the kernel have bytes, or the connection's end? The
 * peer may have fallen back to TCP without sending anything yet. */
bool ready_behind(const struct end *end);

/* The receiver can read something: bytes of the ring, or what comes after the ring's end. False
 * while bytes come over TCP, since the kernel reports those. */
static inline bool ready_bytes(struct end *end)
{
        uint32_t phase = load_relaxed(&end->rx.phase);
        struct view view;

        if (phase != PHASE_READY && phase != PHASE_RING)
                return false;
        view = end_receives(end);
        if (phase == PHASE_READY) {
                uint64_t start = load_acquire(&view.ring->start);

                if (!start || start - 1 > load_relaxed(&end->rx.position))
                        return view_remote(&view) &&
                               ((!start && ready_over(&view) && ready_behind(end)) || ready_broken(end));
        }
        /* SO_RCVLOWAT. For a ring that has ended, the kernel has the low-water mark less what the
         * ring still holds.
         */
        if (__builtin_expect(load_relaxed(&end->low), 0) && !ready_broken(end))
                return load_acquire(&view.ring->tail) - load_relaxed(&end->rx.edge) >=
                       load_relaxed(&end->low);
        return load_acquire(&view.ring->tail) != load_relaxed(&end->rx.edge) ||
               (view_remote(&view) && ready_broken(end)) ||
               ((load_relaxed(&view.ring->end) || (view_remote(&view) && ready_over(&view))) &&
                ready_behind(end));
}

/* Bytes of TCP that come before the ring's are on their way, or another thread is just reading
 * them. Nothing reports that it has read the last of them, so a sleep must be short. */
static inline bool ready_between(struct end *end)
{
        struct view view;
        uint64_t start;

        if (load_relaxed(&end->rx.phase) != PHASE_READY)
                return false;
        view = end_receives(end);
        start = load_acquire(&view.ring->start);
        return start && start - 1 > load_relaxed(&end->rx.position);
}

/* The ring has ended: a FIN that the kernel has belongs to the same event. */
static inline bool ready_end(struct end *end)
{
        uint32_t phase = load_relaxed(&end->rx.phase);
        struct view view;

        if (phase != PHASE_READY && phase != PHASE_RING)
                return false;
        view = end_receives(end);
        return load_relaxed(&view.ring->end) != 0 || (view_remote(&view) && ready_over(&view));
}

/* A sender that found no room is woken when the ring holds no more than so many bytes: as in TCP,
 * when a third is free. */
static inline uint32_t ready_threshold(const struct flow *flow, const struct view *view)
{
        return load_relaxed(&flow->stopped) ? 0 : (uint32_t)ring_limit(view) / 3 * 2;
}

/* Tell the receiver that threshold, before wait_begin(). */
static inline void ready_set_threshold(struct end *end)
{
        struct view view = end_sends(end);

        store_relaxed(&view.ring->room, ready_threshold(&end->tx, &view) + view_remote(&view));
}

/* A sender that has to leave the ring has space too: TCP's. Nobody may read the ring any more. */
static inline bool ready_space(struct end *end)
{
        struct view view;

        if (load_relaxed(&end->tx.phase) != PHASE_RING)
                return false;
        view = end_sends(end);
        return load_relaxed(&end->tx.edge) - load_acquire(&view.ring->head) <=
                   ready_threshold(&end->tx, &view) ||
               load_relaxed(&view.ring->stop) || ready_broken(end);
}

#endif
