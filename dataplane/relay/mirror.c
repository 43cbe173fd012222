#include "mirror.h"

#include "../library/stamp.h"
#include "control.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
        BUCKETS = 4096,
        REST = 2000, /* turns without news after which a mirror rests though others are busy */
        REPORT = 4,  /* a quarter of the ring taken is news */
        SETTLE =
            20, /* ms: what every core has done meanwhile stands for a barrier (upgrade.c of the library) */
        AGAIN = 5, /* ms between looks at a process that is in the middle of a put */
        BEAT = 10, /* ms after which what was taken is reported, first time; doubled while nothing is */
        BEAT_MOST = 1000,
};

#define MS UINT64_C(1000000)

static struct node buckets[BUCKETS];
static struct node active = LIST(active), lazy = LIST(lazy), leaving = LIST(leaving);
static uint64_t beat_at, beat_gap = BEAT;

void mirrors_start(void)
{
        for (int i = 0; i < BUCKETS; i++)
                list_init(&buckets[i]);
}

static struct node *bucket_of(uint32_t number)
{
        return &buckets[number % BUCKETS];
}

struct mirror *mirror_find(uint32_t number)
{
        struct node *bucket = bucket_of(number);

        EACH(node, bucket)
        {
                struct mirror *mirror = OF(node, struct mirror, same);

                if (mirror->number == number)
                        return mirror;
        }
        return NULL;
}

/* The one place where a state changes. */
static void become(struct mirror *m, enum mirror_state state)
{
        m->state = state;
        if (state != MIRROR_BROKEN && state != MIRROR_DROPPING)
                return;
        list_remove(&m->active);
        list_remove(&m->lazy);
        list_remove(&m->leaving);
        if (state != MIRROR_DROPPING)
                return;
        m->dropped_at = now();
        list_add(&m->link->ending, &m->ending);
}

/* Side 0's threads that wait for this connection. */
static void wake_all(struct mirror *m)
{
        arena_wake(m->shared, &m->in->receivers, m->slot);
        arena_wake(m->shared, &m->out->senders, m->slot);
}

static void tell_finished(struct mirror *m, enum relay_state state)
{
        if (m->closed && !m->told_finished)
                control_number(R_FINISHED, m->number, state);
        m->told_finished = m->told_finished || m->closed;
}

static void tell_ended(struct mirror *m, enum relay_state state)
{
        if (!m->told_ended)
                control_number(R_ENDED, m->number, state);
        m->told_ended = true;
}

static void break_it(struct mirror *m)
{
        if (m->broken || m->state == MIRROR_DROPPING)
                return;
        m->broken = true;
        count(COUNT_BROKEN, 1);
        atomic_store_explicit(&m->out->broken, 1, memory_order_release);
        atomic_store_explicit(&m->in->broken, 1, memory_order_release);
        wake_all(m);
        become(m, MIRROR_BROKEN);
        tell_ended(m, RELAY_BROKEN);
        tell_finished(m, RELAY_BROKEN);
        link_ready(m->link, m);
}

static void corrupt(struct mirror *m)
{
        count(COUNT_CORRUPT, 1);
        break_it(m);
}

/* --- what is to be said --- */

static bool may_write(const struct mirror *m)
{
        return m->state == MIRROR_PAIRED && m->heard & WIRE_READY && !(m->heard & WIRE_CLOSED) &&
               !m->resync && !m->muted;
}

/* What the process has put, and what it will ever put if it has stopped, is there or needn't be. */
static bool all_sent(const struct mirror *m)
{
        return !m->resync && (m->sent == m->tail || m->heard & WIRE_CLOSED);
}

static uint32_t flags_of(const struct mirror *m)
{
        uint32_t flags = 0;

        if (m->broken)
                return WIRE_BROKEN | (m->state == MIRROR_DROPPING ? WIRE_DROPPED : 0);
        /* The router may drop it as soon as it has come to its end here; the peer must still hear of that. */
        if (m->state == MIRROR_DROPPING)
                return WIRE_DROPPED | (m->has_left ? WIRE_HAS_LEFT : 0) | (m->has_over ? WIRE_HAS_OVER : 0);
        if (m->looks)
                flags |= WIRE_READY;
        if (m->asked || m->leaves)
                flags |= WIRE_LEAVE;
        if (m->stopped && all_sent(m))
                flags |= WIRE_LEFT;
        if (m->has_left)
                flags |= WIRE_HAS_LEFT;
        if (m->closed)
                flags |= WIRE_CLOSED;
        if (m->closed && all_sent(m))
                flags |= WIRE_OVER;
        if (m->has_over)
                flags |= WIRE_HAS_OVER;
        return flags;
}

