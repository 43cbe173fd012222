#include "arena.h"

#include "clock.h"
#include "io_uring.h"
#include "protocol.h"
#include "real.h"
#include "router.h"
#include "signals.h"
#include "sparse.h"
#include "statistics.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

static struct mapping *_Atomic mappings; /* ARENAS of them, touched as used */

enum {
        SPARE_BELLS = 2,       /* that may be kept of an arena's other side, and two for each connection */
        FETCHES = 32,          /* at once, of an arena */
        FETCH_PAUSE = 16,      /* ms, for each more */
        ORDERS = SLOTS,        /* bells on order, of an arena */
        ORDER_PATIENCE = 1000, /* ms */
        RINGS = 2048,          /* bytes: more than honest rings put into a bell until it is emptied */
};

/* asm-generic/socket.h, since Linux 6.16. */
#ifndef SO_PASSRIGHTS
#define SO_PASSRIGHTS 83
#endif

/* Bells are emptied into this; nobody reads it. */
static char rings[RINGS];
/* A bell has come that takes descriptors. */
static _Atomic bool unguarded;

static uint64_t bit(int number)
{
        return UINT64_C(1) << (number % 64);
}

struct mapping *mapping_of(uint32_t arena)
{
        return &mappings[arena % ARENAS];
}

struct view end_sends(const struct end *end)
{
        return arena_view(atomic_load_explicit(&end->arena, memory_order_relaxed),
                          atomic_load_explicit(&end->slot, memory_order_relaxed),
                          atomic_load_explicit(&end->side, memory_order_relaxed));
}

struct view end_receives(const struct end *end)
{
        return arena_view(atomic_load_explicit(&end->arena, memory_order_relaxed),
                          atomic_load_explicit(&end->slot, memory_order_relaxed),
                          1 - atomic_load_explicit(&end->side, memory_order_relaxed));
}

int own_descriptor(int fd)
{
        struct rlimit limit = {.rlim_cur = 1024};
        long floor, moved;
        int32_t high;

        if (fd < 0)
                return -1;
        sys_4(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, &limit);
        /* Not at the very top of a large table: the kernel's table, which fork copies, reaches to the highest
         * one. */
        floor = limit.rlim_cur > 4096 ? 3072 : (long)limit.rlim_cur / 4 * 3;
        moved = sys_3(SYS_fcntl, fd, F_DUPFD_CLOEXEC, floor);
        sys_1(SYS_close, fd);
        if (moved < 0)
                return -1;
        if (moved >= DESCRIPTORS) {
                sys_1(SYS_close, moved);
                return -1;
        }
        fd_set_word((int)moved, FD_OWN);
        high = atomic_load(&process.own_high);
        while (moved >= high && !atomic_compare_exchange_weak(&process.own_high, &high, (int32_t)moved + 1))
                ;
        return (int)moved;
}

bool is_own_descriptor(int fd)
{
        return process.on && (unsigned)fd < DESCRIPTORS &&
               (uint32_t)atomic_load_explicit(&process.fds[fd], memory_order_relaxed) == FD_OWN;
}

void close_own(int fd)
{
        fd_set_word(fd, 0);
        sys_1(SYS_close, fd);
}

static void forget_lost(_Atomic int32_t *bells)
{
        for (int i = 0; i < BELLS; i++) {
                int32_t word = atomic_load(&bells[i]);

                if (word > 0 && !is_own_descriptor(word - 1))
                        atomic_compare_exchange_strong(&bells[i], &word, 0);
        }
}

void own_lost(void)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (int fd = 0; fd < DESCRIPTORS && fd < atomic_load(&process.own_high); fd++)
                if (is_own_descriptor(fd) && sys_2(SYS_fcntl, fd, F_GETFD) < 0)
                        fd_set_word(fd, 0);
        for (uint32_t i = 0; mappings && i < high && i < ARENAS; i++)
                if (atomic_load(&mappings[i].id)) {
                        forget_lost(mappings[i].bells);
                        forget_lost(mappings[i].peers);
                }
        signals_lost();
}

