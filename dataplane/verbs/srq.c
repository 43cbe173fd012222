#include "srq.h"

#include "progress.h"

#include <errno.h>
#include <stdlib.h>

static _Atomic uint32_t shared_queues;

static struct ibv_srq *fail(int error)
{
        errno = error;
        return NULL;
}

VERB struct ibv_srq *ibv_create_srq(struct ibv_pd *pd, struct ibv_srq_init_attr *wanted)
{
        struct shared_receives *shared;

        if (opened_is_lost(pd->context))
                return fail(EIO);
        if (!wanted->attr.max_wr || wanted->attr.max_wr > MOST_REQUESTS ||
            wanted->attr.max_sge > MOST_PIECES || wanted->attr.srq_limit > wanted->attr.max_wr)
                return fail(EINVAL);
        shared = calloc(1, sizeof *shared);
        if (!shared)
                return fail(ENOMEM);
        if (atomic_fetch_add_explicit(&shared_queues, 1, memory_order_relaxed) >= MOST_RECEIVE_QUEUES ||
            !receive_queue_start(&shared->receives, wanted->attr.max_wr, wanted->attr.max_sge)) {
                atomic_fetch_sub_explicit(&shared_queues, 1, memory_order_relaxed);
                free(shared);
                return fail(ENOMEM);
        }
        shared->plain =
            (struct ibv_srq){.context = pd->context, .srq_context = wanted->srq_context, .pd = pd};
        shared->limit_reached.what = (struct ibv_async_event){.element.srq = &shared->plain,
                                                              .event_type = IBV_EVENT_SRQ_LIMIT_REACHED};
        domain_use(pd);
        return &shared->plain;
}

struct ibv_srq *srq_create_extended(struct ibv_context *context, struct ibv_srq_init_attr_ex *wanted)
{
        struct ibv_srq_init_attr basic = {.srq_context = wanted->srq_context, .attr = wanted->attr};

        (void)context;
        if ((wanted->comp_mask & IBV_SRQ_INIT_ATTR_TYPE && wanted->srq_type != IBV_SRQT_BASIC) ||
            wanted->comp_mask & ~(uint32_t)(IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD))
                return fail(EOPNOTSUPP);
        if (!(wanted->comp_mask & IBV_SRQ_INIT_ATTR_PD) || !wanted->pd)
                return fail(EINVAL);
        return ibv_create_srq(wanted->pd, &basic);
}

static bool is_used(struct shared_receives *shared)
{
        bool used;

        mutex_take(&shared->mutex);
        used = shared->first;
        mutex_release(&shared->mutex);
        return used;
}

VERB int ibv_destroy_srq(struct ibv_srq *plain)
{
        struct shared_receives *shared = shared_of(plain);

        if (!opened_is_lost(plain->context)) {
                if (is_used(shared))
                        return EBUSY;
                events_drop(&opened_of(plain->context)->events, &shared->limit_reached);
                events_wait(&plain->events_completed);
        }
        receive_queue_end(&shared->receives);
        domain_leave(plain->pd);
        free(shared);
        atomic_fetch_sub_explicit(&shared_queues, 1, memory_order_relaxed);
        return 0;
}

VERB int ibv_modify_srq(struct ibv_srq *plain, struct ibv_srq_attr *set, int mask)
{
        struct shared_receives *shared = shared_of(plain);
        int error = 0;

        if (opened_is_lost(plain->context))
                return EIO;
        if (mask & ~(IBV_SRQ_MAX_WR | IBV_SRQ_LIMIT) ||
            (mask & IBV_SRQ_MAX_WR && (!set->max_wr || set->max_wr > MOST_REQUESTS)) ||
            (mask & IBV_SRQ_LIMIT &&
             set->srq_limit > (mask & IBV_SRQ_MAX_WR ? set->max_wr : shared->receives.most)))
                return EINVAL;
        if (mask & IBV_SRQ_MAX_WR)
                error = receive_queue_resize(&shared->receives, set->max_wr);
        if (!error && mask & IBV_SRQ_LIMIT)
                shared_set_limit(shared, set->srq_limit);
        return error;
}

VERB int ibv_query_srq(struct ibv_srq *plain, struct ibv_srq_attr *to)
{
        struct shared_receives *shared = shared_of(plain);

        if (opened_is_lost(plain->context))
                return EIO;
        *to = (struct ibv_srq_attr){.max_wr = shared->receives.most,
                                    .max_sge = shared->receives.most_pieces,
                                    .srq_limit = atomic_load_explicit(&shared->limit, memory_order_relaxed)};
        return 0;
}

int srq_post(struct ibv_srq *plain, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
        struct shared_receives *shared = shared_of(plain);
        int error = opened_is_lost(plain->context) ? EIO : 0;

        while (wr && !error) {
                error = receive_queue_add(&shared->receives, wr);
                if (!error)
                        wr = wr->next;
        }
        if (error)
                *bad = wr;
        shared_feed(shared, progress_feed);
        return error;
}
