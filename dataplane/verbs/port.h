/* The port of the process's only device, as the router describes it: its GIDs and its limits.
 *
 * The router numbers the GIDs, one for each address of the container on a network that has verbs.
 * It tells all of them at first, and each one that changes later. A GID's place stays its own.
 *
 * A child of fork() has none of what its parent has opened: each call that would use it fails. It
 * may open the device itself, once the router has described it to the child.
 */
#ifndef FREEFLOW_PORT_H
#define FREEFLOW_PORT_H

#include "verb.h"

#include <stdatomic.h>
#include <stdbool.h>

enum {
        PORT_NUMBER = 1,
        PORT_GIDS = 128, /* places of the table */
        /* What a process may have of each at one time, unless the router allows less. */
        MOST_QUEUE_PAIRS = 4096,
        MOST_REGIONS = 65536,
        MOST_QUEUES = 4096,
        MOST_COMPLETIONS = 1 << 20, /* of one queue */
        MOST_RECEIVE_QUEUES = 1024,
        MOST_REQUESTS = 16384, /* of one send, receive or shared receive queue */
        MOST_PIECES = 32,      /* of memory, of one request */
        MOST_READS = 16,       /* of one queue pair: READs and atomics under way */
        MOST_INLINE = 512,     /* bytes */
        MOST_MESSAGE = 1 << 30,
};

/* What the router says of one place of the table. */
struct port_place {
        uint32_t index;
        uint32_t queue_pairs, regions; /* limits */
        uint32_t first;                /* of the numbers of the process's queue pairs */
        uint64_t guid;
        uint64_t direct_bytes; /* of memory that peers may map; 0: none may */
        union ibv_gid gid;     /* 0: none */
};

/* The router has said this of a place in the table. True: its GID is another one. */
bool port_set(const struct port_place *place);
/* No GID is in this place. True: one was. */
bool port_clear(uint32_t index);
/* What is opened now is lost. */
void port_lose(void);
/* In a child of fork(): that, and nothing is known. */
void port_forget(void);
/* Of what is opened now. What has another one is lost. */
extern _Atomic uint32_t port_generations;
static inline uint32_t port_generation(void)
{
        return atomic_load_explicit(&port_generations, memory_order_relaxed);
}

/* Bytes of memory that peers may map; 0: none may, and this process maps none of theirs. */
extern _Atomic uint64_t port_direct_bytes;

/* Is there a GID? */
bool port_is_active(void);
/* False: none is in this place. */
bool port_gid(uint32_t index, union ibv_gid *gid);
/* Where is this GID? False: it is none of the port's. */
bool port_find(const union ibv_gid *gid, uint32_t *index);
/* In network byte order. */
__be64 port_guid(void);
uint32_t port_most_queue_pairs(void);
uint32_t port_most_regions(void);
uint32_t port_first_number(void);

#endif