/* linux/dirent.h isn't given to programs. */
struct entry {
        uint64_t inode;
        int64_t offset;
        uint16_t size;
        uint8_t type;
        char name[];
};

static int number_named(const char *name)
{
        int number = 0;

        for (; *name >= '0' && *name <= '9'; name++)
                number = number * 10 + (*name - '0');
        return *name ? -1 : number;
}

enum visited each_descriptor(int first, bool (*visit)(int fd, const char *link))
{
        _Alignas(struct entry) char buffer[2048];
        long list = sys_4(SYS_openat, AT_FDCWD, "/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
        long got = 0;
        bool on = true;

        if (list < 0)
                return VISITED_NONE;
        while (on && (got = sys_3(SYS_getdents64, list, buffer, sizeof buffer)) > 0)
                for (long at = 0; on && at < got;) {
                        const struct entry *entry = (const struct entry *)(const void *)(buffer + at);
                        int fd = number_named(entry->name);
                        char link[64];
                        long size;

                        at += entry->size;
                        if (fd < first || fd == list || entry->name[0] == '.')
                                continue;
                        size = sys_4(SYS_readlinkat, list, entry->name, link, sizeof link - 1);
                        link[size > 0 ? size : 0] = 0;
                        on = visit(fd, link);
                }
        sys_1(SYS_close, list);
        return !on ? VISITED_SOME : got < 0 ? VISITED_NONE : VISITED_ALL;
}

static bool make_mappings(void)
{
        if (!mappings)
                mappings = reserve_for_good(ARENAS * sizeof *mappings, MAP_PRIVATE);
        return mappings != NULL;
}

/* The family's record of an arena, new or known; -1: too many. */
static int64_t find_record(uint64_t id, uint64_t token, uint32_t side)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t i = 0; i < high && i < ARENAS; i++)
                if (atomic_load_explicit(&family->arenas[i].id, memory_order_relaxed) == id &&
                    atomic_load_explicit(&family->arenas[i].side, memory_order_relaxed) == side)
                        return i;
        for (uint32_t i = 0; i < ARENAS; i++) {
                struct arena_record *record = &family->arenas[i];
                uint64_t free = 0;

                if (!atomic_compare_exchange_strong(&record->id, &free, id))
                        continue;
                atomic_store(&record->token, token);
                atomic_store(&record->side, side);
                /* The first is the router's to give, with the grant. */
                atomic_store(&record->bells, 1);
                atomic_store(&record->connections, 0);
                while (i >= high && !atomic_compare_exchange_weak(&family->next_arena, &high, i + 1))
                        ;
                return i;
        }
        return -1;
}

/* What rings a file of this size has, 0: it isn't an arena. */
static uint32_t ring_of_file(long size)
{
        uint64_t ring = (uint64_t)(size - BULK_OFFSET) / (SLOTS * SIDES);

        if (size < BULK_OFFSET || arena_size(ring) != (size_t)size || ring & (ring - 1))
                return 0;
        return ring == RING_SIZE || (ring >= REMOTE_RING_LEAST && ring <= REMOTE_RING_MOST) ? (uint32_t)ring
                                                                                            : 0;
}

static bool is_what_it_should_be(const struct mapping *mapping)
{
        const struct arena *arena = arena_header(mapping);

        return arena->magic == FREEFLOW_MAGIC && arena->version == FREEFLOW_VERSION &&
               arena->size_of_ring == UINT32_C(1) << atomic_load(&mapping->shift) &&
               arena->remote == atomic_load(&mapping->remote);
}

/* Look into a bell without taking anything out. POISONED: there is a descriptor in it. */
enum { POISONED = -4097 };
static long peek(int fd)
{
        struct iovec vec = {.iov_base = rings, .iov_len = sizeof rings};
        struct msghdr header = {.msg_iov = &vec, .msg_iovlen = 1};
        long got = sys_3(SYS_recvmsg, fd, &header, MSG_PEEK | MSG_DONTWAIT);

        /* There is no room for a descriptor in the header, so it would be cut off. */
        return got >= 0 && header.msg_flags & MSG_CTRUNC ? POISONED : got;
}

