#include "far_memory.h"

#include "direct_notes.h"

#include <stdlib.h>

bool far_may(const struct queue_pair *queue)
{
        const struct ring *out = queue->sender.view.ring;

        return out && queue_is_reliable(queue) && view_remote(&queue->sender.view) &&
               atomic_load_explicit(&out->moves, memory_order_acquire);
}

bool far_learn(struct queue_pair *queue, uint32_t key, const struct record_direct *direct)
{
        struct far_segment *segment;

        if (!direct->memory || !direct->length || direct->base + direct->length < direct->base ||
            direct->offset + direct->length < direct->offset || !(direct->access & KEY_REMOTE_WRITE))
                return false;
        segment = calloc(1, sizeof *segment);
        if (!segment)
                return false;
        *segment = (struct far_segment){.next = queue->direct.far,
                                        .key = key,
                                        .base = direct->base,
                                        .length = direct->length,
                                        .file = direct->memory,
                                        .token = direct->token,
                                        .offset = direct->offset};
        queue->direct.far = segment;
        return true;
}

/* Where the request's bytes are, if they are in one piece and in a file of this process. */
static bool find_own(struct queue_pair *queue, const struct send_work *work, uint64_t *file, uint64_t *offset)
{
        struct work_memory memory = send_memory(&queue->sends, work, queue->domain);
        const struct key_entry *entry;
        uint64_t first, from;
        bool found = false;

        if (memory.inlined || memory.count != 1)
                return false;
        entry = key_hold_entry(&memory_keys, memory.pieces->lkey, queue->domain, 0);
        if (!entry)
                return false;
        /* Offsets are those of the key, as a device has it. */
        from = memory.pieces->addr - entry->base;
        first = (uintptr_t)entry->first + from;
        if (entry->extent && from <= entry->length && work->total <= entry->length - from)
                found = extent_has(entry->extent, first, work->total, file, offset);
        key_release(&memory_keys, memory.pieces->lkey);
        return found;
}

/* All that was put is executed, as far as this side knows. */
static bool is_in_order(const struct queue_pair *queue)
{
        return !queue->asking && (int32_t)(queue->executed - queue->sender.psn) >= 0;
}

/* The request has to go as records; its key is asked for if nothing is known of it. */
static enum record_outcome use_records(struct queue_pair *queue, const struct send_work *work, bool asks)
{
        if (asks)
                direct_note_lacking(&queue->direct, work->rkey);
        return RECORD_OK;
}

static void request(struct queue_pair *queue, const struct far_segment *segment, const struct send_work *work,
                    uint64_t file, uint64_t offset)
{
        struct ring *out = queue->sender.view.ring;
        struct move_request *move = &out->move;

        atomic_store_explicit(&move->from, file, memory_order_relaxed);
        atomic_store_explicit(&move->from_offset, offset, memory_order_relaxed);
        atomic_store_explicit(&move->to, segment->file, memory_order_relaxed);
        atomic_store_explicit(&move->to_offset, segment->offset + (work->address - segment->base),
                              memory_order_relaxed);
        atomic_store_explicit(&move->token, segment->token, memory_order_relaxed);
        atomic_store_explicit(&move->length, work->total, memory_order_relaxed);
        queue->direct.move++;
        queue->direct.moving = work->rkey;
        queue->direct.moving_from = file;
        /* Pairs with moves_scan() of the relay. */
        atomic_store_explicit(&move->number, queue->direct.move, memory_order_release);
        queue_pairer->ring(queue, &out->receivers);
}

static enum record_outcome begin(struct queue_pair *queue, const struct send_work *work)
{
        const struct far_segment *segment = far_segment_find(queue->direct.far, work->rkey);
        uint64_t file, offset;

        if (!segment)
                return use_records(queue, work, true);
        if (work->address < segment->base || work->address - segment->base > segment->length ||
            work->total > segment->length - (work->address - segment->base) ||
            !find_own(queue, work, &file, &offset) || file == queue->direct.not_from)
                return use_records(queue, work, false);
        /* What was put before is on its way: it is no use to go after it in the ring. */
        if (!is_in_order(queue))
                return RECORD_WAIT;
        request(queue, segment, work, file, offset);
        return RECORD_WAIT;
}

/* The relay has told how it ended. */
static enum record_outcome finish(struct queue_pair *queue, struct send_work *work, uint32_t outcome)
{
        const struct ring *out = queue->sender.view.ring;
        struct queue_direct *direct = &queue->direct;
        const struct far_segment *segment = far_segment_find(direct->far, direct->moving);
        bool whole = outcome == MOVE_DONE && segment &&
                     atomic_load_explicit(&out->seen, memory_order_relaxed) == direct->moving;

        direct->moving = 0;
        if (whole) {
                work->begun = work->whole = work->direct = true;
                direct->moved = true;
                return RECORD_OK;
        }
        work->recorded = true;
        if (outcome == MOVE_NOT_FROM)
                direct->not_from = direct->moving_from;
        else if (outcome != MOVE_AGAIN && segment)
                far_segment_drop(&direct->far, segment);
        if (outcome == MOVE_NOT_TO)
                direct_note_none(&queue->direct, work->rkey);
        return use_records(queue, work, false);
}

enum record_outcome far_move(struct queue_pair *queue, struct send_work *work)
{
        const struct ring *out = queue->sender.view.ring;

        if (!queue->direct.moving)
                return work->opcode == IBV_WR_RDMA_WRITE && work->total >= FAR_LEAST && !work->recorded &&
                               far_may(queue)
                           ? begin(queue, work)
                           : RECORD_OK;
        if (!queue_move_is_over(queue))
                return RECORD_WAIT;
        return finish(queue, work,
                      (uint32_t)(atomic_load_explicit(&out->moved, memory_order_acquire) % MOVE_OUTCOME));
}
