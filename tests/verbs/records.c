/* Records between two sides: `record.h` without queue pairs, sockets and bells.
 *
 *      records rules
 *      records stress|relayed threads|processes SECONDS SEED
 *      records hostile SECONDS SEED
 *
 * rules: each field of each operation, the sizes of pieces, room, and records around a ring's end.
 *
 * stress: both sides send and write messages in pieces, read, swap and add as much as the rules
 * allow, and answer; each byte is compared, no answer lacks room, and neither side stops. relayed:
 * the same in two arenas, whose bytes a third party carries in parts, and reports late what was
 * taken.
 *
 * hostile: the other side writes anything into the ring at any time. What is taken is valid all the
 * same, and nothing outside the ring is used (the pages around it are inaccessible).
 */
#include "../../dataplane/verbs/record.c"
#include "../dataplane/check.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 64, LEAST_SHIFT = 16, LEAST = 1000, PATIENCE = 60 };

static time_t end;

static unsigned char byte_at(uint64_t place)
{
        return (unsigned char)((place * UINT64_C(0x9e3779b97f4a7c15)) >> 53);
}

/* Memory between two inaccessible pages. */
static unsigned char *fenced(size_t size)
{
        unsigned char *place = mmap(NULL, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(place != MAP_FAILED);
        CHECK(mmap(place + PAGE, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1,
                   0) != MAP_FAILED);
        return place + PAGE;
}

static struct view new_ring(uint32_t shift)
{
        return view_of((struct ring *)(void *)fenced(PAGE), fenced((size_t)1 << shift), shift);
}

/* A size that is often near one of the limits. */
static uint32_t some_length(uint64_t *random, uint32_t most)
{
        switch (any(random, 6)) {
        case 0:
                return (uint32_t)any(random, (uint64_t)most + 1);
        case 1:
                return most;
        case 2:
                return (uint32_t)any(random, 2 * SMALL_SIZE) % (most + 1);
        default:
                return (uint32_t)any(random, 65) % (most + 1);
        }
}

/* --- rules */

static const struct record examples[] = {
    {.operation = RECORD_SEND, .flags = RECORD_FIRST | RECORD_LAST, .length = 5, .total = 5},
    {.operation = RECORD_SEND, .flags = RECORD_FIRST | RECORD_LAST | RECORD_SOLICITED},
    {.operation = RECORD_SEND, .flags = RECORD_FIRST, .length = 5, .total = 9},
    {.operation = RECORD_SEND,
     .flags = RECORD_LAST | RECORD_INVALIDATE,
     .length = 4,
     .total = 9,
     .immediate = 7},
    {.operation = RECORD_WRITE, .flags = 0, .length = 5, .total = 19, .rkey = 3, .address = 5},
    {.operation = RECORD_WRITE,
     .flags = RECORD_FIRST | RECORD_LAST | RECORD_IMMEDIATE,
     .length = 8,
     .total = 8,
     .immediate = 9,
     .rkey = 3,
     .address = 64},
    {.operation = RECORD_READ, .total = 77, .rkey = 3, .address = 64},
    {.operation = RECORD_READ},
    {.operation = RECORD_SWAP, .length = 16, .total = 8, .rkey = 3, .address = 64},
    {.operation = RECORD_ADD, .length = 8, .total = 8, .rkey = 3, .address = 64},
    {.operation = RECORD_DATAGRAM, .length = 4096, .rkey = 17, .address = 1},
    {.operation = RECORD_RESPONSE, .length = 77, .psn = 5},
    {.operation = RECORD_DONE, .psn = 5},
    {.operation = RECORD_REFUSED, .psn = 5, .immediate = REFUSED_ACCESS},
    {.operation = RECORD_CREDIT, .total = 1000, .immediate = RECORD_TIMES - 1},
    {.operation = RECORD_CLOSE},
    {.operation = RECORD_ASK, .rkey = 3},
    {.operation = RECORD_DIRECT, .rkey = 3, .length = sizeof(struct record_direct)},
};

/* What no record may be: each with the example that one change makes invalid. */
static void check_changes(void)
{
        enum {
                SEND,
                SEND_EMPTY,
                SEND_FIRST,
                SEND_LAST,
                WRITE_PART,
                WRITE,
                READ,
                READ_0,
                SWAP,
                ADD,
                DATAGRAM,
                RESPONSE,
                DONE,
                REFUSED,
                CREDIT,
                CLOSE,
                ASK,
                DIRECT
        };
        struct record r;

#define REJECTS(example, change)                                                                             \
        do {                                                                                                 \
                r = examples[example];                                                                       \
                r.change;                                                                                    \
                CHECK(!record_is_valid(&r, RECORD_PIECE));                                                   \
        } while (0)

        for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
                CHECK(record_is_valid(&examples[i], RECORD_PIECE));
                REJECTS(i, zero = 1);
                REJECTS(i, operation = 0);
                REJECTS(i, operation = RECORD_OPERATIONS);
                REJECTS(i, operation = 255);
                REJECTS(i, flags |= 32);
                REJECTS(i, length = RECORD_PIECE + 1);
                REJECTS(i, length = UINT32_MAX);
                if (i >= READ && i != READ_0)
                        REJECTS(i, flags |= RECORD_FIRST);
        }
        REJECTS(SEND, total = 6);
        REJECTS(SEND, total = 0);
        REJECTS(SEND, immediate = 1);
        REJECTS(SEND, rkey = 1);
        REJECTS(SEND, address = 1);
        REJECTS(SEND, flags |= RECORD_IMMEDIATE | RECORD_INVALIDATE);
        REJECTS(SEND, flags = 0);
        REJECTS(SEND_FIRST, length = 9);
        REJECTS(SEND_FIRST, length = 0);
        REJECTS(SEND_FIRST, flags |= RECORD_SOLICITED);
        REJECTS(SEND_FIRST, total = RECORD_MESSAGE + 1);
        REJECTS(SEND_LAST, length = 10);
        REJECTS(SEND_LAST, length = 0);
        REJECTS(WRITE_PART, flags |= RECORD_IMMEDIATE);
        REJECTS(WRITE, flags |= RECORD_INVALIDATE);
        REJECTS(READ, length = 1);
        REJECTS(READ, total = RECORD_PIECE + 1);
        REJECTS(READ, immediate = 1);
        REJECTS(SWAP, length = 8);
        REJECTS(SWAP, total = 16);
        REJECTS(ADD, length = 16);
        REJECTS(ADD, total = 0);
        REJECTS(DATAGRAM, length = RECORD_DATAGRAM_BYTES + 1);
        REJECTS(DATAGRAM, total = 4096);
        REJECTS(DATAGRAM, immediate = 1);
        REJECTS(RESPONSE, rkey = 1);
        REJECTS(RESPONSE, address = 1);
        REJECTS(RESPONSE, total = 77);
        REJECTS(DONE, length = 1);
        REJECTS(DONE, immediate = 1);
        REJECTS(REFUSED, immediate = 0);
        REJECTS(REFUSED, immediate = REFUSALS);
        REJECTS(CREDIT, psn = 1);
        REJECTS(CREDIT, length = 1);
        REJECTS(CREDIT, immediate = RECORD_TIMES);
        REJECTS(CLOSE, psn = 1);
        REJECTS(CLOSE, total = 1);
        REJECTS(ASK, length = 1);
        REJECTS(ASK, psn = 1);
        REJECTS(ASK, address = 1);
        REJECTS(DIRECT, length = sizeof(struct record_direct) - 8);
        REJECTS(DIRECT, length = sizeof(struct record_direct) + 8);
        REJECTS(DIRECT, address = 1);
}

