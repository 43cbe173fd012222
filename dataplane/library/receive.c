#include "receive.h"

#include "arena.h"
#include "boundary.h"
#include "budget.h"
#include "clock.h"
#include "emulate.h"
#include "ends.h"
#include "fallback.h"
#include "identity.h"
#include "peek.h"
#include "ready.h"
#include "statistics.h"
#include "sys.h"
#include "wait.h"

#include <errno.h>
#include <poll.h>

/* --- where a receiver's bytes go --- */

/* Give a piece of the ring to the call's buffers or pipe. */
static long empty(struct operation *o, struct cursor *cursor, unsigned char *place, size_t size)
{
        if (o->call == CALL_SPLICE_OUT) {
                long put = pipe_now(SYS_write, o->other, POLLOUT, place, size);

                return put == -EAGAIN ? -ENOBUFS : put;
        }
        if (!(o->flags & MSG_TRUNC))
                cursor_copy(cursor, place, size, false);
        return (long)size;
}

/* As cursor_copy() out of the ring, by arena_copy(). */
static bool copy_from_file(const struct end *end, struct cursor *cursor, const unsigned char *place,
                           size_t size)
{
        while (size) {
                size_t left = cursor_left(cursor), part = left < size ? left : size;

                if (part &&
                    !arena_copy(end, place, (unsigned char *)cursor->vec->iov_base + cursor->offset, part))
                        return false;
                place += part;
                size -= part;
                cursor_move(cursor, part);
        }
        return true;
}

/* The same as empty(), of a piece that must not be read by its mapping (budget.h). */
static long empty_from_file(struct operation *o, struct end *end, struct cursor *cursor, unsigned char *place,
                            size_t size)
{
        unsigned char page[PIPE_PAGE];
        struct cursor before = *cursor;

        if (o->call == CALL_SPLICE_OUT) {
                if (size > PIPE_PAGE)
                        size = PIPE_PAGE;
                return empty(o, cursor, arena_copy(end, place, page, size) ? page : place, size);
        }
        if (o->flags & MSG_TRUNC || copy_from_file(end, cursor, place, size))
                return (long)size;
        *cursor = before;
        return empty(o, cursor, place, size);
}

static bool may_map(struct flow *flow, const struct view *view, const unsigned char *place, size_t size)
{
        /* The first bytes are in the slot's own page, which the router has made; all of a remote
         * ring is there. */
        uint64_t offset = (uint64_t)(place - view_bulk(view));

        return offset >= view_size(view) || view_remote(view) || budget_may_read(flow, offset + size);
}

/* --- taking --- */

/* Take what is in the ring. Returns bytes, 0 if it is empty, or -errno. */
static inline long take_piece(struct transfer *t, size_t left)
{
        struct operation *o = t->o;
        struct flow *flow = t->flow;
        struct view *view = &t->view;

        for (;;) {
                uint64_t head = load_relaxed(&flow->edge);
                int64_t ready = ring_ready(flow, view);
                struct cursor before = t->cursor;
                size_t taken = 0, wanted;

                if (ready <= 0)
                        return ready < 0 ? -EPROTO : 0;
                wanted = left < (size_t)ready ? left : (size_t)ready;
                if (wanted > PIECE)
                        wanted = PIECE;
                while (taken < wanted) {
                        size_t run;
                        unsigned char *place = ring_to_take(view, head + taken, &run);
                        long got;

                        run = run < wanted - taken ? run : wanted - taken;
                        got = __builtin_expect(may_map(flow, view, place, run), 1)
                                  ? empty(o, &t->cursor, place, run)
                                  : empty_from_file(o, t->end, &t->cursor, place, run);
                        if (got <= 0) {
                                if (!taken)
                                        return got < 0 ? got : -EPIPE;
                                break;
                        }
                        taken += (size_t)got;
                }
                if (ring_take(flow, view, head, taken))
                        return (long)taken;
                if (o->call == CALL_SPLICE_OUT)
                        return -EINTR;
                /* A signal handler has taken bytes meanwhile: begin again. */
                t->cursor = before;
        }
}

/* Take what there is now, from TCP or the ring. Returns as the functions of boundary.h. */
static inline long take_now(struct transfer *t)
{
        struct operation *o = t->o;
        struct end *end = t->end;
        size_t left = o->size - t->done;
        long got;

        if (!left)
                return 0;
        if (t->phase == PHASE_READY) {
                got = boundary_before(t, left);
                if (got > 0 && o->call != CALL_SPLICE_OUT && !(o->flags & MSG_TRUNC))
                        cursor_skip(&t->cursor, (size_t)got);
                if (got > 0)
                        boundary_tell(t);
                return got;
        }
        got = take_piece(t, left);
        store_relaxed(&t->view.ring->receiver_cpu, core());
        if (got > 0) {
                statistics_add(&statistics.received, (uint64_t)got);
                if (__builtin_expect(view_remote(&t->view) || load_relaxed(&t->view.ring->end), 0))
                        boundary_tell(t);
                if (__builtin_expect(load_relaxed(&end->low) | load_relaxed(&end->peeked), 0))
                        emulate_taken(t, (uint64_t)got);
        }
        if (got == 0 && emulate_is_enough(t))
                return -EAGAIN;
        return got ? got : boundary_behind(t);
}

/* Senders that wait have said how empty the ring must be for them. */
static void wake_senders(struct end *end, const struct view *view)
{
        struct waiters *senders = &view->ring->senders;
        uint64_t used;

        atomic_thread_fence(memory_order_seq_cst);
        if (!load_relaxed(&senders->any))
                return;
        used = load_relaxed(&view->ring->tail) - load_relaxed(&end->rx.edge);
        if (used + view_remote(view) <= load_relaxed(&view->ring->room))
                ring_bells(senders, &end->place);
}

