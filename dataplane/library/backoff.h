/* How long an end that has left its ring, or whose request was refused for now, waits before it
 * tries again.
 *
 * Such a connection lives long, so a few seconds on TCP cost it little. What keeps it there (a
 * router that restarts, a lost link, a path that isn't worth it, a limit) is seldom over at once,
 * and each try costs the router a request. So the pause doubles. All connections of a lost path
 * leave it at the same moment; the ends' numbers spread their next requests over the length of the
 * pause.
 */
#ifndef FREEFLOW_BACKOFF_H
#define FREEFLOW_BACKOFF_H

#include "clock.h"
#include "family.h"

enum {
        BACKOFF_FIRST = 5,    /* s: a router starts in less */
        BACKOFF_DOUBLED = 6,  /* times; then it stays as long */
        BACKOFF_CHECK = 1000, /* ms between checks whether an end can leave its slot by now */
        BACKOFF_BUSY = 5,     /* the same, if a thread only has to wake */
        BACKOFF_SPREAD = 16,
};

static inline void backoff_set(struct end *end, uint64_t ms)
{
        store_relaxed(&end->due, now() + (process.restless ? 1 : ms) * UINT64_C(1000000));
}

/* The end has just left its ring, or its request was refused for now. */
static inline void backoff_begin(struct end *end)
{
        uint32_t setbacks = atomic_fetch_add_explicit(&end->setbacks, 1, memory_order_relaxed);
        uint64_t pause = (uint64_t)BACKOFF_FIRST * 1000
                         << (setbacks < BACKOFF_DOUBLED ? setbacks : BACKOFF_DOUBLED);

        backoff_set(end, pause + pause / BACKOFF_SPREAD * (end_number(end) % BACKOFF_SPREAD));
}

static inline bool backoff_is_over(const struct end *end)
{
        uint64_t due = load_relaxed(&end->due);

        return !due || now() >= due;
}

#endif
