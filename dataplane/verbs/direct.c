#include "direct.h"

#include "direct_notes.h"
#include "extents.h"
#include "far_memory.h"

const struct direct_reacher *direct_reacher;

/* --- operations */

static uint32_t access_for(const struct send_work *work)
{
        switch (work->opcode) {
        case IBV_WR_RDMA_WRITE:
                return KEY_REMOTE_WRITE;
        case IBV_WR_RDMA_READ:
                return KEY_REMOTE_READ;
        case IBV_WR_ATOMIC_CMP_AND_SWP:
        case IBV_WR_ATOMIC_FETCH_AND_ADD:
                return KEY_REMOTE_ATOMIC;
        default:
                return 0;
        }
}

/* The other side may have it later: ask again, but ever more seldom. */
static void note_later(struct queue_direct *direct)
{
        enum { PAUSE = 4, PAUSE_MOST = 1024 };

        direct->pause = direct->pause ? direct->pause * 2 : PAUSE;
        if (direct->pause > PAUSE_MOST)
                direct->pause = PAUSE_MOST;
        direct->left = direct->pause;
}

/* Is all executed that this queue pair has put, and is there nothing that it has to look at before?
 */
static bool is_in_order(const struct queue_pair *queue)
{
        const struct ring *in = atomic_load_explicit(&queue->in, memory_order_relaxed);

        /* `asking`: answers are still to be taken. The ring that goes out first: when its records
         * are executed, what was said about them has come in the other one. */
        return !queue->asking && record_taken(&queue->sender, queue->sender.tail) == RECORD_OK && in &&
               atomic_load_explicit(&in->tail, memory_order_acquire) ==
                   atomic_load_explicit(&queue->seen, memory_order_relaxed);
}

/* Whoever sees the last byte sees all. */
static void write_in_order(struct cursor *cursor, unsigned char *to, size_t length)
{
        if (length > WORD) {
                cursor_copy(cursor, to, length - WORD, true);
                to += length - WORD;
                length = WORD;
                atomic_thread_fence(memory_order_release);
        }
        cursor_copy(cursor, to, length, true);
}

static void change_word(const struct send_work *work, struct cursor *cursor, _Atomic uint64_t *word)
{
        uint64_t before = work->operands[0];

        if (work->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD)
                before = atomic_fetch_add(word, before);
        else
                atomic_compare_exchange_strong(word, &before, work->operands[1]);
        cursor_copy(cursor, (unsigned char *)&before, WORD, false);
}

/* The memory of this process is held. */
static void copy(const struct send_work *work, struct cursor *cursor, unsigned char *place)
{
        if (work->opcode == IBV_WR_RDMA_WRITE)
                write_in_order(cursor, place, work->total);
        else if (work->opcode == IBV_WR_RDMA_READ)
                cursor_copy(cursor, place, work->total, false);
        else
                change_word(work, cursor, (_Atomic uint64_t *)(void *)place);
        atomic_thread_fence(memory_order_acq_rel);
}

/* As if the other side had not answered. */
static void fail(struct send_work *work)
{
        work->status = IBV_WC_RETRY_EXC_ERR;
        work->whole = true;
}

/* What is mapped, if the operation's memory is in it, and where that begins; NULL: it is not. */
static const struct segment *find(struct queue_pair *queue, const struct send_work *work, uint32_t access,
                                  unsigned char **place)
{
        struct queue_direct *direct = &queue->direct;
        const struct segment *segment = segment_find(&direct->segments, work->rkey);
        uint64_t offset;

        if (!segment) {
                direct_note_lacking(direct, work->rkey);
                return NULL;
        }
        offset = work->address - segment->base;
        if (access & ~segment->access || offset > segment->length || work->total > segment->length - offset)
                return NULL;
        *place = segment->first + offset;
        return segment;
}

bool direct_try(struct queue_pair *queue, struct send_work *work)
{
        uint32_t access = access_for(work);
        struct work_memory memory;
        struct work_held held;
        struct cursor cursor = {.vec = held.vec};
        struct work_spot spot = {0};
        const struct segment *segment;
        unsigned char *place;

        queue->direct.lacking = 0;
        if (!queue->direct.may || !access || !work->total)
                return false;
        segment = find(queue, work, access, &place);
        if (!segment || !is_in_order(queue) ||
            (access == KEY_REMOTE_ATOMIC && (work->address % WORD || (uintptr_t)place % WORD)))
                return false;
        memory = send_memory(&queue->sends, work, queue->domain);
        /* A record says what is wrong. */
        if (!work_hold(&memory, &spot, work->total, &held))
                return false;
        if (segment_enter(segment)) {
                copy(work, &cursor, place);
                if (segment_leave(segment))
                        work->begun = work->whole = work->answered = work->direct = true;
                else if (access == KEY_REMOTE_ATOMIC)
                        fail(work);
        }
        work_let_go(&held);
        return work->whole;
}

void direct_begun(struct queue_pair *queue)
{
        if (queue->direct.lacking)
                queue->direct.wanted = queue->direct.lacking;
        queue->direct.lacking = 0;
}

/* --- keys */

void direct_remember(struct queue_pair *queue, uint32_t key)
{
        uint32_t *used = queue->used_keys;

        for (size_t i = sizeof queue->used_keys / sizeof *used; --i;)
                used[i] = used[i - 1];
        used[0] = key;
}

