/* A receiver at the two places where TCP and the ring meet: before the ring's first byte, and
 * behind its last.
 *
 * All of it is under the lock and never waits. Functions return bytes, 0 for the end of the
 * connection, or -errno: -EAGAIN: nothing is there now; -EINPROGRESS: something has changed, try
 * again; -EPROTO: the other side wrote invalid words; -ENOLINK: the path through the relays is
 * lost; -EBADE: the connection was reset.
 */
#ifndef FREEFLOW_BOUNDARY_H
#define FREEFLOW_BOUNDARY_H

#include "transfer.h"

/* PHASE_READY: take up to `left` bytes of those that come before the ring. */
long boundary_before(struct transfer *t, size_t left);
/* The ring is empty: has it ended, has the connection? */
long boundary_behind(struct transfer *t);
/* A thread that waits must be told of what lies beyond the last byte of TCP, or beyond the ring's:
 * it may have been told already, or have checked while it couldn't be had yet. */
void boundary_tell(struct transfer *t);
/* The peer has closed: the sender asks the kernel itself at its next call. */
void boundary_closed(struct end *end);

#endif
