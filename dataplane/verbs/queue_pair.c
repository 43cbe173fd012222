#include "queue_pair.h"

#include "monotonic.h"

#include <string.h>

static void nothing(struct queue_pair *queue)
{
        (void)queue;
}

static bool ask_nobody(struct queue_pair *queue)
{
        (void)queue;
        return true;
}

static void listen_to_nobody(void)
{
}

static void ring_nobody(struct queue_pair *queue, struct waiters *waiters)
{
        (void)queue;
        (void)waiters;
}

static const struct queue_pairer nobody = {.ask = nothing,
                                           .ask_again = ask_nobody,
                                           .listen = listen_to_nobody,
                                           .ring = ring_nobody,
                                           .leave = nothing};

const struct queue_pairer *queue_pairer = &nobody;
void (*queue_watch)(void) = listen_to_nobody;

void queue_tell(struct queue_pair *queue, enum queue_event event)
{
        events_put(&opened_of(queue->plain.qp_base.context)->events, &queue->events[event]);
}

void queue_fail(struct queue_pair *queue, enum queue_event event)
{
        atomic_store_explicit(&queue->failed, true, memory_order_release);
        queue_tell(queue, event);
}

/* --- completions */

bool queue_find_receive(struct queue_pair *queue)
{
        if (!queue->shared)
                return receive_queue_take(&queue->receives, &queue->now);
        if (shared_take(queue->shared, &queue->now))
                return true;
        shared_hunger(queue->shared, &queue->feeding);
        return shared_take(queue->shared, &queue->now);
}

void queue_complete_receive(struct queue_pair *queue, struct ibv_wc *wc, bool solicited,
                            const struct cq *polled)
{
        wc->wr_id = queue->now.id;
        wc->qp_num = queue->plain.qp_base.qp_num;
        if (queue->plain.qp_base.qp_type != IBV_QPT_UD)
                wc->src_qp = queue->attributes.dest_qp_num;
        if (!cq_put(queue->receive_cq, wc, solicited, polled == queue->receive_cq))
                atomic_store_explicit(&queue->failed, true, memory_order_release);
}

void queue_flush_receives(struct queue_pair *queue, const struct cq *polled)
{
        struct ibv_wc wc = {.status = IBV_WC_WR_FLUSH_ERR, .opcode = IBV_WC_RECV};

        while (queue->busy || (!queue->shared && receive_queue_take(&queue->receives, &queue->now))) {
                queue->busy = false;
                queue_complete_receive(queue, &wc, false, polled);
        }
}

static enum ibv_wc_opcode opcode_of(const struct send_work *work)
{
        switch (work->opcode) {
        case IBV_WR_RDMA_WRITE:
        case IBV_WR_RDMA_WRITE_WITH_IMM:
                return IBV_WC_RDMA_WRITE;
        case IBV_WR_RDMA_READ:
                return IBV_WC_RDMA_READ;
        case IBV_WR_ATOMIC_CMP_AND_SWP:
                return IBV_WC_COMP_SWAP;
        case IBV_WR_ATOMIC_FETCH_AND_ADD:
                return IBV_WC_FETCH_ADD;
        case IBV_WR_LOCAL_INV:
                return IBV_WC_LOCAL_INV;
        case IBV_WR_BIND_MW:
                return IBV_WC_BIND_MW;
        default:
                return IBV_WC_SEND;
        }
}

void queue_count_open(struct queue_pair *queue)
{
        uint32_t open = queue->sends.tail - queue->sends.head;
        struct ring *out = atomic_load_explicit(&queue->out, memory_order_relaxed);

        atomic_store_explicit(&queue->open, open, memory_order_relaxed);
        if (out && atomic_load_explicit(&queue->relayed, memory_order_relaxed))
                atomic_store_explicit(&out->busy, open != 0, memory_order_relaxed);
}

