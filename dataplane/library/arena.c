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

/* Does a slot of the arena belong to anybody of the family? Under the lock, as all that follows. */
static bool is_used(const struct arena_record *record)
{
        return atomic_load(&record->connections) || atomic_load(&record->queue_pairs);
}

/* Take from a process that was killed what it had for its queue pairs alone. */
static void forget_dead(struct arena_record *record)
{
        int32_t owner = atomic_load(&record->owner);

        if (!owner || owner == atomic_load(&process.pid) || process.renamed ||
            atomic_load(&record->connections) || sys_2(SYS_kill, owner, 0) != -ESRCH)
                return;
        atomic_store(&record->queue_pairs, 0);
        atomic_store(&record->id, 0);
}

static void start_record(struct arena_record *record, const struct granted *granted)
{
        atomic_store(&record->token, granted->token);
        atomic_store(&record->side, granted->side);
        /* The router gives the first one with the grant. */
        atomic_store(&record->bells, 1);
        atomic_store(&record->connections, 0);
        atomic_store(&record->queue_pairs, 0);
        atomic_store(&record->owner, 0);
}

/* The family's record of an arena, new or known; -1: too many. */
static int64_t find_record(const struct granted *granted)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t i = 0; i < high && i < ARENAS; i++)
                if (load_relaxed(&family->arenas[i].id) == granted->arena &&
                    load_relaxed(&family->arenas[i].side) == granted->side)
                        return i;
        for (uint32_t i = 0; i < ARENAS; i++) {
                struct arena_record *record = &family->arenas[i];
                uint64_t free = 0;

                forget_dead(record);
                if (!atomic_compare_exchange_strong(&record->id, &free, granted->arena))
                        continue;
                start_record(record, granted);
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

/* Take the slot, if the arena has it for us. Returns a reason, 0 if it has. */
static uint32_t take_slot(struct place *place, const struct granted *granted, int memfd, int *receiving)
{
        int64_t found = find_record(granted);
        uint32_t arena = (uint32_t)found, reason;

        if (found < 0)
                return REASON_MEMORY;
        reason = map(mapping_of(arena), granted->arena, memfd);
        if (!reason && granted->side && atomic_load(&mapping_of(arena)->remote))
                reason = REASON_CORRUPT;
        for (uint32_t d = 0; !reason && d < SIDES; d++)
                if (atomic_load(&arena_view(arena, granted->slot, d).ring->incarnation) !=
                    granted->incarnation)
                        reason = REASON_CORRUPT;
        if (!reason) {
                atomic_fetch_add(&mapping_of(arena)->attached, 1);
                bell_keep(mapping_of(arena), 0, receiving);
                atomic_store(&place->arena, arena);
                atomic_store(&place->side, (uint16_t)granted->side);
                atomic_store(&place->slot, (uint16_t)granted->slot);
                atomic_store(&place->incarnation, granted->incarnation);
        } else if (!is_used(&family->arenas[arena])) {
                unmap(arena);
                atomic_store(&family->arenas[arena].id, 0);
        }
        return reason;
}

/* `end` NULL: for a queue pair. */
static uint32_t take(struct end *end, struct place *place, const struct granted *granted, int memfd,
                     int *receiving)
{
        uint32_t reason = REASON_MEMORY;
        enum taken taken;

        if (!granted->arena || granted->side >= SIDES || granted->slot >= SLOTS || !granted->incarnation)
                return REASON_CORRUPT;
        if (!mappings_make())
                return REASON_MEMORY;
        taken = lock_take(&family->arenas_lock, self());
        if (taken != LOCK_NESTED)
                reason = take_slot(place, granted, memfd, receiving);
        if (!reason) {
                struct arena_record *record = &family->arenas[atomic_load(&place->arena)];
                struct mapping *mapping = mapping_of(atomic_load(&place->arena));

                if (end) {
                        atomic_fetch_add(&record->connections, 1);
                        atomic_store(&mapping->slots[granted->slot], end_number(end) + 1);
                } else {
                        atomic_store(&record->owner, atomic_load(&process.pid));
                        atomic_fetch_or(&record->queue_pairs, UINT64_C(1) << granted->slot);
                }
        }
        lock_release(&family->arenas_lock, taken);
        return reason;
}

uint32_t arena_attach(struct end *end, const struct granted *granted, int memfd, int *receiving)
{
        uint32_t reason =
            io_uring_is_there(0) ? REASON_RAW : take(end, &end->place, granted, memfd, receiving);

        if (!reason && end_is_remote(end))
                statistics_count(&statistics.remote);
        return reason;
}

uint32_t arena_take(struct place *place, const struct granted *granted, int memfd, int *receiving)
{
        return take(NULL, place, granted, memfd, receiving);
}

/* Reclaim pages that reading may have made (budget.h), up to this offset. The slot isn't anybody
 * else's yet, and nobody reads this ring's bytes. */
static void reclaim_read(const struct place *place, uint64_t read)
{
        uint32_t arena = atomic_load(&place->arena) % ARENAS;
        struct view view;

        if (read <= SMALL_SIZE || !mappings || !atomic_load(&mapping_of(arena)->id) ||
            atomic_load(&mapping_of(arena)->id) != atomic_load(&family->arenas[arena].id) ||
            place_is_remote(place))
                return;
        view = place_receives(place);
        sys_3(SYS_madvise, view_bulk(&view), (read + PAGE - 1) / PAGE * PAGE, MADV_REMOVE);
}

/* The router is to be told last: from then on the slot may be somebody else's. */
static struct release leave_slot(const struct place *place, uint64_t incarnation, bool is_end)
{
        uint32_t arena = atomic_load(&place->arena), slot = atomic_load(&place->slot) % SLOTS;
        struct arena_record *record = &family->arenas[arena % ARENAS];
        enum taken taken = lock_take(&family->arenas_lock, self());
        uint64_t id = atomic_load(&record->id), token = atomic_load(&record->token);

        if (mappings) {
                if (is_end)
                        atomic_store(&mapping_of(arena)->slots[slot], 0);
                if (atomic_load(&mapping_of(arena)->attached))
                        atomic_fetch_sub(&mapping_of(arena)->attached, 1);
        }
        if (is_end)
                atomic_fetch_sub(&record->connections, 1);
        else
                atomic_fetch_and(&record->queue_pairs, ~(UINT64_C(1) << slot));
        if (!is_used(record)) {
                if (mappings)
                        unmap(arena);
                atomic_store(&record->id, 0);
        }
        lock_release(&family->arenas_lock, taken);
        return release_of(id, token, slot, incarnation);
}

void arena_release(struct end *end)
{
        uint64_t incarnation = atomic_exchange(&end->place.incarnation, 0);
        struct release message;

        if (!incarnation)
                return;
        budget_forget_sender(&end->tx);
        reclaim_read(&end->place, atomic_load(&end->rx.touched));
        budget_forget_receiver(&end->rx);
        message = leave_slot(&end->place, incarnation, true);
        router_release(&message);
}

bool arena_give_back(struct place *place, struct release *message)
{
        uint64_t incarnation = atomic_exchange(&place->incarnation, 0);
        const struct arena_record *record = &family->arenas[atomic_load(&place->arena) % ARENAS];

        /* A child of fork has copies of its parent's places. */
        if (!incarnation || atomic_load(&record->owner) != atomic_load(&process.pid))
                return false;
        reclaim_read(place, RING_SIZE);
        *message = leave_slot(place, incarnation, false);
        return true;
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