bool mirror_wants(const struct mirror *m)
{
        if (m->state == MIRROR_LENT || !m->reached)
                return false;
        if (m->muted)
                return false;
        if (flags_of(m) != m->said)
                return true;
        if (m->state != MIRROR_PAIRED)
                return false;
        return m->news || m->report || (m->end && !m->said_end) || (m->sent != m->tail && may_write(m));
}

/* Is the direction over, as far as this relay is needed for it? */
static bool is_through(const struct mirror *m)
{
        return m->heard & (WIRE_HAS_LEFT | WIRE_HAS_OVER) && (m->has_left || m->has_over);
}

/* --- looking at what the process does --- */

static bool look_at_sent(struct mirror *m)
{
        uint64_t end, tail, base;

        if (m->stopped && m->end)
                return true;
        end = atomic_load_explicit(&m->out->end, memory_order_acquire);
        tail = atomic_load_explicit(&m->out->tail, memory_order_acquire);
        if (tail != m->tail) {
                /* Before `ready` nobody may put anything; after it has stopped, neither. */
                if (!(m->heard & WIRE_READY) || m->stopped || tail - m->tail > m->size ||
                    tail - m->head > m->size)
                        return false;
                /* What is below `tail` and not taken holds this `base`. */
                base = atomic_load_explicit(&m->out->base, memory_order_relaxed);
                if (base != m->base && (base != m->tail || m->head != m->tail))
                        return false;
                m->base = base;
                m->tail = tail;
        }
        if (!m->start)
                m->start = atomic_load_explicit(&m->out->start, memory_order_acquire);
        if (end && end - 1 != tail)
                return false;
        if (end) {
                m->end = end;
                m->stopped = true;
        }
        return true;
}

static bool look_at_taken(struct mirror *m)
{
        uint64_t head = atomic_load_explicit(&m->in->head, memory_order_acquire);

        if (head - m->consumed > m->got - m->consumed)
                return false;
        m->consumed = head;
        if (head - m->reported >= m->size / REPORT)
                m->report = true;
        if (!m->looks)
                m->looks = atomic_load_explicit(&m->in->ready, memory_order_acquire) != 0;
        if (!m->asked)
                m->asked = atomic_load_explicit(&m->in->leave, memory_order_relaxed) != 0;
        return true;
}

static void look(struct mirror *m)
{
        if (!look_at_sent(m) || !look_at_taken(m))
                corrupt(m);
}

static void activate(struct mirror *m)
{
        m->quiet = 0;
        if (m->state != MIRROR_PAIRED || list_holds(&m->active))
                return;
        list_add(&active, &m->active);
        list_remove(&m->lazy);
        /* Nobody needs to ring while we look anyway. Nobody else waits on this side. */
        atomic_store_explicit(&m->out->receivers.any, 0, memory_order_relaxed);
        atomic_store_explicit(&m->in->senders.any, 0, memory_order_relaxed);
        atomic_store_explicit(&m->out->receiver_cpu, relay.core, memory_order_relaxed);
        atomic_store_explicit(&m->in->sender_cpu, relay.core, memory_order_relaxed);
}

void mirror_wake(struct mirror *m)
{
        activate(m);
}

static void ask_to_ring(struct waiters *waiters)
{
        atomic_fetch_or_explicit(&waiters->bells[0], 1, memory_order_relaxed);
        atomic_store_explicit(&waiters->any, 1, memory_order_relaxed);
}

