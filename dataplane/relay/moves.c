#include "moves.h"

#include <stdlib.h>

enum {
        REACHED_MOST = 16, /* files of the peer's process */
        GRANTS_MOST = 64,  /* files of the process here, to the peer's relay */
        NOTICES_MOST = 256,
        LENGTH_MOST = 1 << 30,
};

enum phase {
        PHASE_NONE,
        PHASE_REACHES, /* REACH is sent */
        PHASE_MOVES,
        PHASE_MOVED, /* MOVED is sent */
        PHASE_ENDS,  /* the outcome is known, and the device may still read the own file */
};

/* A block that is to be sent. */
struct notice {
        struct node of_mirror;
        struct wire_block block;
};

/* A file of the peer's process. */
struct reached {
        struct node of_mirror;
        uint64_t file, token, size;
        void *target; /* the transport's */
};

/* The peer's relay may write into a file of the process here. */
struct grant {
        struct node of_mirror, of_file;
        struct node revoked; /* in link->revoked: REVOKE was sent */
        uint64_t revoked_at; /* ns */
        struct mirror *mirror;
        struct lent_file *file;
};

struct moves {
        struct mirror *mirror;
        struct node notices, reached, grants;
        unsigned notice_count, reached_count, grant_count;
        bool allowed;
        /* the last one: */
        struct node running; /* in link->movers: some of it was given to the device */
        enum phase phase;
        enum move_outcome outcome;
        uint64_t number, from_offset, to, to_offset, token, length, done, seen;
        uint64_t batch; /* the last one that reads the own file */
        struct lent_file *from;
        struct reached *target;
};

/* Can the device be used? */
static bool has_device(const struct mirror *m)
{
        return m->link->state == LINK_UP && m->link->transport == m->transport;
}

/* --- what is to be said */

static void note(struct mirror *m, struct wire_block block)
{
        struct moves *moves = m->moves;
        struct notice *notice;

        if (moves->notice_count >= NOTICES_MOST) {
                mirror_corrupt(m);
                return;
        }
        notice = relay_memory(sizeof *notice, "memory for a block");
        notice->block = block;
        notice->block.connection = m->peer;
        notice->block.cookie = m->peer_cookie;
        list_init(&notice->of_mirror);
        list_add(&moves->notices, &notice->of_mirror);
        moves->notice_count++;
        mirror_enqueue(m);
}

bool moves_say(struct mirror *m, struct wire_block *block)
{
        struct moves *moves = m->moves;
        struct notice *notice;

        if (!list_holds(&moves->notices))
                return false;
        notice = OF(moves->notices.after, struct notice, of_mirror);
        *block = notice->block;
        list_remove(&notice->of_mirror);
        moves->notice_count--;
        free(notice);
        return true;
}

static bool have_work(const struct mirror *m)
{
        const struct moves *moves = m->moves;

        return has_device(m) &&
               (list_holds(&moves->notices) || (moves->phase == PHASE_MOVES && m->state == MIRROR_PAIRED));
}

/* --- moves of the process here */

void moves_allow(struct mirror *m)
{
        if (m->moves->allowed)
                return;
        m->moves->allowed = true;
        atomic_store_explicit(&m->out->moves, 1, memory_order_release);
}

static void count_outcome(const struct moves *moves)
{
        if (moves->outcome == MOVE_DONE) {
                count(COUNT_MOVES, 1);
                count(COUNT_BYTES_MOVED, moves->length);
        } else {
                count(moves->outcome == MOVE_AGAIN ? COUNT_MOVES_LOST : COUNT_MOVES_REFUSED, 1);
        }
}

/* Tells the process how it ended, also if its connection is broken or dropped: it waits for that
 * before it uses the memory again. */