/* Only an index moves: the request stays readable until the next one is posted. */
static void drop_oldest(struct queue_pair *queue)
{
        struct send_queue *sends = &queue->sends;

        sends->head++;
        if ((int32_t)(sends->next - sends->head) < 0)
                sends->next = sends->head;
        if ((int32_t)(sends->reading - sends->head) < 0)
                sends->reading = sends->head;
        queue_count_open(queue);
}

/* For lists: a request is executed. */
static void count(struct queue_pair *queue, const struct send_work *work)
{
        uint64_t operations = atomic_load_explicit(&queue->operations, memory_order_relaxed);
        uint64_t bytes = atomic_load_explicit(&queue->bytes, memory_order_relaxed);

        atomic_store_explicit(&queue->operations, operations + 1, memory_order_relaxed);
        atomic_store_explicit(&queue->bytes, bytes + work->total, memory_order_relaxed);
}

/* Wait until the device reads this process's memory no more, for a move that is under way and whose
 * request is about to be flushed. The relay says so when the device has read the last byte, or has
 * lost the link for good. A relay that is killed says nothing, and its device does not read on; the
 * router has broken the rings. */
static void stop_moving(struct queue_pair *queue)
{
        enum { PAUSE = 100000 /* ns */ };
        const uint64_t most = 10000000000, most_parted = 1000000000;
        const struct ring *in = queue->receiver.view.ring;
        uint64_t begun = monotonic();

        if (!queue->direct.moving)
                return;
        while (!queue_move_is_over(queue) &&
               monotonic() - begun < (!in || queue_is_parted(queue, in) ? most_parted : most))
                sys_sleep(PAUSE);
        queue->direct.moving = 0;
}

void queue_complete_send(struct queue_pair *queue, enum ibv_wc_status status, const struct cq *polled)
{
        const struct send_work *work = send_at(&queue->sends, queue->sends.head);
        struct ibv_wc wc = {.wr_id = work->id,
                            .status = status,
                            .opcode = opcode_of(work),
                            .byte_len = send_is_asking(work) ? work->total : 0,
                            .qp_num = queue->plain.qp_base.qp_num};
        bool told = queue->signal_all || work->flags & IBV_SEND_SIGNALED || status != IBV_WC_SUCCESS;

        if (status != IBV_WC_SUCCESS)
                stop_moving(queue);
        if (status == IBV_WC_SUCCESS && !send_is_local(work))
                count(queue, work);
        drop_oldest(queue);
        queue->since = 0;
        if ((told && !cq_put(queue->send_cq, &wc, false, polled == queue->send_cq)) ||
            status != IBV_WC_SUCCESS)
                atomic_store_explicit(&queue->failed, true, memory_order_release);
}

void queue_flush_sends(struct queue_pair *queue, const struct cq *polled)
{
        while (queue->sends.head != queue->sends.tail)
                queue_complete_send(queue, IBV_WC_WR_FLUSH_ERR, polled);
}

/* --- telling the other side */

static bool put_note(struct queue_pair *queue, struct record note)
{
        return record_put(&queue->sender, &note, NULL) == RECORD_OK;
}

/* Receives that the other side may use, since the beginning. */
static uint32_t count_receives(struct queue_pair *queue)
{
        if (queue->shared)
                return atomic_load_explicit(&queue->consumed, memory_order_relaxed) +
                       receives_in(&queue->shared->receives);
        return atomic_load_explicit(&queue->receives.tail, memory_order_relaxed) +
               atomic_load_explicit(&queue->lost, memory_order_relaxed);
}

/* How many more messages the other side may send, as far as it knows. */
static int32_t credit_left(const struct queue_pair *queue)
{
        return (int32_t)(queue->credit_told - atomic_load_explicit(&queue->consumed, memory_order_relaxed));
}

/* The other side hears of new receives when it may send no more than there are new ones. So it
 * never waits for one that is posted, and hears of many at once. It hears that others have taken
 * those of a shared receive queue when a message of its own waits for one. */
static bool owes_credit(const struct queue_pair *queue, uint32_t posted)
{
        int32_t new_ones = (int32_t)(posted - queue->credit_told);

        return queue->credit_due || (new_ones > 0 && new_ones >= credit_left(queue)) ||
               (new_ones < 0 && atomic_load_explicit(&queue->stalled, memory_order_relaxed));
}

