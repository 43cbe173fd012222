#include "mirror_receive.h"

#include "../library/stamp.h"
#include "answers.h"
#include "mirror_end.h"
#include "moves.h"

static void publish_end(struct mirror *m)
{
        if (atomic_load_explicit(&m->in->head, memory_order_relaxed) == m->arrived)
                atomic_store_explicit(&m->in->stamp, clock_stamp(), memory_order_relaxed);
        atomic_store_explicit(&m->in->end, m->in_end, memory_order_release);
        m->in_ended = true;
}

/* How far the peer and its process are with what we sent. False: the block is invalid. */
static bool receive_progress(struct mirror *m, const struct wire_block *block)
{
        if (block->received - m->acked > m->sent - m->acked ||
            block->head - m->head > block->received - m->head)
                return false;
        m->acked = block->received;
        atomic_store_explicit(&m->out->received, m->acked, memory_order_release);
        if (m->resync) {
                m->sent = m->acked;
                m->resync = false;
                if (m->link->lost)
                        count(COUNT_RESUMED, 1);
        }
        if (block->head == m->head)
                return true;
        m->head = block->head;
        atomic_store_explicit(&m->out->head, m->head, memory_order_release);
        atomic_thread_fence(memory_order_seq_cst);
        if (atomic_load_explicit(&m->out->senders.any, memory_order_relaxed)) {
                uint64_t used = atomic_load_explicit(&m->out->tail, memory_order_relaxed) - m->head;

                if (used <= atomic_load_explicit(&m->out->room, memory_order_relaxed))
                        arena_ring_bells(m->shared, &m->out->senders, m->slot);
        }
        return true;
}

/* Bytes that the peer's process has sent: they lie in the ring already. False: the block is
 * invalid. */
static bool receive_bytes(struct mirror *m, const struct wire_block *block)
{
        uint64_t more = block->tail - m->arrived;

        if (block->start && !m->in_start) {
                m->in_start = block->start;
                atomic_store_explicit(&m->in->start, m->in_start, memory_order_release);
                /* The peer's process may wait until it knows that `start` has arrived
                 * (await_start() of the library). */
                m->report_due = true;
        }
        /* Less than we have: repeated on a new link. */
        if ((int64_t)more <= 0)
                return true;
        if (block->tail - m->reported > m->size || m->in_ended)
                return false;
        if (block->base != m->in_base) {
                /* The peer's process begins anew at offset 0 once ours has taken everything. */
                if (block->base != m->arrived || m->reported != m->arrived)
                        return false;
                m->in_base = block->base;
                atomic_store_explicit(&m->in->base, m->in_base, memory_order_relaxed);
        }
        if (atomic_load_explicit(&m->in->head, memory_order_relaxed) == m->arrived)
                atomic_store_explicit(&m->in->stamp, clock_stamp(), memory_order_relaxed);
        m->arrived = block->tail;
        atomic_store_explicit(&m->in->sender_cpu, relay.core, memory_order_relaxed);
        atomic_store_explicit(&m->in->tail, m->arrived, memory_order_release);
        count(COUNT_BYTES_IN, more);
        mirror_use(m, USAGE_BYTES_IN, more);
        return true;
}

/* The end of the peer's ring. False: the block is invalid. */
static bool receive_end(struct mirror *m, const struct wire_block *block)
{
        bool last = block->tail == m->arrived;

        if (block->end && !m->in_end)
                m->in_end = block->end;
        if (block->end && block->end != m->in_end)
                return false;
        if (block->flags & WIRE_LEFT && last && !m->has_left) {
                m->has_left = true;
                /* Nothing comes after LEFT, so the ring has ended here even if the peer's process
                 * has written no end. Both processes can go on without a relay. */
                if (!m->in_end)
                        m->in_end = m->arrived + 1;
                atomic_store_explicit(&m->in->stopped, 1, memory_order_release);
        }
        if (m->in_end && !m->in_ended) {
                if ((int64_t)(m->in_end - 1 - m->arrived) < 0)
                        return false;
                if (m->in_end - 1 == m->arrived)
                        publish_end(m);
        }
        if (block->flags & WIRE_OVER && last && !m->has_over) {
                m->has_over = true;
                atomic_store_explicit(&m->in->over, 1, memory_order_release);
                mirror_tell_ended(m, RELAY_WHOLE);
        }
        return true;
}

static void receive_flags(struct mirror *m, uint32_t flags)
{
        if (flags & WIRE_READY && !(m->peer_flags & WIRE_READY)) {
                atomic_store_explicit(&m->out->ready, 1, memory_order_release);
                /* A process may have something to send, and wait for that. */
                arena_wake(m->shared, &m->out->senders, m->slot);
        }
        m->peer_flags |= flags;
        if (flags & WIRE_LEAVE)
                mirror_stop_process(m);
        if (flags & WIRE_HAS_OVER)
                mirror_tell_finished(m, RELAY_WHOLE);
}

static void tell_left(struct mirror *m)
{
        if (!m->told_left && mirror_is_through(m))
                answer_number(R_LEFT, m->number, 0);
        m->told_left = mirror_is_through(m);
}

/* The peer's memory goes. A connection that is not through by now loses bytes. */
static void receive_dropped(struct mirror *m)
{
        m->peer_dropped = true;
        if (m->state == MIRROR_PAIRED && !mirror_is_through(m))
                mirror_break(m);
        tell_left(m);
        mirror_tell_ended(m, RELAY_WHOLE);
        mirror_tell_finished(m, RELAY_WHOLE);
}

/* The block of a connection whose rings are in use. */
static void receive_state(struct mirror *m, const struct wire_block *block)
{
        uint64_t before = m->arrived;
        bool ended = m->in_ended || m->has_left || m->has_over;

        /* Before its process's first bytes. */
        if (block->flags & WIRE_KNOWS_MOVES && m->moves)
                moves_allow(m);
        if (block->flags & WIRE_BROKEN) {
                mirror_break(m);
        } else if (block->flags & (WIRE_DROPPED | WIRE_GONE)) {
                /* Such a block has no positions. */
                m->peer_flags |= block->flags;
        } else if (!receive_progress(m, block) || !receive_bytes(m, block) || !receive_end(m, block)) {
                mirror_corrupt(m);
        } else {
                receive_flags(m, block->flags);
                if (before != m->arrived || ended != (m->in_ended || m->has_left || m->has_over))
                        arena_wake(m->shared, &m->in->receivers, m->slot);
                tell_left(m);
                mirror_activate(m);
        }
}

void mirror_receive(struct mirror *m, const struct wire_block *block)
{
        mirror_use(m, USAGE_BLOCKS_IN, 1);
        if (block->flags & WIRE_OF_MOVES)
                moves_receive(m, block);
        else if (m->state == MIRROR_PAIRED || m->state == MIRROR_REGISTERED)
                receive_state(m, block);
        if (block->flags & WIRE_DROPPED)
                receive_dropped(m);
        if (block->flags & WIRE_GONE)
                m->peer_gone = true;
        if (mirror_has_work(m) && !mirror_rests(m))
                mirror_enqueue(m);
        mirror_try_release(m);
}
