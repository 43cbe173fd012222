#include "mirror.h"

#include "answers.h"

#include <errno.h>
#include <stdlib.h>

enum { BUCKETS = 4096 };

/* Connections and farewells, by number. */
static struct node buckets[BUCKETS], farewells[BUCKETS];
static const struct mirror_moves *mirror_moves;

struct mirrors mirrors = {
    .active = LIST(mirrors.active),
    .lazy = LIST(mirrors.lazy),
    .stopping = LIST(mirrors.stopping),
};

void mirrors_start(const struct mirror_moves *moves)
{
        mirror_moves = moves;
        for (int i = 0; i < BUCKETS; i++) {
                list_init(&buckets[i]);
                list_init(&farewells[i]);
        }
}

static struct node *bucket_of(struct node *table, uint32_t number)
{
        return &table[number % BUCKETS];
}

struct mirror *mirror_find(uint32_t number)
{
        struct node *bucket = bucket_of(buckets, number);

        EACH(node, bucket) {
                struct mirror *mirror = OF(node, struct mirror, same);

                if (mirror->number == number)
                        return mirror;
        }
        return NULL;
}

bool mirrors_visit_paired(bool (*visit)(struct mirror *mirror))
{
        for (int i = 0; i < BUCKETS; i++)
                EACH(node, &buckets[i]) {
                        struct mirror *m = OF(node, struct mirror, same);

                        if (m->state == MIRROR_PAIRED && !visit(m))
                                return false;
                }
        return true;
}

/* The one place where the state changes. */
static void become(struct mirror *m, enum mirror_state state)
{
        m->state = state;
        if (state != MIRROR_BROKEN && state != MIRROR_DROPPING)
                return;
        list_remove(&m->active);
        list_remove(&m->lazy);
        list_remove(&m->stopping);
        if (state != MIRROR_DROPPING)
                return;
        m->dropped_at = now();
        list_add(&m->link->dropping, &m->dropping);
}

/* --- what is to be sent --- */

/* All bytes of the process that the peer needs have been given to the link. */
static bool all_sent(const struct mirror *m)
{
        return !m->resync && (m->sent == m->tail || m->peer_flags & WIRE_CLOSED);
}

