/* A process of ours that forwards a connection, for a reader without the library or one that
 * doesn't know the connection: another program, the C library's streams.
 *
 * Such a reader would miss what is left in a ring that has ended. So the pump takes over the TCP
 * connection, and the reader's descriptor becomes a unix socket to the pump. getpeername() and
 * TCP's options don't work on it any more, so this is only done where bytes would be lost
 * otherwise.
 */
#ifndef FREEFLOW_PUMP_H
#define FREEFLOW_PUMP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The connection's bytes: `before` bytes of TCP, the bytes at `bytes`, and then the rest of TCP. */
struct pump {
        int tcp, program; /* descriptors: the connection, and the program's end of a pair of unix sockets */
        uint64_t before;
        const unsigned char *bytes;
        size_t size;
};

/* Make the pair of sockets, set `program`, and start. False: it can't be done. */
bool pump_start(struct pump *pump);

#endif
