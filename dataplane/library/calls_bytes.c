/* read(), write() and the other calls that move bytes. */
#include "calls.h"

#include "attach.h"
#include "fallback.h"
#include "file.h"
#include "handover.h"
#include "protocol.h"
#include "receive.h"
#include "retire.h"
#include "send.h"
#include "sys.h"
#include "verbs_client.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>

enum {
        LARGEST = 0x7ffff000, /* what the kernel moves at most in one call */
        /* Flags that mean nothing on a stream, or the same on a ring. */
        SEND_FLAGS = MSG_DONTWAIT | MSG_NOSIGNAL | MSG_MORE | MSG_EOR | MSG_CONFIRM | MSG_DONTROUTE |
                     MSG_WAITALL | MSG_TRUNC | MSG_CTRUNC | MSG_ZEROCOPY | MSG_CMSG_CLOEXEC | MSG_WAITFORONE,
        RECEIVE_FLAGS = SEND_FLAGS | MSG_PEEK | MSG_OOB | MSG_ERRQUEUE,
};

/* Flags of preadv2() and pwritev2(): those that mean nothing for a socket, and those that do. */
#define RWF_NOTHING 0x37 /* HIPRI, DSYNC, SYNC, APPEND, NOAPPEND */
#define RWF_WAITS_NOT 0x08
#define RWF_SIGNALS_NOT 0x100

#define SPLICE_FLAGS (SPLICE_F_MOVE | SPLICE_F_NONBLOCK | SPLICE_F_MORE | SPLICE_F_GIFT)

/* Compute the size of all buffers, as much of it as the kernel would move. False: it refuses them,
 * and moves nothing. */
static bool total(struct operation *o)
{
        size_t size = 0;

        if (o->count < 0 || o->count > IOV_MAX)
                return false;
        for (int i = 0; i < o->count; i++) {
                size_t more = o->vec[i].iov_len;

                if ((ssize_t)more < 0)
                        return false;
                size = more < LARGEST - size ? size + more : LARGEST;
        }
        o->size = size;
        return true;
}

static void single(struct operation *o, const void *buffer, size_t size)
{
        o->one = (struct iovec){(void *)(uintptr_t)buffer, size};
        o->vec = &o->one;
        o->count = 1;
}

/* The calls of sockets take any size and move at most LARGEST; read() and write() refuse a negative
 * size. */
static void single_of_socket(struct operation *o, const void *buffer, size_t size)
{
        single(o, buffer, size < LARGEST ? size : LARGEST);
}

/* Of an end that isn't attached: does the call go through the library? */
static bool is_tracked(struct operation *o, struct end *end, uint64_t key, uint32_t stage, size_t size)
{
        if (stage == STAGE_CLOSED)
                return false;
        retire_if_due();
        return attach_step(o->fd, end, key, size);
}

static ssize_t receive(struct operation *o, struct end *end, uint64_t key)
{
        uint32_t stage = load_relaxed(&end->stage);

        if (o->vec && !total(o))
                return operation_native(o);
        if (__builtin_expect(stage != STAGE_ATTACHED, 0) && !is_tracked(o, end, key, stage, 0))
                return operation_native(o);
        /* TCP may know a flag that the library doesn't. What is in the ring comes before. */
        if (__builtin_expect(o->flags & ~RECEIVE_FLAGS, 0) && load_relaxed(&end->tx.phase) != PHASE_OVER)
                fall_back(o->fd, end, key, REASON_OPTION);
        return transfer_receive(o, end, key);
}

static ssize_t send_out(struct operation *o, struct end *end, uint64_t key)
{
        uint32_t stage = load_relaxed(&end->stage);

        if (o->vec && !total(o))
                return operation_native(o);
        if (__builtin_expect(stage != STAGE_ATTACHED, 0) && !is_tracked(o, end, key, stage, o->size))
                return operation_native(o);
        return transfer_send(o, end, key);
}

CALL ssize_t read(int fd, void *buffer, size_t size)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {.call = CALL_READ, .fd = fd};

        if (!end)
                return real()->read(fd, buffer, size);
        single(&o, buffer, size);
        return receive(&o, end, key);
}

