#include "datagram_peers.h"

#include "monotonic.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
        HINTS = 256,
        MILLISECOND = 1000000, /* in ns */
        /* In ms: */
        FOR_ROOM = 100,     /* how long a full ring is waited for, until half of it is taken */
        FOR_PEER = 1000,    /* how long one that the router does not know is */
        FOR_ROUTER = 10000, /* how long the router is */
        AFTER_NO = 10,      /* until a peer is asked for again: who refused it may not have heard of it yet */
        UNANSWERED = 1000,  /* nobody has said anything */
        NOBODY = 1000,      /* no one waits for it any more */
};

static void ring_nobody(struct datagram_peer *peer, struct waiters *waiters)
{
        (void)peer;
        (void)waiters;
}

static void seek_nobody(const union ibv_gid *from, const union ibv_gid *to, uint32_t number, uint32_t wanted,
                        uint32_t request)
{
        (void)from;
        (void)to;
        (void)number;
        (void)wanted;
        (void)request;
}

static void join_nobody(const struct queue_pair *queue, const union ibv_gid *group, bool on)
{
        (void)queue;
        (void)group;
        (void)on;
}

static uint32_t epoch_of_nobody(void)
{
        return 0;
}

static void end_nobody(struct datagram_peer *peer, uint32_t number)
{
        (void)peer;
        (void)number;
}

static const struct datagram_router nobody = {.seek = seek_nobody,
                                              .join = join_nobody,
                                              .epoch = epoch_of_nobody,
                                              .ring = ring_nobody,
                                              .end = end_nobody};

const struct datagram_router *datagram_router = &nobody;
struct datagram_peer *_Atomic datagram_peers[MOST_DATAGRAM_PEERS];
_Atomic uint32_t datagram_peer_count;

static struct mutex table;
static struct datagram_peer *hints[HINTS]; /* where a number was found last */
static struct datagram_peer *_Atomic own;
static _Atomic uint32_t requests;

uint32_t peer_request(void)
{
        uint32_t request = atomic_fetch_add_explicit(&requests, 1, memory_order_relaxed) + 1;

        return request ? request : peer_request();
}

/* --- the table, under its mutex */

static struct datagram_peer *peer_at(uint32_t place)
{
        return atomic_load_explicit(&datagram_peers[place], memory_order_relaxed);
}

static uint32_t peer_count(void)
{
        return atomic_load_explicit(&datagram_peer_count, memory_order_relaxed);
}

static void set_state(struct datagram_peer *peer, enum datagram_state state)
{
        atomic_store_explicit(&peer->state, state, memory_order_release);
}

static bool joins(const struct datagram_peer *peer, const union ibv_gid *from, const union ibv_gid *to)
{
        return memcmp(&peer->from, from, sizeof *from) == 0 && memcmp(&peer->to, to, sizeof *to) == 0;
}

static bool serves(const struct datagram_peer *peer, const struct datagram *datagram)
{
        return peer_state(peer) != PEER_FREE && datagram->to_number - peer->first < peer->count &&
               joins(peer, &datagram->from, &datagram->to) && !peer_is_over(peer);
}

/* Who has this queue pair? One that is UP, if there is one. */
static struct datagram_peer *find(const struct datagram *datagram)
{
        struct datagram_peer **hint = &hints[datagram->to_number % HINTS], *found = NULL;

        if (*hint && peer_state(*hint) == PEER_UP && serves(*hint, datagram))
                return *hint;
        for (uint32_t i = 0; i < peer_count(); i++) {
                struct datagram_peer *peer = peer_at(i);

                if (serves(peer, datagram) && (!found || peer_state(peer) == PEER_UP))
                        found = peer;
        }
        if (found)
                *hint = found;
        return found;
}

/* A place: an unused one, a new one, or that of somebody who was not found. */
static struct datagram_peer *find_place(void)
{
        struct datagram_peer *missed = NULL, *made;
        uint32_t count = peer_count();