/* Put a record whose payload is `length` bytes of byte_at(place). */
static enum record_outcome put(struct record_sender *sender, struct record record, uint64_t place)
{
        static _Thread_local unsigned char bytes[RECORD_PIECE];
        struct iovec vec = {.iov_base = bytes, .iov_len = record.length};
        struct cursor cursor = {.vec = &vec};

        for (uint32_t i = 0; i < record.length; i++)
                bytes[i] = byte_at(place + i);
        return record_put(sender, &record, &cursor);
}

/* Take the payload in parts, into buffers of odd sizes, and compare it. */
static void take(struct record_receiver *receiver, uint64_t place, uint64_t *random)
{
        static _Thread_local unsigned char bytes[RECORD_PIECE];
        uint32_t length = receiver->now.length, half = (uint32_t)any(random, (uint64_t)length + 1);
        struct iovec vec[2] = {{.iov_base = bytes, .iov_len = half},
                               {.iov_base = bytes + half, .iov_len = length - half}};
        struct cursor cursor = {.vec = vec};
        uint32_t first = (uint32_t)any(random, (uint64_t)length + 1);

        record_take(receiver, &cursor, first);
        record_take(receiver, &cursor, length - first);
        for (uint32_t i = 0; i < length; i++)
                if (bytes[i] != byte_at(place + i))
                        FAIL("a byte is wrong");
}

