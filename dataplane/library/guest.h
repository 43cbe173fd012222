/* A guest is a child of vfork, and any other that runs in its parent's memory with descriptors of
 * its own. The parent is its host.
 *
 * A guest that hands a connection over (handover.h) can't replace its host's descriptors. It sends
 * its host the pump's socket over a pair of unix sockets, which the host has made before, and the
 * host replaces them when the guest has gone.
 */
#ifndef FREEFLOW_GUEST_H
#define FREEFLOW_GUEST_H

#include "family.h"

/* In the host, before it makes a guest. */
void guest_prepare(void);
/* In the guest: `program` is the connection from now on. */
void guest_send(struct end *end, uint64_t key, int program);
/* In the host, after the guest has gone: take one such message. Returns false if there is none. */
bool guest_receive(struct end **end, uint64_t *key, int *program);

#endif
