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
                atomic_store(&record->bells, 0);
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

static void close_bells(struct mapping *mapping, _Atomic int32_t *bells)
{
        for (int i = 0; i < BELLS; i++) {
                int32_t fd = atomic_exchange(&bells[i], 0);

                if (fd > 0)
                        close_own(fd - 1);
        }
        for (int i = 0; i < BELL_WORDS; i++)
                atomic_store(&mapping->idle[i], 0);
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
        close_bells(mapping, mapping->bells);
        close_bells(mapping, mapping->peers);
        atomic_store(&mapping->deaf, false);
        atomic_store(&mapping->deaf_at, 0);
        atomic_store(&mapping->refused, 0);
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
        close_bells(mapping, mapping->bells);
        close_bells(mapping, mapping->peers);
}

/* Under the lock: the arena's record if it has this slot for us; a reason otherwise. */
static uint32_t take_slot(uint64_t id, uint64_t token, uint32_t side, uint32_t slot, uint64_t incarnation,
                          int memfd, uint32_t *arena)
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
        } else if (!atomic_load(&record->connections)) {
                unmap(*arena);
                atomic_store(&record->id, 0);
        }
        return reason;
}

uint32_t arena_attach(struct end *end, uint64_t id, uint64_t token, uint32_t side, uint32_t slot,
                      uint64_t incarnation, int memfd)
{
        uint32_t arena, reason;
        enum taken taken;

        if (!id || side >= SIDES || slot >= SLOTS || !incarnation)
                return REASON_CORRUPT;
        if (!make_mappings())
                return REASON_MEMORY;
        taken = lock_take(&family->arenas_lock, self());
        reason = taken == LOCK_NESTED ? REASON_MEMORY
                                      : take_slot(id, token, side, slot, incarnation, memfd, &arena);
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
        if (mappings)
                atomic_store(&mapping_of(arena)->slots[slot], 0);
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
                        close_bells(&mappings[i], mappings[i].bells);
                        if (atomic_load(&family->arenas[i].id) != atomic_load(&mappings[i].id))
                                unmap(i);
                }
}

void arena_retire(void)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t i = 0; mappings && i < high && i < ARENAS; i++)
                if (atomic_load(&mappings[i].id)) {
                        close_bells(&mappings[i], mappings[i].bells);
                        close_bells(&mappings[i], mappings[i].peers);
                }
}

int bell_descriptor(uint32_t arena, int bell)
{
        return atomic_load(&mapping_of(arena)->bells[bell]) - 1;
}

