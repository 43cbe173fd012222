#include "datagrams.h"

#include "groups.h"
#include "monotonic.h"
#include "numbers.h"
#include "requester.h"

#include <endian.h>
#include <time.h>

enum {
        BATCH = 64,
        BUCKETS = 64,
        LOOKS = 16,              /* of a poll, at peers that were heard lately, and as many at others */
        FOR_RECEIVE = 100000000, /* ns: how long a datagram waits for a receive */
        FOR_REST = 500000000,    /* ns: how long the end of a queue pair waits for what is not put */
        HOPS = 64,
        NEXT_HEADER = 0x1b, /* of a GRH: a transport header of InfiniBand */
        OTHER_HEADERS = 24, /* bytes of those, and of the check behind */
};

static const uint32_t own_key = 0x80000000; /* a bit: the Q_Key is the sender's own */

/* Queue pairs by their numbers. */
static struct bucket {
        struct mutex mutex;
        struct queue_pair *first;
} buckets[BUCKETS];

static _Atomic bool held;

/* Where a program that polls looks: 1 + the places of peers that were heard lately, and from where
 * on it looks at others. Hints: no word is written by two threads without losing some. */
static struct {
        _Atomic uint32_t lately[LOOKS];
        _Atomic uint32_t next;
} looks;

/* --- who takes datagrams */

static struct bucket *bucket_of(uint32_t number)
{
        return &buckets[number % BUCKETS];
}

void datagrams_join(struct queue_pair *queue)
{
        struct bucket *bucket = bucket_of(queue->plain.qp_base.qp_num);

        mutex_take(&bucket->mutex);
        queue->neighbour = bucket->first;
        bucket->first = queue;
        mutex_release(&bucket->mutex);
}

void datagrams_leave(struct queue_pair *queue)
{
        struct bucket *bucket = bucket_of(queue->plain.qp_base.qp_num);
        struct queue_pair **at = &bucket->first;

        group_leave(queue, NULL);
        mutex_take(&bucket->mutex);
        while (*at && *at != queue)
                at = &(*at)->neighbour;
        if (*at)
                *at = queue->neighbour;
        mutex_release(&bucket->mutex);
}

/* --- taking */

/* A datagram that has come. */
struct arrival {
        struct record_receiver *receiver;
        union ibv_gid from, to;
        uint32_t prefix; /* bytes of GIDs in front of the message */
        uint32_t length; /* of the message */
        const struct cq *polled;
};

static struct ibv_grh header_of(const struct arrival *arrival)
{
        return (struct ibv_grh){.version_tclass_flow = htobe32(UINT32_C(6) << 28),
                                .paylen = htobe16((uint16_t)(arrival->length + OTHER_HEADERS)),
                                .next_hdr = NEXT_HEADER,
                                .hop_limit = HOPS,
                                .sgid = arrival->from,
                                .dgid = arrival->to};
}

/* The queue pair has no receive. False: the datagram is lost. */
static bool may_wait(struct queue_pair *queue)
{
        uint64_t now;

        if (queue->dry)
                return false;
        now = monotonic();
        if (!queue->dry_since)
                queue->dry_since = now;
        queue->dry = now - queue->dry_since > FOR_RECEIVE;
        return !queue->dry;
}

/* Into the receive that is taken. */
static void fill_receive(struct queue_pair *queue, const struct arrival *arrival)
{
        const struct record *record = &arrival->receiver->now;
        struct ibv_grh header = header_of(arrival);
        struct ibv_wc wc = {.opcode = IBV_WC_RECV,
                            .byte_len = (uint32_t)sizeof header + arrival->length,
                            .src_qp = (uint32_t)(record->address >> 32),
                            .wc_flags = IBV_WC_GRH};
        struct work_memory memory = {.pieces = queue->now.pieces,
                                     .count = queue->now.count,
                                     .domain = queue->domain,
                                     .access = KEY_LOCAL_WRITE};
        struct work_spot spot = {0};
        struct work_held hold;
        struct cursor cursor = {.vec = hold.vec};

        if (record->flags & RECORD_IMMEDIATE) {
                wc.wc_flags |= IBV_WC_WITH_IMM;
                wc.imm_data = record->immediate;
        }
        if (work_hold(&memory, &spot, wc.byte_len, &hold)) {
                cursor_copy(&cursor, (unsigned char *)&header, sizeof header, false);
                arrival->receiver->taken = arrival->prefix;
                record_take(arrival->receiver, &cursor, arrival->length);
                work_let_go(&hold);
        } else {
                wc.status = IBV_WC_LOC_PROT_ERR;
                atomic_store_explicit(&queue->failed, true, memory_order_release);
        }
        queue->busy = false;
        queue_complete_receive(queue, &wc, record->flags & RECORD_SOLICITED, arrival->polled);
}

