#include "requester.h"

#include "direct.h"
#include "far_memory.h"
#include "monotonic.h"

/* --- putting records */

/* The request can't be executed. It completes when those before it are done; none after it is put.
 */
static void spoil(struct send_work *work, enum ibv_wc_status status)
{
        work->status = (uint8_t)status;
        work->whole = true;
}

/* A record of the request was put. */
static void note_put(struct queue_pair *queue, struct send_work *work, const struct record *record)
{
        if (!work->begun) {
                work->begun = true;
                work->expected = record->psn;
                queue->asking += send_is_asking(work);
                queue->spent += send_takes_receive(work);
                direct_begun(queue);
        }
        work->psn = record->psn;
        work->behind = queue->sender.tail;
}

static uint8_t flags_of_last(const struct send_work *work)
{
        uint8_t flags = RECORD_LAST;

        if (work->opcode == IBV_WR_SEND_WITH_IMM || work->opcode == IBV_WR_RDMA_WRITE_WITH_IMM)
                flags |= RECORD_IMMEDIATE;
        if (work->opcode == IBV_WR_SEND_WITH_INV)
                flags |= RECORD_INVALIDATE;
        if (work->flags & IBV_SEND_SOLICITED && send_takes_receive(work))
                flags |= RECORD_SOLICITED;
        return flags;
}

/* The next piece of a message or a write. */
static enum record_outcome put_piece(struct queue_pair *queue, struct send_work *work)
{
        struct work_memory memory = send_memory(&queue->sends, work, queue->domain);
        bool is_write = work->opcode == IBV_WR_RDMA_WRITE || work->opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
        uint32_t left = work->total - work->put, piece = record_piece(&queue->sender.view);
        struct record record = {.length = left < piece ? left : piece,
                                .operation = is_write ? RECORD_WRITE : RECORD_SEND,
                                .flags = work->begun ? 0 : RECORD_FIRST,
                                .total = work->total};
        struct work_spot spot = work->spot;
        struct work_held held;
        struct cursor cursor = {.vec = held.vec};
        enum record_outcome outcome;

        if (is_write) {
                record.rkey = work->rkey;
                record.address = work->address + work->put;
        }
        if (record.length == left) {
                record.flags |= flags_of_last(work);
                if (record.flags & (RECORD_IMMEDIATE | RECORD_INVALIDATE))
                        record.immediate = work->immediate;
        }
        if ((!work->begun && record.length < left && !work_is_allowed(&memory)) ||
            !work_hold(&memory, &spot, record.length, &held)) {
                spoil(work, IBV_WC_LOC_PROT_ERR);
                return RECORD_OK;
        }
        outcome = record_put(&queue->sender, &record, &cursor);
        work_let_go(&held);
        if (outcome != RECORD_OK)
                return outcome;
        note_put(queue, work, &record);
        work->spot = spot;
        work->put += record.length;
        work->whole = record.length == left;
        return RECORD_OK;
}

/* READ, or an atomic operation: as far as there is room for the answer. */
static enum record_outcome put_question(struct queue_pair *queue, struct send_work *work)
{
        struct work_memory memory = send_memory(&queue->sends, work, queue->domain);
        uint32_t left = work->total - work->put, piece = record_piece(&queue->sender.view);
        struct iovec vec = {.iov_base = work->operands};
        struct cursor cursor = {.vec = &vec};
        struct record record = {.operation = RECORD_READ,
                                .total = left < piece ? left : piece,
                                .rkey = work->rkey,
                                .address = work->address + work->put};
        enum record_outcome outcome;

        if (!work->begun && !work_is_allowed(&memory)) {
                spoil(work, IBV_WC_LOC_PROT_ERR);
                return RECORD_OK;
        }
        if (work->opcode != IBV_WR_RDMA_READ) {
                bool swap = work->opcode == IBV_WR_ATOMIC_CMP_AND_SWP;

                record.operation = swap ? RECORD_SWAP : RECORD_ADD;
                vec.iov_len = record.length = swap ? 2 * WORD : WORD;
        }
        if (queue->asked + record_size(record.total) > record_response_share(&queue->sender.view))
                return RECORD_WAIT;
        outcome = record_put(&queue->sender, &record, &cursor);
        if (outcome != RECORD_OK)
                return outcome;
        note_put(queue, work, &record);
        queue->asked += record_size(record.total);
        work->put += record.total;
        work->whole = work->put == work->total;
        return RECORD_OK;
}