/* Which sequences of requests are accepted. */
static void check_order(void)
{
        static const struct {
                uint8_t operations[4], flags[4];
                uint32_t lengths[4];
                int accepted;
        } cases[] = {
            {{RECORD_SEND, RECORD_SEND, RECORD_SEND}, {RECORD_FIRST, 0, RECORD_LAST}, {10, 20, 70}, 3},
            {{RECORD_SEND, RECORD_CREDIT, RECORD_SEND}, {RECORD_FIRST, 0, RECORD_LAST}, {30, 0, 70}, 3},
            {{RECORD_SEND, RECORD_READ}, {RECORD_FIRST}, {30}, 1},
            {{RECORD_SEND, RECORD_SEND}, {RECORD_FIRST, RECORD_FIRST}, {30, 30}, 1},
            {{RECORD_SEND, RECORD_WRITE}, {RECORD_FIRST, RECORD_LAST}, {30, 70}, 1},
            {{RECORD_SEND, RECORD_SEND}, {RECORD_FIRST, RECORD_LAST}, {30, 69}, 1},
            {{RECORD_SEND, RECORD_SEND}, {RECORD_FIRST, 0}, {30, 70}, 1},
            {{RECORD_SEND, RECORD_SEND}, {RECORD_FIRST, 0}, {30, 71}, 1},
            {{RECORD_SEND}, {0}, {30}, 0},
            {{RECORD_SEND}, {RECORD_LAST}, {30}, 0},
        };
        uint64_t random = 1;

        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
                struct view view = new_ring(LEAST_SHIFT);
                struct record_sender sender;
                struct record_receiver receiver;
                int accepted = 0;

                record_send_from(&sender, view);
                record_receive_from(&receiver, view);
                for (int j = 0; j < 4 && cases[i].operations[j]; j++) {
                        bool piece = cases[i].operations[j] <= RECORD_WRITE;

                        CHECK(put(&sender,
                                  (struct record){.operation = cases[i].operations[j],
                                                  .flags = cases[i].flags[j],
                                                  .length = cases[i].lengths[j],
                                                  .total = piece ? 100 : 0},
                                  0) == RECORD_OK);
                        CHECK(record_publish(&sender) && !record_publish(&sender));
                        if (record_next(&receiver) != RECORD_OK)
                                break;
                        take(&receiver, 0, &random);
                        record_done(&receiver);
                        accepted++;
                }
                CHECK(accepted == cases[i].accepted);
        }
}

/* What a second piece, or a second request, may not change. */
static void check_continuation(void)
{
        const struct record piece = {.operation = RECORD_WRITE,
                                     .flags = RECORD_FIRST,
                                     .length = 40,
                                     .total = 100,
                                     .rkey = 3,
                                     .address = 1000};
        uint64_t random = 1;

        for (int change = 0; change < 5; change++) {
                struct view view = new_ring(LEAST_SHIFT);
                struct record_sender sender;
                struct record_receiver receiver;
                struct record second = piece;

                record_send_from(&sender, view);
                record_receive_from(&receiver, view);
                CHECK(put(&sender, piece, 0) == RECORD_OK);
                second.flags = RECORD_LAST;
                second.length = 60;
                second.address = change == 1 ? 1000 : 1040;
                second.rkey = change == 2 ? 4 : 3;
                second.total = change == 3 ? 101 : 100;
                sender.psn += change == 4;
                CHECK(put(&sender, second, 40) == RECORD_OK);
                record_publish(&sender);
                CHECK(record_next(&receiver) == RECORD_OK);
                take(&receiver, 0, &random);
                record_done(&receiver);
                CHECK(record_next(&receiver) == (change ? RECORD_CORRUPT : RECORD_OK));
        }
}