/* Empty a bell, as far as one read goes. */
static long read_rings(int fd)
{
        long size = RINGS;

        if (atomic_load_explicit(&unguarded, memory_order_relaxed)) {
                size = peek(fd);
                /* No byte more than was seen: behind it there may be a descriptor by now. */
                if (size <= 0)
                        return size;
        }
        return sys_6(SYS_recvfrom, fd, rings, size, MSG_DONTWAIT, 0, 0);
}

static bool takes_descriptors(int fd)
{
        int takes = 1;
        uint32_t size = sizeof takes;

        return sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_PASSRIGHTS, &takes, &size) < 0 || takes;
}

/* Can the last close() of this end that hears wait? What others hold too stays as it is. */
static bool is_safe_to_close(int fd, bool others)
{
        long got = RINGS;

        if (!atomic_load(&unguarded))
                return true;
        if (others)
                return peek(fd) != POISONED;
        sys_2(SYS_shutdown, fd, SHUT_RDWR);
        /* A socket's queue has room for some hundred KiB. */
        for (int i = 0; i < 1024 && (got = peek(fd)) > 0; i++)
                sys_6(SYS_recvfrom, fd, rings, got, MSG_DONTWAIT, 0, 0);
        return got <= 0 && got != POISONED;
}

/* One that can't be closed stays: the end of the process closes it without waiting. */
static void close_hearing(int fd, bool others)
{
        if (is_safe_to_close(fd, others))
                close_own(fd);
}

void bell_discard(int fd)
{
        long got = atomic_load(&unguarded) ? peek(fd) : 0;

        if (got != POISONED)
                sys_1(SYS_close, fd);
}

static void close_bells(struct mapping *mapping, bool others)
{
        for (int i = 0; i < BELLS; i++) {
                int32_t hears = atomic_exchange(&mapping->bells[i], 0);

                if (hears > 0)
                        close_hearing(hears - 1, others);
        }
        for (int i = 0; i < BELL_WORDS; i++)
                atomic_store(&mapping->idle[i], 0);
        atomic_store(&mapping->ordered, 0);
}

static void close_peers_bells(struct mapping *mapping)
{
        for (int i = 0; i < BELLS; i++) {
                int32_t rings_it = atomic_exchange(&mapping->peers[i], 0);

                if (rings_it > 0)
                        close_own(rings_it - 1);
        }
        atomic_store(&mapping->kept, 0);
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
        struct mapping *mapping = mapping_of(atomic_load_explicit(&end->arena, memory_order_relaxed));
        int fd = atomic_load(&mapping->memfd) - 1;
        off_t offset = place - (unsigned char *)arena_header(mapping);

        /* A program that closes descriptors past us may have another file there. */
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
        /* The place is as large for each: the next arena there may have other rings. */
        if (ring < RING_SIZE) {
                got = sparse_map(before, ARENA_SIZE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
                if (got < 0 && got > -4096)
                        return REASON_MEMORY;
                before = (unsigned char *)got;
                atomic_store_explicit(&mapping->base, before, memory_order_release);
        }
        got = sparse_map(before, (size_t)size, MAP_SHARED, memfd);
        if (got < 0 && got > -4096)
                return REASON_MEMORY;
        sys_3(SYS_madvise, got, size, MADV_DONTDUMP);
        for (int i = 0; i < SLOTS; i++)
                atomic_store_explicit(&mapping->slots[i], 0, memory_order_relaxed);
        close_bells(mapping, false);
        close_peers_bells(mapping);
        atomic_store(&mapping->unreachable, false);
        atomic_store(&mapping->unreachable_since, 0);
        atomic_store(&mapping->fetches, 0);
        atomic_store(&mapping->attached, 0);
        atomic_store(&mapping->shift, (uint32_t)__builtin_ctz(ring));
        atomic_store(&mapping->remote, ring < RING_SIZE);
        atomic_store(&mapping->id, id);
        atomic_store_explicit(&mapping->base, (unsigned char *)got, memory_order_release);
        return is_what_it_should_be(mapping) ? REASON_NONE : REASON_CORRUPT;
}

/* Nobody here uses the arena any more. What still looks at it sees private memory. */
static void unmap(uint32_t arena)
{
        struct mapping *mapping = mapping_of(arena);
        unsigned char *base = atomic_load(&mapping->base);

        if (!base || !atomic_exchange(&mapping->id, 0))
                return;
        sparse_map(base, ARENA_SIZE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
        close_file(mapping);
        close_bells(mapping, false);
        close_peers_bells(mapping);
}

/* A bell of ours has come. */
static void keep_bell(struct mapping *mapping, uint32_t bell, int *hears)
{
        int ours;

        if (*hears < 0 || bell >= BELLS || atomic_load(&mapping->bells[bell]))
                return;
        if (takes_descriptors(*hears))
                atomic_store(&unguarded, true);
        ours = own_descriptor(*hears);
        *hears = -1;
        if (ours < 0)
                return;
        atomic_store(&mapping->bells[bell], ours + 1);
        bell_return((uint32_t)(mapping - mappings), (int)bell);
}

/* Under the lock: the arena's record if it has this slot for us; a reason otherwise. */
static uint32_t take_slot(uint64_t id, uint64_t token, uint32_t side, uint32_t slot, uint64_t incarnation,
                          int memfd, int *hears, uint32_t *arena)
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
                keep_bell(mapping_of(*arena), 0, hears);
        } else if (!atomic_load(&record->connections)) {
                unmap(*arena);
                atomic_store(&record->id, 0);
        }
        return reason;
}

