#include "transfer.h"

#include "identity.h"
#include "mapping.h"
#include "reentry.h"
#include "signals.h"
#include "sys.h"
#include "upgrade.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif

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

bool operation_is_splice(const struct operation *o)
{
        return o->call == CALL_SPLICE_IN || o->call == CALL_SPLICE_OUT;
}

bool transfer_may_wait(const struct transfer *t)
{
        if (load_relaxed(&t->end->nonblocking))
                return false;
        /* SPLICE_F_NONBLOCK is about the pipe. */
        return operation_is_splice(t->o) || !(t->o->flags & MSG_DONTWAIT);
}

uint32_t transfer_move(struct transfer *t, enum taken taken)
{
        struct end *end = t->end;

        if (taken != LOCK_TAKEN || load_relaxed(&end->stage) != STAGE_ATTACHED)
                return PHASE_TCP;
        if (t->flow == &end->rx)
                upgrade_receiver(end);
        else
                upgrade_sender(t->o->fd, end);
        return load_relaxed(&t->flow->phase);
}

bool transfer_reenters(struct transfer *t)
{
        if (t->done || !reentry_is_due(t->end))
                return false;
        transfer_leave_kernel(t);
        reentry_leave_slot(t->o->fd, t->end, t->key);
        return true;
}

bool transfer_find(struct transfer *t)
{
        bool receives = t->flow == &t->end->rx;

        identity_lost(t->o->fd);
        if (t->done)
                return false;
        t->end = end_of(t->o->fd, &t->key);
        if (!t->end)
                return false;
        t->flow = receives ? &t->end->rx : &t->end->tx;
        t->deadline = 0;
        t->event = false;
        return true;
}

/* --- the rest of a call --- */

int transfer_buffers(const struct operation *o, const struct cursor *cursor, size_t size, struct iovec *vec)
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

void cursor_skip(struct cursor *cursor, size_t size)
{
        while (size) {
                size_t left = cursor_left(cursor), part = left < size ? left : size;

                size -= part;
                cursor_move(cursor, part);
        }
}

/* By sendmsg() or recvmsg(), of the buffers that are left. */
static void rest_of_buffers(struct transfer *t, size_t most, bool sending)
{
        struct operation *o = t->o;
        int flags = o->flags | (sending ? MSG_NOSIGNAL : MSG_WAITALL);
        struct iovec vec[VECTORS];
        struct msghdr message = {.msg_iov = vec};
        bool peek = !sending && flags & MSG_PEEK;
        ssize_t moved, wanted;

        do {
                if (!sending && sys_number(o->fd, SIOCATMARK))
                        break;
                message.msg_iovlen = (size_t)transfer_buffers(o, &t->cursor, most - t->done, vec);
                wanted = 0;
                for (size_t i = 0; i < message.msg_iovlen; i++)
                        wanted += (ssize_t)vec[i].iov_len;
                moved = sending ? real()->sendmsg(o->fd, &message, flags)
                                : real()->recvmsg(o->fd, &message, flags);
                if (moved < 0 && !sending && *__errno_location() != EAGAIN && *__errno_location() != EINTR)
                        store_relaxed(&t->end->error, (uint32_t)*__errno_location());
                if (moved <= 0)
                        break;
                t->done += (size_t)moved;
                if (!(!sending && flags & MSG_TRUNC))
                        cursor_skip(&t->cursor, (size_t)moved);
                /* A second peek would begin with the same bytes. */
        } while (moved == wanted && t->done < most && !peek);
}

/* By the call itself. */
static void rest_of_file(struct transfer *t)
{
        struct operation rest = *t->o;
        ssize_t moved;

        rest.size -= t->done;
        /* What the pipe has had is enough. */
        rest.flags |= operation_is_splice(&rest) ? (int)SPLICE_F_NONBLOCK : 0;
        moved = operation_native(&rest);
        t->done += moved > 0 ? (size_t)moved : 0;
}

/* Bytes that went over TCP count, before a ring and after it (reentry.h). */
static void count_rest(struct transfer *t, ssize_t moved, bool sending)
{
        if (moved > 0 && (sending || operation_is_splice(t->o) || !(t->o->flags & MSG_PEEK)))
                atomic_fetch_add_explicit(&t->flow->position, (uint64_t)moved, memory_order_relaxed);
}

ssize_t transfer_rest(struct transfer *t, size_t most, bool sending)
{
        int saved = *__errno_location();
        size_t before = t->done;

        if (!t->done) {
                ssize_t moved = operation_native(t->o);

                count_rest(t, moved, sending);
                return moved;
        }
        if (t->o->call == CALL_SENDFILE || operation_is_splice(t->o))
                rest_of_file(t);
        else
                rest_of_buffers(t, most, sending);
        count_rest(t, (ssize_t)(t->done - before), sending);
        *__errno_location() = saved;
        return (ssize_t)t->done;
}

/* --- pipes --- */

/* Reads and writes of a pipe can't be told to return at once, so it is polled before: Linux before
 * 6.4. */
static _Atomic bool pipes_wait;

long pipe_now(long call, int fd, short events, void *place, size_t size)
{
        struct iovec vec = {place, size};

        if (!load_relaxed(&pipes_wait)) {
                long got =
                    sys_6(call == SYS_read ? SYS_preadv2 : SYS_pwritev2, fd, &vec, 1, -1, -1, RWF_NOWAIT);

                if (got >= 0 || got == -EAGAIN || got == -EPIPE || got == -EINTR || got == -EBADF)
                        return got;
                store_relaxed(&pipes_wait, true);
        }
        if (!sys_poll(fd, events))
                return -EAGAIN;
        return sys_3(call, fd, place, call == SYS_write && size > PIPE_PAGE ? PIPE_PAGE : size);
}

long pipe_await(const struct operation *o, short events)
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
