/* Every change of an end's stage and of a flow's phase: the state machine of a connection.
 *
 * A stage is what the end as a whole has reached on its way to shared memory; a phase, of an
 * attached end, is where one direction's bytes go. flow.c has the table of what may follow what,
 * and is the only file that writes either.
 *
 * Stages change by compare-and-swap, without a lock: of two threads that move an end on from the
 * same stage one succeeds. Phases change under the flow's lock, except that a thread with the other
 * flow's lock may end a flow whose connection was reset: so PHASE_OVER is final, whatever else is
 * written at the same moment. Only who has both locks may begin anew: flow_leave_slot().
 */
#ifndef FREEFLOW_FLOW_H
#define FREEFLOW_FLOW_H

#include "end.h"

#include <stdbool.h>

/* From one stage to the next. False: the end isn't there (any more), or one doesn't follow the
 * other. */
bool stage_become(struct end *end, enum stage from, enum stage to);
/* From now on no answer of the router is for this end. */
void stage_close(struct end *end);
/* From whatever phase it is in. False: the flow has ended. */
bool flow_become(struct flow *flow, enum phase to);
/* The end is a new socket's: both flows begin. Their locks stay as they are: somebody may hold one
 * for a moment, and then finds the new generation. */
void flow_begin(struct end *end);
/* A thread is about to sleep with a bell of the end's slot. False: the slot isn't the end's any
 * more, and the caller begins anew. After true: flow_end_wait(). */
static inline bool flow_begin_wait(struct end *end, const struct flow *flow)
{
        atomic_fetch_add(&end->waits, 1);
        /* Pairs with flow_leave_slot(). */
        if (atomic_load(&flow->phase) != PHASE_TCP)
                return true;
        atomic_fetch_sub(&end->waits, 1);
        return false;
}

static inline void flow_end_wait(struct end *end)
{
        atomic_fetch_sub(&end->waits, 1);
}

/* Under both locks, both directions having ended: to PHASE_TCP, out of the slot. False: a thread
 * sleeps that only the slot's bells would wake, and nothing has changed. */
bool flow_leave_slot(struct end *end);
/* Then: both flows forget the slot's rings. Their positions go on. */
void flow_begin_again(struct end *end);

#endif