static int make_bell(uint32_t arena)
{
        struct arena_record *record = &family->arenas[arena];
        struct mapping *mapping = mapping_of(arena);
        uint32_t bell;
        int pair[2], ours;

        if (atomic_load(&record->bells) >= BELLS)
                return -1;
        if (sys_4(SYS_socketpair, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0)
                return -1;
        bell = atomic_fetch_add(&record->bells, 1);
        ours = bell < BELLS ? own_descriptor(pair[0]) : -1;
        if (ours >= 0 && router_bell(atomic_load(&record->id), atomic_load(&record->token),
                                     atomic_load(&record->side), bell, pair[1])) {
                atomic_store(&mapping->bells[bell], ours + 1);
        } else {
                uint32_t next = bell + 1;

                if (ours >= 0)
                        close_own(ours);
                ours = -1;
                /* The number is used again, unless somebody has taken the next one. */
                atomic_compare_exchange_strong(&record->bells, &next, bell);
        }
        sys_1(SYS_close, pair[1]);
        return ours < 0 ? -1 : (int)bell;
}

int bell_take(uint32_t arena)
{
        struct mapping *mapping = mapping_of(arena);

        if (atomic_load_explicit(&mapping->deaf, memory_order_relaxed)) {
                arena_grieve(arena);
                return -1;
        }
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
        return make_bell(arena);
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
static void sever(struct mapping *mapping)
{
        uint32_t arena = (uint32_t)(mapping - mappings);

        for (uint32_t slot = 0; slot < SLOTS; slot++)
                for (uint32_t d = 0; d < SIDES && atomic_load(&mapping->slots[slot]); d++)
                        atomic_store_explicit(&arena_view(arena, slot, d).ring->broken, 1,
                                              memory_order_release);
}

void arena_grieve(uint32_t arena)
{
        /* ms: a relay whose router has gone takes 2 s to bring all that is under way to its end. */
        enum { GRACE = 4000 };
        struct mapping *mapping = mapping_of(arena);
        uint32_t since = atomic_load_explicit(&mapping->deaf_at, memory_order_relaxed);

        /* Set to an odd moment, it may be the next one. */
        if (since && (int32_t)(ticks() - since) > GRACE)
                sever(mapping);
}

bool bell_silence(uint32_t arena, int bell)
{
        struct mapping *mapping = mapping_of(arena);
        int32_t word = atomic_load(&mapping->bells[bell]);
        uint32_t never = 0;
        char bytes[64];
        long got;

        if (word <= 0)
                return true;
        while ((got = sys_6(SYS_recvfrom, word - 1, bytes, sizeof bytes, MSG_DONTWAIT, 0, 0)) ==
               (long)sizeof bytes)
                ;
        if (got == -EBADF || got == -ENOTSOCK) {
                own_lost();
                /* A file of the program's may have got the number. The next wait gets a new bell. */
                if (atomic_compare_exchange_strong(&mapping->bells[bell], &word, 0))
                        fd_set_word(word - 1, 0);
                return true;
        }
        if (got)
                return true;
        /* Nobody has the other end, nobody will ring: who waits for this arena looks now and then. */
        atomic_store(&mapping->deaf, true);
        if (atomic_load(&mapping->remote)) {
                /* Where the relay had it, the relay is gone; otherwise it was the router, and that alone. */
                if (bell_is_known(arena, 0, bell))
                        sever(mapping);
                else
                        atomic_compare_exchange_strong(&mapping->deaf_at, &never, ticks() | 1);
        }
        if (atomic_compare_exchange_strong(&mapping->bells[bell], &word, 0))
                close_own(word - 1);
        return false;
}

/* Who names bells that don't exist makes us ask the router in vain, and wait for it: less and less often. */
static int fetch(struct mapping *mapping, const struct arena_record *record, uint32_t side, uint32_t bell)
{
        enum { FIRST_PAUSE = 64, LONGEST_PAUSE = 4096 };
        uint32_t pause = atomic_load_explicit(&mapping->refused, memory_order_relaxed);
        int fd;

        if (pause && ticks() - atomic_load_explicit(&mapping->refused_at, memory_order_relaxed) < pause)
                return -1;
        fd = router_fetch(atomic_load(&record->id), atomic_load(&record->token), side, bell);
        pause = fd >= 0 ? 0 : !pause ? FIRST_PAUSE : pause < LONGEST_PAUSE ? pause * 2 : pause;
        atomic_store_explicit(&mapping->refused, pause, memory_order_relaxed);
        atomic_store_explicit(&mapping->refused_at, ticks(), memory_order_relaxed);
        return fd;
}

/* A descriptor that rings a bell of the other side; -1: it can't be had now. */
static int peer_bell(uint32_t arena, uint32_t side, int bell)
{
        struct mapping *mapping = mapping_of(arena);
        struct arena_record *record = &family->arenas[arena];
        int32_t known = atomic_load_explicit(&mapping->peers[bell], memory_order_acquire);
        int fd;

        if (known > 0)
                return known - 1;
        fd = own_descriptor(fetch(mapping, record, 1 - side, (uint32_t)bell));
        if (fd < 0)
                return -1;
        if (!atomic_compare_exchange_strong(&mapping->peers[bell], &known, fd + 1)) {
                close_own(fd);
                return known - 1;
        }
        atomic_fetch_or(&arena_header(mapping)->sides[1 - side].known[bell / 64], bit(bell));
        return fd;
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
        if (atomic_compare_exchange_strong(&mapping->peers[bell], &known, 0) && is_own_descriptor(fd))
                close_own(fd);
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
                        int fd = peer_bell(arena, side, bell);

                        atomic_fetch_or_explicit(&theirs->dirty[bell], UINT64_C(1) << slot,
                                                 memory_order_seq_cst);
                        if (fd < 0 || ring_once(fd))
                                continue;
                        /* The other side has let the arena go and got it again, with new bells under the old
                         * numbers. */
                        forget_peer_bell(arena, side, bell, fd);
                        fd = peer_bell(arena, side, bell);
                        if (fd >= 0)
                                ring_once(fd);
                        else if (atomic_load(&mapping_of(arena)->remote))
                                sever(mapping_of(arena));
                }
        }
}
