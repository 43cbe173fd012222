#include "executor.h"

#include "direct.h"

enum { BATCH = 64 };

/* What becomes of the next record. */
enum step {
        STEP_DONE,    /* it is executed */
        STEP_TOLD,    /* it is, and the other side can know it */
        STEP_LATER,   /* it waits for a receive, or for room for its answer */
        STEP_CORRUPT, /* the other side breaks the rules */
        STEP_STOP,    /* it is refused */
};

/* UC: this record, which may be a piece of more, is lost. The other side counts receives, and may
 * send one more message for one that was lost. */
static enum step skip(struct queue_pair *queue)
{
        const struct record *record = &queue->receiver.now;

        queue->skips = !(record->flags & RECORD_LAST);
        if (!queue->skips && (record->operation == RECORD_SEND || record->flags & RECORD_IMMEDIATE)) {
                atomic_fetch_add_explicit(&queue->lost, 1, memory_order_relaxed);
                atomic_fetch_add_explicit(&queue->consumed, 1, memory_order_relaxed);
        }
        return STEP_DONE;
}

static enum step refuse(struct queue_pair *queue, enum record_refusal refusal, enum queue_event event)
{
        struct record_receiver told = {.now = {.operation = RECORD_REFUSED,
                                               .psn = queue->receiver.now.psn,
                                               .immediate = (uint32_t)refusal}};

        if (!queue_is_reliable(queue))
                return skip(queue);
        if (queue->leaves)
                return STEP_LATER;
        mutex_take(&queue->sending);
        if (atomic_load_explicit(&queue->looped, memory_order_relaxed)) {
                requester_answer(queue, &told, NULL);
        } else {
                queue->refused = told.now.psn;
                queue->refusal = refusal;
        }
        mutex_release(&queue->sending);
        queue_fail(queue, event);
        return STEP_STOP;
}

static struct key_use remote_use(const struct queue_pair *queue, uint32_t access, uint64_t length)
{
        const struct record *record = &queue->receiver.now;

        return (struct key_use){.key = record->rkey,
                                .domain = queue->domain,
                                .queue = queue->plain.qp_base.qp_num,
                                .access = access,
                                .address = record->address,
                                .length = length};
}

static bool allows(const struct queue_pair *queue, unsigned int access)
{
        return queue->attributes.qp_access_flags & access;
}

/* The program is about to see what the record does: publish answers to those before it, which were
 * executed as well. */
static void tell_answers(struct queue_pair *queue)
{
        if (!queue->answers)
                return;
        mutex_take(&queue->sending);
        queue_publish_put(queue);
        mutex_release(&queue->sending);
        queue->answers = false;
}

/* Copy a payload that may be watched: whoever sees its last byte sees all of it, and the other side
 * can know that it was written. */
static void take_in_order(struct queue_pair *queue, struct cursor *cursor)
{
        struct record_receiver *receiver = &queue->receiver;
        uint32_t length = receiver->now.length;

        if (length > WORD) {
                record_take(receiver, cursor, length - WORD);
                length = WORD;
                atomic_thread_fence(memory_order_release);
        }
        if (receiver->now.flags & RECORD_LAST) {
                tell_answers(queue);
                record_show(receiver);
        }
        record_take(receiver, cursor, length);
}

/* --- receives */

/* Take a receive, if there is one, for a message that begins. */
static bool begin_receive(struct queue_pair *queue)
{
        if (!queue->busy && !queue_find_receive(queue))
                return false;
        atomic_fetch_add_explicit(&queue->consumed, 1, memory_order_relaxed);
        atomic_store_explicit(&queue->stalled, false, memory_order_relaxed);
        queue->busy = true;
        queue->spot = (struct work_spot){0};
        return true;
}

/* There is no receive. */
static enum step stall(struct queue_pair *queue)
{
        if (!queue_is_reliable(queue))
                return skip(queue);
        atomic_store_explicit(&queue->stalled, true, memory_order_relaxed);
        return STEP_LATER;
}

