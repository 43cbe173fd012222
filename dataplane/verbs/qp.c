#include "qp.h"

#include "attribute_masks.h"
#include "datagrams.h"
#include "direct.h"
#include "loop.h"
#include "numbers.h"
#include "post.h"
#include "post_ex.h"
#include "progress.h"
#include "requester.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TIME = 31, MOST_TRIES = 7, MOST_NUMBER = 0xffffff };

static _Atomic uint32_t queue_pairs;

static struct ibv_qp *fail(int error)
{
        errno = error;
        return NULL;
}

/* --- making and destroying */

static bool has_operations(const struct ibv_qp_init_attr_ex *wanted)
{
        return wanted->comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
}

static int check_wanted(const struct ibv_qp_init_attr_ex *wanted)
{
        const struct ibv_qp_cap *cap = &wanted->cap;

        if (wanted->comp_mask & ~(uint32_t)(IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_CREATE_FLAGS |
                                            IBV_QP_INIT_ATTR_SEND_OPS_FLAGS) ||
            (wanted->comp_mask & IBV_QP_INIT_ATTR_CREATE_FLAGS && wanted->create_flags))
                return EOPNOTSUPP;
        if (!(wanted->comp_mask & IBV_QP_INIT_ATTR_PD) || !wanted->pd || !wanted->send_cq || !wanted->recv_cq)
                return EINVAL;
        if ((wanted->qp_type != IBV_QPT_RC && wanted->qp_type != IBV_QPT_UC &&
             wanted->qp_type != IBV_QPT_UD) ||
            (has_operations(wanted) && !post_is_known(wanted->qp_type, wanted->send_ops_flags)))
                return EOPNOTSUPP;
        if (cap->max_send_wr > MOST_REQUESTS || cap->max_send_sge > MOST_PIECES ||
            cap->max_inline_data > MOST_INLINE)
                return EINVAL;
        if (!wanted->srq && (cap->max_recv_wr > MOST_REQUESTS || cap->max_recv_sge > MOST_PIECES))
                return EINVAL;
        return 0;
}

static void set_events(struct queue_pair *queue)
{
        static const enum ibv_event_type types[QUEUE_EVENTS] = {
            [QUEUE_FATAL] = IBV_EVENT_QP_FATAL,
            [QUEUE_REQUEST_ERROR] = IBV_EVENT_QP_REQ_ERR,
            [QUEUE_ACCESS_ERROR] = IBV_EVENT_QP_ACCESS_ERR,
            [QUEUE_DRAINED] = IBV_EVENT_SQ_DRAINED,
            [QUEUE_LAST_RECEIVE] = IBV_EVENT_QP_LAST_WQE_REACHED,
        };

        for (int i = 0; i < QUEUE_EVENTS; i++)
                queue->events[i].what =
                    (struct ibv_async_event){.element.qp = &queue->plain.qp_base, .event_type = types[i]};
}

static void free_parts(struct queue_pair *queue)
{
        post_ex_end(queue);
        loop_end(queue);
        receive_queue_end(&queue->receives);
        send_queue_end(&queue->sends);
}

static bool make_parts(struct queue_pair *queue, bool drafts)
{
        const struct ibv_qp_cap *cap = &queue->attributes.cap;

        numbers_add(port_first_number(), NUMBERS);
        if (send_queue_start(&queue->sends, cap->max_send_wr, cap->max_send_sge, cap->max_inline_data) &&
            receive_queue_start(&queue->receives, cap->max_recv_wr, cap->max_recv_sge) &&
            (!drafts || post_ex_start(queue))) {
                queue->plain.qp_base.qp_num = number_take(queue);
                if (queue->plain.qp_base.qp_num && progress_join(queue))
                        return true;
                number_return(queue->plain.qp_base.qp_num);
        }
        free_parts(queue);
        return false;
}

struct ibv_qp *qp_create_extended(struct ibv_context *context, struct ibv_qp_init_attr_ex *wanted)
{
        struct queue_pair *queue;
        int error = opened_is_lost(context) ? EIO : check_wanted(wanted);

        if (error)
                return fail(error);
        queue = calloc(1, sizeof *queue);
        if (!queue)
                return fail(ENOMEM);
        queue->plain.qp_base = (struct ibv_qp){.context = context,
                                               .qp_context = wanted->qp_context,
                                               .pd = wanted->pd,
                                               .send_cq = wanted->send_cq,
                                               .recv_cq = wanted->recv_cq,
                                               .srq = wanted->srq,
                                               .state = IBV_QPS_RESET,
                                               .qp_type = wanted->qp_type};
        atomic_store_explicit(&queue->bell, -1, memory_order_relaxed);
        queue->signal_all = wanted->sq_sig_all;
        queue->domain = domain_of(wanted->pd)->number;
        queue->send_cq = cq_of(wanted->send_cq);
        queue->receive_cq = cq_of(wanted->recv_cq);
        queue->attributes.cap = wanted->cap;
        if (wanted->srq) {
                queue->shared = shared_of(wanted->srq);
                queue->attributes.cap.max_recv_wr = queue->attributes.cap.max_recv_sge = 0;
        }
        set_events(queue);
        if (atomic_fetch_add_explicit(&queue_pairs, 1, memory_order_relaxed) >= port_most_queue_pairs() ||
            !make_parts(queue, has_operations(wanted))) {
                atomic_fetch_sub_explicit(&queue_pairs, 1, memory_order_relaxed);
                free(queue);
                return fail(ENOMEM);
        }
        queue->plain.qp_base.handle = queue->plain.qp_base.qp_num;
        domain_use(wanted->pd);
        if (queue->shared)
                shared_join(queue->shared, &queue->feeding, queue);
        if (queue_has_datagrams(queue))
                datagrams_join(queue);
        return &queue->plain.qp_base;
}