static bool is_allowed(const struct queue_pair *queue, uint32_t key)
{
        for (size_t i = 0; i < sizeof queue->used_keys / sizeof *queue->used_keys; i++)
                if (queue->used_keys[i] == key)
                        return true;
        return false;
}

/* Does the queue pair allow all that the other side could do with the file? Who can write there can
 * read, too. */
static bool may_map(const struct extent *extent, uint32_t access)
{
        return access & (extent->writable ? KEY_REMOTE_WRITE | KEY_REMOTE_ATOMIC : KEY_REMOTE_READ);
}

/* What the other side may know of a key of this one. */
static struct record_direct describe(struct queue_pair *queue, uint32_t key)
{
        const uint32_t remote = KEY_REMOTE_READ | KEY_REMOTE_WRITE | KEY_REMOTE_ATOMIC;
        const struct key_entry *entry =
            is_allowed(queue, key) && queue_paired(queue) == QUEUE_PAIRED && queue_state(queue) != IBV_QPS_ERR
                ? key_hold_entry(&memory_keys, key, queue->domain, queue->plain.qp_base.qp_num)
                : NULL;
        struct record_direct direct = {0};
        enum extent_answer answer;
        struct direct_pages pages;
        struct extent_file file;
        uint32_t access;

        if (!entry)
                return direct;
        access = entry->access & queue->attributes.qp_access_flags & remote;
        if (entry->extent && may_map(entry->extent, access)) {
                /* While the key is held: deregistering waits. */
                answer = extent_allow(entry->extent, key, &queue->known, &file, &pages);
                direct.later = answer == EXTENT_LATER;
                if (answer == EXTENT_NOW)
                        direct = (struct record_direct){.access = access,
                                                        .memory = file.memory,
                                                        .token = file.token,
                                                        .base = entry->base +
                                                                (pages.first - (uintptr_t)entry->first),
                                                        .length = pages.length,
                                                        .offset = pages.offset};
        }
        key_release(&memory_keys, key);
        return direct;
}

void direct_withdraw(struct queue_pair *queue)
{
        struct extent_set told;

        mutex_take(&queue->sending);
        told = queue->known;
        queue->known = (struct extent_set){0};
        mutex_release(&queue->sending);
        extents_withdraw(&told);
}

/* It is on another host: the file is its relay's. */
static void learn_far(struct queue_pair *queue, uint32_t key)
{
        struct queue_direct *direct = &queue->direct;

        if (far_learn(queue, key, &direct->coming))
                direct->pause = 0;
        else if (direct->coming.later)
                note_later(direct);
        else
                direct_note_none(direct, key);
        direct->asked = 0;
        direct->coming.memory = 0;
}

/* The other side has answered. */
static bool learn(struct queue_pair *queue, struct record_receiver *receiver)
{
        struct queue_direct *direct = &queue->direct;
        struct iovec vec = {.iov_base = &direct->coming, .iov_len = sizeof direct->coming};
        struct cursor cursor = {.vec = &vec};
        struct reached *reached;
        uint32_t key = direct->asked;

        if (!key || receiver->now.rkey != key || direct->coming.memory)
                return false;
        record_take(receiver, &cursor, sizeof direct->coming);
        if (view_remote(&queue->sender.view)) {
                learn_far(queue, key);
                return true;
        }
        reached = direct->coming.memory ? reached_find(direct->coming.memory, direct->coming.token) : NULL;
        if (direct->coming.memory && !reached && direct_reacher) {
                direct_reacher->ask(queue, &direct->coming);
                return true;
        }
        if (!reached && direct->coming.later)
                note_later(direct);
        else if (!reached || !segment_add(&direct->segments, reached, key, &direct->coming))
                direct_note_none(direct, key);
        else
                direct->pause = 0;
        direct->asked = 0;
        direct->coming.memory = 0;
        return true;
}

bool direct_take(struct queue_pair *queue, struct record_receiver *receiver)
{
        if (receiver->now.operation == RECORD_DIRECT)
                return learn(queue, receiver);
        queue->direct.owed = receiver->now.rkey;
        queue->direct.answer = queue->direct.may || far_may(queue) ? describe(queue, receiver->now.rkey)
                                                                   : (struct record_direct){0};
        return receiver->now.rkey;
}

/* --- files */

void direct_reached(struct queue_pair *queue, uint64_t memory, int memfd, bool writable)
{
        struct queue_direct *direct = &queue->direct;
        struct reached *reached;

        mutex_take(&queue->sending);
        if (direct->asked && direct->coming.memory == memory) {
                reached = reached_add(memory, direct->coming.token, memfd, writable);
                if (!reached || !segment_add(&direct->segments, reached, direct->asked, &direct->coming))
                        direct_note_none(direct, direct->asked);
                direct->asked = 0;
                direct->coming.memory = 0;
        }
        mutex_release(&queue->sending);
}

void direct_ask_again(struct queue_pair *queue)
{
        struct queue_direct *direct = &queue->direct;

        mutex_take(&queue->sending);
        if (direct->asked && direct->coming.memory)
                direct_reacher->ask(queue, &direct->coming);
        mutex_release(&queue->sending);
}

void direct_missed(struct queue_pair *queue)
{
        struct queue_direct *direct = &queue->direct;

        mutex_take(&queue->sending);
        if (direct->asked && direct->coming.memory) {
                direct_note_none(direct, direct->asked);
                direct->asked = 0;
                direct->coming.memory = 0;
        }
        mutex_release(&queue->sending);
}