/* A ring that is never empty: records lie around its end in all ways. */
static void check_end(uint32_t shift)
{
        struct view view = new_ring(shift);
        struct record_sender sender;
        struct record_receiver receiver;
        uint64_t random = shift, sent = 0, got = 0;
        uint32_t lengths[2] = {0};

        record_send_from(&sender, view);
        record_receive_from(&receiver, view);
        for (int i = 0; sender.tail < view_size(&view) * 20; i++) {
                uint32_t length = some_length(&random, record_piece(&view));

                lengths[i % 2] = length;
                CHECK(put(&sender,
                          (struct record){.operation = RECORD_SEND,
                                          .flags = RECORD_FIRST | RECORD_LAST,
                                          .length = length,
                                          .total = length},
                          sent) == RECORD_OK);
                CHECK(record_publish(&sender));
                sent += length;
                if (!i)
                        continue;
                CHECK(record_next(&receiver) == RECORD_OK);
                CHECK(receiver.now.length == lengths[1 - i % 2]);
                take(&receiver, got, &random);
                got += receiver.now.length;
                record_done(&receiver);
        }
        CHECK(sender.base == 0);
}

/* Room, publishing and what was taken, in each size of ring. */
static void check_room(uint32_t shift)
{
        struct view view = new_ring(shift);
        struct record_sender sender;
        struct record_receiver receiver;
        uint32_t piece = record_piece(&view), count = 0;
        uint64_t size = view_size(&view), random = shift, first;
        struct record write = {.operation = RECORD_WRITE,
                               .flags = RECORD_FIRST | RECORD_LAST,
                               .length = piece,
                               .total = piece,
                               .rkey = 1};
        struct record answer = {.operation = RECORD_RESPONSE, .length = piece};

        CHECK(piece == (size / 4 - 32 < RECORD_PIECE ? size / 4 - 32 : RECORD_PIECE) && piece % 8 == 0);
        record_send_from(&sender, view);
        record_receive_from(&receiver, view);
        CHECK(atomic_load(&view.ring->start) == 1);
        CHECK(record_next(&receiver) == RECORD_WAIT);
        for (int round = 0; round < 3; round++) {
                for (count = 0; put(&sender, write, 0) == RECORD_OK; count++)
                        ;
                first = sender.published + record_size(piece);
                /* A relay has to say when there is more. */
                CHECK(atomic_load(&view.ring->room) == (view_remote(&view) ? UINT32_MAX : 0));
                CHECK(sender.base == sender.published);
                /* Three quarters are full, and a quarter is left for answers. */
                CHECK(sender.tail - sender.published <= size / 4 * 3);
                CHECK(sender.tail - sender.published + record_size(piece) > size / 4 * 3);
                for (uint64_t room = record_response_share(&view); room >= record_size(piece); count++) {
                        CHECK(put(&sender, answer, 1) == RECORD_OK);
                        room -= record_size(piece);
                }
                CHECK(record_next(&receiver) == RECORD_WAIT);
                /* A record of which some bytes are missing isn't there yet. */
                atomic_store(&view.ring->tail, receiver.head + sizeof(struct record) - 1);
                CHECK(record_next(&receiver) == RECORD_WAIT);
                atomic_store(&view.ring->tail, receiver.head + record_size(piece) - 1);
                CHECK(record_next(&receiver) == RECORD_WAIT);
                CHECK(record_publish(&sender));
                CHECK(record_taken(&sender, sender.tail) == RECORD_WAIT);
                for (uint32_t i = 0; i < count; i++) {
                        CHECK(record_next(&receiver) == RECORD_OK && record_next(&receiver) == RECORD_OK);
                        take(&receiver, receiver.now.operation == RECORD_RESPONSE, &random);
                        CHECK(i || record_taken(&sender, first) == RECORD_WAIT);
                        record_done(&receiver);
                        CHECK(record_taken(&sender, first) == RECORD_OK);
                }
                CHECK(record_next(&receiver) == RECORD_WAIT);
                CHECK(record_taken(&sender, sender.tail) == RECORD_OK);
        }
        atomic_store(&view.ring->head, sender.tail + 1);
        CHECK(put(&sender, write, 0) == RECORD_CORRUPT && record_taken(&sender, 0) == RECORD_CORRUPT);
        atomic_store(&view.ring->head, receiver.head);
        CHECK(put(&sender, (struct record){.operation = RECORD_CLOSE}, 0) == RECORD_OK);
        CHECK(!atomic_load(&view.ring->room));
        record_publish(&sender);
        atomic_store(&view.ring->tail, receiver.head + size + 1);
        CHECK(record_next(&receiver) == RECORD_CORRUPT);
}