static void report(struct moves *moves)
{
        struct mirror *m = moves->mirror;

        list_remove(&moves->running);
        if (moves->from)
                lent_file_leave(moves->from);
        moves->from = NULL;
        moves->target = NULL;
        moves->phase = PHASE_NONE;
        count_outcome(moves);
        if (!m->shared)
                return;
        atomic_store_explicit(&m->out->seen, moves->seen, memory_order_relaxed);
        atomic_store_explicit(&m->out->moved, moves->number * MOVE_OUTCOME + moves->outcome,
                              memory_order_release);
        arena_wake(m->shared, &m->in->receivers, m->slot);
        mirror_activate(m);
}

static bool is_read(const struct moves *moves)
{
        const struct mirror *m = moves->mirror;

        return m->link->lanes[m->lane].completed < moves->batch;
}

static void end(struct moves *moves, enum move_outcome outcome)
{
        moves->outcome = outcome;
        if (list_holds(&moves->running) && is_read(moves))
                moves->phase = PHASE_ENDS;
        else
                report(moves);
}

static struct reached *find_reached(const struct moves *moves, uint64_t file)
{
        EACH(node, &moves->reached) {
                struct reached *reached = OF(node, struct reached, of_mirror);

                if (reached->file == file)
                        return reached;
        }
        return NULL;
}

static void begin(struct moves *moves, struct reached *reached)
{
        if (reached->token != moves->token ||
            !lent_file_has(reached->size, moves->to_offset, moves->length)) {
                end(moves, MOVE_NOT_TO);
                return;
        }
        moves->target = reached;
        moves->phase = PHASE_MOVES;
        mirror_enqueue(moves->mirror);
}

/* The process can write anything there at any time: each word is read once. */
static uint64_t read_word(const _Atomic uint64_t *word)
{
        return atomic_load_explicit(word, memory_order_relaxed);
}

void moves_scan(struct mirror *m)
{
        const struct move_request *request = &m->out->move;
        struct moves *moves = m->moves;
        uint64_t number = atomic_load_explicit(&request->number, memory_order_acquire);
        struct reached *reached;
        struct lent_file *from;

        if (number == moves->number || moves->phase != PHASE_NONE || !moves->allowed)
                return;
        moves->number = number;
        moves->from_offset = read_word(&request->from_offset);
        moves->to = read_word(&request->to);
        moves->to_offset = read_word(&request->to_offset);
        moves->token = read_word(&request->token);
        moves->length = read_word(&request->length);
        moves->done = moves->seen = moves->batch = 0;
        if (!has_device(m) || m->resync || m->peer_dropped) {
                end(moves, MOVE_AGAIN);
                return;
        }
        from = lent_file_find(read_word(&request->from), m->shared->owner);
        if (!from || !moves->length || moves->length > LENGTH_MOST || !lent_file_use(from, m->transport)) {
                end(moves, MOVE_NOT_FROM);
                return;
        }
        moves->from = from;
        reached = find_reached(moves, moves->to);
        if (!lent_file_has(from->size, moves->from_offset, moves->length)) {
                end(moves, MOVE_NOT_FROM);
        } else if (reached) {
                begin(moves, reached);
        } else {
                moves->phase = PHASE_REACHES;
                note(m, (struct wire_block){.flags = WIRE_REACH, .tail = moves->to, .base = moves->token});
        }
}

void moves_write(struct mirror *m, uint64_t batch)
{
        struct moves *moves = m->moves;
        uint64_t left = moves->length - moves->done;
        uint32_t size = left < m->transport->piece ? (uint32_t)left : m->transport->piece;

        if (moves->phase != PHASE_MOVES || m->state != MIRROR_PAIRED || !has_device(m))
                return;
        m->transport->move(m->link, moves->from, moves->from_offset + moves->done, moves->target->target,
                           moves->to_offset + moves->done, size);
        count(COUNT_WRITES, 1);
        mirror_use(m, USAGE_BYTES_OUT, size);
        list_add(&m->link->movers, &moves->running);
        moves->done += size;
        m->moved += size;
        m->last_batch = moves->batch = batch;
        if (moves->done < moves->length)
                return;
        moves->phase = PHASE_MOVED;
        note(m, (struct wire_block){.flags = WIRE_MOVED, .tail = moves->to, .base = moves->number});
}

