#include "memory.h"

#include "extents.h"
#include "mutex.h"
#include "opened.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

/* A memory region, with what rereg may leave as it is. */
struct region {
        struct ibv_mr mr;
        uint64_t base;
        unsigned int access;
        struct extent *extent; /* NULL: peers send records */
};

enum {
        REMOTE_WRITES = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC,
        REMOTE_ACCESS = REMOTE_WRITES | IBV_ACCESS_REMOTE_READ,
};

struct keys memory_keys;
/* For changes of `memory_keys`, and of the number of domains. Taken last. */
static struct mutex mutex;
static uint32_t domains;

static void *fail(int error)
{
        errno = error;
        return NULL;
}

void memory_forget(void)
{
        mutex = (struct mutex){0};
        /* Other threads of the parent may have held some. */
        if (memory_keys.entries)
                keys_end(&memory_keys);
}

/* --- protection domains */

void domain_use(struct ibv_pd *pd)
{
        atomic_fetch_add_explicit(&domain_of(pd)->users, 1, memory_order_relaxed);
}

void domain_leave(struct ibv_pd *pd)
{
        atomic_fetch_sub_explicit(&domain_of(pd)->users, 1, memory_order_relaxed);
}

VERB struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
        struct domain *domain;
        bool started;

        if (opened_is_lost(context))
                return fail(EIO);
        domain = calloc(1, sizeof *domain);
        if (!domain)
                return fail(ENOMEM);
        mutex_take(&mutex);
        started = memory_keys.entries || keys_start(&memory_keys, MEMORY_KEYS);
        if (started)
                domain->number = ++domains;
        mutex_release(&mutex);
        if (!started) {
                free(domain);
                return fail(ENOMEM);
        }
        domain->pd = (struct ibv_pd){.context = context, .handle = domain->number};
        return &domain->pd;
}

struct ibv_pd *domain_in(struct ibv_context *context, struct ibv_pd *parent)
{
        struct domain *domain = calloc(1, sizeof *domain);

        if (!domain)
                return fail(ENOMEM);
        domain->parent = domain_of(parent);
        domain->number = domain->parent->number;
        domain->pd = (struct ibv_pd){.context = context, .handle = domain->number};
        domain_use(parent);
        return &domain->pd;
}

VERB int ibv_dealloc_pd(struct ibv_pd *pd)
{
        struct domain *domain = domain_of(pd);

        if (atomic_load_explicit(&domain->users, memory_order_relaxed))
                return EBUSY;
        if (domain->parent)
                domain_leave(&domain->parent->pd);
        free(domain);
        return 0;
}

/* --- memory regions */

/* Is all of it there, and writable if need be? Returns 0 or what registering fails with. */
static int check_pages(uintptr_t first, size_t length, bool writes)
{
        enum { PAGE_BYTES = 4096, STEP = 512 * PAGE_BYTES };
        uintptr_t from = first & ~(uintptr_t)(PAGE_BYTES - 1);
        uintptr_t end = (first + length + PAGE_BYTES - 1) & ~(uintptr_t)(PAGE_BYTES - 1);
        unsigned char there[STEP / PAGE_BYTES];
        int advice = writes ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;

        if (!sys_3(SYS_madvise, from, end - from, advice))
                return 0;
        /* Kernels before 5.14 don't know the advice. Others say that something is not mapped, may
         * not be used like that, or is a device's. */
        if (!sys_3(SYS_madvise, from, 0, advice))
                return EFAULT;
        for (; from < end; from += STEP)
                if (sys_3(SYS_mincore, from, end - from < STEP ? end - from : STEP, there))
                        return EFAULT;
        return 0;
}