/* --- both sides */

/* A ring of the sender's side, and the one that repeats it at the receiver's. */
struct wire {
        struct view from, to;
        uint64_t moved, reported;
};

struct peer {
        struct record_sender sender;
        struct record_receiver receiver;
        uint64_t random;
        /* as requester */
        struct record message; /* the message of which pieces are being put */
        uint32_t left;
        uint64_t sent; /* bytes of messages, which say what a byte is */
        struct {
                uint32_t psn, length;
                uint64_t address;
        } open[OPEN];
        uint64_t opened, answered, reserved;
        uint32_t credits;
        bool closed;
        /* as responder */
        uint64_t got;
        uint32_t credits_got;
        bool peer_closed;
        uint64_t requests;
        bool relayed;
};

static bool put_piece(struct peer *peer)
{
        uint32_t most = record_piece(&peer->sender.view), part = peer->left < most ? peer->left : most;
        struct record piece = peer->message;

        if (part > 1 && any(&peer->random, 4) == 0)
                part = 1 + (uint32_t)any(&peer->random, part);
        piece.length = part;
        piece.flags = (uint8_t)((peer->left == piece.total ? RECORD_FIRST : 0) |
                                (part == peer->left ? piece.flags | RECORD_LAST : 0));
        piece.immediate = part == peer->left ? piece.immediate : 0;
        if (put(&peer->sender, piece, peer->sent) != RECORD_OK)
                return false;
        peer->sent += part;
        peer->left -= part;
        if (piece.operation == RECORD_WRITE)
                peer->message.address += part;
        if (!peer->left)
                peer->message.operation = 0;
        return true;
}

static void begin_message(struct peer *peer)
{
        uint64_t *random = &peer->random;
        bool write = any(random, 2), immediate = any(random, 2);

        peer->left = some_length(random, any(random, 3) ? 4000 : 200000);
        peer->message = (struct record){.operation = write ? RECORD_WRITE : RECORD_SEND,
                                        .flags = immediate ? RECORD_IMMEDIATE : 0,
                                        .total = peer->left,
                                        .immediate = immediate ? (uint32_t)any(random, UINT32_MAX) : 0,
                                        .rkey = write ? 77 : 0,
                                        .address = write ? 1 + any(random, UINT32_MAX) : 0};
}

/* A request that is answered. */
static bool ask(struct peer *peer)
{
        static const uint8_t operations[] = {RECORD_READ, RECORD_SWAP, RECORD_ADD};
        uint8_t operation = operations[any(&peer->random, 3)];
        uint32_t wanted =
            operation == RECORD_READ ? some_length(&peer->random, record_piece(&peer->sender.view)) : 8;
        struct record record = {.operation = operation,
                                .length = operation == RECORD_SWAP  ? 16
                                          : operation == RECORD_ADD ? 8
                                                                    : 0,
                                .total = wanted,
                                .rkey = 5,
                                .address = any(&peer->random, UINT32_MAX)};
        size_t place = peer->opened % OPEN;

        if (peer->opened - peer->answered == OPEN ||
            peer->reserved + record_size(wanted) > record_response_share(&peer->sender.view))
                return false;
        peer->open[place].psn = peer->sender.psn;
        peer->open[place].length = wanted;
        peer->open[place].address = record.address;
        if (put(&peer->sender, record, record.address) != RECORD_OK)
                return false;
        peer->opened++;
        peer->reserved += record_size(wanted);
        return true;
}

