/* A queue pair: its work, its rings, its state.
 *
 * What a program posts to the send queue becomes records in the ring that goes out (requester.h).
 * What comes in the other ring is executed in the memory of this process (executor.h). Whoever
 * posts, polls, or waits for the process does a bit of both (progress.h).
 *
 *      RESET --> INIT --> RTR --> RTS <--> SQD         each --> ERR, RESET
 *
 * To execute and to send the two queue pairs have to be paired. The router pairs them once both
 * have asked, which they do when they become RTR:
 *
 *      ALONE --RTR--> ASKED --queue_pair_up()--> PAIRED --CLOSE, queue_part()--> LOST
 *
 * Until then requests wait in the send queue. A queue pair whose other side is gone becomes LOST
 * when all has been executed that had come. One that is LOST completes what the other side has
 * executed, and fails at the oldest request that is left, after the time for which a device would
 * try. Without one it does not fail: the other side may rightly be gone after the last one.
 * One that is connected with itself needs no router: loop.h.
 *
 * A queue pair of type UC (IBV_QPT_UC) loses what can't be executed instead: a message without a
 * receive, a write without a key, and everything while the other side isn't there. Its requests
 * complete once they are on their way, or lost.
 *
 * A queue pair that fails becomes ERR. It takes no more records, so that nothing of the other
 * side's completes as if it were executed, and tells it by CLOSE. All that was posted is flushed.
 *
 * Mutexes are taken in this order: `receiving`, `sending`, those of the receive queue and of the
 * completion queues. The state changes under both `receiving` and `sending`.
 */
#ifndef FREEFLOW_QUEUE_PAIR_H
#define FREEFLOW_QUEUE_PAIR_H

#include "../library/place.h"
#include "cq.h"
#include "extents.h"
#include "far_segments.h"
#include "opened.h"
#include "reached.h"
#include "record.h"
#include "shared_receives.h"
#include "work.h"

enum queue_pairing { QUEUE_ALONE, QUEUE_ASKED, QUEUE_PAIRED, QUEUE_LOST };

enum queue_event {
        QUEUE_FATAL,
        QUEUE_REQUEST_ERROR,
        QUEUE_ACCESS_ERROR,
        QUEUE_DRAINED,
        QUEUE_LAST_RECEIVE,
        QUEUE_EVENTS
};

struct queue_pair;

/* A queue pair in the list of a completion queue: progress.c. */
struct queue_member {
        struct queue_member *next;
        struct queue_pair *queue;
        struct queue_member *next_hot;
        _Atomic uint32_t looks; /* in vain, until it is cold; 0: it is */
};

/* What a queue pair knows of memory that it may use without records: direct.h. */
struct queue_direct {
        bool may; /* the other side knows of it, and the network allows it */
        struct segment *segments;
        uint32_t lacking; /* the key of a request that is to begin; 0: none, or nothing is lacking */
        uint32_t wanted;  /* a key to be asked for; 0: none */
        uint32_t asked;   /* the key that was asked for, and whose memory is not there yet; 0: none */
        struct record_direct coming; /* the answer, while its file is awaited */
        uint32_t owed;               /* the key that the other side has asked for; 0: none */
        struct record_direct answer; /* to be told */
        uint32_t without[8];         /* keys without such memory */
        uint32_t next_without;
        uint32_t pause, left; /* "later": how many requests by records until it asks again */
        /* far_memory.h: */
        struct far_segment *far;
        uint64_t move;        /* the number of the last one */
        uint64_t moving_from; /* the file of it */
        uint64_t not_from;    /* a file of this process that the relay can't use */
        uint32_t moving;      /* the key of the one that is under way; 0: none is */
        _Atomic bool moved;   /* one was done */
};

