/* How long to spin before sleeping, learned from how long earlier spins and sleeps took.
 *
 * Spinning pays while the other side answers faster than a sleeper wakes. If both sides sleep at
 * each wait, they stay out of step for ever: by the time that one is awake, the other has stopped
 * spinning. So:
 *
 *      - After a row of misses a waiter sleeps at once.
 *      - But every `patience` waits it spins for as long as it last slept, if that was short: long
 *        enough to see the answer of a peer that has to wake first.
 *      - If that finds something, it spins for a short time at each of the next waits. If the other
 *        side does the same meanwhile, both are in step. If not, `patience` doubles.
 */
#ifndef FREEFLOW_SPIN_H
#define FREEFLOW_SPIN_H

#include "atomics.h"
#include "settings.h"

#include <stdbool.h>
#include <stdint.h>

enum {
        SPIN_MISSES = 4,    /* in a row, after which a waiter sleeps at once */
        SPIN_LONGEST = 400, /* us: a longer sleep didn't wait for a peer that had to wake */
        SPIN_CHECKS = 8,    /* checks between readings of the clock */
        SPIN_PATIENCE = 8,  /* waits */
        SPIN_PATIENCE_MOST = 256,
        SPIN_WINDOW = 64,      /* waits with a short spin after a long one with success, at most */
        SPIN_REACH_MOST = 100, /* us: no spin at each wait for answers that take longer */
        SPIN_IN_STEP = 16,     /* hits in a row after which patience is forgotten */
};

/* Threads may share one. A race between them costs no more than a wrong guess. */
struct spinner {
        _Atomic uint16_t misses; /* left until a waiter sleeps at once, from a window down */
        _Atomic uint16_t hits, patience, left;
        _Atomic uint32_t reach; /* us to spin at each wait, learned from answers; 0: as set */
        _Atomic uint32_t slept; /* us, the last time */
        _Atomic uint32_t started;
};

#define SPIN_GET(field) load_relaxed(&spinner->field)
#define SPIN_SET(field, value) store_relaxed(&spinner->field, (value))

static inline uint64_t spin_usual(struct spinner *spinner)
{
        uint32_t reach = SPIN_GET(reach);

        return (reach > settings.spin && settings.spin ? reach : settings.spin) * UINT64_C(1000);
}

/* Nanoseconds to spin now. */
static inline uint64_t spin_budget(struct spinner *spinner)
{
        uint32_t slept = SPIN_GET(slept);
        uint16_t left;

        if (!SPIN_GET(started)) {
                SPIN_SET(started, 1);
                SPIN_SET(misses, SPIN_MISSES);
        }
        if (SPIN_GET(misses))
                return spin_usual(spinner);
        if (!settings.spin || slept > SPIN_LONGEST)
                return 0;
        left = SPIN_GET(left);
        if (left > 1) {
                SPIN_SET(left, (uint16_t)(left - 1));
                return 0;
        }
        return (settings.spin + slept) * UINT64_C(1000);
}

/* A spin of this budget has ended after so many ns. */
static inline void spin_learn(struct spinner *spinner, bool found, uint64_t budget, uint64_t elapsed)
{
        bool usual = budget <= spin_usual(spinner);
        uint64_t reach = elapsed / 1000 + elapsed / 2000;
        uint16_t patience = SPIN_GET(patience);

        if (!patience)
                SPIN_SET(patience, patience = SPIN_PATIENCE);
        if (found)
                /* Rises at once and falls slowly. */
                SPIN_SET(reach, reach > SPIN_REACH_MOST ? SPIN_REACH_MOST
                                : reach > SPIN_GET(reach)
                                    ? (uint32_t)reach
                                    : SPIN_GET(reach) - (SPIN_GET(reach) - (uint32_t)reach) / 8);
        if (found && usual) {
                if (SPIN_GET(misses) < SPIN_MISSES)
                        SPIN_SET(misses, SPIN_MISSES);
                if (SPIN_GET(hits) < SPIN_IN_STEP)
                        SPIN_SET(hits, (uint16_t)(SPIN_GET(hits) + 1));
                else
                        SPIN_SET(patience, SPIN_PATIENCE);
                return;
        }
        SPIN_SET(hits, 0);
        if (usual) {
                if (SPIN_GET(misses))
                        SPIN_SET(misses, (uint16_t)(SPIN_GET(misses) - 1));
                if (SPIN_GET(misses))
                        return;
                SPIN_SET(reach, 0);
        } else if (found) {
                SPIN_SET(misses, patience < SPIN_WINDOW ? patience : SPIN_WINDOW);
        }
        SPIN_SET(left, patience);
        SPIN_SET(patience, patience < SPIN_PATIENCE_MOST ? (uint16_t)(patience * 2) : SPIN_PATIENCE_MOST);
}

/* Another connection's waits say nothing about the next one's. Threads may be spinning. */
static inline void spin_forget(struct spinner *spinner)
{
        SPIN_SET(misses, 0);
        SPIN_SET(hits, 0);
        SPIN_SET(patience, 0);
        SPIN_SET(left, 0);
        SPIN_SET(reach, 0);
        SPIN_SET(slept, 0);
        SPIN_SET(started, 0);
}

static inline void spin_slept(struct spinner *spinner, uint64_t ns)
{
        SPIN_SET(slept, ns < UINT32_MAX ? (uint32_t)(ns / 1000) : UINT32_MAX);
}

#endif
