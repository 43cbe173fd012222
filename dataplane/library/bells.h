/* Bells: the wake-up sockets of threads and epoll instances that wait for rings.
 *
 * A bell is a pair of connected unix sockets for one waiter and one arena. The router makes it. It
 * gives one socket, the receiving end, to the waiter's side, and the other, the sending end, to the
 * other side, which rings the bell by sending a byte. A bell isn't an eventfd, because the two
 * holders of an eventfd share one file description: either could make the other block in write(),
 * or take the other's wake-ups. With sockets, MSG_DONTWAIT belongs to the call, and a side that
 * fills or breaks its bell harms only its own wake-ups.
 *
 * A unix socket can carry descriptors, and the last close() of a descriptor whose file lingers
 * waits. So nothing can be sent to the sending end (the router has shut that direction down), and
 * no descriptor to the receiving end (SO_PASSRIGHTS, Linux 6.16). Before Linux 6.16 a bell is
 * peeked at before it is read: one that holds a descriptor is never read, and never closed either.
 */
#ifndef FREEFLOW_BELLS_H
#define FREEFLOW_BELLS_H

#include "mapping.h"
#include "waiters.h"

/* A bell for one wait of a thread, or one that an epoll instance keeps; -1: there is none now, and
 * one is ordered. `more`: no matter how many others have ordered. */
int bell_take(uint32_t arena, bool more);
/* Is a bell on its way from the router? */
bool bell_is_ordered(uint32_t arena);
/* The router has sent one end of a bell, or -1 if it has none. A descriptor that is kept becomes
 * -1. The receiving end of one of our bells: */
void bell_received(uint64_t id, uint32_t side, uint32_t bell, int *fd);
/* The sending end of one of the other side's: */
void bell_ringer_received(uint64_t id, uint32_t side, uint32_t bell, int *fd);
/* Keep the receiving end of a bell of ours; it becomes -1. Under family.arenas_lock. */
void bell_keep(struct mapping *mapping, uint32_t bell, int *fd);
/* Close a descriptor that the router has sent and nobody keeps. */
void bell_discard(int fd);
void bell_return(uint32_t arena, int bell);
int bell_descriptor(uint32_t arena, int bell);
/* Has the other side said that it can ring it? */
bool bell_is_known(uint32_t arena, uint32_t side, int bell);
/* Take the bytes out of a bell that rings, and look. False: it can't be used any more. */
bool bell_drain(uint32_t arena, int bell);
/* The bell's event has been taken: from now on the other side rings anew (rung.h). What `dirty` and
 * the rings say has to be read after this. */
void bell_look(uint32_t arena, int bell);
/* Close our bells; `shared`: another process holds them too. Close the other side's. */
void bells_close(struct mapping *mapping, bool shared);
void bells_close_peers(struct mapping *mapping);
/* Own descriptors were closed by somebody else: forget the bells among them. */
void bells_lost(void);

/* Wake those who wait for a ring of this slot of ours. */
void ring_bells(struct waiters *waiters, const struct place *place);

/* Something was published in a ring of this end for those who wait for it. */
static inline void wake(struct waiters *waiters, const struct end *end)
{
        if (waiters_sleep(waiters))
                ring_bells(waiters, &end->place);
}

#endif