/* Returns 0, or the error of a registration that a device would refuse. */
static int check_region(void *address, size_t length, unsigned int access)
{
        unsigned int known = MEMORY_ACCESS | IBV_ACCESS_MW_BIND | IBV_ACCESS_ZERO_BASED | IBV_ACCESS_HUGETLB |
                             IBV_ACCESS_OPTIONAL_RANGE;

        if (access & IBV_ACCESS_ON_DEMAND)
                return EOPNOTSUPP;
        /* What others may change the owner must be allowed to change. */
        if (access & ~known || !length || (uintptr_t)address + length < (uintptr_t)address ||
            (access & (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC) &&
             !(access & IBV_ACCESS_LOCAL_WRITE)))
                return EINVAL;
        return check_pages((uintptr_t)address, length, access & IBV_ACCESS_LOCAL_WRITE);
}

/* Have peers map as much of it as they can. */
static void join_extent(struct region *region)
{
        region->extent = NULL;
        if (region->access & REMOTE_ACCESS)
                region->extent = extent_take((uintptr_t)region->mr.addr, region->mr.length,
                                             region->access & REMOTE_WRITES);
}

static void leave_extent(const struct region *region)
{
        if (region->extent)
                extent_leave(region->extent);
}

static struct key_entry entry_for(const struct region *region)
{
        return (struct key_entry){.base = region->base,
                                  .length = region->mr.length,
                                  .first = region->mr.addr,
                                  .access = region->access & (MEMORY_ACCESS | IBV_ACCESS_MW_BIND),
                                  .domain = domain_of(region->mr.pd)->number,
                                  .extent = region->extent};
}

static struct ibv_mr *add_region(struct ibv_pd *pd, void *address, size_t length, uint64_t base,
                                 unsigned int access)
{
        int error = opened_is_lost(pd->context) ? EIO : check_region(address, length, access);
        struct region *region;
        struct key_entry entry;

        if (error)
                return fail(error);
        region = calloc(1, sizeof *region);
        if (!region)
                return fail(ENOMEM);
        region->mr = (struct ibv_mr){.context = pd->context, .pd = pd, .addr = address, .length = length};
        region->base = base;
        region->access = access;
        join_extent(region);
        entry = entry_for(region);
        mutex_take(&mutex);
        region->mr.lkey = region->mr.rkey = region->mr.handle = key_add_region(&memory_keys, &entry);
        mutex_release(&mutex);
        if (!region->mr.lkey) {
                leave_extent(region);
                free(region);
                return fail(ENOMEM);
        }
        domain_use(pd);
        return &region->mr;
}

/* The address by which others know the first byte, where the program gives none. */
static uint64_t base_of(const void *address, unsigned int access)
{
        return access & IBV_ACCESS_ZERO_BASED ? 0 : (uintptr_t)address;
}

#undef ibv_reg_mr
VERB struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access)
{
        return add_region(pd, addr, length, base_of(addr, (unsigned int)access), (unsigned int)access);
}

#undef ibv_reg_mr_iova
VERB struct ibv_mr *ibv_reg_mr_iova(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, int access)
{
        return add_region(pd, addr, length, iova, (unsigned int)access);
}

/* ibv_reg_mr() is this one in programs that may use optional flags, and then `iova` is `addr`. */
VERB struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova,
                                     unsigned int access)
{
        return add_region(pd, addr, length, iova == (uintptr_t)addr ? base_of(addr, access) : iova, access);
}

/* The keys stay the same, as those of most devices do: programs tell their peers no new ones. */
VERB int ibv_rereg_mr(struct ibv_mr *mr, int flags, struct ibv_pd *pd, void *addr, size_t length, int access)
{
        struct region *region = (struct region *)(void *)mr;
        struct region next = *region;
        struct key_entry entry;
        bool changed;

        if (opened_is_lost(mr->context)) {
                errno = EIO;
                return IBV_REREG_MR_ERR_INPUT;
        }
        if (flags & ~IBV_REREG_MR_FLAGS_SUPPORTED || !flags || (flags & IBV_REREG_MR_CHANGE_PD && !pd)) {
                errno = EINVAL;
                return IBV_REREG_MR_ERR_INPUT;
        }
        if (flags & IBV_REREG_MR_CHANGE_ACCESS)
                next.access = (unsigned int)access;
        if (flags & IBV_REREG_MR_CHANGE_PD)
                next.mr.pd = pd;
        if (flags & IBV_REREG_MR_CHANGE_TRANSLATION) {
                next.mr.addr = addr;
                next.mr.length = length;
                next.base = base_of(addr, next.access);
        }
        if ((errno = check_region(next.mr.addr, next.mr.length, next.access)))
                return IBV_REREG_MR_ERR_INPUT;
        join_extent(&next);
        entry = entry_for(&next);
        mutex_take(&mutex);
        changed = key_change_region(&memory_keys, mr->lkey, &entry);
        mutex_release(&mutex);
        leave_extent(changed ? region : &next);
        if (!changed) {
                errno = EBUSY;
                return IBV_REREG_MR_ERR_INPUT;
        }
        domain_use(next.mr.pd);
        domain_leave(mr->pd);
        *region = next;
        return 0;
}

