#include "port.h"

#include "mutex.h"

#include <endian.h>
#include <string.h>

_Atomic uint32_t port_generations;
_Atomic uint64_t port_direct_bytes;

static struct {
        struct mutex mutex;
        uint32_t count; /* of GIDs */
        uint32_t queue_pairs, regions, first;
        uint64_t guid;
        union ibv_gid gids[PORT_GIDS];
} port;

static bool is_none(const union ibv_gid *gid)
{
        return !gid->global.subnet_prefix && !gid->global.interface_id;
}

static uint32_t lower(uint32_t said, uint32_t most)
{
        return said < most ? said : most;
}

/* Under the mutex. True: it is another one. */
static bool set_gid(uint32_t index, const union ibv_gid *wanted)
{
        union ibv_gid *gid = &port.gids[index];
        bool changed = memcmp(gid, wanted, sizeof *gid) != 0;

        port.count += (uint32_t)is_none(gid) - (uint32_t)is_none(wanted);
        *gid = *wanted;
        return changed;
}

bool port_clear(uint32_t index)
{
        const union ibv_gid none = {0};
        bool changed;

        mutex_take(&port.mutex);
        changed = set_gid(index, &none);
        mutex_release(&port.mutex);
        return changed;
}

bool port_set(const struct port_place *place)
{
        bool changed;

        if (place->index >= PORT_GIDS)
                return false;
        mutex_take(&port.mutex);
        changed = set_gid(place->index, &place->gid);
        port.first = place->first;
        port.guid = place->guid;
        atomic_store_explicit(&port_direct_bytes, place->direct_bytes, memory_order_relaxed);
        port.queue_pairs = lower(place->queue_pairs, MOST_QUEUE_PAIRS);
        port.regions = lower(place->regions, MOST_REGIONS);
        mutex_release(&port.mutex);
        return changed;
}

void port_lose(void)
{
        atomic_fetch_add_explicit(&port_generations, 1, memory_order_relaxed);
}

void port_forget(void)
{
        /* Another thread of the parent may have had the mutex. */
        port.mutex = (struct mutex){0};
        port.count = 0;
        memset(port.gids, 0, sizeof port.gids);
        port.first = 0;
        atomic_store_explicit(&port_direct_bytes, 0, memory_order_relaxed);
        port_lose();
}

/* A copy of a word that the router may change. */
#define COPY_OF(field)                                                                                       \
        ({                                                                                                   \
                __typeof__(port.field) copy_;                                                                \
                                                                                                             \
                mutex_take(&port.mutex);                                                                     \
                copy_ = port.field;                                                                          \
                mutex_release(&port.mutex);                                                                  \
                copy_;                                                                                       \
        })

bool port_is_active(void)
{
        return COPY_OF(count);
}

__be64 port_guid(void)
{
        return htobe64(COPY_OF(guid));
}

uint32_t port_most_queue_pairs(void)
{
        return COPY_OF(queue_pairs);
}

uint32_t port_most_regions(void)
{
        return COPY_OF(regions);
}

uint32_t port_first_number(void)
{
        return COPY_OF(first);
}

bool port_find(const union ibv_gid *gid, uint32_t *index)
{
        bool found = false;

        mutex_take(&port.mutex);
        for (uint32_t i = 0; i < PORT_GIDS && !found; i++) {
                found = !is_none(gid) && memcmp(&port.gids[i], gid, sizeof *gid) == 0;
                *index = i;
        }
        mutex_release(&port.mutex);
        return found;
}

bool port_gid(uint32_t index, union ibv_gid *gid)
{
        if (index >= PORT_GIDS)
                return false;
        mutex_take(&port.mutex);
        *gid = port.gids[index];
        mutex_release(&port.mutex);
        return !is_none(gid);
}
