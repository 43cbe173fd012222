#include "post.h"

#include "datagrams.h"
#include "progress.h"
#include "requester.h"

#include <errno.h>

enum types { ON_RC = 1, ON_UC = 2, ON_UD = 4, CONNECTED = ON_RC | ON_UC, ALL = CONNECTED | ON_UD };

/* What may be posted, by operation: to queue pairs of which types, and with which flags. */
static const struct {
        uint8_t types;
        unsigned int flags;
} operations[] = {
    [IBV_WR_RDMA_WRITE] = {CONNECTED, IBV_SEND_INLINE},
    [IBV_WR_RDMA_WRITE_WITH_IMM] = {CONNECTED, IBV_SEND_INLINE},
    [IBV_WR_SEND] = {ALL, IBV_SEND_INLINE},
    [IBV_WR_SEND_WITH_IMM] = {ALL, IBV_SEND_INLINE},
    [IBV_WR_RDMA_READ] = {ON_RC, 0},
    [IBV_WR_ATOMIC_CMP_AND_SWP] = {ON_RC, 0},
    [IBV_WR_ATOMIC_FETCH_AND_ADD] = {ON_RC, 0},
    [IBV_WR_LOCAL_INV] = {CONNECTED, 0},
    [IBV_WR_BIND_MW] = {CONNECTED, 0},
    [IBV_WR_SEND_WITH_INV] = {CONNECTED, IBV_SEND_INLINE},
};

static enum types type_of(enum ibv_qp_type type)
{
        if (type == IBV_QPT_UD)
                return ON_UD;
        return type == IBV_QPT_RC ? ON_RC : ON_UC;
}

bool post_is_known(enum ibv_qp_type type, uint64_t wanted)
{
        static const struct {
                uint64_t wanted;
                enum ibv_wr_opcode opcode;
        } names[] = {
            {IBV_QP_EX_WITH_RDMA_WRITE, IBV_WR_RDMA_WRITE},
            {IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM, IBV_WR_RDMA_WRITE_WITH_IMM},
            {IBV_QP_EX_WITH_SEND, IBV_WR_SEND},
            {IBV_QP_EX_WITH_SEND_WITH_IMM, IBV_WR_SEND_WITH_IMM},
            {IBV_QP_EX_WITH_RDMA_READ, IBV_WR_RDMA_READ},
            {IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_CMP_AND_SWP},
            {IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD, IBV_WR_ATOMIC_FETCH_AND_ADD},
            {IBV_QP_EX_WITH_LOCAL_INV, IBV_WR_LOCAL_INV},
            {IBV_QP_EX_WITH_BIND_MW, IBV_WR_BIND_MW},
            {IBV_QP_EX_WITH_SEND_WITH_INV, IBV_WR_SEND_WITH_INV},
        };

        for (size_t i = 0; i < sizeof names / sizeof *names; i++)
                if (operations[names[i].opcode].types & type_of(type))
                        wanted &= ~names[i].wanted;
        return !wanted;
}

static int check(enum ibv_qp_type type, const struct ibv_send_wr *wr)
{
        const unsigned int always = IBV_SEND_FENCE | IBV_SEND_SIGNALED | IBV_SEND_SOLICITED;
        uint64_t total = 0;

        if ((size_t)wr->opcode >= sizeof operations / sizeof *operations || !operations[wr->opcode].types)
                return EOPNOTSUPP;
        if (!(operations[wr->opcode].types & type_of(type)) ||
            wr->send_flags & ~(always | operations[wr->opcode].flags))
                return EINVAL;
        switch (wr->opcode) {
        case IBV_WR_ATOMIC_CMP_AND_SWP:
        case IBV_WR_ATOMIC_FETCH_AND_ADD:
                for (int i = 0; i < wr->num_sge; i++)
                        total += wr->sg_list[i].length;
                return total < WORD ? EINVAL : 0;
        case IBV_WR_BIND_MW:
                return wr->bind_mw.mw->type != IBV_MW_TYPE_2 || !wr->bind_mw.bind_info.mr ? EINVAL : 0;
        default:
                return 0;
        }
}