VERB struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *wanted)
{
        struct ibv_qp_init_attr_ex extended = {.comp_mask = IBV_QP_INIT_ATTR_PD, .pd = pd};

        /* The fields before `comp_mask` are the same ones. */
        memcpy(&extended, wanted, offsetof(struct ibv_qp_init_attr_ex, comp_mask));
        return qp_create_extended(pd->context, &extended);
}

VERB int ibv_destroy_qp(struct ibv_qp *plain)
{
        struct queue_pair *queue = queue_of(plain);

        bool lost = opened_is_lost(plain->context);

        if (!lost && queue_has_datagrams(queue))
                datagrams_finish(queue);
        else if (!lost)
                progress_finish(queue);
        progress_leave(queue, lost);
        if (!lost) {
                if (queue_has_datagrams(queue))
                        datagrams_leave(queue);
                if (queue->shared)
                        shared_leave(queue->shared, &queue->feeding);
                number_return(plain->qp_num);
                queue_reset(queue);
                direct_withdraw(queue);
                for (int i = 0; i < QUEUE_EVENTS; i++)
                        events_drop(&opened_of(plain->context)->events, &queue->events[i]);
                events_wait(&plain->events_completed);
        }
        free_parts(queue);
        domain_leave(plain->pd);
        free(queue);
        atomic_fetch_sub_explicit(&queue_pairs, 1, memory_order_relaxed);
        return 0;
}

/* --- changing */

static bool is_valid_path(const struct ibv_ah_attr *path)
{
        union ibv_gid gid;

        /* As on every Ethernet there are no local addresses but GIDs. */
        return path->is_global && path->port_num == PORT_NUMBER && port_gid(path->grh.sgid_index, &gid);
}

static bool are_valid(const struct ibv_qp_attr *set, int mask)
{
        return !((mask & IBV_QP_PORT && set->port_num != PORT_NUMBER) ||
                 (mask & IBV_QP_PKEY_INDEX && set->pkey_index) ||
                 (mask & IBV_QP_AV && !is_valid_path(&set->ah_attr)) ||
                 (mask & IBV_QP_ALT_PATH && !is_valid_path(&set->alt_ah_attr)) ||
                 (mask & IBV_QP_PATH_MTU && (set->path_mtu < IBV_MTU_256 || set->path_mtu > IBV_MTU_4096)) ||
                 (mask & IBV_QP_ACCESS_FLAGS && set->qp_access_flags & ~(unsigned int)MEMORY_ACCESS) ||
                 (mask & IBV_QP_DEST_QPN && set->dest_qp_num > MOST_NUMBER) ||
                 (mask & IBV_QP_MAX_QP_RD_ATOMIC && set->max_rd_atomic > MOST_READS) ||
                 (mask & IBV_QP_MAX_DEST_RD_ATOMIC && set->max_dest_rd_atomic > MOST_READS) ||
                 (mask & IBV_QP_TIMEOUT && set->timeout > MOST_TIME) ||
                 (mask & IBV_QP_MIN_RNR_TIMER && set->min_rnr_timer > MOST_TIME) ||
                 (mask & IBV_QP_RETRY_CNT && set->retry_cnt > MOST_TRIES) ||
                 (mask & IBV_QP_RNR_RETRY && set->rnr_retry > MOST_TRIES));
}

static void set_attributes(struct ibv_qp_attr *to, const struct ibv_qp_attr *from, int mask)
{
#define SET(bit, field)                                                                                      \
        do {                                                                                                 \
                if (mask & (bit))                                                                            \
                        to->field = from->field;                                                             \
        } while (0)

        SET(IBV_QP_EN_SQD_ASYNC_NOTIFY, en_sqd_async_notify);
        SET(IBV_QP_ACCESS_FLAGS, qp_access_flags);
        SET(IBV_QP_PKEY_INDEX, pkey_index);
        SET(IBV_QP_PORT, port_num);
        SET(IBV_QP_QKEY, qkey);
        SET(IBV_QP_AV, ah_attr);
        SET(IBV_QP_PATH_MTU, path_mtu);
        SET(IBV_QP_TIMEOUT, timeout);
        SET(IBV_QP_RETRY_CNT, retry_cnt);
        SET(IBV_QP_RNR_RETRY, rnr_retry);
        SET(IBV_QP_RQ_PSN, rq_psn);
        SET(IBV_QP_SQ_PSN, sq_psn);
        SET(IBV_QP_MAX_QP_RD_ATOMIC, max_rd_atomic);
        SET(IBV_QP_MAX_DEST_RD_ATOMIC, max_dest_rd_atomic);
        SET(IBV_QP_MIN_RNR_TIMER, min_rnr_timer);
        SET(IBV_QP_PATH_MIG_STATE, path_mig_state);
        SET(IBV_QP_DEST_QPN, dest_qp_num);
        SET(IBV_QP_ALT_PATH, alt_ah_attr);
        SET(IBV_QP_ALT_PATH, alt_pkey_index);
        SET(IBV_QP_ALT_PATH, alt_port_num);
        SET(IBV_QP_ALT_PATH, alt_timeout);
}

