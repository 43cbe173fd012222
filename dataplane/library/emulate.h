/* Receiving as the kernel would: what options, recvmsg() and ioctls say of bytes that are in a
 * ring. */
#ifndef FREEFLOW_EMULATE_H
#define FREEFLOW_EMULATE_H

#include "transfer.h"

/* Bytes that a receiver could read: so many of TCP, and those of the ring. */
int emulate_unread(struct end *end, int queued);
/* Tell the kernel what SO_RCVLOWAT is for it, while so many bytes come before its own. */
void emulate_low_water(int fd, uint32_t low, int64_t left);
/* Options that the kernel has: after `taken` bytes of a ring that has ended, it is told what is
 * still to come before its own bytes. Under the lock. */
void emulate_taken(struct transfer *t, uint64_t taken);
/* How many bytes a call waits for. */
size_t emulate_least(const struct transfer *t);
void emulate_message(struct transfer *t);

/* Has the call moved as much as it waits for? */
static inline bool emulate_is_enough(const struct transfer *t)
{
        return t->done && t->done >= emulate_least(t);
}

/* What recvmsg() and recvfrom() say besides the bytes. */
static inline void emulate_description(struct transfer *t)
{
        if (t->o->call == CALL_RECVMSG || t->o->call == CALL_RECVFROM)
                emulate_message(t);
}

#endif