/* If the other side may send no more, whoever posts receives makes this queue pair tell it. */
static uint32_t count_receives_or_hunger(struct queue_pair *queue)
{
        uint32_t posted = count_receives(queue);

        if (!queue->shared || owes_credit(queue, posted) || credit_left(queue) > 0)
                return posted;
        shared_hunger(queue->shared, &queue->feeding);
        return count_receives(queue);
}

static bool owes_done(const struct queue_pair *queue)
{
        return (int32_t)(queue->done - queue->done_told) > 0;
}

/* What is to be told about direct memory. True: there was no room for some of it. */
static bool put_direct_notes(struct queue_pair *queue)
{
        struct queue_direct *direct = &queue->direct;
        struct iovec vec = {.iov_base = &direct->answer, .iov_len = sizeof direct->answer};
        struct cursor cursor = {.vec = &vec};
        struct record answer = {
            .operation = RECORD_DIRECT, .rkey = direct->owed, .length = sizeof direct->answer};

        if (direct->wanted &&
            put_note(queue, (struct record){.operation = RECORD_ASK, .rkey = direct->wanted})) {
                direct->asked = direct->wanted;
                direct->wanted = 0;
        }
        if (direct->owed && record_put(&queue->sender, &answer, &cursor) == RECORD_OK)
                direct->owed = 0;
        return direct->wanted || direct->owed;
}

/* These are states: whatever has not been put yet is replaced by what is newer. */
static void put_notes(struct queue_pair *queue)
{
        uint32_t posted = count_receives_or_hunger(queue);
        bool owes;

        if (queue->refusal && put_note(queue, (struct record){.operation = RECORD_REFUSED,
                                                              .psn = queue->refused,
                                                              .immediate = queue->refusal}))
                queue->refusal = 0;
        if (owes_credit(queue, posted) &&
            put_note(queue, (struct record){.operation = RECORD_CREDIT,
                                            .immediate = queue->attributes.min_rnr_timer,
                                            .total = posted})) {
                queue->credit_due = false;
                queue->credit_told = posted;
                posted = count_receives_or_hunger(queue);
        }
        if (owes_done(queue) &&
            put_note(queue, (struct record){.operation = RECORD_DONE, .psn = queue->done - 1}))
                queue->done_told = queue->done;
        owes = queue_state(queue) != IBV_QPS_ERR && put_direct_notes(queue);
        /* The last record, after the refusal. */
        if (queue->close_due && !queue->refusal &&
            put_note(queue, (struct record){.operation = RECORD_CLOSE}))
                queue->close_due = false;
        atomic_store_explicit(&queue->owes,
                              owes || queue->refusal || queue->close_due || owes_done(queue) ||
                                  owes_credit(queue, posted),
                              memory_order_relaxed);
}

bool queue_is_ready(struct queue_pair *queue)
{
        if (queue_paired(queue) != QUEUE_PAIRED)
                return false;
        if (!queue->ready &&
            /* Pairs with queue_pair_up(). */
            atomic_load_explicit(&queue->sender.view.ring->ready, memory_order_acquire)) {
                queue->ready = true;
                queue->since = 0;
        }
        return queue->ready;
}

/* Relays take nothing before the other side is ready: its ring may not be there yet. */
static bool may_publish(struct queue_pair *queue)
{
        return queue->sender.view.ring &&
               (!view_remote(&queue->sender.view) || queue->ready || queue_is_ready(queue));
}

void queue_publish_put(struct queue_pair *queue)
{
        if (may_publish(queue) && record_publish(&queue->sender))
                queue_pairer->ring(queue, &queue->sender.view.ring->receivers);
}

void queue_publish(struct queue_pair *queue)
{
        if (!queue->sender.view.ring)
                return;
        if (!may_publish(queue)) {
                atomic_store_explicit(&queue->owes, queue_paired(queue) != QUEUE_LOST, memory_order_relaxed);
                return;
        }
        put_notes(queue);
        queue_publish_put(queue);
}