VERB int ibv_dereg_mr(struct ibv_mr *mr)
{
        struct region *region = (struct region *)(void *)mr;
        bool removed = true;

        /* A key of that which is lost may be somebody else's now. */
        if (!opened_is_lost(mr->context)) {
                mutex_take(&mutex);
                removed = key_remove_region(&memory_keys, mr->lkey);
                mutex_release(&mutex);
        }
        if (!removed)
                return EBUSY;
        if (!opened_is_lost(mr->context))
                leave_extent(region);
        domain_leave(mr->pd);
        free(region);
        return 0;
}

/* --- memory windows */

struct ibv_mw *memory_add_window(struct ibv_pd *pd, enum ibv_mw_type type)
{
        struct ibv_mw *window;

        if (opened_is_lost(pd->context))
                return fail(EIO);
        if (type != IBV_MW_TYPE_1 && type != IBV_MW_TYPE_2)
                return fail(EINVAL);
        window = calloc(1, sizeof *window);
        if (!window)
                return fail(ENOMEM);
        *window = (struct ibv_mw){.context = pd->context, .pd = pd, .type = type};
        mutex_take(&mutex);
        window->rkey = window->handle = key_add_window(&memory_keys);
        mutex_release(&mutex);
        if (!window->rkey) {
                free(window);
                return fail(ENOMEM);
        }
        domain_use(pd);
        return window;
}

int memory_remove_window(struct ibv_mw *window)
{
        if (!opened_is_lost(window->context)) {
                mutex_take(&mutex);
                key_remove_window(&memory_keys, window->handle);
                mutex_release(&mutex);
        }
        domain_leave(window->pd);
        free(window);
        return 0;
}

bool memory_bind(const struct ibv_mw *window, uint32_t key, const struct ibv_mw_bind_info *info,
                 uint32_t queue)
{
        const uint32_t domain = domain_of(window->pd)->number;
        const bool rebinds = window->type == IBV_MW_TYPE_1;
        struct key_entry entry = {.base = info->addr,
                                  .access = info->mw_access_flags & MEMORY_ACCESS,
                                  .domain = domain,
                                  .queue = rebinds ? 0 : queue};
        const struct key_use use = {.key = info->mr ? info->mr->lkey : 0,
                                    .domain = domain,
                                    .access = KEY_BIND,
                                    .address = info->addr,
                                    .length = info->length};
        bool bound;

        if (info->mw_access_flags & IBV_ACCESS_ZERO_BASED)
                entry.base = 0;
        mutex_take(&mutex);
        if (rebinds)
                key_free_window(&memory_keys, window->handle);
        bound = key >> KEY_OWN_BITS == window->handle >> KEY_OWN_BITS &&
                ((rebinds && !info->length) || key_bind(&memory_keys, key, &entry, &use));
        mutex_release(&mutex);
        return bound;
}

bool memory_invalidate(uint32_t key, uint32_t domain, uint32_t queue)
{
        bool invalidated;

        mutex_take(&mutex);
        invalidated = key_is_bound(&memory_keys, key, domain, queue) && key_unbind(&memory_keys, key);
        mutex_release(&mutex);
        return invalidated;
}