uint32_t arena_attach(struct end *end, uint64_t id, uint64_t token, uint32_t side, uint32_t slot,
                      uint64_t incarnation, int memfd, int *hears)
{
        uint32_t arena, reason;
        enum taken taken;

        if (!id || side >= SIDES || slot >= SLOTS || !incarnation)
                return REASON_CORRUPT;
        if (!make_mappings())
                return REASON_MEMORY;
        taken = lock_take(&family->arenas_lock, self());
        reason = taken == LOCK_NESTED ? REASON_MEMORY
                                      : take_slot(id, token, side, slot, incarnation, memfd, hears, &arena);
        if (!reason) {
                atomic_store(&mapping_of(arena)->slots[slot], end_number(end) + 1);
                atomic_store(&end->arena, arena);
                atomic_store(&end->side, (uint16_t)side);
                atomic_store(&end->slot, (uint16_t)slot);
                atomic_store(&end->incarnation, incarnation);
                if (atomic_load(&mapping_of(arena)->remote))
                        statistics_count(&statistics.remote);
        }
        lock_release(&family->arenas_lock, taken);
        return reason;
}

/* What reading may have made. The slot isn't another connection's yet, and nobody reads this one's bytes. */
static void give_back_read(struct end *end)
{
        uint32_t arena = atomic_load(&end->arena) % ARENAS;
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
        uint32_t arena = atomic_load(&end->arena), slot = atomic_load(&end->slot) % SLOTS;
        struct arena_record *record = &family->arenas[arena % ARENAS];
        uint64_t incarnation = atomic_exchange(&end->incarnation, 0), id, token;
        enum taken taken;

        if (!incarnation)
                return;
        memory_forget(&end->tx);
        give_back_read(end);
        memory_forget_read(&end->rx);
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

/* A child shares the arenas, and needs bells of its own: a byte in a bell would wake whichever of the two
 * comes first. */
void arena_forked(void)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t i = 0; mappings && i < high && i < ARENAS; i++)
                if (atomic_load(&mappings[i].id)) {
                        close_bells(&mappings[i], true);
                        if (atomic_load(&family->arenas[i].id) != atomic_load(&mappings[i].id))
                                unmap(i);
                }
}

void arena_retire(void)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t i = 0; mappings && i < high && i < ARENAS; i++)
                if (atomic_load(&mappings[i].id)) {
                        close_bells(&mappings[i], false);
                        close_peers_bells(&mappings[i]);
                }
}