/* Copy a request that was checked. */
static int add(struct queue_pair *queue, const struct ibv_send_wr *wr)
{
        enum ibv_qp_state state = queue_state(queue);

        if (state == IBV_QPS_RESET || state == IBV_QPS_INIT || state == IBV_QPS_RTR)
                return EINVAL;
        if (queue_has_datagrams(queue) && !wr->wr.ud.ah)
                return EINVAL;
        return send_queue_add(&queue->sends, wr, queue_has_datagrams(queue));
}

int post_add(struct queue_pair *queue, const struct ibv_send_wr *wr)
{
        int error = check(queue->plain.qp_base.qp_type, wr);

        return error ? error : add(queue, wr);
}

void post_finish(struct queue_pair *queue)
{
        bool first = !atomic_load_explicit(&queue->open, memory_order_relaxed), waits;

        queue_count_open(queue);
        if (queue_state(queue) == IBV_QPS_ERR)
                queue_flush_sends(queue, NULL);
        else if (queue_has_datagrams(queue))
                datagrams_push(queue, false);
        else
                requester_push(queue);
        waits = queue->sends.next != queue->sends.tail;
        /* These are complete, and nothing comes that would make somebody look. */
        if (!queue_is_reliable(queue))
                requester_complete(queue, NULL);
        mutex_release(&queue->sending);
        progress_note_post(queue);
        if (waits && first)
                queue_watch();
        if (queue_has_datagrams(queue))
                datagrams_take_own();
        /* What it waits for may have come already. */
        if (atomic_load_explicit(&queue->looped, memory_order_relaxed))
                progress_loop(queue);
        else if (waits)
                progress_make(queue, NULL, false);
        else
                queue_settle(queue, NULL);
}

int post_send(struct ibv_qp *plain, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
        struct queue_pair *queue = queue_of(plain);
        int error = 0;

        if (opened_is_lost(plain->context)) {
                *bad = wr;
                return EIO;
        }
        mutex_take(&queue->sending);
        for (; wr && !error; wr = error ? wr : wr->next)
                error = post_add(queue, wr);
        if (error)
                *bad = wr;
        post_finish(queue);
        return error;
}

int post_bind(struct ibv_qp *plain, struct ibv_mw *window, struct ibv_mw_bind *bind)
{
        struct queue_pair *queue = queue_of(plain);
        const struct ibv_send_wr wr = {
            .wr_id = bind->wr_id,
            .opcode = IBV_WR_BIND_MW,
            .send_flags = bind->send_flags,
            .bind_mw = {.mw = window, .rkey = ibv_inc_rkey(window->rkey), .bind_info = bind->bind_info}};
        int error;

        if (opened_is_lost(plain->context))
                return EIO;
        if (!(operations[IBV_WR_BIND_MW].types & type_of(plain->qp_type)) ||
            wr.send_flags & ~(unsigned int)(IBV_SEND_FENCE | IBV_SEND_SIGNALED | IBV_SEND_SOLICITED) ||
            bind->bind_info.mw_access_flags & IBV_ACCESS_ZERO_BASED)
                return EINVAL;
        mutex_take(&queue->sending);
        error = add(queue, &wr);
        if (!error)
                window->rkey = wr.bind_mw.rkey;
        post_finish(queue);
        return error;
}

/* Receives that came after the queue pair had failed. */
static void flush_receives(struct queue_pair *queue)
{
        mutex_take(&queue->receiving);
        if (queue_state(queue) == IBV_QPS_ERR)
                queue_flush_receives(queue, NULL);
        mutex_release(&queue->receiving);
}

int post_receive(struct ibv_qp *plain, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
        struct queue_pair *queue = queue_of(plain);
        int error = opened_is_lost(plain->context) ? EIO : 0;

        if (queue_state(queue) == IBV_QPS_RESET || queue->shared)
                error = EINVAL;
        while (wr && !error) {
                error = receive_queue_add(&queue->receives, wr);
                if (!error)
                        wr = wr->next;
        }
        if (error)
                *bad = wr;
        if (queue_state(queue) == IBV_QPS_ERR) {
                flush_receives(queue);
        } else if (queue_paired(queue) == QUEUE_PAIRED) {
                mutex_take(&queue->sending);
                queue_publish(queue);
                mutex_release(&queue->sending);
                if (atomic_load_explicit(&queue->looped, memory_order_relaxed))
                        progress_loop(queue);
        }
        /* Nobody else may be looking. */
        if (queue_has_datagrams(queue) && datagrams_are_held())
                datagrams_take(NULL, true);
        return error;
}
