#include "extents.h"

#include "mutex.h"
#include "port.h"
#include "standstill.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum {
        MOST_PARTS_OF_ALL = 4096,
        CHILD_PATIENCE = 1,   /* s: for a child to make its copies */
        MOVE_PATIENCE = 100,  /* ms: for the mutex */
        FORK_PATIENCE = 3000, /* ms: whoever has it may wait for the router */
};

const struct extent_maker *extent_maker;

static struct {
        struct mutex mutex; /* of what follows */
        struct extent *extents[MOST_EXTENTS];
        uint32_t count;
} table;

/* Where the extents are, for extents_advise(): an allocator may call it with locks that whoever has
 * the mutex waits for. `end` is 0 while the other word changes. */
static struct {
        _Atomic uintptr_t first, end;
} places[MOST_EXTENTS];
static _Atomic uint32_t highest;
static _Atomic bool begun;     /* there may have been extents */
static _Atomic uint32_t forks; /* under way, which do not have the mutex */
static _Atomic bool unsettled; /* some extent has no user, and its pages could not be replaced */

/* --- making and ending them */

static uint64_t inode_of(int fd)
{
        struct stat status;

        return sys_2(SYS_fstat, fd, &status) < 0 ? 0 : status.st_ino;
}

static struct extent_header *map_header(int memfd)
{
        long made =
            sys_6(SYS_mmap, 0, EXTENT_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, memfd, 0);

        if (sys_failed(made))
                return NULL;
        sys_3(SYS_madvise, made, EXTENT_PAGE, MADV_DONTFORK);
        return (void *)made;
}

static void end(struct extent *extent)
{
        if (extent->header)
                sys_2(SYS_munmap, extent->header, EXTENT_PAGE);
        extent->maker->end(&extent->file);
        free(extent);
}

/* Under the mutex, as all that follows. There are no more of them than places. */
static void show(struct extent *extent)
{
        uint32_t place = 0;

        while (atomic_load(&places[place].end))
                place++;
        extent->place = place;
        atomic_store(&places[place].first, extent->pages.first);
        atomic_store(&places[place].end, extent->pages.first + extent->pages.length);
        if (place >= atomic_load(&highest))
                atomic_store(&highest, place + 1);
}

static struct extent *make(uintptr_t first, size_t length, bool writable)
{
        struct extent *extent = table.count < MOST_EXTENTS ? calloc(1, sizeof *extent) : NULL;

        if (!extent)
                return NULL;
        extent->maker = extent_maker;
        if (!extent->maker->make(EXTENT_PAGE + length, writable, &extent->file)) {
                free(extent);
                return NULL;
        }
        extent->writable = writable;
        extent->used = true;
        extent->header = map_header(extent->file.memfd);
        extent->pages = (struct direct_pages){.first = first,
                                              .length = length,
                                              .memfd = extent->file.memfd,
                                              .inode = inode_of(extent->file.memfd),
                                              .offset = EXTENT_PAGE};
        if (!extent->header || !pages_replace(&extent->pages)) {
                end(extent);
                return NULL;
        }
        if (!writable)
                extent->maker->protect(&extent->file);
        show(extent);
        table.extents[table.count++] = extent;
        return extent;
}

/* Make its pages private again. False: that can't be done now. */
static bool restore_pages(struct extent *extent)
{
        return extent->restored || (extent->restored = pages_restore(&extent->pages));
}

/* End one that nobody uses. */
static bool give_up(uint32_t place)
{
        struct extent *extent = table.extents[place];

        if (!restore_pages(extent))
                return false;
        atomic_store(&places[extent->place].end, 0);
        table.extents[place] = table.extents[--table.count];
        end(extent);
        return true;
}

/* --- regions */

static bool overlaps(const struct extent *extent, uintptr_t first, uintptr_t end_of_place)
{
        return extent->pages.first < end_of_place && first < extent->pages.first + extent->pages.length;
}

/* May a new extent be here? One whose region is gone makes way. */
static bool is_free(uintptr_t first, uintptr_t end_of_place)
{
        for (uint32_t i = 0; i < table.count; i++) {
                if (!overlaps(table.extents[i], first, end_of_place))
                        continue;
                if (table.extents[i]->used || !give_up(i))
                        return false;
                i--;
        }
        return true;
}

struct extent *extent_take(uintptr_t address, size_t length, bool writable)
{
        uintptr_t first = (address + EXTENT_PAGE - 1) & ~(uintptr_t)(EXTENT_PAGE - 1);
        uintptr_t end_of_place = (address + length) & ~(uintptr_t)(EXTENT_PAGE - 1);
        struct extent *extent = NULL;