struct queue_pair {
        struct ibv_qp_ex plain; /* what programs know */
        struct mutex receiving, sending;
        _Atomic uint32_t state;   /* enum ibv_qp_state */
        _Atomic uint32_t pairing; /* enum queue_pairing */
        _Atomic bool failed;      /* it has to become ERR: queue_settle() */
        _Atomic bool parted;      /* the router says that the other side is gone */
        bool signal_all;
        uint32_t domain;
        struct ibv_qp_attr attributes; /* that the program has set */
        union ibv_gid gid;             /* of its path, from here */
        struct cq *send_cq, *receive_cq;
        struct shared_receives *shared; /* where its receives are; NULL: they are its own */
        struct shared_member feeding;
        struct queue_pair *neighbour;   /* datagrams.c */
        struct queue_member members[2]; /* of receive_cq, and of send_cq if that is another one */
        struct event events[QUEUE_EVENTS];
        /* Hints, for whoever looks without a mutex whether there is something to do: */
        /* the rings that come in and go out; NULL: none. The memory stays. */
        struct ring *_Atomic in, *_Atomic out;
        _Atomic uint64_t seen; /* in that ring, up to here */
        _Atomic bool relayed;  /* the other side is on another host */
        _Atomic uint32_t open; /* requests in the send queue */
        _Atomic bool owes;     /* there was no room for something that is to be told */
        _Atomic bool looped;   /* it is connected with itself: loop.h */
        struct ring *loop;
        /* Of whoever has paired it: */
        struct place place;
        _Atomic uint32_t request; /* the number of what it asks for; 0: nothing */
        uint32_t asked_by;
        bool asked_for;
        uint32_t refusals; /* that might have passed */
        uint64_t ask_at;   /* ns: not again before */
        uint64_t wait_end; /* ns: it does not wait for longer; 0: as long as the program does */
        /* Requests of this side that were executed, since it asked, and their bytes. Written under
         * `sending`. */
        _Atomic uint64_t operations, bytes;
        _Atomic uint64_t told; /* of the operations, to the router */
        _Atomic int bell;      /* of whoever waits for it in its arena; -1: nobody can */
        struct drafts *drafts; /* post_ex.h; NULL: programs can't post like that */

        /* --- under `sending` --- */
        struct send_queue sends;
        struct record_sender sender;
        bool ready;        /* the other side is there */
        bool died;         /* it has gone without CLOSE */
        uint32_t credit;   /* receives that the other side has posted, since the beginning */
        uint32_t spent;    /* of them, by this side's requests */
        uint32_t time;     /* of CREDIT: how long to wait for more, a code */
        uint32_t executed; /* requests before this number are executed */
        uint32_t asking;   /* READs and atomics that are not answered */
        uint64_t asked;    /* bytes of a ring that their answers take */
        uint64_t since;    /* when the oldest request began to wait for a receive or for pairing; 0: not */
        /* What is to be told to the other side: */
        uint32_t refused, refusal; /* REFUSED; enum record_refusal, 0: no */
        uint32_t done;             /* DONE: requests before this number */
        uint32_t done_told;
        uint32_t credit_told;
        bool credit_due, close_due;
        bool draining; /* SQD, and some requests have begun */
        bool unheard;  /* UC: the other side has not been ready for a while; whatever would wait is lost */
        struct queue_direct direct;
        struct extent_set known; /* by the other side, which was told of them */

        /* --- under `receiving` --- */
        uint32_t used_keys[4]; /* by which the other side was allowed to do something, the last first */
        struct receive_queue receives;
        struct record_receiver receiver;
        struct receive_work now; /* of the message that is coming */
        struct work_spot spot;
        bool busy;                    /* there is such a message */
        bool skips;                   /* UC: the rest of the message or write that is coming is lost */
        _Atomic bool stalled;         /* a message waits for a receive */
        bool leaves;                  /* progress_finish() */
        bool answers;                 /* some were put, and are not published */
        struct record_receiver ahead; /* while it does: up to where answers behind it were taken */
        uint64_t dry_since;           /* UD, ns: since when a datagram waits for a receive; 0: none does */
        bool dry;                     /* none waits any more */
        _Atomic uint32_t consumed;    /* receives, or lost messages for which there were none */
        _Atomic uint32_t lost;        /* of the latter */
};

/* What pairs queue pairs: pair.h. */
struct queue_pairer {
        /* It has become RTR. */
        void (*ask)(struct queue_pair *queue);
        /* Ask again, if the router has lost what it was asked for. False: there is no router. */
        bool (*ask_again)(struct queue_pair *queue);
        /* Tell the router what it has done, if `now`. False: something is untold. */
        bool (*tell)(struct queue_pair *queue, bool now);
        /* Take what the router has said. */
        void (*listen)(void);
        /* Something was published in a ring, for those who wait there. */
        void (*ring)(struct queue_pair *queue, struct waiters *waiters);
        /* It uses its rings no more, or does not want to be paired any longer. */
        void (*leave)(struct queue_pair *queue);
};

extern const struct queue_pairer *queue_pairer;
/* Requests wait, or the program waits for events, and it may sleep: somebody else is to look. */
extern void (*queue_watch)(void);

static inline struct queue_pair *queue_of(struct ibv_qp *plain)
{
        return (struct queue_pair *)(void *)plain;
}

static inline enum ibv_qp_state queue_state(const struct queue_pair *queue)
{
        return (enum ibv_qp_state)atomic_load_explicit(&queue->state, memory_order_acquire);
}