static void interrupt(struct mirror *m)
{
        struct moves *moves = m->moves;

        if (moves->phase != PHASE_NONE && moves->phase != PHASE_ENDS)
                end(moves, MOVE_AGAIN);
}

void moves_completed(struct link *link)
{
        EACH(node, &link->movers) {
                struct moves *moves = OF(node, struct moves, running);

                if (moves->phase == PHASE_ENDS && !is_read(moves))
                        report(moves);
        }
}

/* --- files of the peer's process */

static void forget_reached(struct moves *moves, struct reached *reached)
{
        moves->mirror->transport->unreach(reached->target);
        list_remove(&reached->of_mirror);
        moves->reached_count--;
        free(reached);
}

static void receive_reached(struct moves *moves, const struct wire_block *block)
{
        struct mirror *m = moves->mirror;
        bool wanted =
            moves->phase == PHASE_REACHES && block->tail == moves->to && block->base == moves->token;
        void *target =
            wanted && block->head ? m->transport->reach(block->start, block->end, block->head) : NULL;
        struct reached *reached;

        if (block->head && !target)
                note(m, (struct wire_block){.flags = WIRE_REVOKED, .tail = block->tail});
        if (!wanted)
                return;
        if (!target) {
                end(moves, MOVE_NOT_TO);
                return;
        }
        if (moves->reached_count == REACHED_MOST) {
                struct reached *oldest = OF(moves->reached.after, struct reached, of_mirror);

                note(m, (struct wire_block){.flags = WIRE_REVOKED, .tail = oldest->file});
                forget_reached(moves, oldest);
        }
        reached = relay_memory(sizeof *reached, "memory for a file of a peer");
        *reached = (struct reached){
            .file = block->tail, .token = block->base, .size = block->head, .target = target};
        list_init(&reached->of_mirror);
        list_add(&moves->reached, &reached->of_mirror);
        moves->reached_count++;
        begin(moves, reached);
}

/* Whatever was written there is before the answer. */
static void receive_revoke(struct moves *moves, uint64_t file)
{
        struct reached *reached = find_reached(moves, file);

        note(moves->mirror, (struct wire_block){.flags = WIRE_REVOKED, .tail = file});
        if (!reached)
                return;
        if (moves->target == reached && moves->phase != PHASE_ENDS)
                end(moves, MOVE_AGAIN);
        if (moves->target == reached)
                moves->target = NULL;
        forget_reached(moves, reached);
}

/* --- files of the process here */

static struct grant *find_grant(const struct moves *moves, uint64_t file)
{
        EACH(node, &moves->grants) {
                struct grant *grant = OF(node, struct grant, of_mirror);

                if (grant->file->number == file)
                        return grant;
        }
        return NULL;
}

static void take_back(struct grant *grant)
{
        struct lent_file *file = grant->file;

        list_remove(&grant->of_mirror);
        list_remove(&grant->of_file);
        list_remove(&grant->revoked);
        grant->mirror->moves->grant_count--;
        free(grant);
        lent_file_leave(file);
}

/* NULL: the peer's relay may not have it. */
static struct grant *make_grant(struct moves *moves, const struct wire_block *block)
{
        struct mirror *m = moves->mirror;
        struct lent_file *file =
            m->shared && m->state == MIRROR_PAIRED ? lent_file_find(block->tail, m->shared->owner) : NULL;
        struct grant *grant;

        if (!file || file->token != block->base || !file->writable || !has_device(m))
                return NULL;
        grant = find_grant(moves, file->number);
        if (grant && !file->registration)
                return NULL;
        if (grant || moves->grant_count == GRANTS_MOST || !lent_file_use(file, m->transport))
                return grant;
        grant = relay_memory(sizeof *grant, "memory for a grant");
        grant->mirror = m;
        grant->file = file;
        list_init(&grant->of_mirror);
        list_init(&grant->of_file);
        list_init(&grant->revoked);
        list_add(&moves->grants, &grant->of_mirror);
        list_add(&file->grants, &grant->of_file);
        moves->grant_count++;
        return grant;
}