        for (uint32_t i = 0; i < count; i++) {
                if (peer_state(peer_at(i)) == PEER_FREE)
                        return peer_at(i);
                if (peer_state(peer_at(i)) == PEER_NOBODY)
                        missed = peer_at(i);
        }
        if (count == MOST_DATAGRAM_PEERS || !(made = calloc(1, sizeof *made)))
                return missed;
        made->index = count;
        atomic_store_explicit(&datagram_peers[count], made, memory_order_release);
        atomic_store_explicit(&datagram_peer_count, count + 1, memory_order_release);
        return made;
}

/* What a place is for, from now on. */
static void describe(struct datagram_peer *peer, const union ibv_gid *from, const union ibv_gid *to,
                     uint32_t first, uint32_t count, enum datagram_state state)
{
        mutex_take(&peer->sending);
        peer->from = *from;
        peer->to = *to;
        peer->first = first;
        peer->count = count;
        set_state(peer, state);
        mutex_release(&peer->sending);
}

/* --- slots */

static void copy_place(struct place *to, const struct place *from)
{
        atomic_store(&to->arena, atomic_load(&from->arena));
        atomic_store(&to->side, atomic_load(&from->side));
        atomic_store(&to->slot, atomic_load(&from->slot));
        atomic_store(&to->incarnation, atomic_load(&from->incarnation));
}

/* Under all of its mutexes, or before anybody knows of it. */
static void start(struct datagram_peer *peer, struct view out, struct view in, int bell)
{
        record_send_from(&peer->sender, out);
        record_receive_from(&peer->receiver, in);
        peer->full_since = peer->waited = peer->waited_from = 0;
        atomic_store_explicit(&peer->bell, bell, memory_order_relaxed);
        atomic_store_explicit(&peer->seen, 0, memory_order_relaxed);
        atomic_store_explicit(&peer->relayed, view_remote(&in), memory_order_relaxed);
        atomic_store_explicit(&peer->crowded, false, memory_order_relaxed);
        atomic_store_explicit(&peer->out, out.ring, memory_order_release);
        atomic_store_explicit(&peer->in, in.ring, memory_order_release);
        /* Relays take nothing of the other side before that, and may sleep. */
        atomic_store_explicit(&in.ring->ready, 1, memory_order_release);
        datagram_router->ring(peer, &in.ring->senders);
        set_state(peer, PEER_UP);
}

/* Is it somebody who was asked for, and is found with the slot? */
static bool is_awaited(const struct datagram_peer *peer, const struct datagram_slot *slot)
{
        enum datagram_state state = peer_state(peer);

        return (state == PEER_ASKED || state == PEER_NOBODY) && peer->first - slot->first < slot->count &&
               joins(peer, &slot->from, &slot->to);
}

bool peer_may_come(const struct datagram_slot *slot, uint64_t most_unasked)
{
        bool asked = !slot->unasked;
        uint64_t unasked = 0;

        mutex_take(&table);
        for (uint32_t i = 0; i < peer_count() && !asked; i++) {
                unasked += peer_state(peer_at(i)) == PEER_UP && peer_at(i)->unasked;
                asked = is_awaited(peer_at(i), slot);
        }
        mutex_release(&table);
        return asked || unasked < most_unasked;
}

/* Whoever waits for a queue pair of the new peer's has found it. False: nobody does. */
static bool drop_waiting(const struct datagram_slot *slot)
{
        bool any = false;

        for (uint32_t i = 0; i < peer_count(); i++)
                if (is_awaited(peer_at(i), slot)) {
                        set_state(peer_at(i), PEER_FREE);
                        any = true;
                }
        return any;
}

struct datagram_peer *peer_up(const struct datagram_slot *slot)
{
        struct datagram_peer *peer;
        bool awaited;

        mutex_take(&table);
        awaited = drop_waiting(slot);
        peer = find_place();
        /* It is neither free nor up: nobody else touches it. */
        if (peer)
                describe(peer, &slot->from, &slot->to, slot->first, 0, PEER_ASKED);
        mutex_release(&table);
        if (!peer)
                return NULL;
        mutex_take(&peer->receiving);
        mutex_take(&table);
        mutex_take(&peer->sending);
        peer->count = slot->count;
        peer->number = slot->number;
        peer->epoch = slot->epoch;
        peer->unasked = slot->unasked && !awaited;
        peer->since = monotonic();
        peer->again = 0;
        copy_place(&peer->place, slot->place);
        start(peer, slot->out, slot->in, slot->bell);
        mutex_release(&peer->sending);
        mutex_release(&table);
        mutex_release(&peer->receiving);
        return peer;
}