static inline enum queue_pairing queue_paired(const struct queue_pair *queue)
{
        return (enum queue_pairing)atomic_load_explicit(&queue->pairing, memory_order_acquire);
}

static inline bool queue_executes(const struct queue_pair *queue)
{
        enum ibv_qp_state state = queue_state(queue);

        return queue_paired(queue) == QUEUE_PAIRED &&
               (state == IBV_QPS_RTR || state == IBV_QPS_RTS || state == IBV_QPS_SQD);
}

/* Does it tell whether the other side has executed a request? UC does not. */
static inline bool queue_is_reliable(const struct queue_pair *queue)
{
        return queue->plain.qp_base.qp_type == IBV_QPT_RC;
}

static inline struct receive_queue *queue_receives(struct queue_pair *queue)
{
        return queue->shared ? &queue->shared->receives : &queue->receives;
}

/* Both mutexes. */
static inline void queue_lock(struct queue_pair *queue)
{
        mutex_take(&queue->receiving);
        mutex_take(&queue->sending);
}

static inline void queue_unlock(struct queue_pair *queue)
{
        mutex_release(&queue->sending);
        mutex_release(&queue->receiving);
}

/* Without mutexes: --- */

/* Is the other side gone, whatever it has left in the ring? */
static inline bool queue_is_parted(const struct queue_pair *queue, const struct ring *in)
{
        /* Pairs with whoever says so: all that the other side had put is there. */
        return atomic_load_explicit(&queue->parted, memory_order_acquire) ||
               atomic_load_explicit(&in->broken, memory_order_acquire) ||
               atomic_load_explicit(&in->over, memory_order_acquire);
}

/* Under `sending`: has the relay told how the last move ended? */
static inline bool queue_move_is_over(const struct queue_pair *queue)
{
        const struct ring *out = queue->sender.view.ring;

        return atomic_load_explicit(&out->moved, memory_order_acquire) / MOVE_OUTCOME == queue->direct.move;
}

/* The router has paired it: the ring that goes out, the one that comes in, and where both are.
 * False: it does not wait for that any more. */
bool queue_pair_up(struct queue_pair *queue, struct view out, struct view in, const struct place *place,
                   bool direct);
/* The other side has never been where the router has put the two: it waits to be paired again.
 * False: it has been, or this one does not wait. */
bool queue_pair_down(struct queue_pair *queue);
/* The other side is gone, as the router says: the queue pair becomes LOST once it has executed what
 * had come. With the first request that fails for this the program has an event. */
void queue_lose(struct queue_pair *queue);
/* Become ERR if it has failed. `polled`: the completion queue that the caller polls, or NULL. */
void queue_settle(struct queue_pair *queue, const struct cq *polled);
/* Leave the other side, and forget all work. */
void queue_reset(struct queue_pair *queue);
void queue_tell(struct queue_pair *queue, enum queue_event event);

/* Under `receiving`: --- */

/* All that had come of the other side, which is gone, has been executed: become LOST. */
void queue_part(struct queue_pair *queue);
/* Take the oldest receive for `now`. False: there is none; whoever posts one to a shared receive
 * queue will make the queue pair go on. */
bool queue_find_receive(struct queue_pair *queue);
/* A receive is complete. `wc` has what is special about it. */
void queue_complete_receive(struct queue_pair *queue, struct ibv_wc *wc, bool solicited,
                            const struct cq *polled);
void queue_flush_receives(struct queue_pair *queue, const struct cq *polled);

/* Under `sending`: --- */

/* The other side is gone: become LOST. */
void queue_be_lost(struct queue_pair *queue);
/* The oldest request is complete, and leaves the send queue. */
void queue_complete_send(struct queue_pair *queue, enum ibv_wc_status status, const struct cq *polled);
void queue_flush_sends(struct queue_pair *queue, const struct cq *polled);
/* It can't go on: become ERR soon, and tell the program by this event. */
void queue_fail(struct queue_pair *queue, enum queue_event event);
/* So many requests are open. A relay is told whether any are: without a link it gives up a queue
 * pair that waits, and no idle one. */
void queue_count_open(struct queue_pair *queue);
/* Is it paired, and does the other side use its rings already? */
bool queue_is_ready(struct queue_pair *queue);
/* Put what is to be told, as far as there is room, and publish all that was put. */
void queue_publish(struct queue_pair *queue);
/* Publish what was put. */
void queue_publish_put(struct queue_pair *queue);

/* Under both: become ERR. */
void queue_enter_error(struct queue_pair *queue, const struct cq *polled);

#endif
