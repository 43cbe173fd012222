#include "transfer.h"

#include "arena.h"
#include "clock.h"
#include "poller.h"
#include "protocol.h"
#include "raw.h"
#include "ready.h"
#include "remote.h"
#include "router.h"
#include "settings.h"
#include "statistics.h"
#include "sys.h"
#include "upgrade.h"
#include "wait.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>

enum {
        PIECE = 128 * 1024, /* bytes after which the other side may begin */
        VECTORS = 16,       /* buffers of a call that is shortened */
        PIPE_PAGE = 4096,   /* what a pipe that says POLLOUT takes without blocking */
};

/* A reservation that handlers can't put anything behind: how much it will be isn't known. */
#define RESERVED_WHOLE UINT64_MAX

ssize_t operation_native(const struct operation *o)
{
        struct real *functions = real();

        switch (o->call) {
        case CALL_READ:
                return functions->read(o->fd, o->one.iov_base, o->one.iov_len);
        case CALL_READV:
                return functions->readv(o->fd, o->vec, o->count);
        case CALL_RECV:
                return functions->recv(o->fd, o->one.iov_base, o->one.iov_len, o->flags);
        case CALL_RECVFROM:
                return functions->recvfrom(o->fd, o->one.iov_base, o->one.iov_len, o->flags, o->address,
                                           o->address_size);
        case CALL_RECVMSG:
                return functions->recvmsg(o->fd, o->message, o->flags);
        case CALL_WRITE:
                return functions->write(o->fd, o->one.iov_base, o->one.iov_len);
        case CALL_WRITEV:
                return functions->writev(o->fd, o->vec, o->count);
        case CALL_SEND:
                return functions->send(o->fd, o->one.iov_base, o->one.iov_len, o->flags);
        case CALL_SENDTO:
                return functions->sendto(o->fd, o->one.iov_base, o->one.iov_len, o->flags, o->address,
                                         o->size_of_address);
        case CALL_SENDMSG:
                return functions->sendmsg(o->fd, o->message, o->flags);
        case CALL_SENDFILE:
                return functions->sendfile(o->fd, o->other, o->offset, o->size);
        case CALL_SPLICE_IN:
                return functions->splice(o->other, NULL, o->fd, NULL, o->size, (unsigned)o->flags);
        case CALL_SPLICE_OUT:
                return functions->splice(o->fd, NULL, o->other, NULL, o->size, (unsigned)o->flags);
        }
        __builtin_unreachable();
}

static bool is_splice(const struct operation *o)
{
        return o->call == CALL_SPLICE_IN || o->call == CALL_SPLICE_OUT;
}

static bool may_wait(const struct operation *o, const struct end *end)
{
        if (atomic_load_explicit(&end->nonblocking, memory_order_relaxed))
                return false;
        if (is_splice(o))
                return !((unsigned)o->flags & SPLICE_F_NONBLOCK);
        return !(o->flags & MSG_DONTWAIT);
}

/* A call on a connection that is not in a ring, counted. */
static ssize_t native_counted(struct operation *o, struct flow *flow, bool counts, enum taken taken)
{
        ssize_t moved;

        atomic_fetch_add_explicit(&flow->kernel, 1, memory_order_relaxed);
        lock_release(&flow->lock, taken);
        moved = operation_native(o);
        if (moved > 0 && counts)
                atomic_fetch_add_explicit(&flow->position, (uint64_t)moved, memory_order_relaxed);
        /* Whoever sees the counter at zero sees the position. */
        atomic_fetch_sub_explicit(&flow->kernel, 1, memory_order_release);
        return moved;
}

/* What the C library returns: bytes moved so far, or the error. */
static ssize_t finish(size_t done, long outcome)
{
        if (done)
                return (ssize_t)done;
        return result(outcome);
}