CALL ssize_t readv(int fd, const struct iovec *vec, int count)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {.call = CALL_READV, .fd = fd, .vec = vec, .count = count};

        return end ? receive(&o, end, key) : real()->readv(fd, vec, count);
}

CALL ssize_t recv(int fd, void *buffer, size_t size, int flags)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {.call = CALL_RECV, .fd = fd, .flags = flags};

        if (!end)
                return real()->recv(fd, buffer, size, flags);
        single_of_socket(&o, buffer, size);
        return receive(&o, end, key);
}

CALL ssize_t recvfrom(int fd, void *buffer, size_t size, int flags, struct sockaddr *address,
                      socklen_t *address_size)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {.call = CALL_RECVFROM,
                              .fd = fd,
                              .flags = flags,
                              .address = address,
                              .address_size = address_size};

        if (!end)
                return real()->recvfrom(fd, buffer, size, flags, address, address_size);
        single_of_socket(&o, buffer, size);
        return receive(&o, end, key);
}

/* Another process that gets a descriptor reads it without the library's state. */
static void passing(const struct msghdr *message)
{
        struct msghdr *header = (struct msghdr *)(uintptr_t)message;

        if (!process.on || !message->msg_control || message->msg_controllen < sizeof(struct cmsghdr))
                return;
        for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part; part = CMSG_NXTHDR(header, part)) {
                if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
                        continue;
                for (size_t at = 0; CMSG_LEN(at + sizeof(int)) <= part->cmsg_len; at += sizeof(int)) {
                        int fd;

                        memcpy(&fd, CMSG_DATA(part) + at, sizeof fd);
                        hand_over_descriptor(fd, REASON_PASSED);
                }
        }
}

CALL ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {.call = CALL_RECVMSG, .fd = fd, .flags = flags, .message = message};

        if (!end || !message)
                return real()->recvmsg(fd, message, flags);
        o.vec = message->msg_iov;
        o.count = message->msg_iovlen > IOV_MAX ? -1 : (int)message->msg_iovlen;
        return receive(&o, end, key);
}

CALL int recvmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        unsigned done = 0;

        if (!end)
                return real()->recvmmsg(fd, messages, count, flags, timeout);
        /* A stream: the messages are filled one after the other. The timeout counts from message to
         * message, as the kernel's does, and with it only what is there is taken after the first.
         */
        while (done < count) {
                int later = done && (flags & MSG_WAITFORONE || timeout) ? MSG_DONTWAIT : 0;
                ssize_t got = recvmsg(fd, &messages[done].msg_hdr, (flags & ~MSG_WAITFORONE) | later);

                if (got < 0) {
                        /* The next call returns the error. */
                        if (done && *__errno_location() != EAGAIN && *__errno_location() != EINTR &&
                            end_is(end, key))
                                store_relaxed(&end->error, (uint32_t)*__errno_location());
                        break;
                }
                messages[done].msg_len = (unsigned)got;
                done++;
                if (!got)
                        break;
        }
        return done ? (int)done : -1;
}

CALL ssize_t write(int fd, const void *buffer, size_t size)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {.call = CALL_WRITE, .fd = fd};

        if (!end)
                return __builtin_expect((uint32_t)key == FD_VERBS, 0) ? verbs_write(fd, buffer, size)
                                                                      : real()->write(fd, buffer, size);
        single(&o, buffer, size);
        return send_out(&o, end, key);
}

CALL ssize_t writev(int fd, const struct iovec *vec, int count)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {.call = CALL_WRITEV, .fd = fd, .vec = vec, .count = count};

        return end ? send_out(&o, end, key) : real()->writev(fd, vec, count);
}

CALL ssize_t send(int fd, const void *buffer, size_t size, int flags)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {
            .call = CALL_SEND, .fd = fd, .flags = flags, .by_kernel = (flags & ~SEND_FLAGS) != 0};

        if (!end)
                return real()->send(fd, buffer, size, flags);
        single_of_socket(&o, buffer, size);
        return send_out(&o, end, key);
}