/* Complete it; what is in the last piece's header goes along. */
static void end_receive(struct queue_pair *queue, enum ibv_wc_opcode opcode, enum ibv_wc_status status,
                        const struct cq *polled)
{
        const struct record *record = &queue->receiver.now;
        struct ibv_wc wc = {.status = status, .opcode = opcode, .byte_len = record->total};

        if (record->flags & RECORD_IMMEDIATE) {
                wc.wc_flags = IBV_WC_WITH_IMM;
                wc.imm_data = record->immediate;
        } else if (record->flags & RECORD_INVALIDATE) {
                wc.wc_flags = IBV_WC_WITH_INV;
                wc.invalidated_rkey = record->immediate;
        }
        queue->busy = false;
        queue_complete_receive(queue, &wc, record->flags & RECORD_SOLICITED, polled);
}

/* The other side can know that the message was executed before the program does. */
static enum step complete_receive(struct queue_pair *queue, enum ibv_wc_opcode opcode,
                                  const struct cq *polled)
{
        tell_answers(queue);
        record_done(&queue->receiver);
        end_receive(queue, opcode, IBV_WC_SUCCESS, polled);
        return STEP_TOLD;
}

static enum step refuse_send(struct queue_pair *queue, enum ibv_wc_status status, enum record_refusal refusal,
                             const struct cq *polled)
{
        if (queue->leaves)
                return STEP_LATER;
        end_receive(queue, IBV_WC_RECV, status, polled);
        if (!queue_is_reliable(queue)) {
                atomic_store_explicit(&queue->failed, true, memory_order_release);
                return STEP_STOP;
        }
        return refuse(queue, refusal, QUEUE_REQUEST_ERROR);
}

static enum step take_send(struct queue_pair *queue, const struct cq *polled)
{
        const struct record *record = &queue->receiver.now;
        struct work_memory memory = {
            .pieces = queue->now.pieces, .domain = queue->domain, .access = KEY_LOCAL_WRITE};
        struct work_held held;
        struct cursor cursor = {.vec = held.vec};

        if (record->flags & RECORD_FIRST && !begin_receive(queue))
                return stall(queue);
        if (record->total > queue->now.room && !queue_is_reliable(queue)) {
                /* The receive is for the next message. */
                atomic_fetch_sub_explicit(&queue->consumed, 1, memory_order_relaxed);
                return skip(queue);
        }
        if (record->total > queue->now.room)
                return refuse_send(queue, IBV_WC_LOC_LEN_ERR, REFUSED_REQUEST, polled);
        memory.count = queue->now.count;
        if (!work_hold(&memory, &queue->spot, record->length, &held))
                return refuse_send(queue, IBV_WC_LOC_PROT_ERR, REFUSED_OPERATION, polled);
        record_take(&queue->receiver, &cursor, record->length);
        work_let_go(&held);
        if (!(record->flags & RECORD_LAST))
                return STEP_DONE;
        if (record->flags & RECORD_INVALIDATE &&
            !memory_invalidate(record->immediate, queue->domain, queue->plain.qp_base.qp_num))
                return refuse_send(queue, IBV_WC_LOC_QP_OP_ERR, REFUSED_OPERATION, polled);
        return complete_receive(queue, IBV_WC_RECV, polled);
}

/* --- one-sided operations */

/* Is the whole write allowed? Checked at its first piece. */
static bool may_write(const struct queue_pair *queue)
{
        struct key_use use = remote_use(queue, KEY_REMOTE_WRITE, queue->receiver.now.total);
        unsigned char *first;

        if (!allows(queue, IBV_ACCESS_REMOTE_WRITE))
                return false;
        if (!use.length)
                return true;
        if (key_hold(&memory_keys, &use, &first) != KEY_HELD)
                return false;
        key_release(&memory_keys, use.key);
        return true;
}

static enum step take_write(struct queue_pair *queue, const struct cq *polled)
{
        const struct record *record = &queue->receiver.now;
        struct key_use use = remote_use(queue, KEY_REMOTE_WRITE, record->length);
        struct iovec vec = {.iov_len = record->length};
        struct cursor cursor = {.vec = &vec};
        unsigned char *first;

        if (record->flags & RECORD_FIRST && !may_write(queue))
                return refuse(queue, REFUSED_ACCESS, QUEUE_ACCESS_ERROR);
        if (record->flags & RECORD_IMMEDIATE && !begin_receive(queue))
                return stall(queue);
        if (record->length) {
                if (key_hold(&memory_keys, &use, &first) != KEY_HELD)
                        return refuse(queue, REFUSED_ACCESS, QUEUE_ACCESS_ERROR);
                direct_allowed(queue, use.key);
                vec.iov_base = first;
                take_in_order(queue, &cursor);
                key_release(&memory_keys, use.key);
        }
        return record->flags & RECORD_IMMEDIATE ? complete_receive(queue, IBV_WC_RECV_RDMA_WITH_IMM, polled)
                                                : STEP_DONE;
}

