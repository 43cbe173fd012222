#include "record.h"

/* What each operation may have. */
static const struct rule {
        uint8_t flags;
        bool pieces;
        bool numbered; /* psn */
        bool rkey;
        bool address;
        uint32_t length; /* at most; 0: RECORD_PIECE */
        bool exact;      /* the length is just that */
} rules[RECORD_OPERATIONS] = {
    [RECORD_SEND] = {.flags =
                         RECORD_FIRST | RECORD_LAST | RECORD_IMMEDIATE | RECORD_INVALIDATE | RECORD_SOLICITED,
                     .pieces = true,
                     .numbered = true},
    [RECORD_WRITE] = {.flags = RECORD_FIRST | RECORD_LAST | RECORD_IMMEDIATE | RECORD_SOLICITED,
                      .pieces = true,
                      .numbered = true,
                      .rkey = true,
                      .address = true},
    [RECORD_READ] = {.numbered = true, .rkey = true, .address = true, .exact = true},
    [RECORD_SWAP] = {.numbered = true, .rkey = true, .address = true, .length = 16, .exact = true},
    [RECORD_ADD] = {.numbered = true, .rkey = true, .address = true, .length = 8, .exact = true},
    [RECORD_DATAGRAM] = {.flags = RECORD_IMMEDIATE | RECORD_SOLICITED,
                         .numbered = true,
                         .rkey = true,
                         .address = true,
                         .length = RECORD_DATAGRAM_BYTES},
    [RECORD_RESPONSE] = {.numbered = true},
    [RECORD_DONE] = {.numbered = true, .exact = true},
    [RECORD_REFUSED] = {.numbered = true, .exact = true},
    [RECORD_CREDIT] = {.exact = true},
    [RECORD_CLOSE] = {.exact = true},
    [RECORD_ASK] = {.rkey = true, .exact = true},
    [RECORD_DIRECT] = {.rkey = true, .length = sizeof(struct record_direct), .exact = true},
};

/* A piece of a message or a write. */
static bool is_valid_piece(const struct record *record)
{
        const uint8_t of_last = RECORD_IMMEDIATE | RECORD_INVALIDATE | RECORD_SOLICITED;
        bool first = record->flags & RECORD_FIRST, last = record->flags & RECORD_LAST;

        if (record->total > RECORD_MESSAGE || record->length > record->total)
                return false;
        if (first && last ? record->length != record->total
                          : !record->length || record->length == record->total)
                return false;
        if (!last && record->flags & of_last)
                return false;
        return !(record->flags & RECORD_IMMEDIATE && record->flags & RECORD_INVALIDATE);
}

/* Is the word `total` one that the operation may have? */
static bool is_valid_total(const struct record *record, uint32_t piece)
{
        switch (record->operation) {
        case RECORD_READ:
                return record->total <= piece;
        case RECORD_SWAP:
        case RECORD_ADD:
                return record->total == 8;
        case RECORD_CREDIT:
                return true;
        default:
                return !record->total;
        }
}

static bool is_valid_immediate(const struct record *record)
{
        if (record->operation == RECORD_REFUSED)
                return record->immediate && record->immediate < REFUSALS;
        if (record->operation == RECORD_CREDIT)
                return record->immediate < RECORD_TIMES;
        return !record->immediate || record->flags & (RECORD_IMMEDIATE | RECORD_INVALIDATE);
}

bool record_is_valid(const struct record *record, uint32_t piece)
{
        const struct rule *rule = &rules[record->operation < RECORD_OPERATIONS ? record->operation : 0];

        if (!record->operation || record->operation >= RECORD_OPERATIONS || record->zero ||
            record->flags & ~rule->flags || record->length > piece)
                return false;
        if (rule->exact ? record->length != rule->length : rule->length && record->length > rule->length)
                return false;
        if ((!rule->numbered && record->psn) || (!rule->rkey && record->rkey) ||
            (!rule->address && record->address) || !is_valid_immediate(record))
                return false;
        return rule->pieces ? is_valid_piece(record) : is_valid_total(record, piece);
}

