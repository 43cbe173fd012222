/* How a connection ends, or falls back to TCP: closed by its process, or asked to leave the ring by
 * the router, the peer, or the end of the relay. */
#ifndef FREEFLOW_RELAY_MIRROR_END_H
#define FREEFLOW_RELAY_MIRROR_END_H

#include "mirror.h"

/* R_CLOSE: no process here has the connection's end any more. */
void mirror_close(struct mirror *mirror);
/* R_LEAVE: both directions have to fall back to TCP. */
void mirror_leave(struct mirror *mirror);
/* Asks the process here to stop sending. mirrors_end_tick() sees when it has. */
void mirror_stop_process(struct mirror *mirror);
/* R_EXPIRE: breaks it if this is the last of `most` in a row at which it waits for the peer. An
 * idle one is like an idle TCP connection: it can wait for any time. */
void mirror_expire(struct mirror *mirror, enum relay_user user, uint32_t most);
/* Returns when to call it again; 0: never. */
uint64_t mirrors_end_tick(uint64_t present);

/* The relay ends: ask all connections to leave. */
void mirrors_leave(void);
/* Have all left, or can those that have not do so no more? */
bool mirrors_have_left(void);
/* Reset those that have not left. */
void mirrors_break(void);

#endif
