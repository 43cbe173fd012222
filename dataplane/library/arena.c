#include "arena.h"

#include "io_uring.h"
#include "protocol.h"
#include "router.h"
#include "sparse.h"
#include "statistics.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* The family's record of an arena, new or known; -1: too many. */
static int64_t find_record(uint64_t id, uint64_t token, uint32_t side)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t i = 0; i < high && i < ARENAS; i++)
                if (load_relaxed(&family->arenas[i].id) == id &&
                    load_relaxed(&family->arenas[i].side) == side)
                        return i;
        for (uint32_t i = 0; i < ARENAS; i++) {
                struct arena_record *record = &family->arenas[i];
                uint64_t free = 0;

                if (!atomic_compare_exchange_strong(&record->id, &free, id))
                        continue;
                atomic_store(&record->token, token);
                atomic_store(&record->side, side);
                /* The router gives the first one with the grant. */
                atomic_store(&record->bells, 1);
                atomic_store(&record->connections, 0);
                while (i >= high && !atomic_compare_exchange_weak(&family->next_arena, &high, i + 1))
                        ;
                return i;
        }
        return -1;
}

/* The size of the rings in a file of this size; 0: it isn't an arena. */
static uint32_t ring_of_file(long size)
{
        uint64_t ring = (uint64_t)(size - BULK_OFFSET) / (SLOTS * SIDES);

        if (size < BULK_OFFSET || arena_size(ring) != (size_t)size || ring & (ring - 1))
                return 0;
        return ring == RING_SIZE || (ring >= REMOTE_RING_LEAST && ring <= REMOTE_RING_MOST) ? (uint32_t)ring
                                                                                            : 0;
}

static bool is_valid(const struct mapping *mapping)
{
        const struct arena *arena = arena_header(mapping);

        return arena->magic == FREEFLOW_MAGIC && arena->version == FREEFLOW_VERSION &&
               arena->size_of_ring == UINT32_C(1) << atomic_load(&mapping->shift) &&
               arena->remote == atomic_load(&mapping->remote);
}

static uint64_t inode_of(int fd)
{
        struct stat status;

        return sys_2(SYS_fstat, fd, &status) < 0 ? 0 : status.st_ino;
}

static void close_file(struct mapping *mapping)
{
        int fd = atomic_exchange(&mapping->memfd, 0) - 1;

        if (fd >= 0 && is_own_descriptor(fd) && inode_of(fd) == atomic_load(&mapping->inode))
                close_own(fd);
}

bool arena_copy(const struct end *end, const unsigned char *place, unsigned char *to, size_t size)
{
        struct mapping *mapping = mapping_of(load_relaxed(&end->place.arena));
        int fd = atomic_load(&mapping->memfd) - 1;
        off_t offset = place - (unsigned char *)arena_header(mapping);

        /* A program may have closed the descriptor unseen, and have another file there. */
        if (fd < 0 || inode_of(fd) != atomic_load(&mapping->inode))
                return false;
        while (size) {
                long got = sys_4(SYS_pread64, fd, to, size, offset);

                if (got == -EINTR)
                        continue;
                if (got <= 0)
                        return false;
                to += got;
                offset += got;
                size -= (size_t)got;
        }
        return true;
}