/* Give it to a queue pair. False: it waits for a receive there. */
static bool deliver(struct queue_pair *queue, const struct arrival *arrival)
{
        bool taken = true;

        mutex_take(&queue->receiving);
        if (queue_executes(queue) && !atomic_load_explicit(&queue->failed, memory_order_relaxed) &&
            queue->attributes.qkey == arrival->receiver->now.rkey) {
                if (!queue->busy && !queue_find_receive(queue)) {
                        taken = !may_wait(queue);
                } else {
                        queue->dry = false;
                        queue->dry_since = 0;
                        queue->busy = true;
                        /* A receive that is too small is for the next one. */
                        if (queue->now.room >= sizeof(struct ibv_grh) + arrival->length)
                                fill_receive(queue, arrival);
                }
        }
        mutex_release(&queue->receiving);
        return taken;
}

static bool deliver_to(uint32_t number, const struct arrival *arrival)
{
        struct bucket *bucket = bucket_of(number);
        struct queue_pair *queue;
        bool taken;

        mutex_take(&bucket->mutex);
        for (queue = bucket->first; queue && queue->plain.qp_base.qp_num != number;)
                queue = queue->neighbour;
        taken = !queue || deliver(queue, arrival);
        mutex_release(&bucket->mutex);
        return taken;
}

/* To one of a group, for which nothing waits: the others would get it twice. */
static void deliver_to_member(struct queue_pair *queue, const void *arrival)
{
        deliver(queue, arrival);
}

static void take_gid(struct record_receiver *receiver, union ibv_gid *gid)
{
        struct iovec vec = {.iov_base = gid, .iov_len = sizeof *gid};
        struct cursor cursor = {.vec = &vec};

        record_take(receiver, &cursor, sizeof *gid);
}

/* The record's GIDs and bounds. False: it isn't one that its sender may send, and is lost. */
static bool examine(const struct datagram_peer *peer, struct arrival *arrival)
{
        struct record_receiver *receiver = arrival->receiver;
        const struct record *record = &receiver->now;
        bool here = peer == peer_own(), to_group = (uint32_t)record->address == DATAGRAM_GROUP;

        arrival->prefix = (here + (here || to_group)) * (uint32_t)sizeof(union ibv_gid);
        if (record->length < arrival->prefix || record->length - arrival->prefix > DATAGRAM_MESSAGE ||
            (!here && (uint32_t)(record->address >> 32) - peer->first >= peer->count))
                return false;
        arrival->length = record->length - arrival->prefix;
        arrival->from = peer->to;
        arrival->to = peer->from;
        receiver->taken = 0;
        if (here)
                take_gid(receiver, &arrival->from);
        if (here || to_group)
                take_gid(receiver, &arrival->to);
        return true;
}

/* Take the next one. WAIT: there is none, or it waits. */
static enum record_outcome take_next(struct datagram_peer *peer, const struct cq *polled)
{
        struct record_receiver *receiver = &peer->receiver;
        struct arrival arrival = {.receiver = receiver, .polled = polled};
        enum record_outcome outcome = record_next(receiver);

