#include "send.h"

#include "clock.h"
#include "fallback.h"
#include "file.h"
#include "poller.h"
#include "protocol.h"
#include "raw.h"
#include "ready.h"
#include "router.h"
#include "statistics.h"
#include "sys.h"
#include "upgrade.h"
#include "wait.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>

/* A reservation that handlers can't put anything behind: how much it will be isn't known. */
#define RESERVED_WHOLE UINT64_MAX

/* --- where a sender's bytes come from --- */

/* Fill a piece of the ring from the call's source. Returns bytes, 0 at the end of a file, or
 * -errno; never waits. */
static long fill(struct operation *o, struct cursor *cursor, unsigned char *place, size_t size, size_t ahead)
{
        long got;

        switch (o->call) {
        case CALL_SENDFILE:
                return file_read(o, place, size, file_position(o) + (off_t)ahead);
        case CALL_SPLICE_IN:
                got = pipe_now(SYS_read, o->other, POLLIN, place, size);
                return got == -EAGAIN ? (ahead ? 0 : -ENOBUFS) : got;
        default:
                cursor_copy(cursor, place, size, true);
                return (long)size;
        }
}

/* A source can't be read: the kernel's own error for this source and socket, if it has one. A pipe
 * and a socket can't seek, and reading at an offset has taken nothing from them. */
static long refusal(struct operation *o, long error)
{
        long refused = o->call == CALL_SENDFILE ? sys_4(SYS_sendfile, o->fd, o->other, o->offset, 0) : 0;

        o->refused = refused < 0;
        return refused < 0 ? refused : error;
}

/* --- putting --- */

/* What a signal handler sends while its thread is in the middle of putting a piece comes behind
 * that piece, and is published with it. */
static long put_behind(struct transfer *t, size_t left)
{
        struct flow *flow = t->flow;
        const struct view *view = &t->view;
        uint64_t from = load_relaxed(&flow->reserved);
        uint64_t used = from - load_acquire(&view->ring->head);
        size_t put = 0, wanted;

        if (from == RESERVED_WHOLE || used >= ring_limit(view) || t->o->call == CALL_SENDFILE ||
            t->o->call == CALL_SPLICE_IN)
                return -EAGAIN;
        wanted = ring_within(flow, view, from, ring_limit(view) - used);
        if (!wanted)
                return -EAGAIN;
        wanted = wanted < left ? wanted : left;
        /* First the place, then the bytes: another handler may come in between. */
        store_relaxed(&flow->reserved, from + wanted);
        atomic_signal_fence(memory_order_seq_cst);
        while (put < wanted) {
                size_t run;
                unsigned char *place = ring_to_put(flow, view, from + put, &run);

                run = run < wanted - put ? run : wanted - put;
                cursor_copy(&t->cursor, place, run, true);
                put += run;
        }
        return (long)put;
}

/* Reserve a place in the ring for `left` bytes or fewer, so that handlers put theirs behind it.
 * Returns its size, 0 if there is no room, or -EPROTO; `*tail`: where it begins. */
static inline long reserve_piece(struct flow *flow, const struct view *view, size_t left, bool copies,
                                 uint64_t *tail)
{
        size_t wanted;

        do {
                int64_t space;

                *tail = load_relaxed(&flow->edge);
                space = ring_space(flow, view, left, ring_limit(view));
                if (space <= 0)
                        return space < 0 ? -EPROTO : 0;
                wanted = left < (size_t)space ? left : (size_t)space;
                if (wanted > PIECE)
                        wanted = PIECE;
                store_relaxed(&flow->reserved, copies ? *tail + wanted : RESERVED_WHOLE);
                atomic_signal_fence(memory_order_seq_cst);
                /* A handler that came before the reservation has put its bytes as anybody does. */
        } while (load_relaxed(&flow->edge) != *tail && (store_relaxed(&flow->reserved, 0), true));
        return (long)wanted;
}

/* Publish `put` bytes from `tail` on, and what handlers have put behind them. */
static inline void publish(struct transfer *t, uint64_t tail, size_t put, bool copies, uint64_t stamp)
{
        struct flow *flow = t->flow;

        atomic_signal_fence(memory_order_seq_cst);
        /* While the reservation still stands: a handler that comes now goes behind it, and is
         * published next.
         */
        for (;;) {
                uint64_t last = copies ? load_relaxed(&flow->reserved) : tail + put;

                if (view_remote(&t->view) && !tail && last)
                        upgrade_start(t->end, &t->view);
                ring_put(flow, &t->view, tail, last - tail, stamp);
                tail = last;
                if (!copies)
                        last = RESERVED_WHOLE;
                if (atomic_compare_exchange_strong_explicit(&flow->reserved, &last, 0, memory_order_relaxed,
                                                            memory_order_relaxed))
                        break;
        }
}