/* What this side does alone. */
static void do_alone(struct queue_pair *queue, struct send_work *work)
{
        uint32_t number = queue->plain.qp_base.qp_num;

        work->whole = true;
        if (work->opcode == IBV_WR_LOCAL_INV && !memory_invalidate(work->immediate, queue->domain, number))
                spoil(work, IBV_WC_LOC_QP_OP_ERR);
        if (work->opcode == IBV_WR_BIND_MW && (domain_of(work->window->pd)->number != queue->domain ||
                                               !memory_bind(work->window, work->rkey, &work->bind, number)))
                spoil(work, IBV_WC_MW_BIND_ERR);
}

/* Is it the request's turn? */
static bool may_begin(const struct queue_pair *queue, const struct send_work *work)
{
        if (work->flags & IBV_SEND_FENCE && queue->asking)
                return false;
        if (send_is_asking(work))
                return queue->asking < queue->attributes.max_rd_atomic;
        return !send_takes_receive(work) || (int32_t)(queue->credit - queue->spent) > 0;
}

/* UC: the request is lost, and so are those behind it that would have to wait. */
static void lose(struct queue_pair *queue, struct send_work *work)
{
        queue->unheard = true;
        work->whole = true;
}

/* Put a record, or do what is to be done alone. */
static enum record_outcome put_next(struct queue_pair *queue, struct send_work *work)
{
        if (send_is_asking(work) && !queue->attributes.max_rd_atomic) {
                spoil(work, IBV_WC_LOC_QP_OP_ERR);
                return RECORD_OK;
        }
        if (!work->begun && direct_try(queue, work))
                return RECORD_OK;
        if (!work->begun) {
                enum record_outcome outcome = far_move(queue, work);

                if (outcome != RECORD_OK || work->whole)
                        return outcome;
        }
        if (!work->begun && !may_begin(queue, work)) {
                if (!queue->unheard)
                        return RECORD_WAIT;
                lose(queue, work);
                return RECORD_OK;
        }
        queue->unheard &= !send_takes_receive(work);
        if (send_is_local(work)) {
                do_alone(queue, work);
                return RECORD_OK;
        }
        return send_is_asking(work) ? put_question(queue, work) : put_piece(queue, work);
}

/* Some of the request was put, or is being moved. */
static bool has_begun(const struct queue_pair *queue, const struct send_work *work)
{
        return work->begun || (queue->direct.moving && work == send_at(&queue->sends, queue->sends.next));
}

/* A queue that is to be drained goes on with the request that it has begun. */
static bool goes_on(const struct queue_pair *queue, const struct send_work *work)
{
        enum ibv_qp_state state = queue_state(queue);

        return !work->status && (state == IBV_QPS_RTS || (state == IBV_QPS_SQD && has_begun(queue, work)));
}

/* UC: there is nobody whom they could reach. */
static void lose_all(struct queue_pair *queue)
{
        struct send_queue *sends = &queue->sends;

        if (!queue->unheard)
                return;
        for (; sends->next != sends->tail && goes_on(queue, send_at(sends, sends->next)); sends->next++)
                lose(queue, send_at(sends, sends->next));
}

void requester_push(struct queue_pair *queue)
{
        struct send_queue *sends = &queue->sends;
        enum record_outcome outcome = RECORD_OK;

        if (atomic_load_explicit(&queue->failed, memory_order_relaxed))
                return;
        if (!queue_is_ready(queue)) {
                lose_all(queue);
                return;
        }
        while (sends->next != sends->tail && outcome == RECORD_OK) {
                struct send_work *work = send_at(sends, sends->next);

                if (!goes_on(queue, work))
                        break;
                outcome = put_next(queue, work);
                if (work->whole && !work->status)
                        sends->next++;
        }
        if (outcome == RECORD_CORRUPT)
                queue_fail(queue, QUEUE_FATAL);
        queue_publish(queue);
}

/* --- completions */

/* Are all requests up to this number, and this position, executed? */
static bool is_executed(struct queue_pair *queue, const struct send_work *work)
{
        enum record_outcome outcome;

        if ((int32_t)(queue->executed - work->psn) > 0)
                return true;
        outcome = record_taken(&queue->sender, work->behind);
        if (outcome == RECORD_CORRUPT)
                queue_fail(queue, QUEUE_FATAL);
        /* Keep up: numbers are compared by their distance. */
        if (outcome == RECORD_OK)
                queue->executed = work->psn + 1;
        return outcome == RECORD_OK || (outcome == RECORD_WAIT && queue_paired(queue) == QUEUE_LOST &&
                                        record_was_visible(&queue->sender, work->behind));
}