        if (outcome != RECORD_OK)
                return outcome;
        if (receiver->now.operation != RECORD_DATAGRAM)
                return RECORD_CORRUPT;
        if (examine(peer, &arrival)) {
                uint32_t number = (uint32_t)receiver->now.address;

                if (number == DATAGRAM_GROUP)
                        group_each(&arrival.to, deliver_to_member, &arrival);
                else if (!deliver_to(number, &arrival)) {
                        atomic_store_explicit(&held, true, memory_order_relaxed);
                        return RECORD_WAIT;
                }
        }
        record_done(receiver);
        return RECORD_OK;
}

/* Under the peer's `receiving`. One that breaks the rules is not listened to any more. */
static bool take_some(struct datagram_peer *peer, const struct cq *polled)
{
        struct record_receiver *receiver = &peer->receiver;
        enum record_outcome outcome = RECORD_OK;
        uint64_t from = receiver->head;

        if (!atomic_load_explicit(&peer->in, memory_order_relaxed))
                return false;
        for (int taken = 0; taken < BATCH && outcome == RECORD_OK; taken++)
                outcome = take_next(peer, polled);
        if (outcome == RECORD_CORRUPT)
                atomic_store_explicit(&peer->in, NULL, memory_order_relaxed);
        atomic_store_explicit(&peer->seen, receiver->head, memory_order_relaxed);
        if (receiver->head == from)
                return false;
        datagram_router->ring(peer, &receiver->view.ring->senders);
        return true;
}

static bool has_come(const struct datagram_peer *peer)
{
        struct ring *in = atomic_load_explicit(&peer->in, memory_order_acquire);

        return in && atomic_load_explicit(&in->tail, memory_order_relaxed) !=
                         atomic_load_explicit(&peer->seen, memory_order_relaxed);
}

static bool take_from(struct datagram_peer *peer, const struct cq *polled, bool wait)
{
        bool did;

        if (!has_come(peer))
                return false;
        if (wait)
                mutex_take(&peer->receiving);
        else if (!mutex_try(&peer->receiving))
                return false;
        did = take_some(peer, polled);
        mutex_release(&peer->receiving);
        return did;
}

static struct datagram_peer *peer_at(uint32_t place)
{
        return atomic_load_explicit(&datagram_peers[place], memory_order_acquire);
}

static bool look_at(uint32_t place, const struct cq *polled)
{
        if (!take_from(peer_at(place), polled, false))
                return false;
        atomic_store_explicit(&looks.lately[place % LOOKS], place + 1, memory_order_relaxed);
        return true;
}

/* There are so many peers, more than are looked at. */
static bool look_at_some(uint32_t count, const struct cq *polled)
{
        uint32_t place = atomic_load_explicit(&looks.next, memory_order_relaxed);
        bool did = false;

        for (int i = 0; i < LOOKS; i++) {
                uint32_t heard = atomic_load_explicit(&looks.lately[i], memory_order_relaxed);

                if (heard)
                        did |= look_at(heard - 1, polled);
        }
        for (int i = 0; i < LOOKS; i++) {
                place = place < count ? place : 0;
                did |= look_at(place++, polled);
        }
        atomic_store_explicit(&looks.next, place, memory_order_relaxed);
        return did;
}

bool datagrams_take(const struct cq *polled, bool wait)
{
        uint32_t count = atomic_load_explicit(&datagram_peer_count, memory_order_acquire);
        bool did;

        if (datagrams_are_held())
                atomic_store_explicit(&held, false, memory_order_relaxed);
        did = peer_own() && take_from(peer_own(), polled, wait);
        if (!wait && count > LOOKS)
                return look_at_some(count, polled) || did;
        for (uint32_t i = 0; i < count; i++)
                did |= take_from(peer_at(i), polled, wait);
        return did;
}

bool datagrams_take_from(struct datagram_peer *peer)
{
        return take_from(peer, NULL, true);
}

void datagrams_take_own(void)
{
        struct datagram_peer *own = peer_own();

        while (own && take_from(own, NULL, true))
                ;
}

bool datagrams_are_held(void)
{
        return atomic_load_explicit(&held, memory_order_relaxed);
}

