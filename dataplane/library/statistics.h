/* Counters of this process's connections. For tests and measurements they are appended to the file
 * FREEFLOW_STATS at exit, as one line of JSON per process. */
#ifndef FREEFLOW_STATISTICS_H
#define FREEFLOW_STATISTICS_H

#include <stdatomic.h>
#include <stdint.h>

enum { REASONS = 17 };

struct statistics {
        _Atomic uint64_t tracked, asked, granted, refused;
        _Atomic uint64_t receivers, senders; /* directions that went to the ring */
        _Atomic uint64_t received, sent;     /* bytes through rings */
        _Atomic uint64_t retreats, corrupt;
        _Atomic uint64_t returned;       /* ends that have left their slot, to be counted again */
        _Atomic uint64_t past;           /* ends that found bytes which bypassed the library */
        _Atomic uint64_t remote, broken; /* ends in remote arenas; those whose path was lost */
        _Atomic uint64_t sleeps, spins;  /* waits that slept, waits that spinning ended */
        _Atomic uint64_t polls;          /* looks for answers of the router */
        _Atomic uint64_t reasons[REASONS];
};

extern struct statistics statistics;

static inline void statistics_add(_Atomic uint64_t *counter, uint64_t more)
{
        /* Not a locked instruction: of two counts at the same moment one may be lost. */
        atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + more,
                              memory_order_relaxed);
}

static inline void statistics_count(_Atomic uint64_t *counter)
{
        statistics_add(counter, 1);
}

void statistics_report(void);
void statistics_reason(uint32_t reason);

#endif