CALL ssize_t sendto(int fd, const void *buffer, size_t size, int flags, const struct sockaddr *address,
                    socklen_t address_size)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {.call = CALL_SENDTO,
                              .fd = fd,
                              .flags = flags,
                              .by_kernel = (flags & ~SEND_FLAGS) != 0,
                              .address = (struct sockaddr *)(uintptr_t)address,
                              .size_of_address = address_size};

        if (end && flags & MSG_FASTOPEN) {
                /* It opens the connection with bytes, which would have to be counted before there
                 * is one. */
                fall_back(fd, end, key, REASON_OPTION);
                end = NULL;
        }
        if (!end)
                return real()->sendto(fd, buffer, size, flags, address, address_size);
        single_of_socket(&o, buffer, size);
        return send_out(&o, end, key);
}

CALL ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {
            .call = CALL_SENDMSG, .fd = fd, .flags = flags, .message = (struct msghdr *)(uintptr_t)message};

        if (end && flags & MSG_FASTOPEN) {
                fall_back(fd, end, key, REASON_OPTION);
                end = NULL;
        }
        if (!end) {
                if (__builtin_expect(message && message->msg_controllen, 0))
                        passing(message);
                return real()->sendmsg(fd, message, flags);
        }
        if (!message)
                return real()->sendmsg(fd, message, flags);
        o.vec = message->msg_iov;
        o.count = message->msg_iovlen > IOV_MAX ? -1 : (int)message->msg_iovlen;
        /* Control messages are for the kernel. */
        o.by_kernel = flags & ~SEND_FLAGS || (message->msg_control && message->msg_controllen);
        return send_out(&o, end, key);
}

CALL int sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        unsigned done = 0;

        if (!end) {
                for (unsigned i = 0; i < count && process.on; i++)
                        if (messages[i].msg_hdr.msg_controllen)
                                passing(&messages[i].msg_hdr);
                return real()->sendmmsg(fd, messages, count, flags);
        }
        while (done < count) {
                size_t wanted = 0;
                ssize_t sent = sendmsg(fd, &messages[done].msg_hdr, flags);

                if (sent < 0)
                        break;
                messages[done].msg_len = (unsigned)sent;
                for (size_t i = 0; i < messages[done].msg_hdr.msg_iovlen; i++)
                        wanted += messages[done].msg_hdr.msg_iov[i].iov_len;
                done++;
                if ((size_t)sent < wanted)
                        break;
        }
        return done ? (int)done : -1;
}

/* preadv2() and pwritev2() on a socket: only offset -1 is valid, and then they are recvmsg() and
 * sendmsg() with the flags' meaning. False: the call is the C library's. */
static bool vectors(struct operation *o, struct msghdr *message, const struct iovec *vec, int count,
                    off_t offset, int flags, uint64_t *key)
{
        struct end *end = offset == -1 ? end_of(o->fd, key) : NULL;

        if (!end)
                return false;
        if (flags & ~(RWF_NOTHING | RWF_WAITS_NOT | RWF_SIGNALS_NOT)) {
                fall_back(o->fd, end, *key, REASON_OPTION);
                if (o->call == CALL_SENDMSG || !end_has_rest(end))
                        return false;
        }
        /* The kernel refuses these itself. */
        if (count < 0 || count > IOV_MAX)
                return false;
        *message = (struct msghdr){.msg_iov = (struct iovec *)(uintptr_t)vec, .msg_iovlen = (size_t)count};
        o->message = message;
        o->vec = vec;
        o->count = count;
        o->flags = (flags & RWF_WAITS_NOT ? MSG_DONTWAIT : 0) | (flags & RWF_SIGNALS_NOT ? MSG_NOSIGNAL : 0);
        return true;
}

CALL ssize_t preadv2(int fd, const struct iovec *vec, int count, off_t offset, int flags)
{
        struct operation o = {.call = CALL_RECVMSG, .fd = fd};
        struct msghdr message;
        uint64_t key;

        if (!flags && offset == -1)
                return readv(fd, vec, count);
        if (vectors(&o, &message, vec, count, offset, flags, &key))
                return total(&o) && !o.size ? 0 : receive(&o, end_of(fd, &key), key);
        if (real()->preadv2)
                return real()->preadv2(fd, vec, count, offset, flags);
        return result(sys_6(SYS_preadv2, fd, vec, count, offset, 0, flags));
}