        if (!extent_maker || first < address || end_of_place <= first ||
            end_of_place - first > atomic_load_explicit(&port_direct_bytes, memory_order_relaxed))
                return NULL;
        atomic_store(&begun, true);
        mutex_take(&table.mutex);
        /* Either this sees the fork, or extents_fork() sees that there may be extents. */
        if (!atomic_load(&forks) && is_free(first, end_of_place))
                extent = make(first, end_of_place - first, writable);
        mutex_release(&table.mutex);
        return extent;
}

bool extent_allow(struct extent *extent, uint32_t key, struct extent_set *told)
{
        bool allowed;

        mutex_take(&extent->telling);
        allowed = !extent->withdrawn;
        if (allowed) {
                atomic_store(&extent->header->key, key);
                told->bits[extent->place / 64] |= UINT64_C(1) << extent->place % 64;
        }
        mutex_release(&extent->telling);
        return allowed;
}

/* Peers stop using it, and those that are writing have written. */
static void stop_peers(struct extent *extent)
{
        enum { PAUSE = 100000 /* ns */, PAUSES = EXTENT_PATIENCE * 1000000 / PAUSE };

        mutex_take(&extent->telling);
        extent->withdrawn = true;
        atomic_store(&extent->header->key, 0);
        mutex_release(&extent->telling);
        for (int i = 0; extent->writable && i < PAUSES && atomic_load(&extent->header->writers); i++)
                sys_sleep(PAUSE);
}

/* What is left to be done is done later. */
static void leave_for_later(const struct extent *extent)
{
        atomic_store(&unsettled, true);
        extent->maker->unsettled();
}

void extent_leave(struct extent *extent)
{
        mutex_take(&table.mutex);
        stop_peers(extent);
        extent->used = false;
        for (uint32_t i = 0; i < table.count; i++)
                if (table.extents[i] == extent) {
                        if (!give_up(i))
                                leave_for_later(extent);
                        break;
                }
        mutex_release(&table.mutex);
}

bool extents_settle(void)
{
        bool settled = true;

        if (!atomic_load(&unsettled))
                return true;
        /* Whoever has it may wait for the router, which the caller listens to. */
        if (!mutex_try(&table.mutex))
                return false;
        for (uint32_t i = 0; i < table.count; i++)
                if (!table.extents[i]->used && give_up(i))
                        i--;
                else if (!table.extents[i]->used ||
                         (table.extents[i]->withdrawn && !restore_pages(table.extents[i])))
                        settled = false;
        atomic_store(&unsettled, !settled);
        mutex_release(&table.mutex);
        return settled;
}

/* No peer uses it from now on, and, as far as that can be done, it is the program's own. */
static void withdraw(struct extent *extent)
{
        enum { TRIES = 20 };
        int tries = 0;

        if (extent->restored)
                return;
        stop_peers(extent);
        while (!restore_pages(extent) && ++tries < TRIES)
                ;
        if (!extent->restored)
                leave_for_later(extent);
}

void extents_withdraw(const struct extent_set *told)
{
        mutex_take(&table.mutex);
        for (uint32_t i = 0; i < table.count; i++) {
                uint32_t place = table.extents[i]->place;

                if (told->bits[place / 64] >> place % 64 & 1)
                        withdraw(table.extents[i]);
        }
        mutex_release(&table.mutex);
}

void extents_end(void)
{
        extent_maker = NULL;
        if (!atomic_load(&begun))
                return;
        mutex_take(&table.mutex);
        for (uint32_t i = 0; i < table.count; i++)
                withdraw(table.extents[i]);
        mutex_release(&table.mutex);
}

/* --- what the program does with its memory */

/* Whoever calls may have interrupted its own thread with the mutex, or have a lock that the one who
 * has the mutex waits for. */
static bool take_for_a_while(int milliseconds)
{
        enum { TRIES = 10 /* in a millisecond */, PAUSE = 1000000 / TRIES /* ns */ };

        for (int i = 0; i < milliseconds * TRIES; i++) {
                if (mutex_try(&table.mutex))
                        return true;
                sys_sleep(PAUSE);
        }
        return false;
}

/* The part of a place that lies between two addresses. False: there is none. */
static bool part_of(uint32_t place, uintptr_t *first, uintptr_t *end_of_part)
{
        uintptr_t end_before = atomic_load(&places[place].end);
        uintptr_t begin = atomic_load(&places[place].first);

        if (!end_before || end_before != atomic_load(&places[place].end))
                return false;
        *first = begin > *first ? begin : *first;
        *end_of_part = end_before < *end_of_part ? end_before : *end_of_part;
        return *first < *end_of_part;
}

/* By the kernel, which fails where the program may not write, instead of a signal. */
static void write_zeros(uintptr_t first, uintptr_t end_of_part)
{
        long zeros = sys_4(SYS_openat, AT_FDCWD, "/dev/zero", O_RDONLY | O_CLOEXEC, 0), got = 1;

        for (; zeros >= 0 && first < end_of_part && got > 0; first += got > 0 ? (size_t)got : 0)
                got = sys_3(SYS_read, zeros, first, end_of_part - first);
        if (zeros >= 0)
                sys_1(SYS_close, zeros);
}