int bell_descriptor(uint32_t arena, int bell)
{
        return atomic_load(&mapping_of(arena)->bells[bell]) - 1;
}

bool bell_is_ordered(uint32_t arena)
{
        struct mapping *mapping = mapping_of(arena);

        return atomic_load(&mapping->ordered) && !atomic_load(&mapping->unreachable) &&
               ticks() - atomic_load(&mapping->ordered_at) <= ORDER_PATIENCE;
}

/* Ask for one more bell; it comes with what the router says next. */
static void order_bell(uint32_t arena)
{
        struct arena_record *record = &family->arenas[arena];
        struct mapping *mapping = mapping_of(arena);
        uint32_t bell, next;

        if (!bell_is_ordered(arena))
                atomic_store(&mapping->ordered, 0);
        if (atomic_load(&mapping->ordered) >= ORDERS || atomic_load(&record->bells) >= BELLS)
                return;
        bell = atomic_fetch_add(&record->bells, 1);
        next = bell + 1;
        if (bell < BELLS && router_bell(atomic_load(&record->id), atomic_load(&record->token),
                                        atomic_load(&record->side), bell)) {
                atomic_store(&mapping->ordered_at, ticks());
                atomic_fetch_add(&mapping->ordered, 1);
        } else {
                /* The number is used again, unless somebody has taken the next one. */
                atomic_compare_exchange_strong(&record->bells, &next, bell);
        }
}

static int idle_bell(struct mapping *mapping)
{
        for (int word = 0; word < BELL_WORDS; word++) {
                uint64_t idle = atomic_load_explicit(&mapping->idle[word], memory_order_relaxed);

                while (idle) {
                        int bell = word * 64 + __builtin_ctzll(idle);

                        if (!atomic_compare_exchange_weak_explicit(&mapping->idle[word], &idle,
                                                                   idle & (idle - 1), memory_order_acquire,
                                                                   memory_order_relaxed))
                                continue;
                        /* One that has been lost isn't used again. */
                        if (atomic_load_explicit(&mapping->bells[bell], memory_order_relaxed))
                                return bell;
                        idle &= idle - 1;
                }
        }
        return -1;
}

/* The mapping of an arena of which this is our side, under the lock; NULL: none. */
static struct mapping *mapping_named(uint64_t id, uint32_t side)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t i = 0; mappings && id && i < high && i < ARENAS; i++)
                if (atomic_load(&mappings[i].id) == id && atomic_load(&family->arenas[i].id) == id &&
                    atomic_load(&family->arenas[i].side) == side)
                        return &mappings[i];
        return NULL;
}

void bell_received(uint64_t id, uint32_t side, uint32_t bell, int *fd)
{
        enum taken taken = lock_take(&family->arenas_lock, self());
        struct mapping *mapping = taken == LOCK_NESTED ? NULL : mapping_named(id, side);

        if (mapping && atomic_load(&mapping->ordered))
                atomic_fetch_sub(&mapping->ordered, 1);
        if (mapping && *fd < 0)
                /* None is to be had: who waits for this arena looks now and then. */
                atomic_store(&mapping->unreachable, true);
        else if (mapping)
                keep_bell(mapping, bell, fd);
        lock_release(&family->arenas_lock, taken);
}

static int take_bell(uint32_t arena, bool more)
{
        struct mapping *mapping = mapping_of(arena);
        int bell;

        if (atomic_load_explicit(&mapping->unreachable, memory_order_relaxed)) {
                arena_break_if_unreachable(arena);
                return -1;
        }
        bell = idle_bell(mapping);
        if (bell >= 0)
                return bell;
        if (more || !bell_is_ordered(arena))
                order_bell(arena);
        router_receive();
        return idle_bell(mapping);
}

int bell_take(uint32_t arena)
{
        return take_bell(arena, false);
}

int bell_take_or_order(uint32_t arena)
{
        return take_bell(arena, true);
}