/* Buffers of the call from the cursor on, `size` bytes at most. Returns their number. */
static int shortened(const struct operation *o, const struct cursor *cursor, size_t size, struct iovec *vec)
{
        const struct iovec *last = o->vec + o->count;
        size_t offset = cursor->offset;
        int count = 0;

        for (const struct iovec *from = cursor->vec; from < last && size && count < VECTORS; from++) {
                size_t part = from->iov_len - offset;

                if (part > size)
                        part = size;
                vec[count++] = (struct iovec){(char *)from->iov_base + offset, part};
                size -= part;
                offset = 0;
        }
        return count;
}

/* The rest of a call goes on over TCP after the ring has ended. */
static ssize_t native_rest(struct operation *o, const struct cursor *cursor, size_t done, bool sending)
{
        struct iovec vec[VECTORS];
        struct msghdr message = {.msg_iov = vec};
        ssize_t moved;

        if (!done)
                return operation_native(o);
        if (o->call == CALL_SENDFILE || is_splice(o)) {
                o->size -= done;
                moved = operation_native(o);
                o->size += done;
        } else {
                message.msg_iovlen = (size_t)shortened(o, cursor, o->size - done, vec);
                moved = sending ? real()->sendmsg(o->fd, &message, o->flags)
                                : real()->recvmsg(o->fd, &message, o->flags);
        }
        return finish(done + (moved > 0 ? (size_t)moved : 0), 0);
}

/* --- sending --- */

/* Has the peer closed, or the connection failed? The kernel is asked once per tick of the coarse clock, and
 * when it may have news (ready.h). */
static bool peer_is_gone(int fd, struct end *end, bool news)
{
        uint32_t stamp = ready_stamp();
        struct pollfd polled = {.fd = fd, .events = POLLRDHUP};
        struct timespec at_once = {0};

        if (!news && atomic_load_explicit(&end->tx.checked, memory_order_relaxed) == stamp)
                return false;
        atomic_store_explicit(&end->tx.checked, stamp, memory_order_relaxed);
        return sys_5(SYS_ppoll, &polled, 1, &at_once, 0, 0) > 0;
}

/* Fill a piece of the ring from where the call takes its bytes. Returns bytes, 0 at the end of a file, or
 * -errno. */
static long fill(struct operation *o, struct cursor *cursor, unsigned char *place, size_t size, size_t ahead)
{
        switch (o->call) {
        case CALL_SENDFILE:
                if (o->offset)
                        return sys_4(SYS_pread64, o->other, place, size, *o->offset + (off_t)ahead);
                return sys_3(SYS_read, o->other, place, size);
        case CALL_SPLICE_IN: {
                struct pollfd polled = {.fd = o->other, .events = POLLIN};
                struct timespec at_once = {0};

                /* Never waits for the pipe under the lock. */
                if (sys_5(SYS_ppoll, &polled, 1, &at_once, 0, 0) <= 0)
                        return ahead ? 0 : -ENOBUFS;
                return sys_3(SYS_read, o->other, place, size);
        }
        default:
                cursor_copy(cursor, place, size, true);
                return (long)size;
        }
}

/* What a signal handler sends while its thread is in the middle of putting a piece comes behind that piece,
 * and is published with it. */
static long put_behind(struct operation *o, struct end *end, const struct view *view, struct cursor *cursor,
                       size_t left)
{
        struct flow *flow = &end->tx;
        uint64_t from = atomic_load_explicit(&flow->reserved, memory_order_relaxed);
        uint64_t used = from - atomic_load_explicit(&view->ring->head, memory_order_acquire);
        size_t put = 0, wanted;

        if (from == RESERVED_WHOLE || used >= ring_limit(view) || o->call == CALL_SENDFILE ||
            o->call == CALL_SPLICE_IN)
                return -EAGAIN;
        wanted = ring_within(flow, view, from, ring_limit(view) - used);
        if (!wanted)
                return -EAGAIN;
        wanted = wanted < left ? wanted : left;
        /* First the place, then the bytes: another handler may come in between. */
        atomic_store_explicit(&flow->reserved, from + wanted, memory_order_relaxed);
        atomic_signal_fence(memory_order_seq_cst);
        while (put < wanted) {
                size_t run;
                unsigned char *place = ring_to_put(flow, view, from + put, &run);

                run = run < wanted - put ? run : wanted - put;
                cursor_copy(cursor, place, run, true);
                put += run;
        }
        return (long)put;
}