/* False: it has news. */
static bool rest(struct mirror *m)
{
        uint64_t used = m->got - m->consumed, room = 0;

        if (!list_holds(&m->ready)) {
                /* The peer has room while less than half of its view of the ring is used: it needn't hear. */
                if (m->got - m->reported >= m->size / 2)
                        room = used > m->size / REPORT ? used - m->size / REPORT : 1;
                atomic_store_explicit(&m->in->room, (uint32_t)room, memory_order_relaxed);
                ask_to_ring(&m->out->receivers);
                ask_to_ring(&m->in->senders);
                /* Pairs with wake() of the library: either it sees `any`, or we see what it published. */
                atomic_thread_fence(memory_order_seq_cst);
                look(m);
                if (m->state != MIRROR_PAIRED)
                        return true;
                if (mirror_wants(m) && link_ready(m->link, m))
                        return false;
        }
        atomic_store_explicit(&m->out->receiver_cpu, 0, memory_order_relaxed);
        atomic_store_explicit(&m->in->sender_cpu, 0, memory_order_relaxed);
        list_remove(&m->active);
        if (m->got != m->reported && !list_holds(&m->lazy)) {
                list_add(&lazy, &m->lazy);
                if (beat_gap != BEAT)
                        beat_at = 0;
                beat_gap = BEAT;
        }
        arena_waits(m->shared);
        return true;
}

bool mirrors_look(void)
{
        bool any = false;

        EACH(node, &active)
        {
                struct mirror *m = OF(node, struct mirror, active);

                if (list_holds(&m->ready))
                        continue;
                look(m);
                if (mirror_wants(m) && link_ready(m->link, m)) {
                        m->quiet = 0;
                        any = true;
                } else if (m->state == MIRROR_PAIRED && ++m->quiet > REST) {
                        rest(m);
                }
        }
        return any;
}

bool mirrors_rest(void)
{
        bool all = true;

        EACH(node, &active)
        {
                all = rest(OF(node, struct mirror, active)) && all;
        }
        return all;
}

bool mirrors_active(void)
{
        return list_holds(&active);
}

/* --- life --- */

static void release(struct mirror *m)
{
        uint32_t number = m->number;

        if (m->lent)
                m->lender->take_back(m);
        if (m->reached)
                m->lender->forget(m);
        list_remove(&m->same);
        list_remove(&m->of_link);
        list_remove(&m->ready);
        list_remove(&m->active);
        list_remove(&m->lazy);
        list_remove(&m->leaving);
        list_remove(&m->ending);
        if (m->shared)
                m->shared->mirrors[m->slot] = NULL;
        relay.counters[COUNT_CONNECTIONS]--;
        free(m);
        control_number(R_DROPPED, number, 0);
}

/* The memory is ours again when the peer can't write there, and the device reads nothing of ours any more. */
static void try_release(struct mirror *m)
{
        bool reachable = m->link->state == LINK_UP && m->reached;

        if (m->state != MIRROR_DROPPING)
                return;
        if (!reachable || ((m->gone || m->muted) && m->link->completed >= m->posted))
                release(m);
}

struct mirror *mirror_make(const struct relay_slot *slot, struct link *link, struct shared *shared,
                           struct wire_place *place, int32_t *error, char *text)
{
        struct mirror *m = calloc(1, sizeof *m);

        if (!m)
                relay_die("memory for a connection", ENOMEM);
        m->number = slot->connection;
        m->slot = slot->slot;
        m->link = link;
        m->shared = shared;
        m->size = shared->size_of_ring;
        m->cookie = relay_random();
        m->out = arena_ring(shared, slot->slot, 0);
        m->in = arena_ring(shared, slot->slot, 1);
        m->out_bulk = arena_bulk(shared, slot->slot, 0);
        m->in_bulk = arena_bulk(shared, slot->slot, 1);
        m->lender = relay.transport;
        list_init(&m->same);
        list_init(&m->of_link);
        list_init(&m->ready);
        list_init(&m->active);
        list_init(&m->lazy);
        list_init(&m->leaving);
        list_init(&m->ending);
        *place = (struct wire_place){
            .magic = WIRE_MAGIC,
            .version = WIRE_VERSION,
            .transport = (uint16_t)m->lender->kind,
            .size_of_ring = m->size,
            .cookie = m->cookie,
        };
        for (uint32_t d = 0; d < SIDES; d++)
                if (atomic_load(&arena_ring(shared, slot->slot, d)->incarnation) != slot->incarnation) {
                        snprintf(text, RELAY_TEXT, "slot %u isn't that of this connection", slot->slot);
                        *error = ESTALE;
                }
        if (!*error)
                *error = m->lender->lend(m, place, text);
        list_add(bucket_of(m->number), &m->same);
        list_add(&link->mirrors, &m->of_link);
        shared->mirrors[m->slot] = m;
        count(COUNT_CONNECTIONS, 1);
        return m;
}