CALL ssize_t pwritev2(int fd, const struct iovec *vec, int count, off_t offset, int flags)
{
        struct operation o = {.call = CALL_SENDMSG, .fd = fd};
        struct msghdr message;
        uint64_t key;

        if (!flags && offset == -1)
                return writev(fd, vec, count);
        if (vectors(&o, &message, vec, count, offset, flags, &key))
                return send_out(&o, end_of(fd, &key), key);
        if (real()->pwritev2)
                return real()->pwritev2(fd, vec, count, offset, flags);
        return result(sys_6(SYS_pwritev2, fd, vec, count, offset, 0, flags));
}

CALL ssize_t sendfile(int out, int in, off_t *offset, size_t size)
{
        uint64_t key;
        struct end *end = end_of(out, &key);
        struct operation o = {.call = CALL_SENDFILE, .fd = out, .other = in, .offset = offset, .size = size};
        ssize_t sent;

        if (!end || (ssize_t)size <= 0)
                return real()->sendfile(out, in, offset, size);
        if (size > LARGEST)
                o.size = LARGEST;
        sent = send_out(&o, end, key);
        file_end(&o);
        return sent;
}

CALL ssize_t splice(int in, off64_t *in_offset, int out, off64_t *out_offset, size_t size, unsigned flags)
{
        struct operation o = {.flags = (int)flags, .size = size > LARGEST ? LARGEST : size};
        uint64_t key;
        struct end *end = out_offset || in_offset ? NULL : end_of(out, &key);
        bool sends = end != NULL;

        if (!end && !out_offset && !in_offset)
                end = end_of(in, &key);
        if (end) {
                o.fd = sends ? out : in;
                o.other = sends ? in : out;
                /* One must be a pipe, or the kernel refuses. */
                if (sys_2(SYS_fcntl, o.other, F_GETPIPE_SZ) < 0 || !size || (ssize_t)size < 0)
                        end = NULL;
        }
        if (end && flags & ~SPLICE_FLAGS) {
                fall_back(o.fd, end, key, REASON_OPTION);
                if (sends || !end_has_rest(end))
                        end = NULL;
                o.flags &= SPLICE_FLAGS;
        }
        if (!end)
                return real()->splice(in, in_offset, out, out_offset, size, flags);
        o.call = sends ? CALL_SPLICE_IN : CALL_SPLICE_OUT;
        return sends ? send_out(&o, end, key) : receive(&o, end, key);
}

/* The calls as _FORTIFY_SOURCE makes them, after its check. */
void __chk_fail(void) __attribute__((weak, noreturn));

void call_check(size_t size, size_t room)
{
        if (size <= room)
                return;
        if (__chk_fail)
                __chk_fail();
        __builtin_trap();
}

CALL ssize_t __read_chk(int fd, void *buffer, size_t size, size_t room)
{
        call_check(size, room);
        return read(fd, buffer, size);
}

CALL ssize_t __recv_chk(int fd, void *buffer, size_t size, size_t room, int flags)
{
        call_check(size, room);
        return recv(fd, buffer, size, flags);
}

CALL ssize_t __recvfrom_chk(int fd, void *buffer, size_t size, size_t room, int flags,
                            struct sockaddr *address, socklen_t *address_size)
{
        call_check(size, room);
        return recvfrom(fd, buffer, size, flags, address, address_size);
}

ALSO(read) ssize_t __read(int, void *, size_t);
ALSO(write) ssize_t __write(int, const void *, size_t);
ALSO(send) ssize_t __send(int, const void *, size_t, int);
ALSO(sendfile) ssize_t sendfile64(int, int, off64_t *, size_t);
ALSO(preadv2) ssize_t preadv64v2(int, const struct iovec *, int, off64_t, int);
ALSO(pwritev2) ssize_t pwritev64v2(int, const struct iovec *, int, off64_t, int);