/* Put what fits, up to PIECE. Returns bytes put, 0 if there is no room, or -errno; `*out`: the source has no
 * more. */
static long put_piece(struct operation *o, struct end *end, const struct view *view, struct cursor *cursor,
                      size_t done, uint64_t stamp, bool *out)
{
        struct flow *flow = &end->tx;
        bool copies = o->call != CALL_SENDFILE && o->call != CALL_SPLICE_IN;
        size_t left = o->size - done, put = 0, wanted;
        uint64_t tail, last;
        int64_t space;

        if (atomic_load_explicit(&flow->reserved, memory_order_relaxed))
                return put_behind(o, end, view, cursor, left);
        do {
                tail = atomic_load_explicit(&flow->edge, memory_order_relaxed);
                space = ring_space(flow, view, left, ring_limit(view));
                if (space <= 0)
                        return space < 0 ? -EPROTO : 0;
                wanted = left < (size_t)space ? left : (size_t)space;
                if (wanted > PIECE)
                        wanted = PIECE;
                atomic_store_explicit(&flow->reserved, copies ? tail + wanted : RESERVED_WHOLE,
                                      memory_order_relaxed);
                atomic_signal_fence(memory_order_seq_cst);
                /* A handler that came before the reservation has put its bytes as anybody does. */
        } while (atomic_load_explicit(&flow->edge, memory_order_relaxed) != tail &&
                 (atomic_store_explicit(&flow->reserved, 0, memory_order_relaxed), true));
        while (put < wanted) {
                size_t run;
                unsigned char *place = ring_to_put(flow, view, tail + put, &run);
                long got = fill(o, cursor, place, run < wanted - put ? run : wanted - put, put);

                if (got <= 0) {
                        if (!put && got < 0) {
                                atomic_store_explicit(&flow->reserved, 0, memory_order_relaxed);
                                return got;
                        }
                        /* What a pipe has now is enough; a file that ends has no more. */
                        *out = true;
                        break;
                }
                put += (size_t)got;
        }
        atomic_signal_fence(memory_order_seq_cst);
        /* Published while the reservation still stands: a handler that comes now goes behind it, and is
         * published next. */
        for (;;) {
                last = copies ? atomic_load_explicit(&flow->reserved, memory_order_relaxed) : tail + put;
                if (view_remote(view) && !tail && last)
                        upgrade_start(end, view);
                ring_put(flow, view, tail, last - tail, stamp);
                tail = last;
                if (!copies)
                        last = RESERVED_WHOLE;
                if (atomic_compare_exchange_strong_explicit(&flow->reserved, &last, 0, memory_order_relaxed,
                                                            memory_order_relaxed))
                        break;
        }
        if (o->call == CALL_SENDFILE && o->offset)
                *o->offset += (off_t)put;
        return (long)put;
}

/* Wait for the other descriptor of a splice. False: interrupted. */
static bool await_pipe(const struct operation *o, short events)
{
        struct pollfd polled = {.fd = o->other, .events = events};

        return real()->poll(&polled, 1, -1) > 0;
}

static void pipe_error(const struct operation *o)
{
        if (!(o->flags & MSG_NOSIGNAL) || is_splice(o))
                real()->raise(SIGPIPE);
}

/* The peer asked for it, or has closed. Under the lock. */
static void go_back(int fd, struct end *end, const struct view *view)
{
        bool raw = atomic_load_explicit(&view->ring->leave, memory_order_relaxed) == LEAVE_RAW;

        /* A receiver that asks for another reason doesn't know that something went past us. */
        if (!raw && !view_remote(view) && raw_look(fd, end) == RAW_PAST) {
                upgrade_past(fd, end);
                return;
        }
        if (raw)
                router_note(end, REASON_RAW);
        retreat(fd, end, raw ? REASON_RAW : REASON_PEER_CLOSED);
}