/* Under both mutexes. */
static void enter(struct queue_pair *queue, enum ibv_qp_state from, enum ibv_qp_state to)
{
        const struct send_queue *sends = &queue->sends;

        if (to == IBV_QPS_ERR) {
                queue_enter_error(queue, NULL);
                return;
        }
        atomic_store_explicit(&queue->state, to, memory_order_release);
        queue->plain.qp_base.state = to;
        if (to == IBV_QPS_RTR)
                atomic_store_explicit(&queue->pairing,
                                      queue_has_datagrams(queue) ? QUEUE_PAIRED : QUEUE_ASKED,
                                      memory_order_release);
        queue->draining = to == IBV_QPS_SQD && (from != to || queue->draining);
        if (to == IBV_QPS_RTS && !queue_has_datagrams(queue))
                requester_push(queue);
        if (queue->draining && sends->head == sends->tail)
                requester_complete(queue, NULL);
}

static int change(struct queue_pair *queue, const struct ibv_qp_attr *set, int mask)
{
        enum ibv_qp_state from = queue_state(queue), to = mask & IBV_QP_STATE ? set->qp_state : from;

        if ((mask & IBV_QP_CUR_STATE && set->cur_qp_state != from) ||
            !attribute_mask_is_valid(queue->plain.qp_base.qp_type, from, to, mask) || !are_valid(set, mask))
                return EINVAL;
        set_attributes(&queue->attributes, set, mask);
        if (mask & IBV_QP_AV)
                port_gid(set->ah_attr.grh.sgid_index, &queue->gid);
        /* Leaving the other side is not done under the mutexes: queue_reset(). */
        if (to != IBV_QPS_RESET)
                enter(queue, from, to);
        return 0;
}

static void pair(struct queue_pair *queue)
{
        if (queue_has_datagrams(queue) || !loop_is_wanted(queue))
                queue_pairer->ask(queue);
        else if (!loop_up(queue))
                queue_lose(queue);
}

VERB int ibv_modify_qp(struct ibv_qp *plain, struct ibv_qp_attr *set, int mask)
{
        struct queue_pair *queue = queue_of(plain);
        enum ibv_qp_state from;
        unsigned int allowed;
        int error;

        if (opened_is_lost(plain->context))
                return EIO;
        if (mask & IBV_QP_STATE && (set->qp_state == IBV_QPS_RESET || set->qp_state == IBV_QPS_ERR))
                progress_finish(queue);
        queue_lock(queue);
        from = queue_state(queue);
        allowed = queue->attributes.qp_access_flags;
        error = change(queue, set, mask);
        queue_unlock(queue);
        if (error)
                return error;
        if (mask & IBV_QP_STATE && set->qp_state == IBV_QPS_RESET)
                queue_reset(queue);
        if ((mask & IBV_QP_ACCESS_FLAGS && allowed & ~set->qp_access_flags) ||
            (mask & IBV_QP_STATE && (set->qp_state == IBV_QPS_RESET || set->qp_state == IBV_QPS_ERR)))
                direct_withdraw(queue);
        if (mask & IBV_QP_STATE && set->qp_state == IBV_QPS_RTR && from != IBV_QPS_RTR)
                pair(queue);
        if (atomic_load_explicit(&queue->looped, memory_order_relaxed))
                progress_loop(queue);
        return 0;
}

VERB int ibv_query_qp(struct ibv_qp *plain, struct ibv_qp_attr *to, int mask, struct ibv_qp_init_attr *init)
{
        struct queue_pair *queue = queue_of(plain);

        (void)mask;
        if (opened_is_lost(plain->context))
                return EIO;
        queue_lock(queue);
        *to = queue->attributes;
        to->qp_state = to->cur_qp_state = queue_state(queue);
        to->sq_draining = queue->draining;
        queue_unlock(queue);
        plain->state = to->qp_state;
        *init = (struct ibv_qp_init_attr){.qp_context = plain->qp_context,
                                          .send_cq = plain->send_cq,
                                          .recv_cq = plain->recv_cq,
                                          .srq = plain->srq,
                                          .cap = queue->attributes.cap,
                                          .qp_type = plain->qp_type,
                                          .sq_sig_all = queue->signal_all};
        return 0;
}
