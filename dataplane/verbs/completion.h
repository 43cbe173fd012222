/* The completions of a completion queue, and when its channel gets an event.
 *
 * A program that wants to sleep arms the queue, takes what is in it, and waits for an event if that
 * was nothing. So the first completion that is put in after the queue was armed causes one event,
 * and disarms it. Armed for solicited completions only, it waits for one of those or a failed one.
 * Armed for both, any completion will do.
 *
 * Whoever polls the queue also executes what has arrived for it, and puts in completions which it
 * takes at once. Those cause no event, and the queue stays armed. If some are left in the queue, an
 * event is due after all: see completions_settle().
 *
 * Looking whether something is in the queue takes no lock.
 */
#ifndef FREEFLOW_COMPLETION_H
#define FREEFLOW_COMPLETION_H

#include "mutex.h"
#include "verb.h"

enum arming { DISARMED, ARMED_SOLICITED, ARMED };

struct completions {
        struct mutex mutex;
        /* Of completions put in and taken out. Only written under the mutex. */
        _Atomic uint32_t tail, head;
        struct ibv_wc *entries;
        uint32_t mask;
        uint32_t limit;   /* completions at one time */
        uint32_t armed;   /* enum arming */
        _Atomic bool due; /* while somebody polls: an event, unless the queue gets empty */
        bool overrun;     /* it was full: no more are accepted */
};

enum completion_outcome {
        COMPLETION_QUIET,
        COMPLETION_EVENT,   /* the caller gives the channel an event */
        COMPLETION_OVERRUN, /* full, for the first time: the caller reports IBV_EVENT_CQ_ERR */
};

/* A queue for so many completions at one time. False: no memory. */
bool completions_start(struct completions *queue, uint32_t limit);
void completions_end(struct completions *queue);
/* Change how many there is room for, keeping those that are there. Returns 0, EINVAL if more are
 * there, or ENOMEM. */
int completions_resize(struct completions *queue, uint32_t limit);

/* Put one in. `solicited`: the sender has asked for an event. `polling`: the caller polls the queue
 * and calls completions_settle() afterwards. */
enum completion_outcome completions_put(struct completions *queue, const struct ibv_wc *completion,
                                        bool solicited, bool polling);
/* Take the oldest ones, `most` at most. Returns their number. */
uint32_t completions_take(struct completions *queue, uint32_t most, struct ibv_wc *completions);
/* Forget those of a queue pair. */
void completions_drop(struct completions *queue, uint32_t number);
/* A thread that polls has taken what it wanted. */
enum completion_outcome completions_settle(struct completions *queue);
/* The next completion causes an event, or the next solicited one. */
void completions_arm(struct completions *queue, bool solicited);

static inline bool completions_are_there(const struct completions *queue)
{
        return atomic_load_explicit(&queue->tail, memory_order_relaxed) !=
               atomic_load_explicit(&queue->head, memory_order_relaxed);
}

#endif