static uint32_t map(struct mapping *mapping, uint64_t id, int memfd)
{
        unsigned char *before = atomic_load(&mapping->base);
        const int wanted = F_SEAL_SHRINK | F_SEAL_GROW;
        long seals, size, got;
        uint32_t ring;

        if (before && atomic_load(&mapping->id) == id)
                return REASON_NONE;
        /* A file that could shrink would be a SIGBUS in the program. */
        seals = sys_2(SYS_fcntl, memfd, F_GET_SEALS);
        size = sys_3(SYS_lseek, memfd, 0, SEEK_END);
        ring = ring_of_file(size);
        if (seals < 0 || (seals & wanted) != wanted || !ring)
                return REASON_CORRUPT;
        close_file(mapping);
        if (ring == RING_SIZE) {
                int file = own_descriptor((int)sys_3(SYS_fcntl, memfd, F_DUPFD_CLOEXEC, 0));

                if (file < 0)
                        return REASON_MEMORY;
                atomic_store(&mapping->inode, inode_of(file));
                atomic_store(&mapping->memfd, file + 1);
        }
        /* Each place has the same size: the next arena there may have other rings. */
        if (ring < RING_SIZE) {
                got = sparse_map(before, ARENA_SIZE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
                if (got < 0 && got > -4096)
                        return REASON_MEMORY;
                before = (unsigned char *)got;
                store_release(&mapping->base, before);
        }
        got = sparse_map(before, (size_t)size, MAP_SHARED, memfd);
        if (got < 0 && got > -4096)
                return REASON_MEMORY;
        sys_3(SYS_madvise, got, size, MADV_DONTDUMP);
        for (int i = 0; i < SLOTS; i++)
                store_relaxed(&mapping->slots[i], 0);
        bells_close(mapping, false);
        bells_close_peers(mapping);
        atomic_store(&mapping->unreachable, false);
        atomic_store(&mapping->unreachable_since, 0);
        atomic_store(&mapping->fetches, 0);
        atomic_store(&mapping->attached, 0);
        atomic_store(&mapping->shift, (uint32_t)__builtin_ctz(ring));
        atomic_store(&mapping->remote, ring < RING_SIZE);
        atomic_store(&mapping->id, id);
        store_release(&mapping->base, (unsigned char *)got);
        return is_valid(mapping) ? REASON_NONE : REASON_CORRUPT;
}

/* No end uses the arena any more. A thread that still checks it sees private memory. */
static void unmap(uint32_t arena)
{
        struct mapping *mapping = mapping_of(arena);
        unsigned char *base = atomic_load(&mapping->base);

        if (!base || !atomic_exchange(&mapping->id, 0))
                return;
        sparse_map(base, ARENA_SIZE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
        close_file(mapping);
        bells_close(mapping, false);
        bells_close_peers(mapping);
}

/* Under the lock: take the slot, if the arena has it for us. Returns a reason, 0 if it has. */
static uint32_t take_slot(uint64_t id, uint64_t token, uint32_t side, uint32_t slot, uint64_t incarnation,
                          int memfd, int *receiving, uint32_t *arena)
{
        int64_t found = find_record(id, token, side);
        struct arena_record *record;
        uint32_t reason;

        if (found < 0)
                return REASON_MEMORY;
        *arena = (uint32_t)found;
        record = &family->arenas[found];
        reason = io_uring_is_there(0) ? REASON_RAW : map(mapping_of(*arena), id, memfd);
        if (!reason && side && atomic_load(&mapping_of(*arena)->remote))
                reason = REASON_CORRUPT;
        for (uint32_t d = 0; !reason && d < SIDES; d++)
                if (atomic_load(&arena_view(*arena, slot, d).ring->incarnation) != incarnation)
                        reason = REASON_CORRUPT;
        if (!reason) {
                atomic_fetch_add(&record->connections, 1);
                atomic_fetch_add(&mapping_of(*arena)->attached, 1);
                bell_keep(mapping_of(*arena), 0, receiving);
        } else if (!atomic_load(&record->connections)) {
                unmap(*arena);
                atomic_store(&record->id, 0);
        }
        return reason;
}

uint32_t arena_attach(struct end *end, uint64_t id, uint64_t token, uint32_t side, uint32_t slot,
                      uint64_t incarnation, int memfd, int *receiving)
{
        uint32_t arena, reason;
        enum taken taken;

        if (!id || side >= SIDES || slot >= SLOTS || !incarnation)
                return REASON_CORRUPT;
        if (!mappings_make())
                return REASON_MEMORY;
        taken = lock_take(&family->arenas_lock, self());
        reason = taken == LOCK_NESTED
                     ? REASON_MEMORY
                     : take_slot(id, token, side, slot, incarnation, memfd, receiving, &arena);
        if (!reason) {
                atomic_store(&mapping_of(arena)->slots[slot], end_number(end) + 1);
                atomic_store(&end->place.arena, arena);
                atomic_store(&end->place.side, (uint16_t)side);
                atomic_store(&end->place.slot, (uint16_t)slot);
                atomic_store(&end->place.incarnation, incarnation);
                if (atomic_load(&mapping_of(arena)->remote))
                        statistics_count(&statistics.remote);
        }
        lock_release(&family->arenas_lock, taken);
        return reason;
}

/* Reclaim pages that reading may have made (budget.h). The slot isn't another connection's yet, and
 * nobody reads this one's bytes. */
static void reclaim_read(struct end *end)
{
        uint32_t arena = atomic_load(&end->place.arena) % ARENAS;
        uint64_t read = atomic_load(&end->rx.touched);
        struct view view;

        if (read <= SMALL_SIZE || !mappings || !atomic_load(&mapping_of(arena)->id) ||
            atomic_load(&mapping_of(arena)->id) != atomic_load(&family->arenas[arena].id) ||
            end_is_remote(end))
                return;
        view = end_receives(end);
        sys_3(SYS_madvise, view_bulk(&view), (read + PAGE - 1) / PAGE * PAGE, MADV_REMOVE);
}

void arena_release(struct end *end)
{
        uint32_t arena = atomic_load(&end->place.arena), slot = atomic_load(&end->place.slot) % SLOTS;
        struct arena_record *record = &family->arenas[arena % ARENAS];
        uint64_t incarnation = atomic_exchange(&end->place.incarnation, 0), id, token;
        enum taken taken;

        if (!incarnation)
                return;
        budget_forget_sender(&end->tx);
        reclaim_read(end);
        budget_forget_receiver(&end->rx);
        taken = lock_take(&family->arenas_lock, self());
        id = atomic_load(&record->id);
        token = atomic_load(&record->token);
        if (mappings) {
                atomic_store(&mapping_of(arena)->slots[slot], 0);
                if (atomic_load(&mapping_of(arena)->attached))
                        atomic_fetch_sub(&mapping_of(arena)->attached, 1);
        }
        if (atomic_fetch_sub(&record->connections, 1) == 1) {
                if (mappings)
                        unmap(arena);
                atomic_store(&record->id, 0);
        }
        lock_release(&family->arenas_lock, taken);
        /* Last: from now on the slot may be another connection's. */
        router_release(id, token, slot, incarnation);
}

/* A child shares the arenas, but needs bells of its own: a byte in a shared bell would wake
 * whichever of the two processes reads it first. */
void arena_forked(void)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t i = 0; mappings && i < high && i < ARENAS; i++)
                if (atomic_load(&mappings[i].id)) {
                        bells_close(&mappings[i], true);
                        if (atomic_load(&family->arenas[i].id) != atomic_load(&mappings[i].id))
                                unmap(i);
                }
}

void arena_close_bells(void)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t i = 0; mappings && i < high && i < ARENAS; i++)
                if (atomic_load(&mappings[i].id)) {
                        bells_close(&mappings[i], false);
                        bells_close_peers(&mappings[i]);
                }
}
