/* The last close of a connection in a ring, and the end of its program. */
#ifndef FREEFLOW_CLOSING_H
#define FREEFLOW_CLOSING_H

#include "family.h"

/* Before the last close: the ring ends, and unread bytes make it a reset, as they do in TCP. */
void close_ring(int fd, struct end *end, uint64_t key);
/* When the program ends: what it still sends goes over TCP, and comes after what is in the ring. */
void close_at_exit(int fd, struct end *end, uint64_t key);

#endif