/* The file's pages there read as 0 from now on. */
static void discard(uintptr_t first, uintptr_t end_of_part)
{
        /* A file that peers may only read is sealed against it. */
        if (sys_3(SYS_madvise, first, end_of_part - first, MADV_REMOVE) == -EPERM)
                write_zeros(first, end_of_part);
}

bool extents_advise(uintptr_t first, size_t length, int advice)
{
        enum { FREE = 8, DONT_NEED_LOCKED = 24 };
        uint32_t most = atomic_load(&highest);
        bool meets = false;

        for (uint32_t place = 0; place < most; place++) {
                uintptr_t begin = first, end_of_part = first + length;

                if (!part_of(place, &begin, &end_of_part))
                        continue;
                meets = true;
                if (advice == MADV_DONTNEED || advice == DONT_NEED_LOCKED)
                        discard(begin, end_of_part);
        }
        /* It may be discarded, and need not be; and is not for children. */
        return meets && (advice == FREE || advice == MADV_DOFORK);
}

void extents_move(uintptr_t first, size_t length)
{
        if (!atomic_load(&highest) || !take_for_a_while(MOVE_PATIENCE))
                return;
        for (uint32_t i = 0; i < table.count; i++)
                if (overlaps(table.extents[i], first, first + length))
                        withdraw(table.extents[i]);
        mutex_release(&table.mutex);
}

/* --- fork() */

/* What a child is to copy, by extent. */
static struct {
        struct pages_part parts[MOST_PARTS_OF_ALL];
        const struct direct_pages *of[MOST_PARTS_OF_ALL];
        uint32_t count;
        _Atomic uint32_t thread;  /* that has the table's mutex for it; 0: none */
        _Atomic uint32_t *copied; /* in memory that both share: 1: it has been */
} forking;

/* The child goes on on a copy of this stack. */
static bool make_stack_private(struct extent *extent, uintptr_t stack)
{
        if (stack - extent->pages.first >= extent->pages.length)
                return false;
        withdraw(extent);
        return extent->restored;
}

static void list_for_child(void)
{
        const uintptr_t stack = (uintptr_t)__builtin_frame_address(0);

        for (uint32_t i = 0; i < table.count; i++) {
                const struct direct_pages *pages = &table.extents[i]->pages;
                uint32_t count;

                if (make_stack_private(table.extents[i], stack))
                        continue;
                count = pages_parts(pages, forking.parts + forking.count, MOST_PARTS_OF_ALL - forking.count);
                for (uint32_t p = 0; p < count; p++)
                        forking.of[forking.count++] = pages;
        }
}

void extents_fork(void)
{
        atomic_fetch_add(&forks, 1);
        if (!atomic_load(&begun) || !take_for_a_while(FORK_PATIENCE))
                return;
        atomic_fetch_sub(&forks, 1);
        atomic_store(&forking.thread, (uint32_t)sys_0(SYS_gettid));
        forking.count = 0;
        if (!table.count)
                return;
        list_for_child();
        if (forking.count && !forking.copied) {
                long made = sys_6(SYS_mmap, 0, EXTENT_PAGE, PROT_READ | PROT_WRITE,
                                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);

                forking.copied = sys_failed(made) ? NULL : (void *)made;
        }
        if (forking.copied)
                atomic_store(forking.copied, 0);
}

void extents_forked(void)
{
        for (uint32_t i = 0; i < forking.count; i++)
                pages_copy(forking.of[i], &forking.parts[i]);
        if (forking.copied) {
                atomic_store(forking.copied, 1);
                sys_3(SYS_futex, forking.copied, FUTEX_WAKE, 1);
        }
        /* All of it is the parent's. */
        table.count = forking.count = 0;
        atomic_store(&begun, false);
        atomic_store(&forks, 0);
        atomic_store(&forking.thread, 0);
        atomic_store(&highest, 0);
        memset(places, 0, sizeof places);
        table.mutex = (struct mutex){0};
        forking.copied = NULL;
        extent_maker = NULL;
        standstill_forget();
}

void extents_fork_done(bool made)
{
        const struct timespec patience = {.tv_sec = CHILD_PATIENCE};

        if (atomic_load(&forking.thread) != (uint32_t)sys_0(SYS_gettid)) {
                atomic_fetch_sub(&forks, 1);
                return;
        }
        if (made && forking.count && forking.copied && !atomic_load(forking.copied))
                sys_4(SYS_futex, forking.copied, FUTEX_WAIT, 0, &patience);
        /* A child that nobody announces has none of them. */
        forking.count = 0;
        atomic_store(&forking.thread, 0);
        mutex_release(&table.mutex);
}
