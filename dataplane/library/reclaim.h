/* Returning the rings' memory to the kernel.
 *
 * What bulk data has touched is reclaimed when its ring has been empty for a second. Only the
 * sender can know that no thread writes there, so the sender does it, before a thread of its
 * process sleeps. While there is something to reclaim, sleepers wake for it.
 */
#ifndef FREEFLOW_RECLAIM_H
#define FREEFLOW_RECLAIM_H

#include <stdint.h>

/* Before a sleep of `left` ns; negative: without a time limit. Reclaims what is due, and returns
 * how long to sleep instead. */
int64_t reclaim_before_sleep(int64_t left);

#endif
