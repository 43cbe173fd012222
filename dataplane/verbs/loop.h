/* A queue pair that is connected with itself, as programs have for copies within a device.
 *
 * What it puts into its only ring it takes from there. Nobody else knows of the ring. So whoever
 * puts something there executes it, too, before the program goes on: progress_loop().
 */
#ifndef FREEFLOW_LOOP_H
#define FREEFLOW_LOOP_H

#include "queue_pair.h"

/* Does its path lead to itself? */
bool loop_is_wanted(const struct queue_pair *queue);
/* Pair it with itself. False: no memory. */
bool loop_up(struct queue_pair *queue);
void loop_end(struct queue_pair *queue);

#endif