int mirror_pair(struct mirror *m, uint32_t peer, const struct wire_place *place, char *text)
{
        int error;

        if (m->state != MIRROR_LENT || !m->lent) {
                snprintf(text, RELAY_TEXT, "the connection can't be paired any more");
                return EINVAL;
        }
        if (place->magic != WIRE_MAGIC || place->version != WIRE_VERSION ||
            place->transport != m->lender->kind) {
                snprintf(text, RELAY_TEXT, "the peer's relay speaks another version or transport");
                return EPROTO;
        }
        if (place->size_of_ring != m->size) {
                snprintf(text, RELAY_TEXT, "rings of %u bytes here and of %u bytes at the peer", m->size,
                         place->size_of_ring);
                return EPROTO;
        }
        m->peer = peer;
        m->peer_cookie = place->cookie;
        error = m->lender->reach(m, place, text);
        if (error)
                return error;
        become(m, MIRROR_PAIRED);
        m->news = true;
        /* What the link has lost and got again meanwhile doesn't concern it. */
        m->resync = false;
        activate(m);
        return 0;
}

bool mirror_is_lent(const struct mirror *m)
{
        return m->lent || m->state == MIRROR_BROKEN || m->state == MIRROR_DROPPING;
}

void mirrors_take_back(const struct transport *lender)
{
        for (int i = 0; i < BUCKETS; i++)
                EACH(node, &buckets[i])
                {
                        struct mirror *m = OF(node, struct mirror, same);

                        if (m->lent && m->lender == lender)
                                lender->take_back(m);
                }
}

void mirror_close(struct mirror *m)
{
        m->closed = true;
        if (m->state == MIRROR_PAIRED && !m->muted) {
                if (!look_at_sent(m)) {
                        corrupt(m);
                        return;
                }
                activate(m);
        } else {
                tell_finished(m, m->broken ? RELAY_BROKEN : RELAY_WHOLE);
        }
}

static void stop_process(struct mirror *m)
{
        if (m->stopped || list_holds(&m->leaving))
                return;
        atomic_store(&m->out->leave, 1);
        m->leave_at = now() + SETTLE * MS;
        list_add(&leaving, &m->leaving);
}

void mirror_leave(struct mirror *m)
{
        if (m->state != MIRROR_PAIRED && m->state != MIRROR_LENT)
                return;
        m->leaves = true;
        stop_process(m);
        activate(m);
}

void mirror_drop(struct mirror *m, bool broken)
{
        if (m->state == MIRROR_DROPPING)
                return;
        if (broken && m->shared)
                break_it(m);
        become(m, MIRROR_DROPPING);
        link_ready(m->link, m);
        try_release(m);
}

void mirror_abandon(struct mirror *m)
{
        if (m->shared)
                break_it(m);
        if (m->shared)
                m->shared->mirrors[m->slot] = NULL;
        m->shared = NULL;
}

void mirror_completed(struct mirror *m)
{
        try_release(m);
}

void mirror_suspend(struct mirror *m)
{
        m->resync = true;
        list_remove(&m->ready);
        try_release(m);
}

void mirror_resume(struct mirror *m)
{
        m->said = 0;
        m->said_end = false;
        m->news = true;
        m->resync = true;
        m->muted = false;
        m->posted = 0;
        if (m->state == MIRROR_PAIRED)
                activate(m);
        if (mirror_wants(m))
                link_ready(m->link, m);
}

/* --- what the peer says --- */

static void publish_end(struct mirror *m)
{
        if (atomic_load_explicit(&m->in->head, memory_order_relaxed) == m->got)
                atomic_store_explicit(&m->in->stamp, clock_stamp(), memory_order_relaxed);
        atomic_store_explicit(&m->in->end, m->in_end, memory_order_release);
        m->in_ends = true;
}

/* What has become of what we sent. */
static bool hear_of_sent(struct mirror *m, const struct wire_block *block)
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