void bell_return(uint32_t arena, int bell)
{
        if (atomic_load_explicit(&mapping_of(arena)->bells[bell], memory_order_relaxed))
                atomic_fetch_or_explicit(&mapping_of(arena)->idle[bell / 64], bit(bell),
                                         memory_order_release);
}

bool bell_is_known(uint32_t arena, uint32_t side, int bell)
{
        struct side *ours = &arena_header(mapping_of(arena))->sides[side];

        return atomic_load_explicit(&ours->known[bell / 64], memory_order_relaxed) & bit(bell);
}

/* The relay is no more, and can't say so: our connections through it are broken. */
static void break_connections(struct mapping *mapping)
{
        uint32_t arena = (uint32_t)(mapping - mappings);

        for (uint32_t slot = 0; slot < SLOTS; slot++)
                for (uint32_t d = 0; d < SIDES && atomic_load(&mapping->slots[slot]); d++)
                        atomic_store_explicit(&arena_view(arena, slot, d).ring->broken, 1,
                                              memory_order_release);
}

void arena_break_if_unreachable(uint32_t arena)
{
        /* ms: a relay whose router has gone takes 2 s to bring all that is under way to its end. */
        enum { GRACE = 4000 };
        struct mapping *mapping = mapping_of(arena);
        uint32_t since = atomic_load_explicit(&mapping->unreachable_since, memory_order_relaxed);

        /* Set to an odd moment, it may be the next one. */
        if (since && (int32_t)(ticks() - since) > GRACE)
                break_connections(mapping);
}

bool bell_drain(uint32_t arena, int bell)
{
        struct mapping *mapping = mapping_of(arena);
        int32_t word = atomic_load(&mapping->bells[bell]);
        uint32_t never = 0;
        long got;

        if (word <= 0)
                return true;
        got = read_rings(word - 1);
        if (got == -EBADF || got == -ENOTSOCK) {
                own_lost();
                /* A file of the program's may have got the number. The next wait gets a new bell. */
                if (atomic_compare_exchange_strong(&mapping->bells[bell], &word, 0))
                        fd_set_word(word - 1, 0);
                return true;
        }
        if (got != POISONED && got != 0 && got < RINGS)
                return true;
        /* What is more than honest rings, or carries a descriptor, isn't heard any more. */
        /* Nobody has the other end, nobody will ring: who waits for this arena looks now and then. */
        atomic_store(&mapping->unreachable, true);
        if (!got && atomic_load(&mapping->remote)) {
                /* Where the relay had it, the relay is gone; otherwise it was the router, and that alone. */
                if (bell_is_known(arena, 0, bell))
                        break_connections(mapping);
                else
                        atomic_compare_exchange_strong(&mapping->unreachable_since, &never, ticks() | 1);
        }
        if (atomic_compare_exchange_strong(&mapping->bells[bell], &word, 0))
                close_hearing(word - 1, false);
        return false;
}

void bell_ringer_received(uint64_t id, uint32_t side, uint32_t bell, int *fd)
{
        enum taken taken = lock_take(&family->arenas_lock, self());
        struct mapping *mapping = taken == LOCK_NESTED || side >= SIDES ? NULL : mapping_named(id, 1 - side);

        /* As many as an honest process waits with: the router rings the others. */
        if (mapping && *fd >= 0 && bell < BELLS && !atomic_load(&mapping->peers[bell]) &&
            atomic_load(&mapping->kept) < SPARE_BELLS + 2 * atomic_load(&mapping->attached)) {
                int32_t none = 0;
                int ours = own_descriptor(*fd);

                *fd = -1;
                if (ours >= 0 && atomic_compare_exchange_strong(&mapping->peers[bell], &none, ours + 1)) {
                        atomic_fetch_add(&mapping->kept, 1);
                        atomic_fetch_or(&arena_header(mapping)->sides[side].known[bell / 64], bit((int)bell));
                } else if (ours >= 0) {
                        close_own(ours);
                }
        }
        lock_release(&family->arenas_lock, taken);
}

/* Who names bells that don't exist makes us speak with the router in vain: so and so often, and never waited
 * for. */