/* --- states */

static void copy_place(struct place *to, const struct place *from)
{
        atomic_store_explicit(&to->arena, atomic_load_explicit(&from->arena, memory_order_relaxed),
                              memory_order_relaxed);
        atomic_store_explicit(&to->side, atomic_load_explicit(&from->side, memory_order_relaxed),
                              memory_order_relaxed);
        atomic_store_explicit(&to->slot, atomic_load_explicit(&from->slot, memory_order_relaxed),
                              memory_order_relaxed);
        atomic_store_explicit(&to->incarnation,
                              atomic_load_explicit(&from->incarnation, memory_order_relaxed),
                              memory_order_relaxed);
}

bool queue_pair_up(struct queue_pair *queue, struct view out, struct view in, const struct place *place,
                   bool direct)
{
        bool wanted;

        queue_lock(queue);
        wanted = queue_paired(queue) == QUEUE_ASKED;
        if (wanted) {
                copy_place(&queue->place, place);
                record_send_from(&queue->sender, out);
                record_receive_from(&queue->receiver, in);
                atomic_store_explicit(&queue->seen, 0, memory_order_relaxed);
                atomic_store_explicit(&queue->relayed, view_remote(&out), memory_order_relaxed);
                atomic_store_explicit(&queue->out, out.ring, memory_order_release);
                atomic_store_explicit(&queue->in, in.ring, memory_order_release);
                queue->direct.may = direct;
                /* This library knows moves; before `ready`. */
                atomic_store_explicit(&in.ring->moves, 1, memory_order_relaxed);
                queue_count_open(queue);
                queue->credit_due = true;
                atomic_store_explicit(&queue->pairing, QUEUE_PAIRED, memory_order_release);
                queue_publish(queue);
                /* From now on the other side may put records. Pairs with requester.c. */
                atomic_store_explicit(&in.ring->ready, 1, memory_order_release);
                queue_pairer->ring(queue, &in.ring->senders);
        }
        queue_unlock(queue);
        return wanted;
}

/* Has the other side ever been there? It can take back that it is ready. But work that was begun by
 * then, and answers that were taken ahead, belong to these rings. */
static bool has_peer_been_there(struct queue_pair *queue)
{
        return queue->receiver.head || queue->receiver.held || queue_is_ready(queue);
}

bool queue_pair_down(struct queue_pair *queue)
{
        bool alone = false;

        queue_lock(queue);
        if (queue_paired(queue) == QUEUE_PAIRED && queue_state(queue) != IBV_QPS_ERR &&
            !has_peer_been_there(queue)) {
                alone = true;
                atomic_store_explicit(&queue->in, NULL, memory_order_relaxed);
                atomic_store_explicit(&queue->out, NULL, memory_order_relaxed);
                memset(&queue->sender, 0, sizeof queue->sender);
                memset(&queue->receiver, 0, sizeof queue->receiver);
                atomic_store_explicit(&queue->pairing, QUEUE_ASKED, memory_order_release);
        }
        queue_unlock(queue);
        return alone;
}

void queue_be_lost(struct queue_pair *queue)
{
        queue->since = 0;
        atomic_store_explicit(&queue->pairing, QUEUE_LOST, memory_order_release);
        extents_withdraw_soon(&queue->known);
}

static void lose(struct queue_pair *queue)
{
        queue_be_lost(queue);
        queue->died = true;
}

void queue_lose(struct queue_pair *queue)
{
        queue_lock(queue);
        if (queue_paired(queue) == QUEUE_ASKED)
                lose(queue);
        else if (queue_paired(queue) == QUEUE_PAIRED)
                atomic_store_explicit(&queue->parted, true, memory_order_release);
        queue_unlock(queue);
}

void queue_part(struct queue_pair *queue)
{
        mutex_take(&queue->sending);
        if (queue_paired(queue) == QUEUE_PAIRED)
                lose(queue);
        mutex_release(&queue->sending);
}