ssize_t transfer_send(struct operation *o, struct end *end, uint64_t key)
{
        struct flow *flow = &end->tx;
        struct cursor cursor = {.vec = o->vec};
        bool news = false, out = false;
        uint64_t deadline = 0;
        size_t done = 0;

        for (;;) {
                enum taken taken = lock_take(&flow->lock, self());
                struct view view;
                uint32_t phase;
                uint64_t stamp;
                enum raw raw;
                long put;
                int outcome;

                if (!end_is(end, key)) {
                        lock_release(&flow->lock, taken);
                        return done ? (ssize_t)done : operation_native(o);
                }
                phase = atomic_load_explicit(&flow->phase, memory_order_relaxed);
                if (phase == PHASE_TCP &&
                    atomic_load_explicit(&end->stage, memory_order_relaxed) == STAGE_ATTACHED &&
                    taken == LOCK_TAKEN) {
                        upgrade_sender(o->fd, end);
                        phase = atomic_load_explicit(&flow->phase, memory_order_relaxed);
                }
                if (phase == PHASE_TCP)
                        return native_counted(o, flow, true, taken);
                if (phase == PHASE_RING && ((o->flags & MSG_OOB && !is_splice(o)) ||
                                            atomic_load_explicit(&end->shut, memory_order_relaxed) & 2)) {
                        retreat(o->fd, end, REASON_OPTION);
                        phase = PHASE_OVER;
                }
                if (phase == PHASE_OVER) {
                        lock_release(&flow->lock, taken);
                        return native_rest(o, &cursor, done, true);
                }
                view = end_sends(end);
                atomic_store_explicit(&view.ring->busy, 1, memory_order_relaxed);
                /* Pairs with the barrier that the one who asks us to leave makes all cores execute. */
                atomic_signal_fence(memory_order_seq_cst);
                if (__builtin_expect(atomic_load_explicit(&view.ring->leave, memory_order_relaxed), 0) ||
                    peer_is_gone(o->fd, end, news)) {
                        atomic_store_explicit(&view.ring->busy, 0, memory_order_release);
                        go_back(o->fd, end, &view);
                        lock_release(&flow->lock, taken);
                        continue;
                }
                if (view_remote(&view) && ready_broken(end)) {
                        atomic_store_explicit(&view.ring->busy, 0, memory_order_release);
                        upgrade_broken(o->fd, end, false);
                        lock_release(&flow->lock, taken);
                        if (done)
                                return (ssize_t)done;
                        continue;
                }
                news = false;
                stamp = clock_stamp();
                raw = taken == LOCK_TAKEN ? raw_before_put(o->fd, end, stamp) : RAW_UNKNOWN;
                if (__builtin_expect(raw == RAW_PAST || raw == RAW_LOST, 0)) {
                        atomic_store_explicit(&view.ring->busy, 0, memory_order_release);
                        if (raw == RAW_PAST)
                                upgrade_past(o->fd, end);
                        lock_release(&flow->lock, taken);
                        if (raw == RAW_PAST)
                                continue;
                        end_forget(o->fd);
                        return done ? (ssize_t)done : operation_native(o);
                }
                put = o->size > done ? put_piece(o, end, &view, &cursor, done, stamp, &out) : 0;
                if (put > 0)
                        raw_after_put(o->fd, end, stamp, (size_t)put);
                atomic_store_explicit(&view.ring->sender_cpu, core(), memory_order_relaxed);
                atomic_store_explicit(&view.ring->busy, 0, memory_order_release);
                if (put == -EPROTO) {
                        upgrade_corrupt(o->fd, end);
                        lock_release(&flow->lock, taken);
                        if (!done)
                                pipe_error(o);
                        return finish(done, -ECONNRESET);
                }
                if (!put && o->size > done && !out)
                        poller_sender_full(end);
                lock_release(&flow->lock, taken);
                if (put > 0) {
                        wake(&view.ring->receivers, end);
                        done += (size_t)put;
                }
                if (done == o->size || out)
                        break;
                if (put > 0 || put == -EINTR)
                        continue;
                if (put == -ENOBUFS && !done && may_wait(o, end) && await_pipe(o, POLLIN))
                        continue;
                if (put < 0)
                        return finish(done, put == -ENOBUFS ? -EAGAIN : put);
                if (!may_wait(o, end))
                        return finish(done, -EAGAIN);
                outcome = wait_for(o->fd, end, key, WANT_SPACE, &deadline, &news);
                if (outcome < 0)
                        return finish(done, outcome);
        }
        statistics_add(&statistics.sent, done);
        return (ssize_t)done;
}

