/* How a thread waits for one connection: spins while that pays, then sleeps until its bell rings or TCP has
 * news. */
#ifndef FREEFLOW_WAIT_H
#define FREEFLOW_WAIT_H

#include "arena.h"
#include "family.h"
#include "remote.h"

enum want { WANT_BYTES, WANT_SPACE };

/* Returns 0 when it's worth looking again, or a negative errno: -EINTR, -EAGAIN (the socket's timeout has
 * passed). `beyond`: for bytes that
 * come into the ring after those up to it; NULL. `deadline`: 0 before the first wait of a call; kept by the
 * caller. `news`: set when TCP has something. */
int wait_for(int fd, struct end *end, uint64_t key, enum want want, const uint64_t *beyond,
             uint64_t *deadline, bool *news);

/* There is no bell for a reader: it looks now and then, until the sender has gone back to TCP, where the
 * kernel wakes. */
static inline void wait_elsewhere(struct end *end)
{
        struct view view = end_receives(end);

        if (view_remote(&view))
                remote_request_fallback(end);
        else
                atomic_store(&view.ring->leave, 1);
}

#endif