bool datagrams_end(struct datagram_peer *peer, uint32_t number, bool returned, struct place *place)
{
        bool ends;

        mutex_take(&peer->receiving);
        ends = peer_state(peer) == PEER_UP && peer->number == number;
        if (ends) {
                /* Not more than the ring holds: the other side may go on putting some. */
                for (uint32_t i = 0; i < RING_SIZE / sizeof(struct record) / BATCH && take_some(peer, NULL);
                     i++)
                        ;
                *place = peer->place;
                peer_end(peer, returned || peer_is_unused(peer));
        }
        mutex_release(&peer->receiving);
        return ends;
}

void datagrams_check_one(struct datagram_peer *peer)
{
        uint32_t number = 0;

        if (!peer_is_over(peer))
                return;
        /* Its place may be another one's meanwhile. */
        mutex_take(&peer->receiving);
        if (peer_is_over(peer))
                number = peer->number;
        mutex_release(&peer->receiving);
        if (number)
                datagram_router->end(peer, number);
}

void datagrams_check(void)
{
        uint32_t count = atomic_load_explicit(&datagram_peer_count, memory_order_acquire);

        for (uint32_t i = 0; i < count; i++)
                datagrams_check_one(peer_at(i));
}

/* --- sending */

/* Is it of this process? Its numbers are given to nobody else with these addresses. */
static bool is_here(const union ibv_gid *to, uint32_t number)
{
        uint32_t index;

        return number - port_first_number() < NUMBERS && port_find(to, &index);
}

static enum datagram_outcome send_message(struct queue_pair *queue, const struct send_work *work,
                                          const struct work_held *hold, bool awaits)
{
        const struct datagram datagram = {
            .from = work->from,
            .to = work->to,
            .from_number = queue->plain.qp_base.qp_num,
            .to_number = work->number,
            .key = work->rkey & own_key ? queue->attributes.qkey : work->rkey,
            .immediate = work->immediate,
            .flags = (uint8_t)((work->opcode == IBV_WR_SEND_WITH_IMM ? RECORD_IMMEDIATE : 0) |
                               (work->flags & IBV_SEND_SOLICITED ? RECORD_SOLICITED : 0)),
            .awaits = awaits,
            .message = hold->vec,
            .length = work->total};

        if (work->number == DATAGRAM_GROUP)
                return is_group(&work->to) ? group_send(&datagram) : DATAGRAM_DONE;
        return is_here(&work->to, work->number) ? peers_send_here(&datagram) : peers_send(&datagram);
}

/* What is longer than the MTU is lost without an error (InfiniBand architecture specification,
 * volume 1, C10-93.1.1). */
static enum datagram_outcome send_next(struct queue_pair *queue, struct send_work *work, bool awaits)
{
        struct work_memory memory = send_memory(&queue->sends, work, queue->domain);
        enum datagram_outcome outcome = DATAGRAM_DONE;
        struct work_spot spot = {0};
        struct work_held hold;

        if (work->total > DATAGRAM_MESSAGE)
                return DATAGRAM_DONE;
        if (!work_hold(&memory, &spot, work->total, &hold)) {
                work->status = IBV_WC_LOC_PROT_ERR;
                return DATAGRAM_DONE;
        }
        outcome = send_message(queue, work, &hold, awaits);
        work_let_go(&hold);
        return outcome;
}

void datagrams_push(struct queue_pair *queue, bool awaits)
{
        struct send_queue *sends = &queue->sends;

        while (sends->next != sends->tail && queue_state(queue) == IBV_QPS_RTS &&
               !atomic_load_explicit(&queue->failed, memory_order_relaxed)) {
                struct send_work *work = send_at(sends, sends->next);

                if (work->status || send_next(queue, work, awaits) == DATAGRAM_WAIT)
                        break;
                work->whole = true;
                if (!work->status)
                        sends->next++;
        }
}

