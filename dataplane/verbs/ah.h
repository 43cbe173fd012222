/* Where datagrams go. */
#ifndef FREEFLOW_AH_H
#define FREEFLOW_AH_H

#include "verb.h"

struct address {
        struct ibv_ah plain; /* what programs know */
        union ibv_gid from, to;
};

static inline struct address *address_of(struct ibv_ah *plain)
{
        return (struct address *)(void *)plain;
}

#endif