/* Put what fits, up to PIECE. Returns bytes put, 0 if there is no room, or -errno; `*out`: the
 * source has no more. */
static long put_piece(struct transfer *t, uint64_t stamp, bool *out)
{
        struct operation *o = t->o;
        bool copies = o->call != CALL_SENDFILE && o->call != CALL_SPLICE_IN;
        size_t left = o->size - t->done, put = 0;
        uint64_t tail;
        long wanted;

        if (load_relaxed(&t->flow->reserved))
                return put_behind(t, left);
        wanted = reserve_piece(t->flow, &t->view, left, copies, &tail);
        if (wanted <= 0)
                return wanted < 0 || t->done ? wanted : refusal(o, 0);
        while (put < (size_t)wanted) {
                size_t run;
                unsigned char *place = ring_to_put(t->flow, &t->view, tail + put, &run);
                long got =
                    fill(o, &t->cursor, place, run < (size_t)wanted - put ? run : (size_t)wanted - put, put);

                if (got <= 0) {
                        if (!put && got < 0) {
                                store_relaxed(&t->flow->reserved, 0);
                                return t->done ? got : refusal(o, got);
                        }
                        /* What a pipe has now is enough; a file that ends has no more. */
                        *out = got != -ENODATA;
                        break;
                }
                put += (size_t)got;
        }
        publish(t, tail, put, copies, stamp);
        if (o->call == CALL_SENDFILE)
                file_advance(o, file_position(o) + (off_t)put);
        return (long)put;
}

/* --- steps --- */

__attribute__((noinline)) static bool ask_kernel(struct transfer *t)
{
        return (process.restless && fallback_at_random(t->end)) || sys_poll(t->o->fd, POLLRDHUP);
}

/* Has the peer closed, or the connection failed? The kernel is asked once per tick of the coarse
 * clock, and when it may have an event (ready.h). */
static inline bool peer_is_gone(struct transfer *t)
{
        uint32_t stamp = ready_stamp();

        if (!t->event && load_relaxed(&t->flow->checked) == stamp)
                return false;
        store_relaxed(&t->flow->checked, stamp);
        return ask_kernel(t);
}

/* The peer requests it, or has closed. */
static void go_back(struct transfer *t)
{
        int fd = t->o->fd;
        bool raw = load_relaxed(&t->view.ring->stop) == STOP_RAW;

        /* A receiver that requests it for another reason doesn't know that something bypassed the
         * ring. */
        if (!raw && raw_check(fd, t->end) == RAW_BYPASSED) {
                fallback_bypassed(fd, t->end);
                return;
        }
        if (raw)
                router_note(t->end, REASON_RAW);
        fallback_sender(fd, t->end, raw ? REASON_RAW : REASON_PEER_CLOSED);
}

/* While the ring is `busy`: put a piece, if bytes still go to the ring. */
static inline enum outcome put_now(struct transfer *t, enum taken taken, bool *out)
{
        struct operation *o = t->o;
        uint64_t stamp;
        enum raw raw;

        if (__builtin_expect(load_relaxed(&t->view.ring->stop), 0) || peer_is_gone(t))
                return OUTCOME_FALL_BACK;
        if (view_remote(&t->view) && ready_broken(t->end))
                return OUTCOME_BROKEN;
        t->event = false;
        stamp = clock_stamp();
        raw = taken == LOCK_TAKEN ? raw_before_put(o->fd, t->end, stamp) : RAW_UNKNOWN;
        if (__builtin_expect(raw == RAW_BYPASSED || raw == RAW_LOST, 0))
                return raw == RAW_LOST ? OUTCOME_LOST : OUTCOME_BYPASSED;
        t->moved = o->size > t->done ? put_piece(t, stamp, out) : 0;
        if (t->moved > 0)
                raw_after_put(o->fd, t->end, stamp, (size_t)t->moved);
        store_relaxed(&t->view.ring->sender_cpu, core());
        if (t->moved > 0)
                return OUTCOME_MOVED;
        return t->moved == -EPROTO ? OUTCOME_CORRUPT : OUTCOME_NOT_NOW;
}

/* Under the lock. */
__attribute__((noinline)) static enum outcome leave_ring(struct transfer *t, enum outcome why)
{
        int fd = t->o->fd;

        switch (why) {
        case OUTCOME_FALL_BACK:
                go_back(t);
                return OUTCOME_AGAIN;
        case OUTCOME_BYPASSED:
                if (!end_is_behind(fd, t->end))
                        return OUTCOME_LOST;
                fallback_bypassed(fd, t->end);
                return OUTCOME_AGAIN;
        case OUTCOME_BROKEN:
                reset_broken(fd, t->end, false);
                return why;
        case OUTCOME_CORRUPT:
                reset_corrupt(fd, t->end);
                return why;
        default:
                return why;
        }
}

