/* The memory that a program registers: protection domains, memory regions and memory windows.
 *
 * All devices that a process has opened are one, so their keys are in one table. Nothing is pinned:
 * whoever owns the memory is also who touches it for its peers, through the addresses of the
 * program. Registering makes sure that all of it is there and may be used as asked for, as a device
 * does when it pins it.
 */
#ifndef FREEFLOW_MEMORY_H
#define FREEFLOW_MEMORY_H

#include "keys.h"
#include "verb.h"

enum {
        MEMORY_KEYS = 65536, /* regions and windows of a process */
        MEMORY_ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
                        IBV_ACCESS_REMOTE_ATOMIC,
};

_Static_assert(KEY_LOCAL_WRITE == (int)IBV_ACCESS_LOCAL_WRITE &&
                   KEY_REMOTE_WRITE == (int)IBV_ACCESS_REMOTE_WRITE &&
                   KEY_REMOTE_READ == (int)IBV_ACCESS_REMOTE_READ &&
                   KEY_REMOTE_ATOMIC == (int)IBV_ACCESS_REMOTE_ATOMIC && KEY_BIND == (int)IBV_ACCESS_MW_BIND,
               "accesses are those of libibverbs");

/* A protection domain. The one of a parent domain is its own, and has the number of its parent. */
struct domain {
        struct ibv_pd pd;
        struct domain *parent;
        uint32_t number;
        _Atomic uint32_t users; /* objects in it */
};

/* The keys of the process. There are some once a domain was allocated. */
extern struct keys memory_keys;

static inline struct domain *domain_of(struct ibv_pd *pd)
{
        return (struct domain *)(void *)pd;
}

/* An object in the domain is made or destroyed. */
void domain_use(struct ibv_pd *pd);
void domain_leave(struct ibv_pd *pd);
/* A domain whose objects are those of `parent`. NULL: errno says why. */
struct ibv_pd *domain_in(struct ibv_context *context, struct ibv_pd *parent);

/* In a child of fork(): there are no keys. */
void memory_forget(void);

/* The operations `alloc_mw` and `dealloc_mw` of a context. */
struct ibv_mw *memory_add_window(struct ibv_pd *pd, enum ibv_mw_type type);
int memory_remove_window(struct ibv_mw *window);

/* Bind a window under a new key: one of type 2 for a queue pair of this domain and number, one of
 * type 1 for all of the domain. The latter is unbound before, and stays so if it has no length.
 * False: a window of type 2 is bound, or it may not be bound there. */
bool memory_bind(const struct ibv_mw *window, uint32_t key, const struct ibv_mw_bind_info *info,
                 uint32_t queue);
/* Make a window's key invalid, for a queue pair that may use it. False: it is none. */
bool memory_invalidate(uint32_t key, uint32_t domain, uint32_t queue);

#endif