void peer_refused(uint32_t request, bool later)
{
        uint64_t now = monotonic();

        mutex_take(&table);
        for (uint32_t i = 0; i < peer_count(); i++) {
                struct datagram_peer *peer = peer_at(i);

                if (peer_state(peer) != PEER_ASKED || !peer->count || !request || peer->request != request)
                        continue;
                peer->again = now + (uint64_t)AFTER_NO * MILLISECOND;
                if (!peer->refused)
                        peer->since = now;
                peer->refused = true;
                peer->request = 0;
                if (!later) {
                        set_state(peer, PEER_NOBODY);
                        peer->since = now;
                        peer->again = now + (uint64_t)NOBODY * MILLISECOND;
                }
        }
        mutex_release(&table);
}

static struct datagram_peer *find_slot(uint32_t number, uint32_t epoch)
{
        for (uint32_t i = 0; i < peer_count(); i++)
                if (peer_state(peer_at(i)) == PEER_UP && peer_at(i)->number == number &&
                    peer_at(i)->epoch == epoch)
                        return peer_at(i);
        return NULL;
}

struct datagram_peer *peer_with(uint32_t number, uint32_t epoch)
{
        struct datagram_peer *found;

        mutex_take(&table);
        found = find_slot(number, epoch);
        mutex_release(&table);
        return found;
}

struct datagram_peer *peer_before(const struct datagram_slot *slot)
{
        struct datagram_peer *found = NULL;

        mutex_take(&table);
        for (uint32_t i = 0; i < peer_count() && !found; i++) {
                struct datagram_peer *peer = peer_at(i);

                if (peer_state(peer) == PEER_UP && peer->first == slot->first &&
                    joins(peer, &slot->from, &slot->to))
                        found = peer;
        }
        mutex_release(&table);
        return found;
}

void peer_end(struct datagram_peer *peer, bool returned)
{
        uint64_t now = monotonic();

        mutex_take(&table);
        mutex_take(&peer->sending);
        atomic_store_explicit(&peer->in, NULL, memory_order_relaxed);
        atomic_store_explicit(&peer->out, NULL, memory_order_relaxed);
        peer->request = 0;
        peer->refused = false;
        peer->since = now;
        peer->again = now + (uint64_t)NOBODY * MILLISECOND;
        set_state(peer, returned ? PEER_NOBODY : PEER_FREE);
        mutex_release(&peer->sending);
        mutex_release(&table);
}

/* --- the process itself */

static struct datagram_peer *make_own(void)
{
        struct datagram_peer *made = calloc(1, sizeof *made);
        struct ring *ring;
        struct view view;

        if (!made)
                return NULL;
        ring = mmap(NULL, PAGE + RING_SIZE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (ring == MAP_FAILED) {
                free(made);
                return NULL;
        }
        view = view_of(ring, (unsigned char *)ring + PAGE, RING_SHIFT);
        start(made, view, view, -1);
        return made;
}

struct datagram_peer *peer_own(void)
{
        return atomic_load_explicit(&own, memory_order_acquire);
}

static struct datagram_peer *find_own(void)
{
        struct datagram_peer *found = peer_own();

