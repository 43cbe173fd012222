/* What the relay's process may do from its start on, so that a fault in what it reads from peers
 * and processes is worth little to them. */
#ifndef FREEFLOW_RELAY_CONFINE_H
#define FREEFLOW_RELAY_CONFINE_H

/* Gives up all capabilities but that to lock memory, and all system calls but those that the relay,
 * libcrypto and libibverbs with its drivers make. The transport `loopback`, which takes descriptors
 * from other processes, needs more; it is only in builds for tests (FREEFLOW_MEMORY). errno; 0:
 * done. */
int confine(void);

#endif
