#include "peek.h"

#include "boundary.h"
#include "emulate.h"
#include "ends.h"
#include "fallback.h"
#include "flow.h"
#include "protocol.h"
#include "ready.h"
#include "sys.h"
#include "wait.h"

#include <errno.h>

/* TCP's bytes ahead of those of the ring that haven't been peeked at; UINT64_MAX: it isn't known
 * yet. */
static uint64_t before_ring(const struct transfer *t, uint32_t peeked)
{
        uint64_t start = load_acquire(&t->view.ring->start);
        uint64_t position = load_relaxed(&t->flow->position), before;
        int offset = 0;

        if (!start || start - 1 <= position)
                return UINT64_MAX;
        before = start - 1 - position;
        if (peeked)
                offset = sys_option(t->o->fd, SOL_SOCKET, SO_PEEK_OFF);
        if (offset <= 0)
                return before;
        return before > (uint64_t)offset ? before - (uint64_t)offset : 0;
}

/* Copy `wanted` bytes of the ring from `position` on, and take none. */
static void copy(struct transfer *t, uint64_t position, size_t wanted)
{
        for (size_t seen = 0; seen < wanted;) {
                size_t run;
                unsigned char *place = ring_to_take(&t->view, position + seen, &run);

                run = run < wanted - seen ? run : wanted - seen;
                if (!(t->o->flags & MSG_TRUNC))
                        cursor_copy(&t->cursor, place, run, false);
                seen += run;
        }
}

/* Peek at bytes: those of TCP that come before the ring, and those in the ring. Returns as the
 * functions of boundary.h; -ENODATA: the ring has ended, and all of it has been peeked at. `*edge`:
 * where the ring's bytes ended. */
static long peek_now(struct transfer *t, uint64_t *edge)
{
        struct operation *o = t->o;
        struct end *end = t->end;
        uint64_t head = load_relaxed(&t->flow->edge);
        uint32_t peeked = load_relaxed(&end->peeked), from = peeked ? peeked - 1 : 0;
        size_t done = 0, wanted;
        int64_t ready = ring_ready(t->flow, &t->view);

        t->cursor = (struct cursor){.vec = o->vec};
        *edge = head + (ready > 0 ? (uint64_t)ready : 0);
        if (ready < 0)
                return -EPROTO;
        if (load_relaxed(&t->flow->phase) == PHASE_READY) {
                uint64_t before = before_ring(t, peeked);
                long got = before ? boundary_before(t, before < o->size ? before : o->size) : 0;

                if (before && (got <= 0 || (uint64_t)got != before))
                        return got;
                done = (size_t)got;
                if (!(o->flags & MSG_TRUNC))
                        cursor_skip(&t->cursor, done);
        }
        if (from && from >= ready)
                return done ? (long)done : ready_end(end) ? -ENODATA : -EAGAIN;
        if (!ready)
                return done ? (long)done : boundary_behind(t);
        wanted = o->size - done < (size_t)ready - from ? o->size - done : (size_t)ready - from;
        copy(t, head + from, wanted);
        if (peeked)
                store_relaxed(&end->peeked, peeked + (uint32_t)wanted);
        return (long)(done + wanted);
}

/* A call that peeks. */
struct peek {
        struct transfer t;
        struct operation one; /* what is peeked at: of no bytes, one */
        char byte;
        bool all;      /* the call waits for all of its bytes */
        bool last;     /* nothing more will come: what there is is the answer */
        bool left;     /* the connection is falling back to TCP, as a ring can't hold so much */
        bool over;     /* at the last step the ring had ended */
        long error;    /* of the last wait */
        uint64_t edge; /* where the ring's bytes ended at the last step */
};

/* Under the lock. */
static enum outcome peek_step(struct peek *p, enum taken taken)
{
        struct transfer *t = &p->t;
        enum outcome outcome = transfer_enter(t, taken);

        if (outcome != OUTCOME_RING)
                return outcome;
        t->view = end_receives(t->end);
        t->moved = peek_now(t, &p->edge);
        p->over = ready_end(t->end);
        if (t->moved == -EPROTO)
                reset_corrupt(t->o->fd, t->end);
        if (t->moved == -ENOLINK)
                reset_broken(t->o->fd, t->end, true);
        return outcome;
}

