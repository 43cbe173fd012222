#include "sparse.h"

#include "sys.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>

enum { RANGES = 16400 }; /* tables, and one range for each arena */

struct range {
        uintptr_t first, last;
};

/* The library's ranges, in no order. None is removed: its addresses are used again for the next
 * arena. */
static struct range *_Atomic ranges;
static _Atomic uint32_t ranges_used;

/* A new mapping that is not locked, even if the program has called mlockall(MCL_FUTURE). */
static void *map_unlocked(size_t size, int flags, int fd)
{
        long got = sys_6(SYS_mmap, 0, size, PROT_NONE, flags | MAP_NORESERVE, fd, 0);

        if (sys_failed(got))
                return NULL;
        sys_2(SYS_munlock, got, size);
        if (sys_failed(sys_3(SYS_mprotect, got, size, PROT_READ | PROT_WRITE))) {
                sys_2(SYS_munmap, got, size);
                return NULL;
        }
        /* A host with huge pages everywhere would make two megabytes for the first byte touched. */
        sys_3(SYS_madvise, got, size, MADV_NOHUGEPAGE);
        return (void *)got;
}

static void remember(void *place, size_t size)
{
        struct range *all = atomic_load(&ranges), *none = NULL;
        uint32_t number;

        if (!all) {
                all = map_unlocked(RANGES * sizeof *all, MAP_PRIVATE | MAP_ANONYMOUS, -1);
                if (!all)
                        return;
                if (!atomic_compare_exchange_strong(&ranges, &none, all)) {
                        sys_2(SYS_munmap, all, RANGES * sizeof *all);
                        all = none;
                }
        }
        number = atomic_fetch_add(&ranges_used, 1);
        if (number < RANGES)
                all[number] = (struct range){(uintptr_t)place, (uintptr_t)place + size};
}

void *reserve(size_t size, int kind)
{
        return map_unlocked(size, kind | MAP_ANONYMOUS, -1);
}

void *reserve_for_good(size_t size, int kind)
{
        void *place = reserve(size, kind);

        if (place)
                remember(place, size);
        return place;
}

long sparse_map(void *before, size_t size, int flags, int fd)
{
        void *made = map_unlocked(size, flags, fd);
        long moved;

        if (!made)
                return -ENOMEM;
        if (!before) {
                remember(made, size);
                return (long)made;
        }
        moved = sys_5(SYS_mremap, made, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, before);
        if (sys_failed(moved))
                sys_2(SYS_munmap, made, size);
        return moved;
}

void sparse_each_outside(uintptr_t first, uintptr_t last, void (*visit)(uintptr_t, uintptr_t, void *),
                         void *data)
{
        const struct range *all = atomic_load(&ranges);
        uint32_t used = atomic_load(&ranges_used);

        while (first < last) {
                uintptr_t end = last, on = last;

                for (uint32_t i = 0; i < used && i < RANGES && all; i++) {
                        if (all[i].first <= first && first < all[i].last) {
                                end = first;
                                on = all[i].last;
                                break;
                        }
                        if (all[i].first > first && all[i].first < end)
                                on = end = all[i].first;
                }
                if (end > first)
                        visit(first, end, data);
                first = on;
        }
}

void sparse_unlock(void)
{
        const struct range *all = atomic_load(&ranges);
        uint32_t used = atomic_load(&ranges_used);

        for (uint32_t i = 0; i < used && i < RANGES && all; i++)
                sys_2(SYS_munlock, all[i].first, all[i].last - all[i].first);
}