/* --- steps --- */

/* Under the lock. */
static inline enum outcome receive_step(struct transfer *t, enum taken taken)
{
        enum outcome outcome = transfer_enter(t, taken);
        int fd = t->o->fd;

        if (__builtin_expect(outcome != OUTCOME_RING, 0))
                return outcome;
        if (__builtin_expect(!identity_holds(fd, t->end), 0))
                return OUTCOME_LOST;
        t->view = end_receives(t->end);
        t->moved = take_now(t);
        t->event = false;
        if (__builtin_expect(t->moved > 0, 1))
                return OUTCOME_MOVED;
        if ((t->moved == -EBADF || t->moved == -ENOTSOCK) && !end_is_behind(fd, t->end))
                return OUTCOME_LOST;
        if (t->moved == -EPROTO)
                reset_corrupt(fd, t->end);
        if (t->moved == -ENOLINK)
                reset_broken(fd, t->end, true);
        return OUTCOME_NOT_NOW;
}

/* The rest of a receive goes on over TCP. The kernel wakes nobody for less than SO_RCVLOWAT. */
static ssize_t receive_rest(struct transfer *t)
{
        uint32_t low = load_relaxed(&t->end->low), error;
        size_t least = emulate_least(t);
        bool began = t->done;
        ssize_t got;

        if (emulate_is_enough(t))
                return (ssize_t)t->done;
        error = atomic_exchange_explicit(&t->end->error, 0, memory_order_relaxed);
        if (error)
                return transfer_result(t, -(long)error);
        if (began && low)
                emulate_low_water(t->o->fd, (uint32_t)(least - t->done), 0);
        got = transfer_rest(t, least, false);
        if (began && low)
                emulate_low_water(t->o->fd, low, 0);
        if (!got)
                boundary_closed(t->end);
        return got;
}

/* Nothing could be taken: wait, or end the call. True: go on; false: the call returns `*answer`. */
static bool await_bytes(struct transfer *t, ssize_t *answer)
{
        struct operation *o = t->o;
        long status = t->moved;

        switch (status) {
        case -EINPROGRESS:
        case -EINTR:
                return true;
        case -EAGAIN:
                if (emulate_is_enough(t) || load_relaxed(&t->end->shut) & SHUT_READ)
                        return transfer_ends(answer, (ssize_t)t->done);
                status = transfer_may_wait(t)
                             ? wait_for(o->fd, t->end, t->key, WANT_BYTES, NULL, &t->deadline, &t->event)
                             : -EAGAIN;
                break;
        case -ENOBUFS:
                status = t->done ? -EAGAIN : pipe_await(o, POLLOUT);
                break;
        case -EBADF:
        case -ENOTSOCK:
                /* Closed by a call that the library did not see; the number is another file's, or
                 * nobody's.
                 */
                end_forget(o->fd);
                return transfer_ends(answer, transfer_native(t));
        default:
                /* The end of the connection, or its error: the kernel reports it only once, and has
                 * done so.
                 */
                boundary_closed(t->end);
                emulate_description(t);
                if (status == -EPROTO || status == -ENOLINK || status == -EBADE)
                        status = -ECONNRESET;
                if (t->done && status < 0)
                        store_relaxed(&t->end->error, (uint32_t)-status);
                return transfer_ends(answer, transfer_result(t, status));
        }
        if (status < 0)
                *answer = transfer_result(t, status);
        return status >= 0;
}

/* After a step that moved nothing, without the lock. True: take the next one; false: the call
 * returns `*answer`. */
static bool goes_on(struct transfer *t, enum outcome outcome, ssize_t *answer)
{
        switch (outcome) {
        case OUTCOME_NOT_NOW:
                return await_bytes(t, answer);
        case OUTCOME_OVER:
                if (transfer_reenters(t))
                        return true;
                __attribute__((fallthrough));
        case OUTCOME_TCP:
                *answer = outcome == OUTCOME_OVER || t->done ? receive_rest(t)
                                                             : transfer_rest(t, t->o->size, false);
                transfer_leave_kernel(t);
                return false;
        case OUTCOME_LOST:
                if (transfer_find(t))
                        return true;
                return transfer_ends(answer, transfer_native(t));
        default:
                return transfer_ends(answer, transfer_native(t));
        }
}

ssize_t transfer_receive(struct operation *o, struct end *end, uint64_t key)
{
        struct transfer t = {.o = o, .end = end, .key = key, .flow = &end->rx, .cursor = {.vec = o->vec}};
        int flags = operation_is_splice(o) ? 0 : o->flags;
        ssize_t answer;

        if (flags & (MSG_OOB | MSG_ERRQUEUE))
                return operation_native(o);
        if (__builtin_expect(flags & MSG_PEEK || !o->size, 0))
                return o->size || (o->call != CALL_READ && o->call != CALL_READV) ? transfer_peek(o, end, key)
                                                                                  : 0;
        for (;;) {
                enum taken taken = lock_take(&t.flow->lock, self());
                enum outcome outcome = receive_step(&t, taken);

                lock_release(&t.flow->lock, taken);
                if (__builtin_expect(outcome == OUTCOME_MOVED, 1)) {
                        if (t.phase == PHASE_RING)
                                wake_senders(t.end, &t.view);
                        t.done += (size_t)t.moved;
                        emulate_description(&t);
                        if (t.done == o->size || (t.phase == PHASE_READY && emulate_is_enough(&t)))
                                return (ssize_t)t.done;
                } else if (!goes_on(&t, outcome, &answer)) {
                        return answer;
                }
        }
}