static bool send_some(struct peer *peer)
{
        bool some = false;

        for (int i = 0; i < 8 && !peer->closed; i++) {
                bool over = time(NULL) >= end && peer->sender.psn >= LEAST, put_one;

                if (peer->message.operation) {
                        put_one = put_piece(peer);
                } else if (over) {
                        peer->closed = put_one =
                            put(&peer->sender, (struct record){.operation = RECORD_CLOSE}, 0) == RECORD_OK;
                } else if (any(&peer->random, 8) == 0) {
                        put_one = put(&peer->sender,
                                      (struct record){.operation = RECORD_CREDIT, .total = peer->credits + 1},
                                      0) == RECORD_OK;
                        peer->credits += put_one;
                } else if (any(&peer->random, 2)) {
                        put_one = ask(peer);
                } else {
                        begin_message(peer);
                        put_one = put_piece(peer);
                }
                some |= put_one;
                if (!put_one)
                        break;
        }
        some |= record_publish(&peer->sender);
        return some;
}

/* Execute a request. False: its answer has no room yet. */
static bool execute(struct peer *peer)
{
        struct record *now = &peer->receiver.now, answer = {.operation = RECORD_RESPONSE, .psn = now->psn};
        enum record_outcome outcome;

        if (now->operation == RECORD_SEND || now->operation == RECORD_WRITE) {
                take(&peer->receiver, peer->got, &peer->random);
                peer->got += now->length;
        } else {
                answer.length = now->total;
                outcome = put(&peer->sender, answer, now->address);
                CHECK(outcome == RECORD_OK || (peer->relayed && outcome == RECORD_WAIT));
                if (outcome != RECORD_OK)
                        return false;
                if (now->operation != RECORD_READ)
                        take(&peer->receiver, now->address, &peer->random);
        }
        peer->requests++;
        return true;
}

static bool receive_one(struct peer *peer)
{
        struct record *now = &peer->receiver.now;
        enum record_outcome outcome = record_next(&peer->receiver);
        size_t place = peer->answered % OPEN;

        CHECK(outcome != RECORD_CORRUPT);
        if (outcome == RECORD_WAIT)
                return false;
        switch (now->operation) {
        case RECORD_RESPONSE:
                CHECK(peer->answered < peer->opened && now->psn == peer->open[place].psn &&
                      now->length == peer->open[place].length);
                take(&peer->receiver, peer->open[place].address, &peer->random);
                peer->answered++;
                peer->reserved -= record_size(now->length);
                break;
        case RECORD_CREDIT:
                CHECK(now->total == ++peer->credits_got);
                break;
        case RECORD_CLOSE:
                peer->peer_closed = true;
                break;
        default:
                if (!execute(peer))
                        return false;
        }
        record_done(&peer->receiver);
        return true;
}

static void *be_peer(void *argument)
{
        struct peer *peer = argument;

        while (!peer->closed || !peer->peer_closed || peer->answered != peer->opened) {
                bool some = send_some(peer);

                for (int i = 0; i < 8 && receive_one(peer); i++)
                        some = true;
                some |= record_publish(&peer->sender);
                if (!some)
                        sched_yield();
        }
        CHECK(peer->requests >= LEAST);
        return NULL;
}

