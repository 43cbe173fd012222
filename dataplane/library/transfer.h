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
        union {
                struct iovec one; /* what `vec` is for calls with one buffer */
                /* Of a file that has to be waited for: bytes that were read without a lock. */
                struct {
                        unsigned char *ahead;
                        size_t ahead_size;
                };
        };
        union {
                struct msghdr *message;
                off_t ahead_at; /* where those bytes were */
        };
        struct sockaddr *address;
        socklen_t *address_size;
        socklen_t size_of_address;
        int other;
        bool by_kernel;  /* a ring can't carry it: the connection goes back to TCP first */
        bool refused;    /* the kernel has said that it doesn't do it */
        bool file_waits; /* its file system can't read without waiting */
        off_t *offset;
        size_t size; /* of all buffers, or to move */
};

enum { AHEAD = 64 * 1024 };

/* A sendfile() is over: what it read ahead of the connection goes to the next one. */
void transfer_end_ahead(struct operation *operation);
ssize_t operation_native(const struct operation *operation);
ssize_t transfer_send(struct operation *operation, struct end *end, uint64_t key);
ssize_t transfer_receive(struct operation *operation, struct end *end, uint64_t key);
/* Bytes that a receiver could read: so many of TCP, and those of the ring. */
int transfer_unread(struct end *end, int queued);
/* Tell the kernel what SO_RCVLOWAT is for it, while so many bytes come before its own. */
void transfer_low_water(int fd, uint32_t low, int64_t left);

#endif
