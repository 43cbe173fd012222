/* One call that moves bytes, whatever its name: what the program asked for, and how to ask the C library for
 * it. */
#ifndef FREEFLOW_TRANSFER_H
#define FREEFLOW_TRANSFER_H

#include "family.h"
#include "real.h"

enum call {
        CALL_READ,
        CALL_READV,
        CALL_RECV,
        CALL_RECVFROM,
        CALL_RECVMSG,
        CALL_WRITE,
        CALL_WRITEV,
        CALL_SEND,
        CALL_SENDTO,
        CALL_SENDMSG,
        CALL_SENDFILE,   /* `other` is a file, `offset` where */
        CALL_SPLICE_IN,  /* from the pipe `other` into the socket */
        CALL_SPLICE_OUT, /* from the socket into the pipe `other` */
};

struct operation {
        enum call call;
        int fd;
        int flags;
        const struct iovec *vec;
        int count;
        struct iovec one; /* what `vec` is for calls with one buffer */
        struct msghdr *message;
        struct sockaddr *address;
        socklen_t *address_size;
        socklen_t size_of_address;
        int other;
        off_t *offset;
        size_t size; /* of all buffers, or to move */
};

ssize_t operation_native(const struct operation *operation);
ssize_t transfer_send(struct operation *operation, struct end *end, uint64_t key);
ssize_t transfer_receive(struct operation *operation, struct end *end, uint64_t key);

#endif