/* Copy between the ring, from position `from` on, and the buffers. */
static void copy(const struct view *view, uint64_t from, struct cursor *cursor, size_t size, bool into_ring)
{
        while (size) {
                size_t run;
                unsigned char *place = ring_at(view, from, &run);

                run = run < size ? run : size;
                cursor_copy(cursor, place, run, into_ring);
                from += run;
                size -= run;
        }
}

static void copy_header(const struct view *view, uint64_t from, struct record *record, bool into_ring)
{
        struct iovec vec = {.iov_base = record, .iov_len = sizeof *record};
        struct cursor cursor = {.vec = &vec};

        copy(view, from, &cursor, sizeof *record, into_ring);
}

/* --- sending */

void record_send_from(struct record_sender *sender, struct view view)
{
        *sender = (struct record_sender){.view = view};
        /* The relays take bytes of a ring that has begun (layout.h). */
        atomic_store_explicit(&view.ring->start, 1, memory_order_release);
}

/* Bytes of the ring that the other side has not taken. */
static uint64_t used_by(const struct record_sender *sender)
{
        /* Pairs with record_done(). */
        return sender->tail - atomic_load_explicit(&sender->view.ring->head, memory_order_acquire);
}

/* Have the relay tell of room from now on, or no longer: otherwise it wakes nobody for that. */
static void wait_for_room(struct record_sender *sender, bool waits)
{
        if (sender->waits == waits || !view_remote(&sender->view))
                return;
        sender->waits = waits;
        atomic_store_explicit(&sender->view.ring->room, waits ? UINT32_MAX : 0, memory_order_relaxed);
        /* Pairs with the relay's: either it sees the wish, or we see the room that it has told
         * of. */
        if (waits)
                atomic_thread_fence(memory_order_seq_cst);
}

/* Is there room for a record of this size? An empty ring begins anew at its first byte: its first
 * pages are in the caches, and small records stay beside the ring's header. */
static enum record_outcome make_room(struct record_sender *sender, uint64_t size, bool is_response)
{
        uint64_t whole = view_size(&sender->view), limit = is_response ? whole : whole / 4 * 3;
        uint64_t used = used_by(sender);

        if (used + size > limit) {
                wait_for_room(sender, true);
                used = used_by(sender);
        }
        if (used > whole)
                return RECORD_CORRUPT;
        if (used + size > limit)
                return RECORD_WAIT;
        /* There is room for each record, whatever has found none before. */
        if (used <= whole / 2)
                wait_for_room(sender, false);
        if (!used && sender->base != sender->tail) {
                sender->base = sender->tail;
                atomic_store_explicit(&sender->view.ring->base, sender->base, memory_order_relaxed);
        }
        return RECORD_OK;
}

enum record_outcome record_put(struct record_sender *sender, struct record *record, struct cursor *payload)
{
        uint64_t size = record_size(record->length), place;
        enum record_outcome outcome = make_room(sender, size, record->operation == RECORD_RESPONSE);

        if (outcome != RECORD_OK)
                return outcome;
        if (record_is_request(record))
                record->psn = sender->psn++;
        place = sender->tail - sender->base;
        copy_header(&sender->view, place, record, true);
        copy(&sender->view, place + sizeof *record, payload, record->length, true);
        sender->tail += size;
        return RECORD_OK;
}

bool record_publish(struct record_sender *sender)
{
        if (sender->published == sender->tail)
                return false;
        sender->published = sender->tail;
        /* Pairs with record_next(). */
        atomic_store_explicit(&sender->view.ring->tail, sender->tail, memory_order_release);
        return true;
}

enum record_outcome record_taken(const struct record_sender *sender, uint64_t tail)
{
        /* What the other side executed has happened. */
        uint64_t used = used_by(sender);

        if (used > view_size(&sender->view))
                return RECORD_CORRUPT;
        return used <= sender->tail - tail ? RECORD_OK : RECORD_WAIT;
}

