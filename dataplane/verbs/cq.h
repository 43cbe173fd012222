/* Completion queues as programs know them: completions, the channel that tells of them, and who
 * looks for more.
 *
 * Nothing below puts completions in but those who have work of the queue's: the queue pairs that
 * use it. They set `driver`, by which a program that finds the queue empty makes them go on.
 */
#ifndef FREEFLOW_CQ_H
#define FREEFLOW_CQ_H

#include "channel.h"
#include "completion.h"

struct cq;

struct cq_driver {
        /* The program has found the queue empty: go on, with cq_put(..., polling=true). False:
         * nothing was done. */
        bool (*poll)(struct cq *cq);
        /* The program has armed the queue: it may sleep until its channel has an event. */
        void (*arm)(struct cq *cq);
};

struct cq {
        /* What programs know. Those of ibv_create_cq() only know the first fields. */
        union {
                struct ibv_cq plain;
                struct ibv_cq_ex extended;
        };
        struct completions completions;
        struct channel_member member; /* at its channel, if it has one */
        struct event overrun;
        _Atomic uint32_t users; /* queue pairs and shared receive queues */
        const struct cq_driver *_Atomic driver;
        void *driven; /* the driver's, by malloc(): freed with the queue */
        /* From start_poll to end_poll: */
        struct mutex reading; /* not taken if single_threaded */
        bool single_threaded;
        bool settle;       /* the driver has gone on */
        struct ibv_wc now; /* the completion that is read */
};

static inline struct cq *cq_of(struct ibv_cq *plain)
{
        return (struct cq *)plain;
}

/* Put a completion in, and tell who is to hear of it. See completions_put(). False: there was no
 * room: this one and all later ones are lost. */
bool cq_put(struct cq *cq, const struct ibv_wc *completion, bool solicited, bool polling);

/* For the operations of a context. */
int cq_poll(struct ibv_cq *plain, int most, struct ibv_wc *completions);
int cq_request(struct ibv_cq *plain, int solicited_only);
int cq_modify(struct ibv_cq *plain, struct ibv_modify_cq_attr *change);
struct ibv_cq_ex *cq_create_extended(struct ibv_context *context, struct ibv_cq_init_attr_ex *wanted);

#endif
