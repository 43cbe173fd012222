/* Where datagrams go. */
#ifndef FREEFLOW_AH_H
#define FREEFLOW_AH_H

#include "verb.h"

struct address_handle {
        struct ibv_ah plain; /* what programs know */
        union ibv_gid from, to;
};

static inline struct address_handle *handle_of(struct ibv_ah *plain)
{
        return (struct address_handle *)(void *)plain;
}

#endif