        if (found)
                return found;
        mutex_take(&table);
        found = peer_own();
        if (!found && (found = make_own()))
                atomic_store_explicit(&own, found, memory_order_release);
        mutex_release(&table);
        return found;
}

void peers_forget(void)
{
        for (uint32_t i = 0; i < peer_count(); i++)
                atomic_store_explicit(&datagram_peers[i], NULL, memory_order_relaxed);
        atomic_store_explicit(&datagram_peer_count, 0, memory_order_relaxed);
        atomic_store_explicit(&own, NULL, memory_order_relaxed);
        memset(hints, 0, sizeof hints);
        table = (struct mutex){0};
}

/* --- sending, under `sending` */

/* Somebody who takes datagrams may be slow. */
static void check_taken(struct datagram_peer *peer)
{
        uint64_t head = atomic_load_explicit(&peer->sender.view.ring->head, memory_order_relaxed);

        if (head != peer->sender.tail && head - peer->waited_from < view_size(&peer->sender.view) / 2)
                return;
        peer->full_since = peer->waited = 0;
        peer->waited_from = head;
}

/* There is no room. */
static enum datagram_outcome wait_for_room(struct datagram_peer *peer)
{
        const uint64_t most = (uint64_t)FOR_ROOM * MILLISECOND;
        uint64_t now;

        if (peer->waited > most)
                return DATAGRAM_DONE;
        now = monotonic();
        if (peer->full_since)
                peer->waited += now - peer->full_since;
        peer->full_since = now;
        return peer->waited > most ? DATAGRAM_DONE : DATAGRAM_WAIT;
}

/* List the buffers of a record's payload. Returns its length. */
static uint32_t list_payload(const struct datagram_peer *peer, const struct datagram *datagram,
                             struct iovec *vec)
{
        uint32_t count = 0, gids, left = datagram->length;

        if (peer == peer_own())
                vec[count++] = (struct iovec){(void *)(uintptr_t)&datagram->from, sizeof datagram->from};
        if (count || datagram->to_number == DATAGRAM_GROUP)
                vec[count++] = (struct iovec){(void *)(uintptr_t)&datagram->to, sizeof datagram->to};
        gids = count;
        for (const struct iovec *part = datagram->message; left; part++) {
                vec[count++] = *part;
                left -= (uint32_t)part->iov_len;
        }
        return gids * (uint32_t)sizeof datagram->to + datagram->length;
}

/* From now on the bell rings when there is room. What has become free before is for the caller to
 * look for. */
static void await_room(struct datagram_peer *peer)
{
        struct waiters *senders = &peer->sender.view.ring->senders;
        int bell = atomic_load_explicit(&peer->bell, memory_order_relaxed);

        atomic_store_explicit(&peer->crowded, true, memory_order_relaxed);
        if (bell >= 0 && !wait_has_begun(senders, bell))
                wait_begin(senders, bell);
}

/* Has the process on the other host not got the slot yet? */
static bool is_starting(const struct datagram_peer *peer)
{
        return view_remote(&peer->sender.view) &&
               !atomic_load_explicit(&peer->sender.view.ring->ready, memory_order_acquire);
}

static enum datagram_outcome wait_for_start(const struct datagram_peer *peer)
{
        return monotonic() - peer->since > (uint64_t)FOR_PEER * MILLISECOND ? DATAGRAM_DONE : DATAGRAM_WAIT;
}

static enum datagram_outcome put(struct datagram_peer *peer, const struct datagram *datagram)
{
        struct ring *ring = peer->sender.view.ring;
        struct iovec vec[2 + DATAGRAM_PARTS];
        struct cursor cursor = {.vec = vec};
        struct record record = {.operation = RECORD_DATAGRAM,
                                .flags = datagram->flags,
                                .immediate = datagram->immediate,
                                .rkey = datagram->key,
                                .address = (uint64_t)datagram->from_number << 32 | datagram->to_number,
                                .length = list_payload(peer, datagram, vec)};
        enum record_outcome outcome;

        check_taken(peer);
        if (is_starting(peer))
                return wait_for_start(peer);
        outcome = record_put(&peer->sender, &record, &cursor);
        if (outcome == RECORD_WAIT && datagram->awaits) {
                await_room(peer);
                outcome = record_put(&peer->sender, &record, &cursor);
        }
        if (outcome == RECORD_WAIT)
                return wait_for_room(peer);
        peer->full_since = 0;
        if (record_publish(&peer->sender))
                datagram_router->ring(peer, &ring->receivers);
        return DATAGRAM_DONE;
}

/* Under the table's mutex, which it releases. */
static enum datagram_outcome put_or_lose(struct datagram_peer *peer, const struct datagram *datagram)
{
        enum datagram_outcome outcome = DATAGRAM_DONE;

