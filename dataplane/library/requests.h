/* What the library requests of the router, and what it does with the answers. */
#ifndef FREEFLOW_REQUESTS_H
#define FREEFLOW_REQUESTS_H

#include "family.h"

/* Request a connection's upgrade, if that is possible now. */
void request_upgrade(struct end *end, int fd);
/* Take the router's answers, if it is time to poll for them. */
void request_poll(struct end *end);
/* While acceleration is off: take the router's message that it is on, if it is time to look. The
 * router may learn of a container only after the container's first processes have come. */
void request_watch(void);
/* A message of the router: see hooks.received(). */
void request_received(const void *message, size_t size, int *descriptors, int count);

#endif
