/* Counters of this process's connections. For tests and measurements they are appended to the file
 * FREEFLOW_STATS at exit, as one line of JSON per process. */
#ifndef FREEFLOW_STATISTICS_H
#define FREEFLOW_STATISTICS_H

#include "atomics.h"

#include <stdint.h>

enum { REASONS = 17 };

/* clang-format off */
#define STATISTICS(F)                                                                                        \
        F(tracked) F(asked) F(granted) F(refused)                                                            \
        F(receivers) F(senders) /* directions that went to the ring */                                       \
        F(received) F(sent)     /* bytes through rings */                                                    \
        F(retreats)                                                                                          \
        F(returned)             /* ends that have left their slot, to be counted again */                    \
        F(corrupt)                                                                                           \
        F(past)                 /* ends that found bytes which bypassed the library */                       \
        F(remote) F(broken)     /* ends in remote arenas; those whose path was lost */                       \
        F(sleeps) F(spins)      /* waits that slept, waits that spinning ended */                            \
        F(polls)                /* looks for answers of the router */
/* clang-format on */

#define DECLARE(name) _Atomic uint64_t name;
struct statistics {
        STATISTICS(DECLARE)
        _Atomic uint64_t reasons[REASONS];
};
#undef DECLARE

extern struct statistics statistics;

static inline void statistics_add(_Atomic uint64_t *counter, uint64_t more)
{
        /* Not a locked instruction: of two counts at the same moment one may be lost. */
        store_relaxed(counter, load_relaxed(counter) + more);
}

static inline void statistics_count(_Atomic uint64_t *counter)
{
        statistics_add(counter, 1);
}

void statistics_report(void);
void statistics_reason(uint32_t reason);

#endif
