/* For a descriptor that somebody reads from now on who doesn't have the library, or doesn't know the
 * connection: another program, the C library's streams. What he would miss, because it is in a ring that has
 * ended, a process of our own gives him: it takes over the TCP connection, and the descriptor becomes a unix
 * socket to it. So it is only done when bytes would be lost otherwise; getpeername() and TCP's options don't
 * work any more then.
 */
#ifndef FREEFLOW_PUMP_H
#define FREEFLOW_PUMP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What comes from the connection: `before` bytes of TCP, the bytes at `bytes`, and then the rest of TCP. */
struct pump {
        int tcp, program; /* descriptors: the connection, and the program's end of a pair of unix sockets */
        uint64_t before;
        const unsigned char *bytes;
        size_t size;
};

/* Make the pair of sockets, set `program`, and start. False: it can't be done. */
bool pump_start(struct pump *pump);

#endif