static bool is_done(struct queue_pair *queue, const struct send_work *work)
{
        if (!work->whole || work->status)
                return false;
        if (send_is_asking(work))
                return work->answered;
        return work->direct || send_is_local(work) || !queue_is_reliable(queue) || is_executed(queue, work);
}

/* The oldest request has lost the other side. Is the time over for which a device would try? Until
 * then a program can take what else has completed, which on a device may be all that it waits for.
 */
static bool has_given_up(struct queue_pair *queue)
{
        const uint64_t most = 500000000;
        const struct ibv_qp_attr *set = &queue->attributes;
        uint64_t tries = (UINT64_C(4096) << set->timeout) * (set->retry_cnt + UINT64_C(1));
        uint64_t now = monotonic();

        if (!queue->since)
                queue->since = now;
        return now - queue->since >= (set->timeout && tries < most ? tries : most);
}

/* It has lost it for good. */
static void fail_lost(struct queue_pair *queue, const struct cq *polled)
{
        queue_complete_send(queue, IBV_WC_RETRY_EXC_ERR, polled);
        if (queue->died)
                queue_tell(queue, QUEUE_FATAL);
}

void requester_complete(struct queue_pair *queue, const struct cq *polled)
{
        struct send_queue *sends = &queue->sends;

        if (atomic_load_explicit(&queue->failed, memory_order_relaxed))
                return;
        if (queue_paired(queue) == QUEUE_LOST && !queue_is_reliable(queue)) {
                queue->unheard = true;
                lose_all(queue);
        }
        while (sends->head != sends->next && is_done(queue, send_at(sends, sends->head)))
                queue_complete_send(queue, IBV_WC_SUCCESS, polled);
        if (queue->draining && sends->head == sends->next &&
            (sends->head == sends->tail || !has_begun(queue, send_at(sends, sends->head)))) {
                queue->draining = false;
                if (queue->attributes.en_sqd_async_notify)
                        queue_tell(queue, QUEUE_DRAINED);
        }
        if (sends->head == sends->tail)
                return;
        /* A request that fails is the oldest that is put, or the first that isn't. */
        if (send_at(sends, sends->head)->status)
                queue_complete_send(queue, (enum ibv_wc_status)send_at(sends, sends->head)->status, polled);
        else if (queue_paired(queue) == QUEUE_LOST && queue_is_reliable(queue) && has_given_up(queue))
                fail_lost(queue, polled);
}

/* --- answers */

/* Nothing that was not put can be executed. */
static bool note_executed(struct queue_pair *queue, uint32_t behind)
{
        if ((int32_t)(queue->sender.psn - behind) < 0)
                return false;
        if ((int32_t)(behind - queue->executed) > 0)
                queue->executed = behind;
        return true;
}

/* The oldest request that waits for an answer. */
static struct send_work *find_asking(struct send_queue *sends)
{
        for (; sends->reading != sends->tail; sends->reading++) {
                struct send_work *work = send_at(sends, sends->reading);

                if (send_is_asking(work) && !work->answered)
                        return work->begun ? work : NULL;
                if (!work->whole)
                        return NULL;
        }
        return NULL;
}

bool requester_find_answer(struct queue_pair *queue)
{
        const struct send_work *work = find_asking(&queue->sends);

        return work && work->whole && work->opcode != IBV_WR_RDMA_READ &&
               record_was_visible(&queue->sender, work->behind) &&
               record_publish_answer(&queue->receiver.view, work->psn, sizeof(uint64_t));
}

static bool take_response(struct queue_pair *queue, struct record_receiver *receiver)
{
        const struct record *record = &receiver->now;
        struct send_work *work = find_asking(&queue->sends);
        uint32_t piece = record_piece(&queue->sender.view), left;
        struct work_memory memory;
        struct work_held held;
        struct cursor cursor = {.vec = held.vec};

        if (!work || record->psn != work->expected || (int32_t)(work->psn - record->psn) < 0)
                return false;
        left = work->total - work->got;
        if (record->length != (left < piece ? left : piece))
                return false;
        memory = send_memory(&queue->sends, work, queue->domain);
        if (work_hold(&memory, &work->spot, record->length, &held)) {
                record_take(receiver, &cursor, record->length);
                work_let_go(&held);
        } else {
                spoil(work, IBV_WC_LOC_PROT_ERR);
        }
        work->got += record->length;
        work->expected++;
        queue->asked -= record_size(record->length);
        if (work->got == work->total) {
                work->answered = true;
                queue->asking--;
        }
        return note_executed(queue, record->psn + 1);
}