/* Under `sending`: put an answer with these bytes. */
static enum record_outcome put_answer(struct queue_pair *queue, void *bytes, uint32_t length)
{
        struct iovec vec = {.iov_base = bytes, .iov_len = length};
        struct cursor cursor = {.vec = &vec};
        struct record response = {
            .length = length, .operation = RECORD_RESPONSE, .psn = queue->receiver.now.psn};
        enum record_outcome outcome = record_put(&queue->sender, &response, &cursor);

        /* It says as much as DONE would. */
        if (outcome == RECORD_OK && view_remote(&queue->sender.view))
                queue->done_told = response.psn + 1;
        queue->answers |= outcome == RECORD_OK;
        return outcome;
}

static enum step step_of(enum record_outcome outcome)
{
        if (outcome == RECORD_OK)
                return STEP_DONE;
        return outcome == RECORD_WAIT ? STEP_LATER : STEP_CORRUPT;
}

static enum step take_read(struct queue_pair *queue)
{
        const struct record *record = &queue->receiver.now;
        struct key_use use = remote_use(queue, KEY_REMOTE_READ, record->total);
        unsigned char *first = NULL;
        enum step step;

        if (!queue->attributes.max_dest_rd_atomic)
                return refuse(queue, REFUSED_REQUEST, QUEUE_REQUEST_ERROR);
        if (!allows(queue, IBV_ACCESS_REMOTE_READ) ||
            (use.length && key_hold(&memory_keys, &use, &first) != KEY_HELD))
                return refuse(queue, REFUSED_ACCESS, QUEUE_ACCESS_ERROR);
        mutex_take(&queue->sending);
        step = step_of(put_answer(queue, first, record->total));
        mutex_release(&queue->sending);
        if (use.length) {
                direct_allowed(queue, use.key);
                key_release(&memory_keys, use.key);
        }
        return step;
}

/* Under `sending`: execute an atomic operation on a word of the program's. The answer is in the
 * ring before the word changes, so that it is there if the program sees the change and ends. */
static enum record_outcome change(struct queue_pair *queue, _Atomic uint64_t *word)
{
        struct record_receiver *receiver = &queue->receiver;
        uint64_t operands[2] = {0}, before = atomic_load(word), after;
        struct iovec vec = {.iov_base = operands, .iov_len = sizeof operands};
        struct cursor cursor = {.vec = &vec};
        enum record_outcome outcome;

        receiver->taken = 0;
        record_take(receiver, &cursor, receiver->now.length);
        queue_publish_put(queue);
        for (;;) {
                const struct record_sender sender = queue->sender;

                outcome = put_answer(queue, &before, sizeof before);
                if (outcome != RECORD_OK)
                        return outcome;
                after = receiver->now.operation == RECORD_ADD ? before + operands[0] : operands[1];
                if (receiver->now.operation == RECORD_SWAP && before != operands[0])
                        after = before;
                record_show(receiver);
                if (atomic_compare_exchange_strong(word, &before, after))
                        break;
                queue->sender = sender;
        }
        /* The program may have seen it. */
        queue_publish_put(queue);
        return RECORD_OK;
}

/* It isn't executed before there is room for its answer. */
static enum step take_atomic(struct queue_pair *queue)
{
        const struct record *record = &queue->receiver.now;
        struct key_use use = remote_use(queue, KEY_REMOTE_ATOMIC, WORD);
        enum record_outcome outcome;
        unsigned char *first;

        if (record->address % WORD || !queue->attributes.max_dest_rd_atomic)
                return refuse(queue, REFUSED_REQUEST, QUEUE_REQUEST_ERROR);
        if (!allows(queue, IBV_ACCESS_REMOTE_ATOMIC) || key_hold(&memory_keys, &use, &first) != KEY_HELD)
                return refuse(queue, REFUSED_ACCESS, QUEUE_ACCESS_ERROR);
        if ((uintptr_t)first % WORD) {
                key_release(&memory_keys, use.key);
                return refuse(queue, REFUSED_REQUEST, QUEUE_REQUEST_ERROR);
        }
        mutex_take(&queue->sending);
        outcome = change(queue, (_Atomic uint64_t *)(void *)first);
        mutex_release(&queue->sending);
        key_release(&memory_keys, use.key);
        if (outcome == RECORD_OK)
                direct_allowed(queue, use.key);
        queue->answers = false;
        return step_of(outcome);
}

