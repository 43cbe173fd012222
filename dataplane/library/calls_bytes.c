/* read(), write() and their kin. */
#include "calls.h"

#include "protocol.h"
#include "statistics.h"
#include "transfer.h"
#include "upgrade.h"

#include <errno.h>
#include <limits.h>
#include <string.h>

enum { LARGEST = 0x7ffff000 }; /* what the kernel moves at most in one call */

static bool total(struct operation *o)
{
        size_t size = 0;

        if (o->count < 0 || o->count > IOV_MAX)
                return false;
        for (int i = 0; i < o->count; i++) {
                if (o->vec[i].iov_len > LARGEST - size)
                        return false;
                size += o->vec[i].iov_len;
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

static ssize_t receive(struct operation *o, struct end *end, uint64_t key)
{
        uint32_t stage = atomic_load_explicit(&end->stage, memory_order_relaxed);

        if (o->vec && !total(o))
                return operation_native(o);
        if (__builtin_expect(stage != STAGE_ATTACHED, 0) &&
            (stage == STAGE_CLOSED || !upgrade_step(o->fd, end, key, 0)))
                return operation_native(o);
        return transfer_receive(o, end, key);
}

static ssize_t send_out(struct operation *o, struct end *end, uint64_t key)
{
        uint32_t stage = atomic_load_explicit(&end->stage, memory_order_relaxed);

        if (o->vec && !total(o))
                return operation_native(o);
        if (__builtin_expect(stage != STAGE_ATTACHED, 0) &&
            (stage == STAGE_CLOSED || !upgrade_step(o->fd, end, key, o->size)))
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
        single(&o, buffer, size);
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
        single(&o, buffer, size);
        return receive(&o, end, key);
}

/* A descriptor that another process gets is read there without what we know of it. */
static void passing(const struct msghdr *message)
{
        struct msghdr *header = (struct msghdr *)(uintptr_t)message;

        if (!process.on || !message->msg_control || message->msg_controllen < sizeof(struct cmsghdr))
                return;
        for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part; part = CMSG_NXTHDR(header, part)) {
                if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
                        continue;
                for (size_t at = 0; CMSG_LEN(at + sizeof(int)) <= part->cmsg_len; at += sizeof(int)) {
                        struct end *end;
                        uint64_t key;
                        int fd;

                        memcpy(&fd, CMSG_DATA(part) + at, sizeof fd);
                        end = end_of(fd, &key);
                        if (end)
                                upgrade_hand_over(fd, end, key, REASON_PASSED);
                }
        }
}

CALL ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {.call = CALL_RECVMSG, .fd = fd, .flags = flags, .message = message};

        if (!end)
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
        /* A stream: the messages are filled one after the other. The timeout counts from message to message,
         * as the kernel's does, and with it only what is there is taken after the first. */
        while (done < count) {
                int later = done && (flags & MSG_WAITFORONE || timeout) ? MSG_DONTWAIT : 0;
                ssize_t got = recvmsg(fd, &messages[done].msg_hdr, (flags & ~MSG_WAITFORONE) | later);

                if (got < 0)
                        break;
                messages[done].msg_len = (unsigned)got;
                messages[done].msg_hdr.msg_flags = 0;
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
                return real()->write(fd, buffer, size);
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
        struct operation o = {.call = CALL_SEND, .fd = fd, .flags = flags};

        if (!end)
                return real()->send(fd, buffer, size, flags);
        single(&o, buffer, size);
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
                              .address = (struct sockaddr *)(uintptr_t)address,
                              .size_of_address = address_size};

        if (end && flags & MSG_FASTOPEN) {
                /* Opens the connection with bytes that we'd have to count before it is one. */
                upgrade_leave(fd, end, key, REASON_OPTION);
                end = NULL;
        }
        if (!end)
                return real()->sendto(fd, buffer, size, flags, address, address_size);
        single(&o, buffer, size);
        return send_out(&o, end, key);
}

CALL ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);
        struct operation o = {
            .call = CALL_SENDMSG, .fd = fd, .flags = flags, .message = (struct msghdr *)(uintptr_t)message};

        if (end && flags & MSG_FASTOPEN) {
                upgrade_leave(fd, end, key, REASON_OPTION);
                end = NULL;
        }
        if (!end) {
                if (__builtin_expect(message && message->msg_controllen, 0))
                        passing(message);
                return real()->sendmsg(fd, message, flags);
        }
        o.vec = message->msg_iov;
        o.count = message->msg_iovlen > IOV_MAX ? -1 : (int)message->msg_iovlen;
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

CALL ssize_t preadv2(int fd, const struct iovec *vec, int count, off_t offset, int flags)
{
        uint64_t key;

        /* On a socket only offset -1 means anything, and then it's readv(). */
        if (offset == -1 && !flags && end_of(fd, &key))
                return readv(fd, vec, count);
        return real()->preadv2(fd, vec, count, offset, flags);
}

CALL ssize_t pwritev2(int fd, const struct iovec *vec, int count, off_t offset, int flags)
{
        uint64_t key;

        if (offset == -1 && !flags && end_of(fd, &key))
                return writev(fd, vec, count);
        return real()->pwritev2(fd, vec, count, offset, flags);
}

CALL ssize_t sendfile(int out, int in, off_t *offset, size_t size)
{
        uint64_t key;
        struct end *end = end_of(out, &key);
        struct operation o = {.call = CALL_SENDFILE, .fd = out, .other = in, .offset = offset, .size = size};

        if (!end)
                return real()->sendfile(out, in, offset, size);
        if (size > LARGEST)
                o.size = LARGEST;
        return send_out(&o, end, key);
}

CALL ssize_t splice(int in, off64_t *in_offset, int out, off64_t *out_offset, size_t size, unsigned flags)
{
        struct operation o = {.flags = (int)flags, .size = size > LARGEST ? LARGEST : size};
        uint64_t key;
        struct end *end = out_offset ? NULL : end_of(out, &key);

        if (end && !in_offset) {
                o.call = CALL_SPLICE_IN;
                o.fd = out;
                o.other = in;
                return send_out(&o, end, key);
        }
        end = in_offset ? NULL : end_of(in, &key);
        if (end && !out_offset) {
                o.call = CALL_SPLICE_OUT;
                o.fd = in;
                o.other = out;
                return receive(&o, end, key);
        }
        return real()->splice(in, in_offset, out, out_offset, size, flags);
}

/* What _FORTIFY_SOURCE makes of the calls, after its check. */
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