/* Bytes that the peer's process has put. */
static bool hear_of_bytes(struct mirror *m, const struct wire_block *block)
{
        uint64_t more = block->tail - m->got;

        if (block->start && !m->in_start) {
                m->in_start = block->start;
                atomic_store_explicit(&m->in->start, m->in_start, memory_order_release);
                /* The peer's process may wait until it is known that this is here (await_start() of the
                 * library). */
                m->report = true;
        }
        /* Below: said again on a new link. */
        if ((int64_t)more <= 0)
                return true;
        if (block->tail - m->reported > m->size || m->in_ends)
                return false;
        if (block->base != m->in_base) {
                /* The peer's process begins anew where ours has taken everything. */
                if (block->base != m->got || m->reported != m->got)
                        return false;
                m->in_base = block->base;
                atomic_store_explicit(&m->in->base, m->in_base, memory_order_relaxed);
        }
        if (atomic_load_explicit(&m->in->head, memory_order_relaxed) == m->got)
                atomic_store_explicit(&m->in->stamp, clock_stamp(), memory_order_relaxed);
        m->got = block->tail;
        atomic_store_explicit(&m->in->sender_cpu, relay.core, memory_order_relaxed);
        atomic_store_explicit(&m->in->tail, m->got, memory_order_release);
        count(COUNT_BYTES_IN, more);
        return true;
}

static bool hear_of_end(struct mirror *m, const struct wire_block *block)
{
        bool last = block->tail == m->got;

        if (block->end && !m->in_end)
                m->in_end = block->end;
        if (block->end && block->end != m->in_end)
                return false;
        if (block->flags & WIRE_LEFT && last && !m->has_left) {
                m->has_left = true;
                /* Nothing comes after it, so the ring has ended here, whether the process says so or not:
                 * both can do without a relay. */
                if (!m->in_end)
                        m->in_end = m->got + 1;
                atomic_store_explicit(&m->in->left, 1, memory_order_release);
        }
        if (m->in_end && !m->in_ends) {
                if ((int64_t)(m->in_end - 1 - m->got) < 0)
                        return false;
                if (m->in_end - 1 == m->got)
                        publish_end(m);
        }
        if (block->flags & WIRE_OVER && last && !m->has_over) {
                m->has_over = true;
                atomic_store_explicit(&m->in->over, 1, memory_order_release);
                tell_ended(m, RELAY_WHOLE);
        }
        return true;
}

static void hear_flags(struct mirror *m, uint32_t flags)
{
        if (flags & WIRE_READY && !(m->heard & WIRE_READY))
                atomic_store_explicit(&m->out->ready, 1, memory_order_release);
        m->heard |= flags;
        if (flags & WIRE_LEAVE)
                stop_process(m);
        if (flags & WIRE_HAS_OVER)
                tell_finished(m, RELAY_WHOLE);
}

static void tell_left(struct mirror *m)
{
        if (!m->told_left && is_through(m))
                control_number(R_LEFT, m->number, 0);
        m->told_left = is_through(m);
}

/* The peer's memory goes. What hasn't come to its end by now doesn't. */
static void hear_dropped(struct mirror *m)
{
        m->muted = true;
        if (m->state == MIRROR_PAIRED && !is_through(m))
                break_it(m);
        tell_left(m);
        tell_ended(m, RELAY_WHOLE);
        tell_finished(m, RELAY_WHOLE);
}

void mirror_heard(struct mirror *m, const struct wire_block *block)
{
        if (m->state == MIRROR_PAIRED || m->state == MIRROR_LENT) {
                uint64_t before = m->got;
                bool ended = m->in_ends || m->has_left || m->has_over;

                if (block->flags & WIRE_BROKEN) {
                        break_it(m);
                } else if (block->flags & (WIRE_DROPPED | WIRE_GONE)) {
                        /* Says nothing of the rings any more. */
                        m->heard |= block->flags;
                } else if (!hear_of_sent(m, block) || !hear_of_bytes(m, block) || !hear_of_end(m, block)) {
                        corrupt(m);
                } else {
                        hear_flags(m, block->flags);
                        if (before != m->got || ended != (m->in_ends || m->has_left || m->has_over))
                                arena_wake(m->shared, &m->in->receivers, m->slot);
                        tell_left(m);
                        activate(m);
                }
        }
        if (block->flags & WIRE_DROPPED)
                hear_dropped(m);
        if (block->flags & WIRE_GONE)
                m->gone = true;
        if (mirror_wants(m))
                link_ready(m->link, m);
        try_release(m);
}