/* --- receiving --- */

/* The receiver has seen all that comes through the ring. */
static long leave_ring(struct end *end)
{
        atomic_store_explicit(&end->rx.phase, PHASE_OVER, memory_order_relaxed);
        /* Those who sleep in epoll wait for the kernel's word now, if the other direction is over too. */
        poller_sender_changed(end);
        return -EINPROGRESS;
}

/* There is nothing in a remote ring, and so much the kernel has said: 0 a FIN, more: bytes that come after
 * the ring. As look_behind_ring(). */
static long look_at_remote(int fd, struct end *end, long got)
{
        /* A connection that isn't there any more without both sides' FIN was reset; who heard it isn't known.
         */
        struct pollfd polled = {.fd = fd};
        struct timespec at_once = {0};

        if (ready_broken(end))
                return -ENOLINK;
        if (got == 0 && (atomic_load_explicit(&end->shut, memory_order_relaxed) & 1 ||
                         (sys_5(SYS_ppoll, &polled, 1, &at_once, 0, 0) > 0 && polled.revents & POLLHUP &&
                          !(atomic_load_explicit(&end->shut, memory_order_relaxed) & 6))))
                return 0;
        if (got >= 0) {
                remote_withhold(end);
                return -EAGAIN;
        }
        if (got != -EAGAIN && got != -EINTR)
                leave_ring(end);
        return got;
}

/* Bytes that come before the ring may have been read past us: then they aren't waited for. */
static bool taken_past(int fd, struct flow *flow, uint64_t last)
{
        struct tcp_info info;
        uint32_t size = sizeof info;
        int queued = 0;
        uint64_t taken;

        memset(&info, 0, sizeof info);
        if (sys_3(SYS_ioctl, fd, FIONREAD, &queued) < 0 || queued ||
            sys_5(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, &info, &size) < 0 ||
            sys_3(SYS_ioctl, fd, FIONREAD, &queued) < 0 || queued)
                return false;
        taken = info.tcpi_bytes_received < last ? info.tcpi_bytes_received : last;
        if (taken <= atomic_load_explicit(&flow->position, memory_order_relaxed))
                return false;
        atomic_store_explicit(&flow->position, taken, memory_order_relaxed);
        return true;
}

/* Where bytes come from while a receiver is ready and hasn't reached the ring. Returns bytes, 0 for the end
 * of the connection, or -errno; -EAGAIN: nothing there now. Under the lock, never waits. */