/* Under the lock. */
static inline enum outcome send_step(struct transfer *t, enum taken taken, bool *out)
{
        enum outcome outcome = transfer_enter(t, taken);

        if (__builtin_expect(outcome != OUTCOME_RING, 0))
                return outcome;
        if (t->o->by_kernel || load_relaxed(&t->end->shut) & SHUT_WRITE) {
                fallback_sender(t->o->fd, t->end, REASON_OPTION);
                return OUTCOME_AGAIN;
        }
        t->view = end_sends(t->end);
        store_relaxed(&t->view.ring->busy, 1);
        /* Pairs with the barrier that a receiver which requests the fallback makes all cores
         * execute. */
        atomic_signal_fence(memory_order_seq_cst);
        outcome = put_now(t, taken, out);
        store_release(&t->view.ring->busy, 0);
        if (__builtin_expect(outcome == OUTCOME_MOVED, 1))
                return outcome;
        if (outcome != OUTCOME_NOT_NOW)
                return leave_ring(t, outcome);
        if (!t->moved && t->o->size > t->done && !*out)
                poller_sender_full(t->end);
        return outcome;
}

static ssize_t sent(const struct transfer *t)
{
        statistics_add(&statistics.sent, t->done);
        return (ssize_t)t->done;
}

/* Nothing could be put: wait for room, or for the source. True: go on; false: the call returns
 * `*answer`. */
static bool await_room(struct transfer *t, ssize_t *answer)
{
        struct operation *o = t->o;
        long status = t->moved;
        bool is_full = !status;

        if (status == -EINTR)
                return true;
        if (status == -ENOBUFS && !t->done)
                status = pipe_await(o, POLLIN);
        else if (status == -ENODATA)
                status = file_read_ahead(o, o->size - t->done);
        if (!status && !is_full)
                return true;
        /* The source's end, or a source that only the kernel can read. */
        if (status == -ENODATA)
                return transfer_ends(answer, sent(t));
        if (status < 0 && status != -EAGAIN && o->call == CALL_SENDFILE && !t->done && !o->refused &&
            !o->by_kernel) {
                o->by_kernel = true;
                return true;
        }
        if (status == -ENOBUFS)
                status = -EAGAIN;
        if (!status)
                status = transfer_may_wait(t)
                             ? wait_for(o->fd, t->end, t->key, WANT_SPACE, NULL, &t->deadline, &t->event)
                             : -EAGAIN;
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
                return await_room(t, answer);
        case OUTCOME_OVER:
                if (transfer_reenters(t))
                        return true;
                __attribute__((fallthrough));
        case OUTCOME_TCP:
                *answer = transfer_rest(t, t->o->size, true);
                transfer_leave_kernel(t);
                return false;
        case OUTCOME_BROKEN:
                *answer = (ssize_t)t->done;
                return !t->done;
        case OUTCOME_LOST:
                if (transfer_find(t))
                        return true;
                return transfer_ends(answer, transfer_native(t));
        case OUTCOME_GONE:
                return transfer_ends(answer, transfer_native(t));
        case OUTCOME_CORRUPT:
                if (!t->done && (!(t->o->flags & MSG_NOSIGNAL) || operation_is_splice(t->o)))
                        real()->raise(SIGPIPE);
                return transfer_ends(answer, transfer_result(t, -ECONNRESET));
        default:
                return true;
        }
}

ssize_t transfer_send(struct operation *o, struct end *end, uint64_t key)
{
        struct transfer t = {.o = o, .end = end, .key = key, .flow = &end->tx, .cursor = {.vec = o->vec}};
        bool out = false; /* the source has no more */
        ssize_t answer;

        for (;;) {
                enum taken taken = lock_take(&t.flow->lock, self());
                enum outcome outcome = send_step(&t, taken, &out);

                lock_release(&t.flow->lock, taken);
                if (__builtin_expect(outcome == OUTCOME_MOVED, 1)) {
                        wake(&t.view.ring->receivers, t.end);
                        t.done += (size_t)t.moved;
                }
                if ((outcome == OUTCOME_MOVED || outcome == OUTCOME_NOT_NOW) && (t.done == o->size || out))
                        return sent(&t);
                if (outcome != OUTCOME_MOVED && !goes_on(&t, outcome, &answer))
                        return answer;
        }
}