/* Carry bytes in parts; report what was taken as late as a relay may. */
static bool carry(struct wire *wire, uint64_t *random)
{
        uint64_t size = view_size(&wire->from), head;
        uint64_t tail = atomic_load_explicit(&wire->from.ring->tail, memory_order_acquire);
        uint64_t base = atomic_load_explicit(&wire->from.ring->base, memory_order_relaxed);
        uint64_t most = any(random, 2) ? tail - wire->moved : 40;
        uint64_t part = tail == wire->moved ? 0 : 1 + any(random, most);
        bool some = part;

        part = part < tail - wire->moved ? part : tail - wire->moved;
        atomic_store_explicit(&wire->to.ring->base, base, memory_order_relaxed);
        while (part) {
                size_t run;
                unsigned char *from = ring_at(&wire->from, wire->moved - base, &run);

                run = run < part ? run : part;
                memcpy(ring_at(&wire->to, wire->moved - base, &(size_t){0}), from, run);
                wire->moved += run;
                part -= run;
        }
        atomic_store_explicit(&wire->to.ring->tail, wire->moved, memory_order_release);
        /* Let the receiver look at what isn't whole. */
        if (wire->moved != tail && any(random, 16) == 0)
                sched_yield();
        head = atomic_load_explicit(&wire->to.ring->head, memory_order_acquire);
        if (head != wire->reported && (wire->moved - wire->reported >= size / 2 || any(random, 100) == 0)) {
                wire->reported = head;
                atomic_store_explicit(&wire->from.ring->head, head, memory_order_release);
                some = true;
        }
        return some;
}

static struct wire wires[2];
static _Atomic bool *over;

static void *be_relay(void *unused)
{
        uint64_t random = seed ^ 3;

        (void)unused;
        while (!atomic_load(over)) {
                bool some = carry(&wires[0], &random);

                if (!carry(&wires[1], &random) && !some)
                        sched_yield();
        }
        return NULL;
}

static void run(void *(*part)(void *), void *argument, bool processes, pthread_t *thread, pid_t *child)
{
        if (!processes) {
                CHECK(pthread_create(thread, NULL, part, argument) == 0);
                return;
        }
        *child = fork();
        CHECK(*child >= 0);
        if (!*child) {
                alarm((unsigned)(end - time(NULL)) + PATIENCE);
                part(argument);
                _exit(0);
        }
}

static void join(bool processes, pthread_t thread, pid_t child)
{
        int status = 0;

        if (processes)
                CHECK(waitpid(child, &status, 0) == child && status == 0);
        else
                CHECK(pthread_join(thread, NULL) == 0);
}

static void stress(bool processes, bool relayed)
{
        static struct peer peers[2];
        /* A local ring, or one of a remote arena. */
        uint32_t shift = relayed || seed & 1 ? LEAST_SHIFT + (uint32_t)(seed >> 1) % 6 : RING_SHIFT;
        pthread_t threads[3] = {0};
        pid_t children[3] = {0};

        over = (_Atomic bool *)(void *)fenced(PAGE);
        for (int i = 0; i < 2; i++) {
                wires[i].from = new_ring(shift);
                wires[i].to = relayed ? new_ring(shift) : wires[i].from;
        }
        for (int i = 0; i < 2; i++) {
                peers[i].random = seed + (uint64_t)i;
                peers[i].relayed = relayed;
                record_send_from(&peers[i].sender, wires[i].from);
                record_receive_from(&peers[i].receiver, wires[1 - i].to);
        }
        for (int i = 0; i < 2; i++)
                run(be_peer, &peers[i], processes, &threads[i], &children[i]);
        if (relayed)
                run(be_relay, NULL, processes, &threads[2], &children[2]);
        for (int i = 0; i < 2; i++)
                join(processes, threads[i], children[i]);
        atomic_store(over, true);
        if (relayed)
                join(processes, threads[2], children[2]);
}

/* --- hostile */

static void spoil(struct view *view, uint64_t place, uint64_t *random)
{
        _Atomic uint64_t *words[] = {&view->ring->tail, &view->ring->base, &view->ring->head};
        _Atomic uint64_t *word = words[any(random, 3)];
        size_t run, field = any(random, sizeof(struct record));
        unsigned char *byte;

        switch (any(random, 8)) {
        case 0:
                atomic_store(word, any(random, UINT64_MAX));
                break;
        case 1:
                atomic_store(word, atomic_load(word) + any(random, 2 * view_size(view)) - view_size(view));
                break;
        default:
                /* A byte of a header: some value, or one bit. */
                byte = ring_at(view, place + field, &run);
                *byte = (unsigned char)(any(random, 2) ? any(random, 256) : *byte ^ (1u << any(random, 8)));
        }
}