static void receive_reach(struct moves *moves, const struct wire_block *block)
{
        struct grant *grant = make_grant(moves, block);
        struct wire_block answer = {.flags = WIRE_REACHED, .tail = block->tail, .base = block->base};

        if (grant) {
                answer.head = grant->file->size;
                moves->mirror->transport->place_file(grant->file, &answer.start, &answer.end);
        }
        note(moves->mirror, answer);
}

/* All of it is in the file by now. */
static void receive_moved(struct moves *moves, const struct wire_block *block)
{
        const struct grant *grant = find_grant(moves, block->tail);

        note(moves->mirror, (struct wire_block){.flags = WIRE_SEEN,
                                                .tail = block->tail,
                                                .base = block->base,
                                                .head = grant ? lent_file_key(grant->file) : 0});
}

void moves_revoke(struct lent_file *file)
{
        EACH(node, &file->grants) {
                struct grant *grant = OF(node, struct grant, of_file);

                if (grant->mirror->peer_dropped || list_holds(&grant->revoked))
                        continue;
                grant->revoked_at = now();
                list_add(&grant->mirror->link->revoked, &grant->revoked);
                note(grant->mirror, (struct wire_block){.flags = WIRE_REVOKE, .tail = file->number});
        }
}

uint64_t moves_revoked_at(const struct link *link)
{
        return list_holds(&link->revoked) ? OF(link->revoked.after, struct grant, revoked)->revoked_at : 0;
}

/* --- */

void moves_receive(struct mirror *m, const struct wire_block *block)
{
        struct moves *moves = m->moves;

        if (!moves) {
                mirror_corrupt(m);
                return;
        }
        switch (block->flags) {
        case WIRE_REACH:
                receive_reach(moves, block);
                break;
        case WIRE_REACHED:
                receive_reached(moves, block);
                break;
        case WIRE_MOVED:
                receive_moved(moves, block);
                break;
        case WIRE_SEEN:
                if (moves->phase != PHASE_MOVED || block->base != moves->number)
                        break;
                moves->seen = block->head;
                end(moves, MOVE_DONE);
                break;
        case WIRE_REVOKE:
                receive_revoke(moves, block->tail);
                break;
        case WIRE_REVOKED: {
                struct grant *grant = find_grant(moves, block->tail);

                if (grant)
                        take_back(grant);
                break;
        }
        default:
                mirror_corrupt(m);
        }
}

static void suspend(struct mirror *m)
{
        struct moves *moves = m->moves;
        struct wire_block unused;

        while (moves_say(m, &unused))
                ;
        if (moves->phase != PHASE_NONE) {
                moves->outcome = moves->phase == PHASE_ENDS ? moves->outcome : MOVE_AGAIN;
                report(moves);
        }
        EACH(node, &moves->reached)
                forget_reached(moves, OF(node, struct reached, of_mirror));
        EACH(node, &moves->grants)
                take_back(OF(node, struct grant, of_mirror));
}

static void end_all(struct mirror *m)
{
        suspend(m);
        free(m->moves);
        m->moves = NULL;
}

static void start(struct mirror *m)
{
        struct moves *moves = relay_memory(sizeof *moves, "memory for moves");

        moves->mirror = m;
        list_init(&moves->notices);
        list_init(&moves->reached);
        list_init(&moves->grants);
        list_init(&moves->running);
        m->moves = moves;
        /* It may have said so before this. */
        if (m->peer_flags & WIRE_KNOWS_MOVES)
                moves_allow(m);
}

const struct mirror_moves moves_of_mirrors = {
    .start = start, .end = end_all, .suspend = suspend, .interrupt = interrupt, .have_work = have_work};
