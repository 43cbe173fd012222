/* A token bucket: a thread's share of time for questions to the kernel.
 *
 * Times are those of clock_stamp(). A question may be asked every `cost`, and up to BUCKET_SIZE of
 * them at once by a thread that has asked none for long.
 */
#ifndef FREEFLOW_BUCKET_H
#define FREEFLOW_BUCKET_H

#include <stdbool.h>
#include <stdint.h>

enum { BUCKET_SIZE = 256 };

/* Take a token, if there is one. `spent`: the time until which the thread's share is used up. */
static inline bool bucket_take(uint64_t *spent, uint64_t stamp, uint64_t cost)
{
        if ((int64_t)(*spent - stamp) > (int64_t)(cost * (BUCKET_SIZE - 1)))
                return false;
        if ((int64_t)(*spent - stamp) < 0)
                *spent = stamp;
        *spent += cost;
        return true;
}

#endif