uint32_t mirror_flags(const struct mirror *m)
{
        uint32_t flags = 0;

        if (m->broken)
                return WIRE_BROKEN | (m->state == MIRROR_DROPPING ? WIRE_DROPPED : 0);
        /* The router may drop it as soon as it has ended here; the peer still needs the
         * confirmation. */
        if (m->state == MIRROR_DROPPING)
                return WIRE_DROPPED | (m->has_left ? WIRE_HAS_LEFT : 0) | (m->has_over ? WIRE_HAS_OVER : 0);
        if (m->process_ready)
                flags |= WIRE_READY;
        if (m->knows_moves && m->moves)
                flags |= WIRE_KNOWS_MOVES;
        if (m->stop_requested || m->leaves)
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

bool mirror_has_work(const struct mirror *m)
{
        if (m->state == MIRROR_REGISTERED || !m->target)
                return false;
        if (m->peer_dropped)
                return false;
        if (m->moves && mirror_moves->have_work(m))
                return true;
        if (mirror_flags(m) != m->sent_flags)
                return true;
        if (m->state != MIRROR_PAIRED)
                return false;
        return m->block_due || m->report_due || (m->end && !m->end_sent) ||
               (m->sent != m->tail && mirror_may_write(m));
}

unsigned mirror_wants_lane(const struct mirror *m)
{
        const struct transport *transport = m->link->transport;

        if (m->bulk && transport->lanes > transport->message_lanes)
                return transport->message_lanes + m->group % (transport->lanes - transport->message_lanes);
        return m->link->message_lane;
}

void mirror_set_lane(struct mirror *m, unsigned lane)
{
        m->lane = lane;
        m->last_batch = m->last_message = 0;
}

/* --- what happens to it --- */

void mirror_activate(struct mirror *m)
{
        m->idle_turns = 0;
        if (m->state != MIRROR_PAIRED || list_holds(&m->active))
                return;
        list_add(&m->source->active, &m->active);
        list_add(&mirrors.active, &m->source->scanned);
        list_remove(&m->lazy);
        /* No ring is needed while the rings are scanned anyway; the relay is the only waiter of
         * side 1. */
        atomic_store_explicit(&m->out->receivers.any, 0, memory_order_relaxed);
        atomic_store_explicit(&m->in->senders.any, 0, memory_order_relaxed);
        atomic_store_explicit(&m->out->receiver_cpu, relay.core, memory_order_relaxed);
        atomic_store_explicit(&m->in->sender_cpu, relay.core, memory_order_relaxed);
}

void mirror_tell_finished(struct mirror *m, enum relay_state state)
{
        if (m->closed && !m->told_finished)
                answer_number(R_FINISHED, m->number, state);
        m->told_finished = m->told_finished || m->closed;
}

void mirror_tell_ended(struct mirror *m, enum relay_state state)
{
        if (!m->told_ended)
                answer_number(R_ENDED, m->number, state);
        m->told_ended = true;
}

void mirror_break(struct mirror *m)
{
        if (m->broken || m->state == MIRROR_DROPPING)
                return;
        m->broken = true;
        count(COUNT_BROKEN, 1);
        atomic_store_explicit(&m->out->broken, 1, memory_order_release);
        atomic_store_explicit(&m->in->broken, 1, memory_order_release);
        arena_wake(m->shared, &m->in->receivers, m->slot);
        arena_wake(m->shared, &m->out->senders, m->slot);
        become(m, MIRROR_BROKEN);
        if (m->moves)
                mirror_moves->interrupt(m);
        mirror_tell_ended(m, RELAY_BROKEN);
        mirror_tell_finished(m, RELAY_BROKEN);
        mirror_enqueue(m);
}

void mirror_corrupt(struct mirror *m)
{
        count(COUNT_CORRUPT, 1);
        mirror_break(m);
}

void mirror_suspend(struct mirror *m)
{
        m->resync = true;
        list_remove(&m->queued);
        if (m->moves)
                mirror_moves->suspend(m);
        mirror_try_release(m);
}

void mirror_resume(struct mirror *m)
{
        m->sent_flags = 0;
        m->end_sent = false;
        m->block_due = true;
        m->resync = true;
        m->expired = 0;
        mirror_set_lane(m, mirror_wants_lane(m));
        if (m->state == MIRROR_PAIRED)
                mirror_activate(m);
        if (mirror_has_work(m))
                mirror_enqueue(m);
}

/* --- from its first to its last request of the router --- */

static struct mirror *make(const struct relay_slot *slot, struct link *link, struct shared *shared)
{
        struct mirror *m = relay_memory(sizeof *m, "memory for a connection");

        m->number = slot->connection;
        m->slot = slot->slot;
        m->link = link;
        m->source = source_enter(link, shared->owner);
        m->shared = shared;
        m->size = shared->size_of_ring;
        m->cookie = relay_random();
        m->out = arena_ring(shared, slot->slot, 0);
        m->in = arena_ring(shared, slot->slot, 1);
        m->out_bulk = arena_bulk(shared, slot->slot, 0);
        m->in_bulk = arena_bulk(shared, slot->slot, 1);
        m->transport = link->named;
        m->group = (uint32_t)shared->id;
        m->queue_pair = slot->user != RELAY_CONNECTION;
        m->offers_moves = slot->user == RELAY_MOVING_QUEUE_PAIR && m->transport->move;
        list_init(&m->same);
        list_init(&m->of_link);
        list_init(&m->queued);
        list_init(&m->active);
        list_init(&m->lazy);
        list_init(&m->stopping);
        list_init(&m->dropping);
        return m;
}

struct mirror *mirror_add(const struct relay_slot *slot, struct link *link, struct shared *shared,
                          struct wire_place *place, int32_t *error, char *text)
{
        struct mirror *m = make(slot, link, shared);

        *place = (struct wire_place){
            .magic = WIRE_MAGIC,
            .version = WIRE_VERSION,
            .transport = (uint16_t)m->transport->kind,
            .size_of_ring = m->size,
            .features = m->offers_moves ? WIRE_MOVING : 0,
            .cookie = m->cookie,
        };
        for (uint32_t d = 0; d < SIDES; d++)
                if (atomic_load(&arena_ring(shared, slot->slot, d)->incarnation) != slot->incarnation)
                        *error = relay_refuse(text, ESTALE, "slot %u does not belong to this connection",
                                              slot->slot);
        if (!*error)
                *error = m->transport->register_rings(m, place, text);
        list_add(bucket_of(buckets, m->number), &m->same);
        list_add(&link->mirrors, &m->of_link);
        shared->mirrors[m->slot] = m;
        count(COUNT_CONNECTIONS, 1);
        return m;
}

int mirror_pair(struct mirror *m, uint32_t peer, const struct wire_place *place, char *text)
{
        int error;

        if (m->state != MIRROR_REGISTERED || !m->registration)
                return relay_refuse(text, EINVAL, "the connection cannot be paired any more");
        if (place->magic != WIRE_MAGIC || place->version != WIRE_VERSION ||
            place->transport != m->transport->kind)
                return relay_refuse(text, EPROTO, "the peer's relay has another version or transport");
        if (place->size_of_ring != m->size)
                return relay_refuse(text, EPROTO, "rings of %u bytes here and of %u bytes at the peer",
                                    m->size, place->size_of_ring);
        m->peer = peer;
        m->peer_cookie = place->cookie;
        error = m->transport->attach(m, place, text);
        if (error)
                return error;
        if (m->offers_moves && place->features & WIRE_MOVING)
                mirror_moves->start(m);
        become(m, MIRROR_PAIRED);
        mirror_set_lane(m, mirror_wants_lane(m));
        m->block_due = true;
        /* Nothing was sent yet: what the link has lost before does not concern it. */
        m->resync = false;
        mirror_activate(m);
        return 0;
}

bool mirror_is_registered(const struct mirror *m, const struct transport *transport)
{
        return (m->registration && m->transport == transport) || m->state == MIRROR_BROKEN ||
               m->state == MIRROR_DROPPING;
}

void mirrors_deregister(const struct transport *transport)
{
        for (int i = 0; i < BUCKETS; i++)
                EACH(node, &buckets[i]) {
                        struct mirror *m = OF(node, struct mirror, same);

                        if (m->registration && m->transport == transport)
                                transport->deregister(m);
                }
}

void mirror_drop(struct mirror *m, bool broken)
{
        if (m->state == MIRROR_DROPPING)
                return;
        if (broken && m->shared)
                mirror_break(m);
        become(m, MIRROR_DROPPING);
        mirror_enqueue(m);
        mirror_try_release(m);
}

void mirrors_abandon(struct shared *shared)
{
        for (uint32_t i = 0; i < SLOTS; i++) {
                struct mirror *m = shared->mirrors[i];

                if (!m)
                        continue;
                mirror_break(m);
                shared->mirrors[i] = NULL;
                m->shared = NULL;
        }
}

void farewell_forget(struct farewell *farewell)
{
        list_remove(&farewell->same);
        list_remove(&farewell->of_link);
        farewell->link->farewell_count--;
        free(farewell);
}

void mirror_confirm_farewell(struct link *link, uint32_t number, uint64_t cookie)
{
        EACH(node, bucket_of(farewells, number)) {
                struct farewell *farewell = OF(node, struct farewell, same);

                if (farewell->link == link && farewell->block.start == number &&
                    farewell->block.end == cookie) {
                        farewell_forget(farewell);
                        return;
                }
        }
}

/* The last block about a dropped connection. */
static struct wire_block last_block(const struct mirror *m)
{
        return (struct wire_block){
            .connection = m->peer,
            .flags = mirror_flags(m),
            .cookie = m->peer_cookie,
            .start = m->number,
            .end = m->cookie,
        };
}

static void bid_farewell(const struct mirror *m)
{
        struct link *link = m->link;
        struct farewell *farewell;

        if (!m->target || m->peer_gone || m->peer_dropped || link->farewell_count >= RELAY_LINK_CONNECTIONS)
                return;
        farewell = relay_memory(sizeof *farewell, "memory for a farewell");
        farewell->block = last_block(m);
        farewell->link = link;
        list_init(&farewell->of_link);
        list_init(&farewell->same);
        list_add(&link->farewells, &farewell->of_link);
        list_add(bucket_of(farewells, m->number), &farewell->same);
        link->farewell_count++;
}

static void release(struct mirror *m)
{
        uint32_t number = m->number;

        bid_farewell(m);
        if (m->moves)
                mirror_moves->end(m);
        if (m->registration)
                m->transport->deregister(m);
        if (m->target)
                m->transport->detach(m);
        list_remove(&m->same);
        list_remove(&m->of_link);
        list_remove(&m->queued);
        list_remove(&m->active);
        list_remove(&m->lazy);
        list_remove(&m->stopping);
        list_remove(&m->dropping);
        if (m->shared)
                m->shared->mirrors[m->slot] = NULL;
        source_leave(m->source);
        relay.counters[COUNT_CONNECTIONS]--;
        free(m);
        answer_number(R_DROPPED, number, 0);
}

bool mirror_is_read(const struct mirror *m)
{
        return m->link->lanes[m->lane].completed < m->last_batch;
}

void mirror_try_release(struct mirror *m)
{
        bool reachable = m->link->state == LINK_UP && m->target;

        if (m->state != MIRROR_DROPPING)
                return;
        if (!reachable || ((m->peer_gone || m->peer_dropped) && !mirror_is_read(m)))
                release(m);
}