static long receive_before_ring(struct operation *o, struct end *end, const struct view *view,
                                const struct cursor *cursor, size_t left)
{
        struct flow *flow = &end->rx;
        uint64_t position = atomic_load_explicit(&flow->position, memory_order_relaxed);
        uint64_t start = atomic_load_explicit(&view->ring->start, memory_order_acquire);
        uint64_t most;
        struct iovec vec[VECTORS];
        struct msghdr message = {.msg_iov = vec};
        int queued = 0;
        long got;

        if (!start && view_remote(view) && ready_over(view)) {
                start = atomic_load_explicit(&view->ring->start, memory_order_acquire);
                /* Nothing has ever been put into it. */
                if (!start)
                        return leave_ring(end);
        }
        if (!start) {
                char byte;

                sys_3(SYS_ioctl, o->fd, FIONREAD, &queued);
                start = atomic_load_explicit(&view->ring->start, memory_order_acquire);
                if (!start && queued <= 0) {
                        got = sys_6(SYS_recvfrom, o->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT, 0, 0);
                        /* Bytes or the ring came just now: look again. What was sent before a FIN is visible
                         * after it. */
                        if (got > 0 || atomic_load_explicit(&view->ring->start, memory_order_acquire))
                                return -EINPROGRESS;
                        return view_remote(view) ? look_at_remote(o->fd, end, got) : got;
                }
        }
        if (start) {
                if (start - 1 < position)
                        return -EPROTO;
                atomic_store_explicit(&flow->limit, start - 1, memory_order_relaxed);
                most = start - 1 - position;
                if (!most) {
                        atomic_store_explicit(&flow->phase, PHASE_RING, memory_order_relaxed);
                        return -EINPROGRESS;
                }
        } else {
                most = (uint64_t)queued;
        }
        if (left > most)
                left = most;
        if (o->call == CALL_SPLICE_OUT) {
                got = sys_6(SYS_splice, o->fd, 0, o->other, 0, left, o->flags | (int)SPLICE_F_NONBLOCK);
        } else {
                message.msg_iovlen = (size_t)shortened(o, cursor, left, vec);
                got = sys_3(SYS_recvmsg, o->fd, &message, (o->flags & (MSG_PEEK | MSG_TRUNC)) | MSG_DONTWAIT);
        }
        if (got > 0 && !(o->flags & MSG_PEEK && !is_splice(o)))
                atomic_store_explicit(&flow->position, position + (uint64_t)got, memory_order_relaxed);
        if (got == -EAGAIN && start && taken_past(o->fd, flow, start - 1))
                return -EINPROGRESS;
        /* A splice's other errors are of the pipe. */
        if (view_remote(view) && got < 0 && (got == -EAGAIN || o->call != CALL_SPLICE_OUT))
                return look_at_remote(o->fd, end, got);
        return got;
}

/* Give a piece of the ring to whom the call gives its bytes. */
static long empty(struct operation *o, struct cursor *cursor, unsigned char *place, size_t size)
{
        if (o->call == CALL_SPLICE_OUT) {
                struct pollfd polled = {.fd = o->other, .events = POLLOUT};
                struct timespec at_once = {0};

                if (sys_5(SYS_ppoll, &polled, 1, &at_once, 0, 0) <= 0)
                        return -ENOBUFS;
                return sys_3(SYS_write, o->other, place, size < PIPE_PAGE ? size : PIPE_PAGE);
        }
        if (!(o->flags & MSG_TRUNC))
                cursor_copy(cursor, place, size, false);
        return (long)size;
}

/* Take what is there. Returns bytes, 0 if the ring is empty, or -errno. */
static long take_piece(struct operation *o, struct end *end, const struct view *view, struct cursor *cursor,
                       size_t left)
{
        struct flow *flow = &end->rx;
        bool peek = !is_splice(o) && o->flags & MSG_PEEK;

        for (;;) {
                uint64_t head = atomic_load_explicit(&flow->edge, memory_order_relaxed);
                int64_t ready = ring_ready(flow, view);
                struct cursor before = *cursor;
                size_t taken = 0, wanted;

                if (ready <= 0)
                        return ready < 0 ? -EPROTO : 0;
                wanted = left < (size_t)ready ? left : (size_t)ready;
                if (wanted > PIECE && !peek)
                        wanted = PIECE;
                while (taken < wanted) {
                        size_t run;
                        unsigned char *place = ring_to_take(view, head + taken, &run);
                        long got = empty(o, cursor, place, run < wanted - taken ? run : wanted - taken);

                        if (got <= 0) {
                                if (!taken)
                                        return got < 0 ? got : -EPIPE;
                                break;
                        }
                        taken += (size_t)got;
                }
                if (peek || ring_take(flow, view, head, taken))
                        return (long)taken;
                if (o->call == CALL_SPLICE_OUT)
                        return -EINTR;
                *cursor = before;
        }
}

/* The ring is empty: has it ended, has the connection? Returns 0 at the end of the connection, -EINPROGRESS
 * to look again, -EAGAIN if there is nothing yet, or the connection's error, which the native call will
 * report. */
