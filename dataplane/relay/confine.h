/* What the relay's process may do from its start on, so that a fault in what it reads from peers
 * and processes is worth little to them. */
#ifndef FREEFLOW_RELAY_CONFINE_H
#define FREEFLOW_RELAY_CONFINE_H

#include <stdbool.h>

/* Gives up all capabilities but that to lock memory, and all system calls but those that the relay,
 * libcrypto and libibverbs with its drivers make. `memory`: the transport `loopback` may be used,
 * which takes descriptors from other processes. errno; 0: done. */
int confine(bool memory);

#endif
