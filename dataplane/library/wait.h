/* How a read or a write of one connection waits: see sleep.h. */
#ifndef FREEFLOW_WAIT_H
#define FREEFLOW_WAIT_H

#include "family.h"

enum want { WANT_BYTES, WANT_SPACE };

/* Returns 0 when it is worth trying again, or a negative errno: -EINTR, or -EAGAIN if the socket's
 * timeout has passed. `beyond`: wait for bytes that come into the ring after this position; NULL:
 * for any. `deadline` is 0 before the first wait of a call, and kept by the caller. `*tcp_event` is
 * set when TCP has reported something. */
int wait_for(int fd, struct end *end, uint64_t key, enum want want, const uint64_t *beyond,
             uint64_t *deadline, bool *tcp_event);

#endif