static long look_behind_ring(int fd, struct end *end, const struct view *view, bool news)
{
        struct flow *flow = &end->rx;
        uint64_t over = atomic_load_explicit(&view->ring->end, memory_order_acquire);
        uint32_t stamp = ready_stamp();
        char byte;
        long got;

        if (over) {
                uint64_t head = atomic_load_explicit(&flow->edge, memory_order_relaxed);

                /* What was put in before the end is visible with it. */
                if (ring_ready(flow, view))
                        return -EINPROGRESS;
                if (over - 1 != head)
                        return -EPROTO;
                return leave_ring(end);
        }
        if (view_remote(view) && (ready_over(view) || ready_broken(end))) {
                if (ring_ready(flow, view) || atomic_load_explicit(&view->ring->end, memory_order_acquire))
                        return -EINPROGRESS;
                return ready_over(view) ? leave_ring(end) : -ENOLINK;
        }
        if (!news && atomic_load_explicit(&flow->checked, memory_order_relaxed) == stamp)
                return -EAGAIN;
        atomic_store_explicit(&flow->checked, stamp, memory_order_relaxed);
        got = sys_6(SYS_recvfrom, fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT, 0, 0);
        if (got == -EAGAIN) {
                atomic_store_explicit(&flow->clean, atomic_load_explicit(&flow->edge, memory_order_relaxed),
                                      memory_order_relaxed);
                return -EAGAIN;
        }
        if (got == -EINTR)
                return -EAGAIN;
        if (got == -EBADF || got == -ENOTSOCK)
                return got;
        /* What the peer did before it closed or sent over TCP is visible now. */
        if (ring_ready(flow, view) || atomic_load_explicit(&view->ring->end, memory_order_acquire))
                return -EINPROGRESS;
        if (view_remote(view))
                return look_at_remote(fd, end, got);
        return got > 0 ? upgrade_unannounced(fd, end) : got;
}

/* Senders that wait said how empty the ring must be for them. */
static void wake_senders(struct end *end, const struct view *view)
{
        struct waiters *senders = &view->ring->senders;
        uint64_t used;

        atomic_thread_fence(memory_order_seq_cst);
        if (!atomic_load_explicit(&senders->any, memory_order_relaxed))
                return;
        used = atomic_load_explicit(&view->ring->tail, memory_order_relaxed) -
               atomic_load_explicit(&end->rx.edge, memory_order_relaxed);
        if (used + view_remote(view) <= atomic_load_explicit(&view->ring->room, memory_order_relaxed))
                ring_bells(senders, end);
}

static void no_address(struct operation *o)
{
        if (o->call == CALL_RECVFROM && o->address && o->address_size)
                *o->address_size = 0;
        if (o->call == CALL_RECVMSG) {
                o->message->msg_namelen = 0;
                o->message->msg_controllen = 0;
                o->message->msg_flags = 0;
        }
}

static void skip(struct cursor *cursor, size_t size)
{
        while (size) {
                size_t left = cursor->vec->iov_len - cursor->offset;
                size_t part = left < size ? left : size;

                size -= part;
                cursor->offset += part;
                if (cursor->offset == cursor->vec->iov_len) {
                        cursor->vec++;
                        cursor->offset = 0;
                }
        }
}

/* Take what there is now, from TCP or the ring, under the lock. As receive_before_ring() and
 * look_behind_ring(). */
static long receive_now(struct operation *o, struct end *end, const struct view *view, struct cursor *cursor,
                        size_t done, uint32_t phase, bool news)
{
        bool all = !is_splice(o) && o->flags & MSG_WAITALL;
        size_t left = o->size - done;
        long got;

        if (!left)
                return 0;
        if (phase == PHASE_READY) {
                got = receive_before_ring(o, end, view, cursor, left);
                if (got > 0 && o->call != CALL_SPLICE_OUT && !(o->flags & MSG_TRUNC))
                        skip(cursor, (size_t)got);
                return got;
        }
        got = take_piece(o, end, view, cursor, left);
        atomic_store_explicit(&view->ring->receiver_cpu, core(), memory_order_relaxed);
        if (got > 0)
                statistics_add(&statistics.received, (uint64_t)got);
        if (got == 0 && done && !all)
                return -EAGAIN;
        return got ? got : look_behind_ring(o->fd, end, view, news);
}

