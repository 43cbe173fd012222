/* How ends are made and freed.
 *
 * Life of an end: made by socket() or accept(); found through `process.fds`, which holds its number
 * and generation; held by any number of processes, which `holders` counts; freed by the last one's
 * last close, under both locks, with a new generation. A thread that has waited in between compares
 * the generation before it touches anything.
 */
#ifndef FREEFLOW_ENDS_H
#define FREEFLOW_ENDS_H

#include "family.h"

struct end *end_make(int fd, bool nonblocking);
void end_alias(int old, int new);
/* Before the descriptor is closed or replaced. */
void end_forget(int fd);
/* This connection stays on, or goes back to, TCP and is no longer tracked. Not for one that is
 * attached. */
void end_leave(int fd, struct end *end, uint64_t key, uint32_t reason);

#endif