bool record_was_visible(const struct record_sender *sender, uint64_t tail)
{
        /* Pairs with record_show(). */
        uint64_t visible = atomic_load_explicit(&sender->view.ring->visible, memory_order_acquire);

        return sender->tail - visible <= sender->tail - tail;
}

/* --- receiving */

void record_receive_from(struct record_receiver *receiver, struct view view)
{
        *receiver = (struct record_receiver){.view = view};
}

/* Does a request follow those before it? Then its pieces are counted. */
static bool follows(struct record_receiver *receiver, const struct record *record)
{
        bool piece = record->operation == RECORD_SEND || record->operation == RECORD_WRITE;
        bool first = record->flags & RECORD_FIRST;

        if (record->psn != receiver->psn || (receiver->pending && (!piece || first)))
                return false;
        receiver->psn++;
        if (!piece)
                return true;
        if (first) {
                receiver->missing = receiver->total = record->total;
                receiver->rkey = record->rkey;
                receiver->address = record->address;
        } else if (record->operation != receiver->pending || record->total != receiver->total ||
                   record->rkey != receiver->rkey || record->address != receiver->address) {
                return false;
        }
        if (record->length > receiver->missing ||
            (record->length == receiver->missing) != ((record->flags & RECORD_LAST) != 0))
                return false;
        receiver->missing -= record->length;
        receiver->address += record->operation == RECORD_WRITE ? record->length : 0;
        receiver->pending = receiver->missing ? record->operation : 0;
        return true;
}

enum record_outcome record_next(struct record_receiver *receiver)
{
        struct record *now = &receiver->now;
        /* Pairs with record_publish(). */
        uint64_t ready =
            atomic_load_explicit(&receiver->view.ring->tail, memory_order_acquire) - receiver->head;

        if (receiver->held)
                return RECORD_OK;
        if (ready > view_size(&receiver->view))
                return RECORD_CORRUPT;
        if (ready < sizeof *now)
                return RECORD_WAIT;
        copy_header(&receiver->view,
                    receiver->head - atomic_load_explicit(&receiver->view.ring->base, memory_order_relaxed),
                    now, false);
        if (!record_is_valid(now, record_piece(&receiver->view)))
                return RECORD_CORRUPT;
        if (ready < record_size(now->length))
                return RECORD_WAIT;
        if (record_is_request(now) && !follows(receiver, now))
                return RECORD_CORRUPT;
        receiver->held = true;
        receiver->taken = 0;
        return RECORD_OK;
}

void record_take(struct record_receiver *receiver, struct cursor *to, uint32_t size)
{
        uint64_t base = atomic_load_explicit(&receiver->view.ring->base, memory_order_relaxed);
        uint64_t from = receiver->head - base + sizeof receiver->now + receiver->taken;

        copy(&receiver->view, from, to, size, false);
        receiver->taken += size;
}

void record_skip(struct record_receiver *receiver)
{
        receiver->head += record_size(receiver->now.length);
        receiver->held = false;
}

bool record_publish_answer(const struct view *view, uint32_t psn, uint32_t length)
{
        uint64_t tail;
        struct record found;

        if (!view->ring || view_remote(view))
                return false;
        tail = atomic_load_explicit(&view->ring->tail, memory_order_acquire);
        copy_header(view, tail - atomic_load_explicit(&view->ring->base, memory_order_relaxed), &found,
                    false);
        if (found.operation != RECORD_RESPONSE || found.psn != psn || found.length != length)
                return false;
        atomic_store_explicit(&view->ring->tail, tail + record_size(length), memory_order_release);
        return true;
}

void record_show(struct record_receiver *receiver)
{
        uint64_t behind = receiver->head + record_size(receiver->now.length);

        /* Pairs with record_was_visible(). */
        atomic_store_explicit(&receiver->view.ring->visible, behind, memory_order_release);
        /* What the caller writes next isn't seen before that. */
        atomic_thread_fence(memory_order_release);
}

void record_done(struct record_receiver *receiver)
{
        record_skip(receiver);
        /* Pairs with make_room() and record_taken(). */
        atomic_store_explicit(&receiver->view.ring->head, receiver->head, memory_order_release);
}
