/* How programs that sleep hear of events: of completion queues by a completion channel, of other
 * things by the asynchronous events of a context.
 *
 * Each is a queue, and an eventfd that programs poll or block in. The eventfd counts the events in
 * the queue, as a semaphore: whoever has read one from it takes one from the queue. An object that
 * is destroyed takes its events along. One who has read the eventfd by then finds no event, and
 * reads again.
 *
 * A program acknowledges each event that it took. An object isn't destroyed before all of its
 * events are. How many are not is counted in the field of the object's public structure where
 * libibverbs counts those that are.
 *
 * An event of a queue or a context takes no memory, so none is ever lost.
 */
#ifndef FREEFLOW_CHANNEL_H
#define FREEFLOW_CHANNEL_H

#include "mutex.h"
#include "verb.h"

/* --- completion channels */

/* A completion queue at its channel. */
struct channel_member {
        struct channel_member *next;
        struct ibv_cq *queue;
        uint32_t unread; /* events in the channel */
};

struct channel {
        struct ibv_comp_channel plain; /* what programs know */
        uint32_t generation;           /* port_generation() */
        struct mutex mutex;
        struct channel_member *first, **last; /* those with unread events */
};

static inline struct channel *channel_of(struct ibv_comp_channel *plain)
{
        return (struct channel *)plain;
}

void channel_join(struct channel *channel);
/* The queue is about to be destroyed, and no event of it is put in any more: drop its events, and
 * wait until the program has acknowledged those that it took. */
void channel_leave(struct channel *channel, struct channel_member *member);
/* An event of this queue. */
void channel_put(struct channel *channel, struct channel_member *member);

/* --- asynchronous events */

/* Something that may happen to an object, or to the port. As long as nobody has read that it did,
 * it doesn't happen again. */
struct event {
        struct event *next;
        struct ibv_async_event what;
        bool unread;
};

struct events {
        uint32_t generation; /* port_generation() */
        int fd;
        struct mutex mutex;
        struct event *first, **last;
};

/* False: errno says why. */
bool events_start(struct events *events);
void events_end(struct events *events);
void events_put(struct events *events, struct event *event);
/* The oldest one; waits as the program has chosen. False: errno says why. */
bool events_get(struct events *events, struct ibv_async_event *event);
/* The object is about to be destroyed, and this does not happen to it any more. */
void events_drop(struct events *events, struct event *event);
/* Then wait until the program has acknowledged the object's events that it took. The field of its
 * public structure counts them. */
void events_wait(uint32_t *unacknowledged);

#endif
