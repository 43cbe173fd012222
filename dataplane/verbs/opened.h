/* A device that the program has opened, as other objects see it. */
#ifndef FREEFLOW_OPENED_H
#define FREEFLOW_OPENED_H

#include "channel.h"
#include "port.h"

#include <stddef.h>

struct opened {
        struct opened *next;
        struct events events;
        struct event gids_changed, port_up, port_down;
        struct verbs_context extended; /* what programs know, from its last field on */
};

static inline struct opened *opened_of(struct ibv_context *context)
{
        return (struct opened *)((char *)context - offsetof(struct opened, extended.context));
}

/* Was it opened before this process was forked off? Then each call fails with EIO, and what belongs
 * to the context is only freed. */
static inline bool opened_is_lost(struct ibv_context *context)
{
        return __builtin_expect(opened_of(context)->events.generation != port_generation(), 0);
}

#endif