/* There are too few bytes. True: go on; false: the call returns `*answer`. */
static bool await_more(struct peek *p, ssize_t *answer)
{
        struct transfer *t = &p->t;
        struct end *end = t->end;
        long got = t->moved;
        bool beyond;

        if (load_relaxed(&end->shut) & SHUT_READ && got < 0)
                return transfer_ends(answer, 0);
        if (p->error || !transfer_may_wait(t))
                return transfer_ends(answer, got > 0 ? got : result(p->error ? p->error : -EAGAIN));
        /* More than a ring may hold: TCP holds as much as it holds. */
        if (got > 0 && !p->left && t->o->size > ring_limit(&t->view)) {
                p->left = true;
                fall_back(t->o->fd, end, t->key, REASON_OPTION);
                return true;
        }
        t->event = false;
        beyond = got > 0 || load_relaxed(&end->peeked);
        p->error =
            wait_for(t->o->fd, end, t->key, WANT_BYTES, beyond ? &p->edge : NULL, &t->deadline, &t->event);
        /* What was there before is still there: it is peeked at once more, with what has come. */
        p->last = p->error < 0 || (t->event && !view_remote(&t->view)) || ready_broken(end);
        return true;
}

/* After a step in the ring, without the lock. True: go on; false: the call returns `*answer`. */
static bool goes_on(struct peek *p, struct operation *o, ssize_t *answer)
{
        struct transfer *t = &p->t;
        long got = t->moved;

        if (got == -EINPROGRESS || got == -EINTR)
                return true;
        if (got > 0)
                emulate_description(t);
        if (got > 0 &&
            (!p->all || (size_t)got == t->o->size || p->last || (p->over && t->phase == PHASE_READY)))
                return transfer_ends(answer, o->size ? got : 0);
        if (got > 0 && p->over) {
                /* Beyond what has come through a ring that has ended, peeks go on in TCP. */
                if (!flow_begin_wait(t->end, t->flow))
                        return true;
                t->done = (size_t)got;
                t->cursor = (struct cursor){.vec = t->o->vec};
                if (!(t->o->flags & MSG_TRUNC))
                        cursor_skip(&t->cursor, t->done);
                *answer = transfer_rest(t, t->o->size, false);
                if (end_is(t->end, t->key))
                        flow_end_wait(t->end);
                return false;
        }
        if (got > 0 || got == -EAGAIN)
                return await_more(p, answer);
        if (got == -EBADF || got == -ENOTSOCK)
                end_forget(o->fd);
        if (got == -EBADF || got == -ENOTSOCK || got == -ENODATA)
                return transfer_ends(answer, operation_native(o));
        boundary_closed(t->end);
        emulate_description(t);
        return transfer_ends(answer,
                             result(got == -EPROTO || got == -ENOLINK || got == -EBADE ? -ECONNRESET : got));
}

ssize_t transfer_peek(struct operation *o, struct end *end, uint64_t key)
{
        struct peek p = {.one = *o, .all = o->flags & MSG_WAITALL && o->size && !load_relaxed(&end->peeked)};
        struct transfer *t = &p.t;
        ssize_t answer;

        *t = (struct transfer){.o = &p.one, .end = end, .key = key, .flow = &end->rx};
        if (!o->size) {
                p.one.one = (struct iovec){&p.byte, 1};
                p.one.vec = &p.one.one;
                p.one.count = 1;
                p.one.size = 1;
                p.one.flags |= MSG_PEEK;
        }
        for (;;) {
                enum taken taken = lock_take(&t->flow->lock, self());
                enum outcome outcome = peek_step(&p, taken);
                uint32_t error;

                lock_release(&t->flow->lock, taken);
                switch (outcome) {
                case OUTCOME_RING:
                        if (!goes_on(&p, o, &answer))
                                return answer;
                        break;
                case OUTCOME_TCP:
                        answer = operation_native(o);
                        transfer_leave_kernel(t);
                        return answer;
                case OUTCOME_OVER:
                        error = atomic_exchange_explicit(&end->error, 0, memory_order_relaxed);
                        answer = error ? result(-(long)error) : operation_native(o);
                        transfer_leave_kernel(t);
                        return answer;
                default:
                        return operation_native(o);
                }
        }
}
