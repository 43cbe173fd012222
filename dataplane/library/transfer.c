#include "transfer.h"

#include "arena.h"
#include "clock.h"
#include "identity.h"
#include "poller.h"
#include "protocol.h"
#include "raw.h"
#include "ready.h"
#include "remote.h"
#include "router.h"
#include "settings.h"
#include "signals.h"
#include "sparse.h"
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

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif

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
        /* SPLICE_F_NONBLOCK is about the pipe. */
        return is_splice(o) || !(o->flags & MSG_DONTWAIT);
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

/* Under the lock: the phase of a call that begins now, which may be the one at which bytes go to the ring. */
__attribute__((noinline)) static uint32_t enter_tcp(int fd, struct end *end, struct flow *flow,
                                                    enum taken taken)
{
        if (taken != LOCK_TAKEN || atomic_load_explicit(&end->stage, memory_order_relaxed) != STAGE_ATTACHED)
                return PHASE_TCP;
        if (flow == &end->rx)
                upgrade_receiver(end);
        else
                upgrade_sender(fd, end);
        return atomic_load_explicit(&flow->phase, memory_order_relaxed);
}

static inline uint32_t enter(int fd, struct end *end, struct flow *flow, enum taken taken)
{
        uint32_t phase = atomic_load_explicit(&flow->phase, memory_order_relaxed);

        return __builtin_expect(phase == PHASE_TCP, 0) ? enter_tcp(fd, end, flow, taken) : phase;
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

static bool is_at_mark(int fd)
{
        int at = 0;

        return sys_3(SYS_ioctl, fd, SIOCATMARK, &at) >= 0 && at;
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

/* The rest of a call goes on over TCP after the ring has ended, up to `most` bytes of all. To the program it
 * is one call: of an error after the first byte only the next one hears. */
__attribute__((noinline)) static ssize_t native_rest(struct operation *o, struct end *end,
                                                     struct cursor cursor, size_t done, size_t most,
                                                     bool sending)
{
        int saved = *__errno_location(), flags = o->flags | (sending ? MSG_NOSIGNAL : MSG_WAITALL);
        struct iovec vec[VECTORS];
        struct msghdr message = {.msg_iov = vec};
        bool peek = !sending && flags & MSG_PEEK;
        ssize_t moved, wanted;

        if (!done)
                return operation_native(o);
        if (o->call == CALL_SENDFILE || is_splice(o)) {
                flags = o->flags;
                o->size -= done;
                /* What the pipe has had is enough. */
                o->flags |= is_splice(o) ? (int)SPLICE_F_NONBLOCK : 0;
                moved = operation_native(o);
                o->flags = flags;
                o->size += done;
                done += moved > 0 ? (size_t)moved : 0;
        } else {
                do {
                        if (!sending && is_at_mark(o->fd))
                                break;
                        message.msg_iovlen = (size_t)shortened(o, &cursor, most - done, vec);
                        wanted = 0;
                        for (size_t i = 0; i < message.msg_iovlen; i++)
                                wanted += (ssize_t)vec[i].iov_len;
                        moved = sending ? real()->sendmsg(o->fd, &message, flags)
                                        : real()->recvmsg(o->fd, &message, flags);
                        if (moved < 0 && !sending && *__errno_location() != EAGAIN &&
                            *__errno_location() != EINTR)
                                atomic_store_explicit(&end->error, (uint32_t)*__errno_location(),
                                                      memory_order_relaxed);
                        if (moved <= 0)
                                break;
                        done += (size_t)moved;
                        if (!(!sending && flags & MSG_TRUNC))
                                skip(&cursor, (size_t)moved);
                        /* A second look would begin with the same bytes. */
                } while (moved == wanted && done < most && !peek);
        }
        *__errno_location() = saved;
        return (ssize_t)done;
}

/* The descriptor isn't the connection's any more: what it is now takes the call. */
static ssize_t lost(struct operation *o, size_t done, bool sending)
{
        uint64_t key;
        struct end *end;

        identity_lost(o->fd);
        if (done)
                return (ssize_t)done;
        end = end_of(o->fd, &key);
        if (!end)
                return operation_native(o);
        return sending ? transfer_send(o, end, key) : transfer_receive(o, end, key);
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

/* Where a pipe's reads and writes can't be told to return at once, it is asked before: Linux before 6.4. */
static _Atomic bool pipes_wait;

/* Read from, or write to, a pipe without waiting: others wait for the lock that we have. -EAGAIN: not now. */
static long pipe_now(long call, int fd, short events, void *place, size_t size)
{
        struct iovec vec = {place, size};
        struct pollfd polled = {.fd = fd, .events = events};
        struct timespec at_once = {0};

        if (!atomic_load_explicit(&pipes_wait, memory_order_relaxed)) {
                long got =
                    sys_6(call == SYS_read ? SYS_preadv2 : SYS_pwritev2, fd, &vec, 1, -1, -1, RWF_NOWAIT);

                if (got >= 0 || got == -EAGAIN || got == -EPIPE || got == -EINTR || got == -EBADF)
                        return got;
                atomic_store_explicit(&pipes_wait, true, memory_order_relaxed);
        }
        if (sys_5(SYS_ppoll, &polled, 1, &at_once, 0, 0) <= 0)
                return -EAGAIN;
        return sys_3(call, fd, place, call == SYS_write && size > PIPE_PAGE ? PIPE_PAGE : size);
}

static off_t place_in_file(const struct operation *o)
{
        return o->offset ? *o->offset : (off_t)sys_3(SYS_lseek, o->other, 0, SEEK_CUR);
}

static void move_in_file(const struct operation *o, off_t place)
{
        if (o->offset)
                *o->offset = place;
        else
                sys_3(SYS_lseek, o->other, place, SEEK_SET);
}

/* From a file, of what is there without waiting for a disk or a network. -ENODATA: it isn't. */
static long read_file(struct operation *o, unsigned char *place, size_t size, off_t at)
{
        struct iovec vec = {place, size};
        long got;

        if (at >= o->ahead_at && at < o->ahead_at + (off_t)o->ahead_size) {
                size_t left = o->ahead_size - (size_t)(at - o->ahead_at);

                size = size < left ? size : left;
                memcpy(place, o->ahead + (at - o->ahead_at), size);
                return (long)size;
        }
        /* -1 would mean the file's own place, and take bytes of a pipe. */
        if (at < 0 || o->file_waits)
                return -ENODATA;
        got = sys_6(SYS_preadv2, o->other, &vec, 1, at, 0, RWF_NOWAIT);
        /* overlayfs, the root of most containers, can't say whether a read would wait. */
        o->file_waits = got == -EOPNOTSUPP;
        return got < 0 ? -ENODATA : got;
}

/* Memory that one call after the other reads files into: mapping it anew for each would cost more than the
 * read. */
static _Atomic(unsigned char *) spare_ahead;

static unsigned char *take_ahead(void)
{
        unsigned char *place = atomic_exchange_explicit(&spare_ahead, NULL, memory_order_acquire);

        return place ? place : reserve(AHEAD, MAP_PRIVATE);
}

void transfer_end_ahead(struct operation *o)
{
        unsigned char *place = o->ahead;

        if (place)
                place = atomic_exchange_explicit(&spare_ahead, place, memory_order_release);
        if (place)
                sys_2(SYS_munmap, place, AHEAD);
        o->ahead = NULL;
}

/* Wait for a file, without a lock: others can send meanwhile. Returns 0, or -errno; -ENODATA: it has ended.
 */
static long read_ahead(struct operation *o, size_t left)
{
        long got;

        if (!o->ahead)
                o->ahead = take_ahead();
        if (!o->ahead)
                return -ENOMEM;
        o->ahead_size = 0;
        o->ahead_at = place_in_file(o);
        got = sys_4(SYS_pread64, o->other, o->ahead, left < AHEAD ? left : AHEAD, o->ahead_at);
        if (got > 0)
                o->ahead_size = (size_t)got;
        return got > 0 ? 0 : got < 0 ? got : -ENODATA;
}

/* Fill a piece of the ring from where the call takes its bytes. Returns bytes, 0 at the end of a file, or
 * -errno; never waits. */
static long fill(struct operation *o, struct cursor *cursor, unsigned char *place, size_t size, size_t ahead)
{
        long got;

        switch (o->call) {
        case CALL_SENDFILE:
                return read_file(o, place, size, place_in_file(o) + (off_t)ahead);
        case CALL_SPLICE_IN:
                got = pipe_now(SYS_read, o->other, POLLIN, place, size);
                return got == -EAGAIN ? (ahead ? 0 : -ENOBUFS) : got;
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

/* A source that couldn't be read. What the kernel says of the two, if it refuses: a pipe and a socket can't
 * seek. Reading at an offset has taken nothing of those. */
static long refusal(struct operation *o, long error)
{
        long refused = o->call == CALL_SENDFILE ? sys_4(SYS_sendfile, o->fd, o->other, o->offset, 0) : 0;

        o->refused = refused < 0;
        return refused < 0 ? refused : error;
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
                if (space < 0)
                        return -EPROTO;
                if (!space)
                        return done ? 0 : refusal(o, 0);
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
                                return done ? got : refusal(o, got);
                        }
                        /* What a pipe has now is enough; a file that ends has no more. */
                        *out = got != -ENODATA;
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
        if (o->call == CALL_SENDFILE)
                move_in_file(o, place_in_file(o) + (off_t)put);
        return (long)put;
}

/* Wait for the pipe of a splice, whatever the socket's mode is. Returns 0 or -errno. */
static long await_pipe(const struct operation *o, short events)
{
        struct pollfd polled[2] = {{.fd = o->other, .events = events}, {.fd = -1, .events = POLLIN}};
        struct signals signals;
        int saved = *__errno_location(), got;

        if ((unsigned)o->flags & SPLICE_F_NONBLOCK || sys_2(SYS_fcntl, o->other, F_GETFL) & O_NONBLOCK)
                return -EAGAIN;
        signals_prepare(&signals);
        if (signals.mixed)
                polled[1].fd = signals.fd;
        do
                got = real()->ppoll(polled, 2, NULL, signals.mixed ? &signals.mask : NULL);
        while (got < 0 && *__errno_location() == EINTR && signals_restart(&signals));
        *__errno_location() = saved;
        return got > 0 && polled[0].revents ? 0 : -EINTR;
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
        if (!raw && raw_check(fd, end) == RAW_BYPASSED) {
                fallback_bypassed(fd, end);
                return;
        }
        if (raw)
                router_note(end, REASON_RAW);
        fallback_sender(fd, end, raw ? REASON_RAW : REASON_PEER_CLOSED);
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
                bool is_full;
                long put;
                int outcome;

                if (!end_is(end, key)) {
                        lock_release(&flow->lock, taken);
                        return done ? (ssize_t)done : operation_native(o);
                }
                phase = enter(o->fd, end, flow, taken);
                if (phase == PHASE_TCP)
                        return native_counted(o, flow, true, taken);
                if (phase == PHASE_RING &&
                    (o->by_kernel || atomic_load_explicit(&end->shut, memory_order_relaxed) & 2)) {
                        fallback_sender(o->fd, end, REASON_OPTION);
                        phase = PHASE_OVER;
                }
                if (phase == PHASE_OVER) {
                        lock_release(&flow->lock, taken);
                        return native_rest(o, end, cursor, done, o->size, true);
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
                        reset_broken(o->fd, end, false);
                        lock_release(&flow->lock, taken);
                        if (done)
                                return (ssize_t)done;
                        continue;
                }
                news = false;
                stamp = clock_stamp();
                raw = taken == LOCK_TAKEN ? raw_before_put(o->fd, end, stamp) : RAW_UNKNOWN;
                if (__builtin_expect(raw == RAW_BYPASSED || raw == RAW_LOST, 0)) {
                        atomic_store_explicit(&view.ring->busy, 0, memory_order_release);
                        if (raw == RAW_BYPASSED && !end_is_behind(o->fd, end))
                                raw = RAW_LOST;
                        if (raw == RAW_BYPASSED)
                                fallback_bypassed(o->fd, end);
                        lock_release(&flow->lock, taken);
                        if (raw == RAW_BYPASSED)
                                continue;
                        return lost(o, done, true);
                }
                put = o->size > done ? put_piece(o, end, &view, &cursor, done, stamp, &out) : 0;
                if (put > 0)
                        raw_after_put(o->fd, end, stamp, (size_t)put);
                atomic_store_explicit(&view.ring->sender_cpu, core(), memory_order_relaxed);
                atomic_store_explicit(&view.ring->busy, 0, memory_order_release);
                if (put == -EPROTO) {
                        reset_corrupt(o->fd, end);
                        lock_release(&flow->lock, taken);
                        if (!done)
                                pipe_error(o);
                        return finish(done, -ECONNRESET);
                }
                is_full = !put && o->size > done && !out;
                if (is_full)
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
                if (put == -ENOBUFS && !done)
                        put = await_pipe(o, POLLIN);
                else if (put == -ENODATA)
                        put = read_ahead(o, o->size - done);
                if (put == 0 && !is_full)
                        continue;
                /* The source's end, or what only the kernel can read. */
                if (put == -ENODATA)
                        break;
                if (put < 0 && put != -EAGAIN && o->call == CALL_SENDFILE && !done && !o->refused &&
                    !o->by_kernel) {
                        o->by_kernel = true;
                        continue;
                }
                if (put < 0)
                        return finish(done, put == -ENOBUFS ? -EAGAIN : put);
                if (!may_wait(o, end))
                        return finish(done, -EAGAIN);
                outcome = wait_for(o->fd, end, key, WANT_SPACE, NULL, &deadline, &news);
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
        /* move_options() has told the kernel of the last byte: from here on it knows them alone. */
        atomic_store_explicit(&end->peeked, 0, memory_order_relaxed);
        atomic_store_explicit(&end->inq, 0, memory_order_relaxed);
        /* Those who sleep in epoll wait for the kernel's word now, if the other direction is over too. */
        poller_receiver_changed(end);
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
                remote_defer(end);
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
                size_t left = cursor->vec->iov_len - cursor->offset, part = left < size ? left : size;

                if (part &&
                    !arena_copy(end, place, (unsigned char *)cursor->vec->iov_base + cursor->offset, part))
                        return false;
                place += part;
                size -= part;
                cursor->offset += part;
                if (cursor->offset == cursor->vec->iov_len) {
                        cursor->vec++;
                        cursor->offset = 0;
                }
        }
        return true;
}

/* Give a piece of the ring that must not be read by its mapping (budget.h) to whom the call gives its bytes.
 */
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
        /* The first bytes are in the slot's own page, which the router has made; a remote ring is all there.
         */
        uint64_t offset = (uint64_t)(place - view_bulk(view));

        return offset >= view_size(view) || view_remote(view) || budget_may_read(flow, offset + size);
}

/* Take what is there. Returns bytes, 0 if the ring is empty, or -errno. */
static long take_piece(struct operation *o, struct end *end, const struct view *view, struct cursor *cursor,
                       size_t left)
{
        struct flow *flow = &end->rx;

        for (;;) {
                uint64_t head = atomic_load_explicit(&flow->edge, memory_order_relaxed);
                int64_t ready = ring_ready(flow, view);
                struct cursor before = *cursor;
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
                                  ? empty(o, cursor, place, run)
                                  : empty_from_file(o, end, cursor, place, run);
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
        return got > 0 ? fallback_unannounced(fd, end) : got;
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

/* What recvmsg() says of bytes besides them, as the kernel's does of a stream's. */
__attribute__((noinline)) static void describe_message(struct operation *o, struct end *end)
{
        struct msghdr *message = o->message;
        size_t room;
        int unread = 0;

        if (o->call == CALL_RECVFROM && o->address && o->address_size)
                *o->address_size = 0;
        if (o->call != CALL_RECVMSG)
                return;
        room = message->msg_control ? message->msg_controllen : 0;
        if (message->msg_name)
                message->msg_namelen = 0;
        message->msg_controllen = 0;
        message->msg_flags = o->flags & MSG_CMSG_CLOEXEC;
        if (__builtin_expect(!atomic_load_explicit(&end->inq, memory_order_relaxed), 1))
                return;
        if (room < CMSG_LEN(sizeof unread)) {
                message->msg_flags |= MSG_CTRUNC;
                return;
        }
        message->msg_controllen = room < CMSG_SPACE(sizeof unread) ? room : CMSG_SPACE(sizeof unread);
        sys_3(SYS_ioctl, o->fd, FIONREAD, &unread);
        unread = transfer_unread(end, unread);
        *(struct cmsghdr *)message->msg_control = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(sizeof unread), .cmsg_level = IPPROTO_TCP, .cmsg_type = TCP_CM_INQ};
        memcpy(CMSG_DATA((struct cmsghdr *)message->msg_control), &unread, sizeof unread);
}

static inline void describe(struct operation *o, struct end *end)
{
        if (o->call == CALL_RECVMSG || o->call == CALL_RECVFROM)
                describe_message(o, end);
}

int transfer_unread(struct end *end, int queued)
{
        enum taken taken = lock_take(&end->rx.lock, self());
        uint32_t phase = atomic_load(&end->rx.phase);
        uint64_t before = UINT64_MAX; /* bytes of TCP that are still to come before those of the ring */
        int64_t ready = 0;

        if (phase == PHASE_READY || phase == PHASE_RING) {
                struct view view = end_receives(end);
                uint64_t start = atomic_load_explicit(&view.ring->start, memory_order_acquire);
                uint64_t position = atomic_load_explicit(&end->rx.position, memory_order_relaxed);

                if (phase == PHASE_RING)
                        before = 0;
                else if (start)
                        before = start - 1 > position ? start - 1 - position : 0;
                /* As peek_now(): the ring's bytes can be read once all of those are there. */
                if (queued >= 0 && before <= (uint64_t)queued)
                        ready = ring_ready(&end->rx, &view);
        }
        lock_release(&end->rx.lock, taken);
        return queued + (ready > 0 ? (int)ready : 0);
}

/* Options that the kernel keeps: of a ring that has ended it is told what is still to come before its bytes.
 * Under the lock, after `taken` bytes. */
__attribute__((noinline)) static void move_options(int fd, struct end *end, const struct view *view,
                                                   uint64_t taken)
{
        uint32_t low = atomic_load_explicit(&end->low, memory_order_relaxed);
        uint32_t peeked = atomic_load_explicit(&end->peeked, memory_order_relaxed);

        if (low)
                transfer_low_water(fd, low, ring_ready(&end->rx, view));
        if (peeked)
                atomic_store_explicit(&end->peeked, peeked - 1 > taken ? peeked - (uint32_t)taken : 1,
                                      memory_order_relaxed);
}

void transfer_low_water(int fd, uint32_t low, int64_t left)
{
        int of_kernel = left > 0 ? (low > left ? (int)(low - left) : 1) : (int)low;

        sys_5(SYS_setsockopt, fd, SOL_SOCKET, SO_RCVLOWAT, &of_kernel, sizeof of_kernel);
}

/* How much a call waits for. */
__attribute__((noinline)) static size_t least_of(const struct operation *o, const struct end *end)
{
        uint32_t low = atomic_load_explicit(&end->low, memory_order_relaxed);

        if (is_splice(o))
                return 1;
        if (o->flags & MSG_WAITALL)
                return o->size;
        return !low ? 1 : low < o->size ? low : o->size;
}

static bool is_enough(const struct operation *o, const struct end *end, size_t done)
{
        return done && done >= least_of(o, end);
}

/* The rest of a receive goes on over TCP. The kernel wakes nobody for less than SO_RCVLOWAT. */
__attribute__((noinline)) static ssize_t receive_rest(struct operation *o, struct end *end,
                                                      struct cursor cursor, size_t done)
{
        uint32_t low = atomic_load_explicit(&end->low, memory_order_relaxed);
        size_t least = least_of(o, end);
        ssize_t got;

        if (done && low)
                transfer_low_water(o->fd, (uint32_t)(least - done), 0);
        got = native_rest(o, end, cursor, done, least, false);
        if (done && low)
                transfer_low_water(o->fd, low, 0);
        return got;
}

/* A read that returns less than it was asked for says that more will be told of. What lies beyond the last
 * byte of TCP, or beyond the ring's, may have been told of already; or those who wait have looked while it
 * couldn't be had yet. */
static void tell_of_more(struct end *end, const struct view *view)
{
        bool ready = atomic_load_explicit(&end->rx.phase, memory_order_relaxed) == PHASE_READY;
        uint64_t start;

        /* Pairs with wait_begin(): either those see our position, or we see where the ring begins. */
        atomic_thread_fence(memory_order_seq_cst);
        start = atomic_load_explicit(&view->ring->start, memory_order_acquire);
        if (ready ? start && start - 1 <= atomic_load_explicit(&end->rx.position, memory_order_relaxed)
                  : ready_end(end) && !ring_ready(&end->rx, view))
                poller_receiver_changed(end);
}

/* Take what there is now, from TCP or the ring, under the lock. As receive_before_ring() and
 * look_behind_ring(). */
static long receive_now(struct operation *o, struct end *end, const struct view *view, struct cursor *cursor,
                        size_t done, uint32_t phase, bool news)
{
        size_t left = o->size - done;
        long got;

        if (!left)
                return 0;
        if (phase == PHASE_READY) {
                got = receive_before_ring(o, end, view, cursor, left);
                if (got > 0 && o->call != CALL_SPLICE_OUT && !(o->flags & MSG_TRUNC))
                        skip(cursor, (size_t)got);
                if (got > 0)
                        tell_of_more(end, view);
                return got;
        }
        got = take_piece(o, end, view, cursor, left);
        atomic_store_explicit(&view->ring->receiver_cpu, core(), memory_order_relaxed);
        if (got > 0) {
                statistics_add(&statistics.received, (uint64_t)got);
                if (__builtin_expect(
                        view_remote(view) || atomic_load_explicit(&view->ring->end, memory_order_relaxed), 0))
                        tell_of_more(end, view);
                if (__builtin_expect(atomic_load_explicit(&end->low, memory_order_relaxed) |
                                         atomic_load_explicit(&end->peeked, memory_order_relaxed),
                                     0))
                        move_options(o->fd, end, view, (uint64_t)got);
        }
        if (got == 0 && is_enough(o, end, done))
                return -EAGAIN;
        return got ? got : look_behind_ring(o->fd, end, view, news);
}

/* The peer has closed: the sender looks for itself at its next call. */
static void look_again(struct end *end)
{
        atomic_store_explicit(&end->tx.checked, ready_stamp() - 1, memory_order_relaxed);
}

/* TCP's bytes ahead of those of the ring that haven't been peeked at; UINT64_MAX: it isn't known yet. */
static uint64_t peeks_before_ring(int fd, struct end *end, const struct view *view, uint32_t peeked)
{
        uint64_t start = atomic_load_explicit(&view->ring->start, memory_order_acquire);
        uint64_t position = atomic_load_explicit(&end->rx.position, memory_order_relaxed);
        int offset = 0;
        uint32_t size = sizeof offset;

        if (!start || start - 1 <= position)
                return UINT64_MAX;
        if (peeked)
                sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_PEEK_OFF, &offset, &size);
        return offset > 0
                   ? (start - 1 - position > (uint64_t)offset ? start - 1 - position - (uint64_t)offset : 0)
                   : start - 1 - position;
}

/* Look at bytes, under the lock: those of TCP that come before the ring, and those in the ring. Returns as
 * receive_now(). `*edge`: where the ring's bytes ended then. */
static long peek_now(struct operation *o, struct end *end, const struct view *view, bool news, uint64_t *edge)
{
        uint64_t head = atomic_load_explicit(&end->rx.edge, memory_order_relaxed);
        uint32_t peeked = atomic_load_explicit(&end->peeked, memory_order_relaxed),
                 from = peeked ? peeked - 1 : 0;
        struct cursor cursor = {.vec = o->vec};
        size_t done = 0, seen = 0, wanted;
        int64_t ready = ring_ready(&end->rx, view);

        *edge = head + (ready > 0 ? (uint64_t)ready : 0);
        if (ready < 0)
                return -EPROTO;
        if (atomic_load_explicit(&end->rx.phase, memory_order_relaxed) == PHASE_READY) {
                uint64_t before = peeks_before_ring(o->fd, end, view, peeked);
                long got =
                    before ? receive_before_ring(o, end, view, &cursor, before < o->size ? before : o->size)
                           : 0;

                if (before && (got <= 0 || (uint64_t)got != before))
                        return got;
                done = (size_t)got;
                if (!(o->flags & MSG_TRUNC))
                        skip(&cursor, done);
        }
        if (from && from >= ready)
                return done ? (long)done : ready_end(end) ? -ENODATA : -EAGAIN;
        if (!ready)
                return done ? (long)done : look_behind_ring(o->fd, end, view, news);
        wanted = o->size - done < (size_t)ready - from ? o->size - done : (size_t)ready - from;
        while (seen < wanted) {
                size_t run;
                unsigned char *place = ring_to_take(view, head + from + seen, &run);

                run = run < wanted - seen ? run : wanted - seen;
                if (!(o->flags & MSG_TRUNC))
                        cursor_copy(&cursor, place, run, false);
                seen += run;
        }
        if (peeked)
                atomic_store_explicit(&end->peeked, peeked + (uint32_t)seen, memory_order_relaxed);
        return (long)(done + seen);
}

/* Peeks beyond what has come through a ring that has ended go on in TCP. */
static ssize_t peek_on(struct operation *o, struct end *end, size_t done)
{
        struct cursor cursor = {.vec = o->vec};

        if (!(o->flags & MSG_TRUNC))
                skip(&cursor, done);
        return native_rest(o, end, cursor, done, o->size, false);
}

static void peek_at_one(struct operation *o, char *byte)
{
        o->one = (struct iovec){byte, 1};
        o->vec = &o->one;
        o->count = 1;
        o->size = 1;
        o->flags |= MSG_PEEK;
}

/* A receive that takes nothing: with MSG_PEEK, or of no bytes, which waits all the same until there is one.
 */
__attribute__((noinline)) static ssize_t transfer_peek(struct operation *o, struct end *end, uint64_t key)
{
        bool all =
            o->flags & MSG_WAITALL && o->size && !atomic_load_explicit(&end->peeked, memory_order_relaxed);
        bool news = false, last = false, left = false;
        uint64_t deadline = 0, edge = 0;
        struct operation one = *o;
        long error = 0;
        char byte;

        if (!o->size)
                peek_at_one(&one, &byte);
        for (;;) {
                enum taken taken = lock_take(&end->rx.lock, self());
                bool is_now = end_is(end, key), over;
                uint32_t phase;
                struct view view;
                long got;

                phase = is_now ? enter(o->fd, end, &end->rx, taken) : PHASE_OVER;
                if (phase == PHASE_TCP)
                        return native_counted(o, &end->rx, false, taken);
                if (phase == PHASE_OVER) {
                        lock_release(&end->rx.lock, taken);
                        error =
                            is_now ? (long)atomic_exchange_explicit(&end->error, 0, memory_order_relaxed) : 0;
                        return error ? finish(0, -error) : operation_native(o);
                }
                view = end_receives(end);
                got = peek_now(&one, end, &view, news, &edge);
                over = ready_end(end);
                if (got == -EPROTO)
                        reset_corrupt(o->fd, end);
                if (got == -ENOLINK)
                        reset_broken(o->fd, end, true);
                lock_release(&end->rx.lock, taken);
                if (got == -EINPROGRESS || got == -EINTR)
                        continue;
                if (got == -ENODATA)
                        return operation_native(o);
                if (got > 0)
                        describe(o, end);
                if (got > 0 && (!all || (size_t)got == one.size || last || (over && phase == PHASE_READY)))
                        return o->size ? got : 0;
                if (got > 0 && over)
                        return peek_on(&one, end, (size_t)got);
                if (got == -EBADF || got == -ENOTSOCK) {
                        end_forget(o->fd);
                        return operation_native(o);
                }
                if (got <= 0 && got != -EAGAIN) {
                        look_again(end);
                        describe(o, end);
                        return finish(0,
                                      got == -EPROTO || got == -ENOLINK || got == -EBADE ? -ECONNRESET : got);
                }
                if (atomic_load_explicit(&end->shut, memory_order_relaxed) & 1 && got < 0)
                        return 0;
                if (error || !may_wait(&one, end))
                        return got > 0 ? got : finish(0, error ? error : -EAGAIN);
                /* More than a ring may hold: TCP holds as much as it holds. */
                if (got > 0 && !left && one.size > ring_limit(&view)) {
                        left = true;
                        fall_back(o->fd, end, key, REASON_OPTION);
                        continue;
                }
                news = false;
                error = wait_for(o->fd, end, key, WANT_BYTES,
                                 got > 0 || atomic_load_explicit(&end->peeked, memory_order_relaxed) ? &edge
                                                                                                     : NULL,
                                 &deadline, &news);
                /* What was there before is still there: it is told once more, and what has come with it. */
                last = error < 0 || (news && !view_remote(&view)) || ready_broken(end);
        }
}

ssize_t transfer_receive(struct operation *o, struct end *end, uint64_t key)
{
        struct flow *flow = &end->rx;
        struct cursor cursor = {.vec = o->vec};
        int flags = is_splice(o) ? 0 : o->flags;
        bool news = false;
        uint64_t deadline = 0;
        size_t done = 0;

        if (flags & (MSG_OOB | MSG_ERRQUEUE))
                return operation_native(o);
        if (__builtin_expect(flags & MSG_PEEK || !o->size, 0))
                return o->size || (o->call != CALL_READ && o->call != CALL_READV) ? transfer_peek(o, end, key)
                                                                                  : 0;
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
                phase = enter(o->fd, end, flow, taken);
                if (phase == PHASE_TCP)
                        return native_counted(o, flow, true, taken);
                if (phase == PHASE_OVER) {
                        uint32_t error;

                        lock_release(&flow->lock, taken);
                        if (is_enough(o, end, done))
                                return (ssize_t)done;
                        error = atomic_exchange_explicit(&end->error, 0, memory_order_relaxed);
                        if (error)
                                return finish(done, -(long)error);
                        got = receive_rest(o, end, cursor, done);
                        if (!got)
                                look_again(end);
                        return got;
                }
                if (__builtin_expect(!identity_holds(o->fd, end), 0)) {
                        lock_release(&flow->lock, taken);
                        return lost(o, done, false);
                }
                view = end_receives(end);
                got = receive_now(o, end, &view, &cursor, done, phase, news);
                news = false;
                if (__builtin_expect(got == -EBADF || got == -ENOTSOCK, 0) && !end_is_behind(o->fd, end)) {
                        lock_release(&flow->lock, taken);
                        return lost(o, done, false);
                }
                if (got == -EPROTO)
                        reset_corrupt(o->fd, end);
                if (got == -ENOLINK)
                        reset_broken(o->fd, end, true);
                lock_release(&flow->lock, taken);
                if (got > 0) {
                        if (phase == PHASE_RING)
                                wake_senders(end, &view);
                        done += (size_t)got;
                        describe(o, end);
                        if (done == o->size || (phase == PHASE_READY && is_enough(o, end, done)))
                                return (ssize_t)done;
                        continue;
                }
                if (got == -EINPROGRESS || got == -EINTR)
                        continue;
                if (got == -EAGAIN) {
                        if (is_enough(o, end, done))
                                return (ssize_t)done;
                        if (atomic_load_explicit(&end->shut, memory_order_relaxed) & 1)
                                return (ssize_t)done;
                        if (!may_wait(o, end))
                                return finish(done, -EAGAIN);
                        outcome = wait_for(o->fd, end, key, WANT_BYTES, NULL, &deadline, &news);
                        if (outcome < 0)
                                return finish(done, outcome);
                        continue;
                }
                if (got == -ENOBUFS) {
                        got = done ? -EAGAIN : await_pipe(o, POLLOUT);
                        if (!got)
                                continue;
                        return finish(done, got);
                }
                if (got == -EBADF || got == -ENOTSOCK) {
                        /* Closed past us; the number is another file's, or nobody's. */
                        end_forget(o->fd);
                        return done ? (ssize_t)done : operation_native(o);
                }
                /* The end of the connection, or its error: the kernel says it only once, and we have asked.
                 */
                look_again(end);
                describe(o, end);
                if (got == -EPROTO || got == -ENOLINK || got == -EBADE)
                        got = -ECONNRESET;
                if (done && got < 0)
                        atomic_store_explicit(&end->error, (uint32_t)-got, memory_order_relaxed);
                return finish(done, got);
        }
}