void datagrams_make(struct queue_pair *queue, const struct cq *polled, bool wait)
{
        if (atomic_load_explicit(&queue->open, memory_order_relaxed)) {
                if (wait)
                        mutex_take(&queue->sending);
                if (wait || mutex_try(&queue->sending)) {
                        datagrams_push(queue, wait);
                        requester_complete(queue, polled);
                        mutex_release(&queue->sending);
                }
                if (peer_own())
                        take_from(peer_own(), polled, wait);
        }
        queue_settle(queue, polled);
}

/* --- sleeping */

static bool has_more(struct queue_pair *queue)
{
        bool more;

        mutex_take(&queue->sending);
        more = queue->sends.next != queue->sends.tail && queue_state(queue) == IBV_QPS_RTS &&
               !atomic_load_explicit(&queue->failed, memory_order_relaxed);
        mutex_release(&queue->sending);
        return more;
}

void datagrams_finish(struct queue_pair *queue)
{
        const struct timespec pause = {.tv_nsec = 100000};
        uint64_t until = monotonic() + FOR_REST;

        while (has_more(queue) && monotonic() < until) {
                sys_2(SYS_nanosleep, &pause, 0);
                datagrams_make(queue, NULL, true);
        }
}

bool datagrams_arm_one(struct datagram_peer *peer)
{
        struct ring *in = atomic_load_explicit(&peer->in, memory_order_acquire);
        int bell = atomic_load_explicit(&peer->bell, memory_order_acquire);

        if (in && bell >= 0 && !wait_has_begun(&in->receivers, bell))
                wait_begin(&in->receivers, bell);
        return !in || bell >= 0;
}

void datagrams_disarm_one(struct datagram_peer *peer)
{
        struct ring *in = atomic_load_explicit(&peer->in, memory_order_acquire);
        int bell = atomic_load_explicit(&peer->bell, memory_order_acquire);

        if (in && bell >= 0 && wait_has_begun(&in->receivers, bell))
                wait_end(&in->receivers, bell);
}

bool datagrams_arm(void)
{
        uint32_t count = atomic_load_explicit(&datagram_peer_count, memory_order_acquire);
        bool all = true;

        for (uint32_t i = 0; i < count; i++)
                all &= datagrams_arm_one(peer_at(i));
        return all;
}

static bool meets(struct datagram_peer *peer, uint32_t core)
{
        struct ring *in = atomic_load_explicit(&peer->in, memory_order_acquire);
        struct ring *out = atomic_load_explicit(&peer->out, memory_order_acquire);

        if (!in || !out)
                return false;
        if (atomic_load_explicit(&peer->relayed, memory_order_relaxed))
                return true;
        if (atomic_load_explicit(&in->receiver_cpu, memory_order_relaxed) != core)
                atomic_store_explicit(&in->receiver_cpu, core, memory_order_relaxed);
        return atomic_load_explicit(&out->receiver_cpu, memory_order_relaxed) == core;
}

/* With more peers than that, of those that were heard lately. */
bool datagrams_meet(uint32_t core)
{
        uint32_t count = atomic_load_explicit(&datagram_peer_count, memory_order_acquire);
        bool met = false;

        for (uint32_t i = 0; i < LOOKS; i++) {
                uint32_t place =
                    count > LOOKS ? atomic_load_explicit(&looks.lately[i], memory_order_relaxed) - 1 : i;

                if (place < count)
                        met |= meets(peer_at(place), core);
        }
        return met;
}

void datagrams_set_bell(uint32_t arena, int bell)
{
        uint32_t count = atomic_load_explicit(&datagram_peer_count, memory_order_acquire);

        for (uint32_t i = 0; i < count; i++) {
                struct datagram_peer *peer = peer_at(i);

                if (peer_state(peer) == PEER_UP &&
                    atomic_load_explicit(&peer->place.arena, memory_order_relaxed) == arena)
                        atomic_store_explicit(&peer->bell, bell, memory_order_release);
        }
}

void datagrams_forget(void)
{
        peers_forget();
        for (int i = 0; i < LOOKS; i++)
                atomic_store_explicit(&looks.lately[i], 0, memory_order_relaxed);
        for (int i = 0; i < BUCKETS; i++)
                buckets[i] = (struct bucket){0};
        groups_forget();
}