static enum ibv_wc_status status_of(uint32_t refusal)
{
        switch (refusal) {
        case REFUSED_ACCESS:
                return IBV_WC_REM_ACCESS_ERR;
        case REFUSED_REQUEST:
                return IBV_WC_REM_INV_REQ_ERR;
        default:
                return IBV_WC_REM_OP_ERR;
        }
}

/* All before the request that is refused is executed. */
static bool take_refusal(struct queue_pair *queue, const struct record *record, const struct cq *polled)
{
        struct send_queue *sends = &queue->sends;
        struct send_work *work;

        if (!note_executed(queue, record->psn))
                return false;
        requester_complete(queue, polled);
        if (sends->head == sends->tail)
                return false;
        work = send_at(sends, sends->head);
        if (!work->begun || (int32_t)(work->psn - record->psn) < 0)
                return false;
        queue_complete_send(queue, status_of(record->immediate), polled);
        return true;
}

bool requester_answer(struct queue_pair *queue, struct record_receiver *receiver, const struct cq *polled)
{
        const struct record *record = &receiver->now;

        switch (record->operation) {
        case RECORD_RESPONSE:
                return take_response(queue, receiver);
        case RECORD_DONE:
                return note_executed(queue, record->psn + 1);
        case RECORD_REFUSED:
                return take_refusal(queue, record, polled);
        case RECORD_CREDIT:
                queue->credit = record->total;
                queue->time = record->immediate;
                return true;
        case RECORD_ASK:
        case RECORD_DIRECT:
                return direct_take(queue, receiver);
        case RECORD_CLOSE:
                queue_be_lost(queue);
                requester_complete(queue, polled);
                return true;
        default:
                return false;
        }
}

/* --- time */

/* How long the code of min_rnr_timer means, in ns (InfiniBand architecture specification, volume 1,
 * table "encoding for RNR NAK timer field"). */
static uint64_t time_of(uint32_t code)
{
        static const uint32_t hundredths[RECORD_TIMES] = {
            /* of a ms */
            65536, 1,    2,    3,    4,    6,     8,     12,    16,    24,   32,
            48,    64,   96,   128,  192,  256,   384,   512,   768,   1024, 1536,
            2048,  3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152};

        return (uint64_t)hundredths[code % RECORD_TIMES] * 10000;
}

/* How long the oldest request may wait, in ns; 0: for ever. It isn't called for before it has. */
static uint64_t patience(const struct queue_pair *queue)
{
        const struct ibv_qp_attr *set = &queue->attributes;
        /* Answers are no slower than that, also of routers of two busy hosts, or of one that has
         * just started. Programs expect those of a device, which are faster. */
        const uint64_t least_to_pair = 5000000000, least_for_receive = 100000000;
        /* UC: nothing comes back that would tell that the other side isn't there. */
        const uint64_t most_to_pair = 10000000000, most_for_receive = 1000000000;
        uint64_t time;

        if (!queue_is_reliable(queue)) {
                time = queue->ready ? most_for_receive : most_to_pair;
        } else if (queue->ready) {
                time = set->rnr_retry == 7 ? 0 : time_of(queue->time) * set->rnr_retry + least_for_receive;
        } else {
                time = set->timeout ? (UINT64_C(4096) << set->timeout) * (set->retry_cnt + UINT64_C(1)) : 0;
                time = time && time < least_to_pair ? least_to_pair : time;
        }
        return time;
}

/* Does the oldest request wait for what may never come? One that has begun does if the other side
 * says that it has fewer receives than messages have come. */
static bool waits_in_vain(const struct queue_pair *queue, const struct send_work *work)
{
        if (work->begun)
                return send_takes_receive(work) && (int32_t)(queue->credit - queue->spent) < 0;
        return !queue->ready || send_takes_receive(work);
}

void requester_check_time(struct queue_pair *queue)
{
        struct send_queue *sends = &queue->sends;
        struct send_work *work = send_at(sends, sends->head);
        uint64_t most, now;

        if (sends->head == sends->tail || work->status || queue_state(queue) != IBV_QPS_RTS ||
            (queue_paired(queue) == QUEUE_LOST && queue_is_reliable(queue)) || !waits_in_vain(queue, work))
                return;
        most = patience(queue);
        if (!most)
                return;
        now = monotonic();
        if (!queue->since)
                queue->since = now;
        else if (now - queue->since > most && !queue_is_reliable(queue))
                queue->unheard = true;
        else if (now - queue->since > most)
                spoil(work, queue->ready ? IBV_WC_RNR_RETRY_EXC_ERR : IBV_WC_RETRY_EXC_ERR);
}