static bool may_fetch(struct mapping *mapping)
{
        uint32_t time = ticks();
        uint32_t over =
            (time - atomic_load_explicit(&mapping->fetched_at, memory_order_relaxed)) / FETCH_PAUSE;
        uint32_t fetches = atomic_load_explicit(&mapping->fetches, memory_order_relaxed);

        if (over || !fetches) {
                fetches = fetches > over ? fetches - over : 0;
                atomic_store_explicit(&mapping->fetched_at, time, memory_order_relaxed);
        }
        if (fetches < FETCHES)
                atomic_store_explicit(&mapping->fetches, fetches + 1, memory_order_relaxed);
        else
                atomic_store_explicit(&mapping->fetches, fetches, memory_order_relaxed);
        return fetches < FETCHES;
}

/* A descriptor that rings a bell of the other side; -1: we have none, and the router rings it. */
static int peer_bell(uint32_t arena, uint32_t side, int bell)
{
        struct mapping *mapping = mapping_of(arena);
        struct arena_record *record = &family->arenas[arena];
        int32_t known = atomic_load_explicit(&mapping->peers[bell], memory_order_acquire);

        if (known > 0)
                return known - 1;
        if (!may_fetch(mapping))
                return -1;
        router_receive();
        known = atomic_load_explicit(&mapping->peers[bell], memory_order_acquire);
        if (known > 0)
                return known - 1;
        router_fetch(atomic_load(&record->id), atomic_load(&record->token), 1 - side, (uint32_t)bell);
        return -1;
}

/* False: nobody is there any more. A bell that is full rings already. */
static bool ring_once(int fd)
{
        long sent = sys_6(SYS_sendto, fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL, 0, 0);

        if (sent == -EBADF || sent == -ENOTSOCK) {
                own_lost();
                fd_set_word(fd, 0);
        }
        return sent >= 0 || sent == -EAGAIN;
}

static void forget_peer_bell(uint32_t arena, uint32_t side, int bell, int fd)
{
        struct mapping *mapping = mapping_of(arena);
        int32_t known = fd + 1;

        atomic_fetch_and(&arena_header(mapping)->sides[1 - side].known[bell / 64], ~bit(bell));
        if (atomic_compare_exchange_strong(&mapping->peers[bell], &known, 0)) {
                if (is_own_descriptor(fd))
                        close_own(fd);
                atomic_fetch_sub(&mapping->kept, 1);
        }
}

void ring_bells(struct waiters *waiters, const struct end *end)
{
        uint32_t arena = atomic_load_explicit(&end->arena, memory_order_relaxed);
        uint32_t side = atomic_load_explicit(&end->side, memory_order_relaxed);
        uint32_t slot = atomic_load_explicit(&end->slot, memory_order_relaxed);
        struct side *theirs = &arena_header(mapping_of(arena))->sides[1 - side];

        atomic_exchange_explicit(&waiters->any, 0, memory_order_acq_rel);
        for (int word = 0; word < BELL_WORDS; word++) {
                uint64_t sleeping = atomic_load_explicit(&waiters->bells[word], memory_order_relaxed);

                if (sleeping)
                        sleeping = atomic_exchange_explicit(&waiters->bells[word], 0, memory_order_acq_rel);
                for (; sleeping; sleeping &= sleeping - 1) {
                        int bell = word * 64 + __builtin_ctzll(sleeping);
                        int fd;

                        /* First: the router may ring before we are back from asking it. */
                        atomic_fetch_or_explicit(&theirs->dirty[bell], UINT64_C(1) << slot,
                                                 memory_order_seq_cst);
                        fd = peer_bell(arena, side, bell);
                        if (fd < 0 || ring_once(fd))
                                continue;
                        /* The other side has let the arena go and got it again, with new bells under the old
                         * numbers. */
                        forget_peer_bell(arena, side, bell, fd);
                        if (atomic_load(&mapping_of(arena)->remote))
                                break_connections(mapping_of(arena));
                        else if ((fd = peer_bell(arena, side, bell)) >= 0)
                                ring_once(fd);
                }
        }
}
