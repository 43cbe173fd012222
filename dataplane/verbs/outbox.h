/* Messages to the router that its socket has had no room for.
 *
 * The router stops reading from a process that does not read its answers. So no thread may wait for
 * room while it holds a lock that others need for reading. Such messages are kept here, and sent
 * later in their order. When the socket that they are for is lost, they are dropped.
 */
#ifndef FREEFLOW_OUTBOX_H
#define FREEFLOW_OUTBOX_H

#include "../library/services.h"

enum outbox_outcome {
        OUTBOX_SENT,
        OUTBOX_KEPT,
        OUTBOX_LOST, /* that socket is lost, or too much is kept */
};

/* Send a message by this epoch's socket, after those that are kept. May be called with any lock
 * held. */
enum outbox_outcome outbox_send(const struct freeflow_services *here, const void *message, size_t size,
                                uint32_t epoch);
/* Send what is kept, as far as there is room. */
void outbox_flush(const struct freeflow_services *here);
bool outbox_is_empty(void);
/* In a child of fork(): nothing is kept. */
void outbox_forget(void);

#endif
