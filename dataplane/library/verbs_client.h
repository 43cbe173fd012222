/* What the library does for libibverbs.so.1, and says to it. services.h describes both. */
#ifndef FREEFLOW_VERBS_CLIENT_H
#define FREEFLOW_VERBS_CLIENT_H

#include "protocol.h"
#include "services.h"

static inline bool verbs_is_kind(const struct message *message)
{
        return message->kind >= V_OPEN;
}

/* Under the router's lock: a message of such a kind. See hooks.received(). */
void verbs_received(const void *message, size_t size, int *descriptors, int count);
/* Is there a client, or may there be one later? */
bool verbs_are_used(void);
void verbs_fork(void);
void verbs_fork_done(bool made);
void verbs_forked(void);
void verbs_descriptors_lost(void);
void verbs_retired(void);

/* Of a descriptor with FD_VERBS: write(). */
ssize_t verbs_write(int fd, const void *buffer, size_t size);
/* If it has FD_VERBS: it is about to be closed; `new` is another number of the same file. */
void verbs_closing(int fd);
void verbs_alias(int old, int new);

#endif