/* Some record that is valid, or nearly so. */
static struct record some_record(struct record_sender *sender, uint64_t *random)
{
        struct record record = examples[any(random, sizeof examples / sizeof *examples)];

        if (record.operation <= RECORD_WRITE && any(random, 2)) {
                record.length = some_length(random, record_piece(&sender->view));
                record.total = any(random, 2) ? record.length : record.length + 100;
        }
        if (record.operation == RECORD_RESPONSE)
                record.length = some_length(random, record_piece(&sender->view));
        return record;
}

static void take_hostile(struct record_receiver *receiver, uint64_t *taken)
{
        /* Exactly as long as the record says, so that a sanitizer sees each byte too many. */
        unsigned char *bytes = malloc(receiver->now.length ? receiver->now.length : 1);
        struct iovec vec = {.iov_base = bytes, .iov_len = receiver->now.length};
        struct cursor cursor = {.vec = &vec};

        CHECK(bytes && receiver->now.length <= record_piece(&receiver->view));
        CHECK(record_is_valid(&receiver->now, record_piece(&receiver->view)));
        record_take(receiver, &cursor, receiver->now.length);
        taken[receiver->now.operation]++;
        record_done(receiver);
        free(bytes);
}

static void hostile(void)
{
        struct view view = new_ring(seed & 1 ? LEAST_SHIFT + (uint32_t)(seed >> 1) % 6 : RING_SHIFT);
        uint64_t random = seed, taken[RECORD_OPERATIONS] = {0}, corrupt[2] = {0};
        struct record_receiver receiver;
        struct record_sender sender;
        bool begin = true;

        while (time(NULL) < end)
                for (int i = 0; i < 1000; i++) {
                        if (begin) {
                                memset(view.ring, 0, sizeof *view.ring);
                                record_send_from(&sender, view);
                                record_receive_from(&receiver, view);
                        }
                        begin = put(&sender, some_record(&sender, &random), 0) == RECORD_CORRUPT;
                        corrupt[0] += begin;
                        record_publish(&sender);
                        for (int tries = 0; tries < 2; tries++) {
                                enum record_outcome outcome;

                                if (any(&random, 4) == 0)
                                        spoil(&view, receiver.head - atomic_load(&view.ring->base), &random);
                                outcome = record_next(&receiver);
                                if (any(&random, 8) == 0)
                                        spoil(&view, receiver.head - atomic_load(&view.ring->base), &random);
                                if (outcome == RECORD_OK)
                                        take_hostile(&receiver, taken);
                                begin |= outcome == RECORD_CORRUPT;
                                corrupt[1] += outcome == RECORD_CORRUPT;
                        }
                }
        CHECK(corrupt[0] && corrupt[1]);
        for (int i = 1; i < RECORD_OPERATIONS; i++)
                CHECK(taken[i]);
        printf("corrupt %llu %llu\n", (unsigned long long)corrupt[0], (unsigned long long)corrupt[1]);
}

int main(int count, char **arguments)
{
        const char *play = count > 1 ? arguments[1] : "";

        if (count == 2 && strcmp(play, "rules") == 0) {
                check_changes();
                check_order();
                check_continuation();
                for (uint32_t shift = LEAST_SHIFT; shift <= RING_SHIFT; shift++) {
                        check_room(shift);
                        check_end(shift);
                }
                return 0;
        }
        if (count < 4)
                return 2;
        end = time(NULL) + atoi(arguments[count - 2]);
        seed = strtoull(arguments[count - 1], NULL, 0);
        alarm((unsigned)atoi(arguments[count - 2]) + PATIENCE);
        if (strcmp(play, "hostile") == 0)
                hostile();
        else
                stress(strcmp(arguments[2], "processes") == 0, strcmp(play, "relayed") == 0);
        return 0;
}
