/* Shared receive queues: receives that whichever queue pair needs one takes.
 *
 * No receive is reserved for a queue pair: each one tells its other side of all that are there. So
 * a message may come when none is left. It waits at the head of its ring. Its queue pair is hungry
 * from then on, which means that it waits for a receive, and tells the other side that there are
 * fewer. A thread that posts receives makes the hungry queue pairs continue.
 */
#ifndef FREEFLOW_SHARED_RECEIVES_H
#define FREEFLOW_SHARED_RECEIVES_H

#include "channel.h"
#include "work.h"

struct queue_pair;

/* A queue pair in the list of a shared receive queue. */
struct shared_member {
        struct shared_member *next;
        struct queue_pair *queue;
        /* It waits for a receive. */
        _Atomic bool hungry;
};

struct shared_receives {
        struct ibv_srq plain; /* what programs know */
        struct receive_queue receives;
        _Atomic uint32_t limit; /* with fewer receives than that the program has an event; 0: none */
        struct event limit_reached;
        _Atomic bool hungry; /* some members are */
        struct mutex mutex;  /* of the list: before those of queue pairs */
        struct shared_member *first;
};

static inline struct shared_receives *shared_of(struct ibv_srq *plain)
{
        return (struct shared_receives *)(void *)plain;
}

void shared_join(struct shared_receives *shared, struct shared_member *member, struct queue_pair *queue);
void shared_leave(struct shared_receives *shared, struct shared_member *member);
/* Take the oldest receive. False: there is none. */
bool shared_take(struct shared_receives *shared, struct receive_work *work);
/* With fewer receives than that the program has an event, once; 0: it has none. */
void shared_set_limit(struct shared_receives *shared, uint32_t limit);
/* The member waits for a receive. Whatever is posted after this makes it go on; look once more for
 * what was posted before. */
void shared_hunger(struct shared_receives *shared, struct shared_member *member);
/* Receives were posted: call `feed` for each member that waits for one. */
void shared_feed(struct shared_receives *shared, void (*feed)(struct queue_pair *queue));

#endif
