/* A connection goes to code that knows nothing of the ring: another program, the C library's
 * streams. It falls back to TCP, and what is left in its ring goes through a pump (pump.h).
 */
#ifndef FREEFLOW_HANDOVER_H
#define FREEFLOW_HANDOVER_H

#include "family.h"

/* Like fall_back(), for a descriptor that is read without the library from now on. */
void hand_over(int fd, struct end *end, uint64_t key, uint32_t reason);
/* The same for any descriptor, if it is tracked. */
static inline void hand_over_descriptor(int fd, uint32_t reason)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);

        if (end)
                hand_over(fd, end, key, reason);
}

/* From now on `program`, which this takes over, is what the program reads and writes. */
void hand_over_to(int fd, struct end *end, uint64_t key, int program, uint32_t reason);

#endif
