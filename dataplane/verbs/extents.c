#include "extents.h"

#include "monotonic.h"
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
        FILE_PATIENCE = 500,  /* ms: for the router, while a program registers */
        RENEWAL_PATIENCE = 50,
        RENEWAL_PAUSE = 1, /* s, doubled each time */
        MOST_DOUBLINGS = 6,
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
static _Atomic bool begun;                              /* there may have been extents */
static _Atomic uint32_t forks;                          /* under way, which do not have the mutex */
static _Atomic bool unsettled;                          /* there is something for extents_settle() to do */
static _Atomic uint64_t to_withdraw[MOST_EXTENTS / 64]; /* as in struct extent_set */

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

static void drop_file(const struct extent_maker *maker, const struct extent_file *file,
                      struct extent_header *header)
{
        if (header)
                sys_2(SYS_munmap, header, EXTENT_PAGE);
        maker->end(file);
}

static void end(struct extent *extent)
{
        drop_file(extent->maker, &extent->file, extent->header);
        free(extent);
}

/* Put the pages of a new file in its place, and say which: `made` has only these. False: it is as
 * before. */
static bool give_file(const struct extent *extent, int patience, struct extent *made)
{
        made->pages = extent->pages;
        if (!extent->maker->make(EXTENT_PAGE + made->pages.length, extent->writable, patience, &made->file))
                return false;
        made->header = map_header(made->file.memfd);
        made->pages.memfd = made->file.memfd;
        made->pages.inode = inode_of(made->file.memfd);
        if (!made->header || !pages_replace(&made->pages)) {
                drop_file(extent->maker, &made->file, made->header);
                return false;
        }
        if (!extent->writable)
                extent->maker->protect(&made->file);
        return true;
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
        extent->writable = writable;
        extent->used = true;
        extent->pages = (struct direct_pages){.first = first, .length = length, .offset = EXTENT_PAGE};
        if (!give_file(extent, FILE_PATIENCE, extent)) {
                free(extent);
                return NULL;
        }
        show(extent);
        table.extents[table.count++] = extent;
        return extent;
}

/* Make its pages private again. False: that can't be done now. */
static bool restore_pages(struct extent *extent)
{
        return extent->restored || (extent->restored = pages_restore(&extent->pages));
}