static void write_bytes(struct mirror *m, uint64_t batch)
{
        uint64_t budget = m->link->transport->piece;

        for (int i = 0; i < WRITES && budget && m->sent != m->tail; i++) {
                uint32_t offset = (uint32_t)(m->sent - m->base) & (m->size - 1);
                uint64_t run = (offset < SMALL_SIZE ? SMALL_SIZE : m->size) - offset;

                run = run < budget ? run : budget;
                run = run < m->tail - m->sent ? run : m->tail - m->sent;
                m->link->transport->write(m->link, m, offset, (uint32_t)run);
                count(COUNT_WRITES, 1);
                count(COUNT_BYTES_OUT, run);
                m->sent += run;
                m->posted = batch;
                budget -= run;
        }
}

void mirror_say(struct mirror *m, struct wire_block *block, uint64_t batch)
{
        if (m->state == MIRROR_PAIRED)
                look(m);
        if (may_write(m))
                write_bytes(m, batch);
        *block = (struct wire_block){.connection = m->peer, .flags = flags_of(m), .cookie = m->peer_cookie};
        m->said = block->flags;
        if (block->flags & WIRE_DROPPED) {
                /* Whom to answer, should the peer not know it any more. */
                block->start = m->number;
                block->end = m->cookie;
                m->posted = batch;
        } else if (!m->broken) {
                block->tail = m->resync ? m->acked : m->sent;
                block->base = m->base;
                block->start = m->start;
                block->end = m->end;
                block->head = m->reported = m->consumed;
                block->received = m->got;
                m->said_end = m->end != 0;
                m->news = m->report = false;
        }
        activate(m);
}

/* --- time --- */

static void beat_leaving(uint64_t present)
{
        EACH(node, &leaving)
        {
                struct mirror *m = OF(node, struct mirror, leaving);

                if (present < m->leave_at)
                        continue;
                if (atomic_load_explicit(&m->out->busy, memory_order_acquire) && !m->closed) {
                        m->leave_at = present + AGAIN * MS;
                        continue;
                }
                list_remove(node);
                if (!look_at_sent(m)) {
                        corrupt(m);
                        continue;
                }
                m->stopped = true;
                activate(m);
        }
}

static bool beat_lazy(void)
{
        bool any = false;

        EACH(node, &lazy)
        {
                struct mirror *m = OF(node, struct mirror, lazy);

                if (!look_at_taken(m)) {
                        corrupt(m);
                } else if (m->consumed != m->reported) {
                        m->report = any = true;
                        activate(m);
                } else if (m->got == m->reported) {
                        list_remove(node);
                }
        }
        return any;
}

uint64_t mirrors_beat(uint64_t present)
{
        uint64_t due = 0;

        if (list_holds(&leaving)) {
                beat_leaving(present);
                due = list_holds(&leaving) ? present + AGAIN * MS : 0;
        }
        if (!list_holds(&lazy) && !arenas_deaf()) {
                beat_at = 0;
                beat_gap = BEAT;
                return due;
        }
        if (beat_at && present >= beat_at) {
                bool any = beat_lazy();

                beat_at = 0;
                any = arenas_listen() || any;
                beat_gap = any ? BEAT : beat_gap * 2 < BEAT_MOST ? beat_gap * 2 : BEAT_MOST;
        }
        if (!beat_at)
                beat_at = present + beat_gap * MS;
        return due && due < beat_at ? due : beat_at;
}

/* --- the end of the relay --- */

static bool each_paired(bool (*visit)(struct mirror *))
{
        for (int i = 0; i < BUCKETS; i++)
                EACH(node, &buckets[i])
                {
                        struct mirror *m = OF(node, struct mirror, same);

                        if (m->state == MIRROR_PAIRED && !visit(m))
                                return false;
                }
        return true;
}

static bool leave_one(struct mirror *m)
{
        mirror_leave(m);
        return true;
}

/* Or can't any more. */
static bool has_left(struct mirror *m)
{
        return is_through(m) || !link_is_live(m->link) ||
               (m->link->state == LINK_STREAM && !control_is_there());
}

static bool break_one(struct mirror *m)
{
        if (!is_through(m))
                break_it(m);
        return true;
}

void mirrors_leave(void)
{
        each_paired(leave_one);
}

bool mirrors_left(void)
{
        return each_paired(has_left);
}

void mirrors_break(void)
{
        each_paired(break_one);
}