        mutex_take(&peer->sending);
        mutex_release(&table);
        if (peer_state(peer) == PEER_UP)
                outcome = put(peer, datagram);
        mutex_release(&peer->sending);
        return outcome;
}

/* Under the table's mutex: go on looking for it. */
static enum datagram_outcome seek(struct datagram_peer *peer, bool *due)
{
        uint64_t now = monotonic();

        *due = now >= peer->again;
        if (*due) {
                peer->again = now + (uint64_t)UNANSWERED * MILLISECOND;
                /* An answer to what was asked before is as good. */
                if (!peer->request)
                        peer->request = peer_request();
        }
        if (peer_state(peer) == PEER_ASKED &&
            now - peer->since > (uint64_t)(peer->refused ? FOR_PEER : FOR_ROUTER) * MILLISECOND) {
                set_state(peer, PEER_NOBODY);
                peer->since = now;
        }
        if (*due && peer_state(peer) == PEER_NOBODY)
                peer->again = now + (uint64_t)NOBODY * MILLISECOND;
        return peer_state(peer) == PEER_ASKED ? DATAGRAM_WAIT : DATAGRAM_DONE;
}

/* Under the table's mutex: an earlier router has given its slot. The one that is there now can't
 * tell when it ends, unless it gives another one. */
static bool seek_anew(struct datagram_peer *peer)
{
        uint64_t now = monotonic();

        if (now < peer->again)
                return false;
        peer->again = now + (uint64_t)NOBODY * MILLISECOND;
        peer->request = peer_request();
        return true;
}

enum datagram_outcome peers_send(const struct datagram *datagram)
{
        enum datagram_outcome outcome;
        struct datagram_peer *peer;
        uint32_t request;
        bool due;

        mutex_take(&table);
        peer = find(datagram);
        if (peer && peer_state(peer) == PEER_UP) {
                due = peer->epoch != datagram_router->epoch() && seek_anew(peer);
                request = peer->request;
                outcome = put_or_lose(peer, datagram);
                if (due)
                        datagram_router->seek(&datagram->from, &datagram->to, datagram->from_number,
                                              datagram->to_number, request);
                return outcome;
        }
        if (!peer && (peer = find_place())) {
                describe(peer, &datagram->from, &datagram->to, datagram->to_number, 1, PEER_ASKED);
                peer->since = monotonic();
                peer->again = 0;
                peer->request = 0;
                peer->refused = false;
        }
        if (!peer) {
                mutex_release(&table);
                return DATAGRAM_DONE;
        }
        outcome = seek(peer, &due);
        request = peer->request;
        mutex_release(&table);
        if (due)
                datagram_router->seek(&datagram->from, &datagram->to, datagram->from_number,
                                      datagram->to_number, request);
        return outcome;
}

enum datagram_outcome peers_send_here(const struct datagram *datagram)
{
        struct datagram_peer *peer = find_own();
        enum datagram_outcome outcome;

        if (!peer)
                return DATAGRAM_DONE;
        mutex_take(&peer->sending);
        outcome = put(peer, datagram);
        mutex_release(&peer->sending);
        return outcome;
}

enum datagram_outcome peers_send_to(uint32_t number, uint32_t epoch, const struct datagram *datagram)
{
        struct datagram_peer *peer;

        mutex_take(&table);
        peer = find_slot(number, epoch);
        if (peer)
                return put_or_lose(peer, datagram);
        mutex_release(&table);
        return DATAGRAM_DONE;
}

bool peer_starts(uint32_t number, uint32_t epoch)
{
        struct datagram_peer *peer;
        bool starts = false;

        mutex_take(&table);
        peer = find_slot(number, epoch);
        if (peer) {
                mutex_take(&peer->sending);
                starts = is_starting(peer) && wait_for_start(peer) == DATAGRAM_WAIT;
                mutex_release(&peer->sending);
        }
        mutex_release(&table);
        return starts;
}