/* --- */

static enum step take_answer(struct queue_pair *queue, struct record_receiver *receiver,
                             const struct cq *polled)
{
        bool fits;

        mutex_take(&queue->sending);
        fits = requester_answer(queue, receiver, polled);
        mutex_release(&queue->sending);
        return fits ? STEP_DONE : STEP_CORRUPT;
}

static enum step execute(struct queue_pair *queue, const struct cq *polled)
{
        struct record_receiver *receiver = &queue->receiver;
        bool reliable = queue_is_reliable(queue);

        if (!record_is_request(&receiver->now))
                return receiver->head < queue->ahead.head ? STEP_DONE : take_answer(queue, receiver, polled);
        if (queue->skips)
                return skip(queue);
        switch (receiver->now.operation) {
        case RECORD_SEND:
                return take_send(queue, polled);
        case RECORD_WRITE:
                return take_write(queue, polled);
        case RECORD_READ:
                return reliable ? take_read(queue) : STEP_CORRUPT;
        case RECORD_SWAP:
        case RECORD_ADD:
                return reliable ? take_atomic(queue) : STEP_CORRUPT;
        default:
                return STEP_CORRUPT;
        }
}

/* Take the answers behind a message that waits for a receive, up to where there is no whole record,
 * or the other side has closed. */
static enum step take_ahead(struct queue_pair *queue, const struct cq *polled)
{
        struct record_receiver *ahead = &queue->ahead;

        if ((int64_t)(ahead->head - queue->receiver.head) <= 0) {
                *ahead = queue->receiver;
                record_skip(ahead);
        }
        for (int taken = 0; taken < BATCH; taken++) {
                enum record_outcome outcome = record_next(ahead);

                if (outcome == RECORD_CORRUPT)
                        return STEP_CORRUPT;
                if (outcome == RECORD_WAIT || ahead->now.operation == RECORD_CLOSE)
                        break;
                if (!record_is_request(&ahead->now) && take_answer(queue, ahead, polled) != STEP_DONE)
                        return STEP_CORRUPT;
                record_skip(ahead);
        }
        return STEP_LATER;
}

/* Take the next record. */
static enum step take_next(struct queue_pair *queue, const struct cq *polled)
{
        enum record_outcome outcome = record_next(&queue->receiver);
        enum step step;

        if (outcome != RECORD_OK)
                return outcome == RECORD_WAIT ? STEP_LATER : STEP_CORRUPT;
        step = execute(queue, polled);
        if (step == STEP_DONE)
                record_done(&queue->receiver);
        return step == STEP_TOLD ? STEP_DONE : step;
}

bool executor_run(struct queue_pair *queue, const struct cq *polled)
{
        uint64_t from, ahead;
        enum step step = STEP_DONE;

        if (!queue_executes(queue) || atomic_load_explicit(&queue->failed, memory_order_relaxed))
                return false;
        from = queue->receiver.head;
        ahead = queue->ahead.head;
        for (int taken = 0; taken < BATCH && step == STEP_DONE; taken++) {
                step = take_next(queue, polled);
                if (queue_paired(queue) != QUEUE_PAIRED ||
                    atomic_load_explicit(&queue->failed, memory_order_relaxed))
                        break;
        }
        if (step == STEP_LATER && atomic_load_explicit(&queue->stalled, memory_order_relaxed))
                step = take_ahead(queue, polled);
        if (step == STEP_CORRUPT)
                queue_fail(queue, QUEUE_FATAL);
        atomic_store_explicit(&queue->seen, queue->receiver.head, memory_order_relaxed);
        mutex_take(&queue->sending);
        if (view_remote(&queue->receiver.view))
                queue->done = queue->receiver.psn - queue->receiver.held;
        if (atomic_load_explicit(&queue->failed, memory_order_relaxed))
                queue_enter_error(queue, polled);
        else
                queue_publish(queue);
        queue->answers = false;
        mutex_release(&queue->sending);
        return queue->receiver.head != from || queue->ahead.head != ahead;
}