void queue_enter_error(struct queue_pair *queue, const struct cq *polled)
{
        if (queue_state(queue) == IBV_QPS_ERR)
                return;
        atomic_store_explicit(&queue->state, IBV_QPS_ERR, memory_order_release);
        queue->plain.qp_base.state = IBV_QPS_ERR;
        queue->close_due = queue_paired(queue) == QUEUE_PAIRED;
        queue_publish(queue);
        extents_withdraw_soon(&queue->known);
        queue_flush_sends(queue, polled);
        queue_flush_receives(queue, polled);
        if (queue->shared)
                queue_tell(queue, QUEUE_LAST_RECEIVE);
}

void queue_settle(struct queue_pair *queue, const struct cq *polled)
{
        if (!atomic_load_explicit(&queue->failed, memory_order_acquire) || queue_state(queue) == IBV_QPS_ERR)
                return;
        queue_lock(queue);
        /* It may have been reset meanwhile. */
        if (atomic_load_explicit(&queue->failed, memory_order_acquire))
                queue_enter_error(queue, polled);
        queue_unlock(queue);
}

/* Under both: all that belongs to one pairing. */
static void forget(struct queue_pair *queue)
{
        struct send_queue *sends = &queue->sends;

        sends->head = sends->reading = sends->next = sends->tail = 0;
        receive_queue_clear(&queue->receives);
        memset(&queue->sender, 0, sizeof queue->sender);
        memset(&queue->receiver, 0, sizeof queue->receiver);
        queue->ready = queue->credit_due = queue->close_due = queue->busy = false;
        queue->draining = queue->died = queue->unheard = queue->skips = false;
        queue->ahead = (struct record_receiver){0};
        queue->dry = false;
        queue->dry_since = 0;
        queue->answers = false;
        queue->credit = queue->spent = queue->time = queue->executed = queue->asking = 0;
        queue->refusal = queue->done = queue->done_told = queue->credit_told = 0;
        queue->asked = queue->since = 0;
        segments_end(&queue->direct.segments);
        far_segments_end(&queue->direct.far);
        memset(&queue->direct, 0, sizeof queue->direct);
        memset(queue->used_keys, 0, sizeof queue->used_keys);
        atomic_store_explicit(&queue->consumed, 0, memory_order_relaxed);
        atomic_store_explicit(&queue->lost, 0, memory_order_relaxed);
        atomic_store_explicit(&queue->stalled, false, memory_order_relaxed);
        atomic_store_explicit(&queue->open, 0, memory_order_relaxed);
        atomic_store_explicit(&queue->seen, 0, memory_order_relaxed);
        atomic_store_explicit(&queue->owes, false, memory_order_relaxed);
        atomic_store_explicit(&queue->in, NULL, memory_order_relaxed);
        atomic_store_explicit(&queue->out, NULL, memory_order_relaxed);
        atomic_store_explicit(&queue->failed, false, memory_order_relaxed);
        atomic_store_explicit(&queue->looped, false, memory_order_relaxed);
        atomic_store_explicit(&queue->parted, false, memory_order_relaxed);
        atomic_store_explicit(&queue->relayed, false, memory_order_relaxed);
}

void queue_reset(struct queue_pair *queue)
{
        bool paired;

        queue_lock(queue);
        if (queue_paired(queue) == QUEUE_PAIRED) {
                queue->close_due |= queue_state(queue) != IBV_QPS_ERR;
                queue_publish(queue);
        }
        stop_moving(queue);
        atomic_store_explicit(&queue->state, IBV_QPS_RESET, memory_order_release);
        queue->plain.qp_base.state = IBV_QPS_RESET;
        forget(queue);
        paired = atomic_exchange_explicit(&queue->pairing, QUEUE_ALONE, memory_order_acq_rel);
        queue_unlock(queue);
        completions_drop(&queue->send_cq->completions, queue->plain.qp_base.qp_num);
        completions_drop(&queue->receive_cq->completions, queue->plain.qp_base.qp_num);
        /* Whoever pairs queue pairs has mutexes of its own. */
        if (paired)
                queue_pairer->leave(queue);
}
