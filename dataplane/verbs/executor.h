/* What the other side asks for, executed in the memory of this process.
 *
 * Requests are executed in the order in which they come, each whole before the next. Nothing is
 * touched before the key, the protection domain, the access of the region and of the queue pair,
 * and the bounds of the whole operation have been checked.
 *
 * A request that is not allowed is refused: it stays in the ring, the other side hears of it, and
 * the queue pair becomes ERR. One for which there is no receive stays in the ring until there is;
 * answers behind it are taken meanwhile, since the program may wait for them before it posts more
 * receives. On a queue pair of type UC both are lost instead, and it goes on.
 */
#ifndef FREEFLOW_EXECUTOR_H
#define FREEFLOW_EXECUTOR_H

#include "requester.h"

/* Execute what has come, but not for long. Called under `receiving`, and without `sending`. True:
 * something was executed, and the caller wakes who waits for room in that ring. */
bool executor_run(struct queue_pair *queue, const struct cq *polled);

#endif