/* The same, more than once: a thread that can't be stopped may be in a moment. */
static bool restore_soon(struct extent *extent)
{
        enum { TRIES = 20 };
        int tries = 0;

        while (!restore_pages(extent) && ++tries < TRIES)
                ;
        return extent->restored;
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

/* Somebody is to settle them. */
static void leave_for_later(const struct extent_maker *maker)
{
        atomic_store(&unsettled, true);
        maker->unsettled();
}

/* Under `telling`: a peer asks for one that was withdrawn. */
static enum extent_answer want(struct extent *extent)
{
        if (extent->pages.length > MOST_RENEWED)
                return EXTENT_NEVER;
        if (!extent->wanted && monotonic() >= extent->not_before) {
                extent->wanted = true;
                leave_for_later(extent->maker);
        }
        return EXTENT_LATER;
}

enum extent_answer extent_allow(struct extent *extent, uint32_t key, struct extent_set *told,
                                struct extent_file *file, struct direct_pages *pages)
{
        enum extent_answer answer = EXTENT_NOW;

        mutex_take(&extent->telling);
        if (extent->withdrawn) {
                answer = want(extent);
        } else {
                atomic_store(&extent->header->key, key);
                told->bits[extent->place / 64] |= UINT64_C(1) << extent->place % 64;
                *file = extent->file;
                *pages = extent->pages;
        }
        mutex_release(&extent->telling);
        return answer;
}

bool extent_has(struct extent *extent, uintptr_t first, size_t length, uint64_t *file, uint64_t *offset)
{
        const struct direct_pages *pages = &extent->pages;
        bool has;

        mutex_take(&extent->telling);
        has = !extent->withdrawn && first >= pages->first && first - pages->first <= pages->length &&
              length <= pages->length - (first - pages->first);
        *file = extent->file.memory;
        *offset = pages->offset + (first - pages->first);
        mutex_release(&extent->telling);
        return has;
}

/* Peers are to stop using it. */
static void forbid(struct extent *extent)
{
        mutex_take(&extent->telling);
        extent->withdrawn = true;
        atomic_store(&extent->header->key, 0);
        mutex_release(&extent->telling);
}

static uint64_t end_of_patience(void)
{
        return monotonic() + UINT64_C(1000000) * EXTENT_PATIENCE;
}

/* Those that are writing have written, or will know that this may be lost. */
static void await_writers(const struct extent *extent, uint64_t until)
{
        enum { PAUSE = 100000 /* ns */ };

        while (extent->writable && atomic_load(&extent->header->writers)) {
                if (monotonic() >= until) {
                        /* Before the pages are copied. Pairs with segment_leave(). */
                        atomic_store(&extent->header->abandoned, 1);
                        return;
                }
                sys_sleep(PAUSE);
        }
}

void extent_leave(struct extent *extent)
{
        mutex_take(&table.mutex);
        forbid(extent);
        await_writers(extent, end_of_patience());
        extent->used = false;
        for (uint32_t i = 0; i < table.count; i++)
                if (table.extents[i] == extent) {
                        if (!restore_soon(extent) || !give_up(i))
                                leave_for_later(extent->maker);
                        break;
                }
        mutex_release(&table.mutex);
}

/* No peer uses it from now on, and, as far as that can be done, it is the program's own. `until`:
 * how long to wait for peers. */
static void withdraw(struct extent *extent, uint64_t until)
{
        if (extent->restored)
                return;
        forbid(extent);
        await_writers(extent, until);
        if (!restore_soon(extent))
                leave_for_later(extent->maker);
}

static bool has(const struct extent_set *set, const struct extent *extent)
{
        return set->bits[extent->place / 64] >> extent->place % 64 & 1;
}

/* Those of the set, and of extents_withdraw_soon(). What is put there meanwhile is withdrawn, too:
 * none is told of another file before the mutex is released. */
static void withdraw_all(const struct extent_set *told)
{
        uint64_t until = end_of_patience(); /* for all of them: a peer may say that it writes to each */
        struct extent_set all;

        for (uint32_t i = 0; i < MOST_EXTENTS / 64; i++)
                all.bits[i] = atomic_load(&to_withdraw[i]) | told->bits[i];
        for (uint32_t i = 0; i < table.count; i++)
                if (has(&all, table.extents[i]))
                        forbid(table.extents[i]);
        for (uint32_t i = 0; i < table.count; i++)
                if (has(&all, table.extents[i]))
                        withdraw(table.extents[i], until);
        for (uint32_t i = 0; i < MOST_EXTENTS / 64; i++)
                atomic_fetch_and(&to_withdraw[i], ~all.bits[i]);
}

void extents_withdraw(const struct extent_set *told)
{
        uint64_t any = 0;

        for (uint32_t i = 0; i < MOST_EXTENTS / 64; i++)
                any |= atomic_load(&to_withdraw[i]) | told->bits[i];
        if (!any)
                return;
        mutex_take(&table.mutex);
        withdraw_all(told);
        mutex_release(&table.mutex);
}

void extents_withdraw_soon(struct extent_set *told)
{
        const struct extent_maker *maker = extent_maker;
        uint64_t any = 0;

        for (uint32_t i = 0; i < MOST_EXTENTS / 64; i++)
                if (told->bits[i]) {
                        any |= told->bits[i];
                        atomic_fetch_or(&to_withdraw[i], told->bits[i]);
                        told->bits[i] = 0;
                }
        if (any && maker)
                leave_for_later(maker);
}

/* Is another file to be made for one that was withdrawn? Not again before a while. */
static bool is_wanted(struct extent *extent)
{
        uint32_t doublings = extent->renewals < MOST_DOUBLINGS ? extent->renewals : MOST_DOUBLINGS;
        bool wanted;

        mutex_take(&extent->telling);
        wanted = extent->wanted && extent->withdrawn;
        extent->wanted = false;
        if (wanted) {
                extent->not_before = monotonic() + (UINT64_C(1000000000) * RENEWAL_PAUSE << doublings);
                extent->renewals = doublings + 1;
        }
        mutex_release(&extent->telling);
        return wanted;
}

/* Its pages are private. Whoever waits for the router here may take mutexes under which others tell
 * peers of extents: so not under `telling`. */
static void renew(struct extent *extent)
{
        const struct extent before = {.file = extent->file, .header = extent->header};
        struct extent made = {0};

        if (!extent_maker || !give_file(extent, RENEWAL_PATIENCE, &made))
                return;
        mutex_take(&extent->telling);
        extent->pages = made.pages;
        extent->header = made.header;
        extent->file = made.file;
        extent->withdrawn = extent->restored = false;
        mutex_release(&extent->telling);
        drop_file(extent->maker, &before.file, before.header);
}

/* False: something is left to be done with one of them. */
static bool settle_one(struct extent *extent)
{
        if (extent->withdrawn && !restore_pages(extent))
                return false;
        if (is_wanted(extent))
                renew(extent);
        return true;
}

bool extents_settle(void)
{
        static const struct extent_set none;
        bool settled = true;

        if (!atomic_exchange(&unsettled, false))
                return true;
        /* Whoever has it may wait for the router, which the caller listens to. */
        if (!mutex_try(&table.mutex)) {
                atomic_store(&unsettled, true);
                return false;
        }
        withdraw_all(&none);
        for (uint32_t i = 0; i < table.count; i++)
                if (table.extents[i]->used)
                        settled &= settle_one(table.extents[i]);
                else if (give_up(i))
                        i--;
                else
                        settled = false;
        if (!settled)
                atomic_store(&unsettled, true);
        mutex_release(&table.mutex);
        return settled;
}

void extents_end(void)
{
        extent_maker = NULL;
        if (!atomic_load(&begun))
                return;
        mutex_take(&table.mutex);
        for (uint32_t i = 0; i < table.count; i++)
                withdraw(table.extents[i], end_of_patience());
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
                        withdraw(table.extents[i], end_of_patience());
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
        withdraw(extent, end_of_patience());
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
        memset(to_withdraw, 0, sizeof to_withdraw);
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