/* The peer has closed: the sender looks for itself at its next call. */
static void look_again(struct end *end)
{
        atomic_store_explicit(&end->tx.checked, ready_stamp() - 1, memory_order_relaxed);
}

ssize_t transfer_receive(struct operation *o, struct end *end, uint64_t key)
{
        struct flow *flow = &end->rx;
        struct cursor cursor = {.vec = o->vec};
        int flags = is_splice(o) ? 0 : o->flags;
        bool all = flags & MSG_WAITALL, peek = flags & MSG_PEEK, news = false;
        uint64_t deadline = 0;
        size_t done = 0;

        if (flags & (MSG_OOB | MSG_ERRQUEUE))
                return operation_native(o);
        for (;;) {
                enum taken taken = lock_take(&flow->lock, self());
                struct view view;
                uint32_t phase;
                long got;
                int outcome;

                if (!end_is(end, key)) {
                        lock_release(&flow->lock, taken);
                        return done ? (ssize_t)done : operation_native(o);
                }
                phase = atomic_load_explicit(&flow->phase, memory_order_relaxed);
                if (phase == PHASE_TCP &&
                    atomic_load_explicit(&end->stage, memory_order_relaxed) == STAGE_ATTACHED &&
                    taken == LOCK_TAKEN) {
                        upgrade_receiver(end);
                        phase = atomic_load_explicit(&flow->phase, memory_order_relaxed);
                }
                if (phase == PHASE_TCP)
                        return native_counted(o, flow, !peek, taken);
                if (phase == PHASE_OVER) {
                        uint32_t error = atomic_exchange_explicit(&end->error, 0, memory_order_relaxed);

                        lock_release(&flow->lock, taken);
                        if (done && !all)
                                return (ssize_t)done;
                        if (error)
                                return finish(done, -(long)error);
                        got = native_rest(o, &cursor, done, false);
                        if (!got)
                                look_again(end);
                        return got;
                }
                view = end_receives(end);
                got = receive_now(o, end, &view, &cursor, done, phase, news);
                news = false;
                if (got == -EPROTO)
                        upgrade_corrupt(o->fd, end);
                if (got == -ENOLINK)
                        upgrade_broken(o->fd, end, true);
                lock_release(&flow->lock, taken);
                if (got > 0) {
                        if (phase == PHASE_RING && !peek)
                                wake_senders(end, &view);
                        done += (size_t)got;
                        no_address(o);
                        if (done == o->size || peek || (phase == PHASE_READY && !all))
                                return (ssize_t)done;
                        continue;
                }
                if (got == -EINPROGRESS || got == -EINTR)
                        continue;
                if (got == -EAGAIN) {
                        if (done && !all)
                                return (ssize_t)done;
                        if (atomic_load_explicit(&end->shut, memory_order_relaxed) & 1)
                                return (ssize_t)done;
                        if (!may_wait(o, end))
                                return finish(done, -EAGAIN);
                        outcome = wait_for(o->fd, end, key, WANT_BYTES, &deadline, &news);
                        if (outcome < 0)
                                return finish(done, outcome);
                        continue;
                }
                if (got == -ENOBUFS) {
                        if (!done && may_wait(o, end) && await_pipe(o, POLLOUT))
                                continue;
                        return finish(done, -EAGAIN);
                }
                if (got == -EBADF || got == -ENOTSOCK) {
                        /* Closed past us; the number is another file's, or nobody's. */
                        end_forget(o->fd);
                        return done ? (ssize_t)done : operation_native(o);
                }
                /* The end of the connection, or its error: the kernel says it only once, and we have asked.
                 */
                look_again(end);
                no_address(o);
                if (got == -EPROTO || got == -ENOLINK || got == -EBADE)
                        got = -ECONNRESET;
                if (done && got < 0)
                        atomic_store_explicit(&end->error, (uint32_t)-got, memory_order_relaxed);
                return finish(done, got);
        }
}
