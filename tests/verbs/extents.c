/* Extents of registered memory: `extents.h`, with files made by hand.
 *
 *      extents rules
 *      extents race SECONDS SEED
 *
 * race: threads register and deregister regions that overlap, write to them and fork. What each has
 * written is there, and in its children as it was when they were made.
 */
#include "../../dataplane/verbs/extents.c"
#include "../../dataplane/verbs/direct_pages.c"
#include "../../dataplane/verbs/standstill.c"
#include "../dataplane/check.h"

#include <pthread.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

enum { PAGE_BYTES = EXTENT_PAGE, PAGES = 32, BYTES = PAGES * PAGE_BYTES, THREADS = 3 };

static _Atomic uint32_t files, ended, protected;

static bool make_file(size_t bytes, bool writable, int patience, struct extent_file *file)
{
        (void)writable;
        (void)patience;
        *file = (struct extent_file){.memory = ++files, .memfd = memfd_create("extent", MFD_CLOEXEC)};
        return file->memfd >= 0 && ftruncate(file->memfd, (off_t)bytes) == 0;
}

static void protect_file(const struct extent_file *file)
{
        (void)file;
        protected++;
}

static void end_file(const struct extent_file *file)
{
        CHECK(close(file->memfd) == 0);
        ended++;
}

static void note_unsettled(void)
{
}

_Atomic uint64_t port_direct_bytes = UINT32_MAX;

static const struct extent_maker maker = {
    .make = make_file, .protect = protect_file, .end = end_file, .unsettled = note_unsettled};

static unsigned char *map(size_t bytes)
{
        unsigned char *made = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(made != MAP_FAILED);
        return made;
}

/* On a busy machine a thread may take too long to stop. */
static struct extent *take(unsigned char *first, size_t length, bool writable)
{
        struct extent *extent = NULL;

        for (int i = 0; i < 20 && !extent; i++)
                extent = extent_take((uintptr_t)first, length, writable);
        return extent;
}

static struct extent_set told;

static void settle(void)
{
        for (int i = 0; !extents_settle(); i++)
                CHECK(i < 20);
}

/* What a peer is told: */
static struct extent_file new_file;
static struct direct_pages new_pages;

static bool allow(struct extent *extent, uint32_t key, struct extent_set *set)
{
        return extent_allow(extent, key, set, &new_file, &new_pages) == EXTENT_NOW;
}

static void await_renewal(struct extent *extent, struct extent_set *set)
{
        for (int i = 0; !allow(extent, 9, set); i++) {
                CHECK(i < 20);
                extent->not_before = 0;
                settle();
        }
        CHECK(new_file.memory == extent->file.memory && new_pages.length == extent->pages.length);
}

/* --- rules */

static void check_regions(void)
{
        unsigned char *own = map(BYTES), *peer;
        struct extent *extent = take(own + 100, BYTES - 200, true);

        /* Only the pages that are whole. */
        CHECK(extent && extent->pages.first == (uintptr_t)own + PAGE_BYTES);
        CHECK(extent->pages.length == BYTES - 2 * PAGE_BYTES && !extent->header->key);
        peer = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, extent->file.memfd, 0);
        CHECK(peer != MAP_FAILED);
        own[PAGE_BYTES] = 5;
        CHECK(peer[PAGE_BYTES] == 5);
        CHECK(allow(extent, 77, &told));
        CHECK(*(uint64_t *)(void *)peer == 77);
        /* None for a region that overlaps it, or has no whole page. */
        CHECK(!extent_take((uintptr_t)own, BYTES, true));
        CHECK(!extent_take((uintptr_t)own + 4 * PAGE_BYTES, PAGE_BYTES, true));
        CHECK(!extent_take((uintptr_t)own + 100, BYTES - 200, true));
        CHECK(!extent_take((uintptr_t)own + 100, PAGE_BYTES, true) && files == 1);
        extent_leave(extent);
        CHECK(!*(uint64_t *)(void *)peer);
        settle();
        own[PAGE_BYTES] = 7;
        CHECK(peer[PAGE_BYTES] == 5 && ended == files && !table.count);
        /* Whoever has mapped it has nothing of the next region there. */
        extent = take(own, BYTES, false);
        CHECK(extent && protected == 1);
        own[PAGE_BYTES] = 8;
        CHECK(peer[PAGE_BYTES] == 5);
        extent_leave(extent);
        settle();
        CHECK(munmap(peer, BYTES) == 0);
}

/* The program unmaps registered memory, and maps something else there. */
static void check_unmapped(void)
{
        unsigned char *own = map(BYTES);
        struct extent *extent = take(own, BYTES, true);

        CHECK(extent && munmap(own, BYTES) == 0);
        CHECK(mmap(own, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
              own);
        CHECK(!extent_take((uintptr_t)own, BYTES, true));
        own[0] = 9;
        extent_leave(extent);
        settle();
        CHECK(own[0] == 9);
        extent = take(own, BYTES, true);
        CHECK(extent && own[0] == 9);
        extent_leave(extent);
        settle();
}

/* As the wrapped calls do. */
static int advise(unsigned char *first, size_t length, int advice)
{
        return extents_advise((uintptr_t)first, length, advice) ? 0 : madvise(first, length, advice);
}

/* What the program discards reads as 0, to it and to peers; other advice does no harm. */
static void check_advice(void)
{
        for (int writable = 0; writable < 2; writable++) {
                unsigned char *own = map(BYTES + PAGE_BYTES), *peer;
                struct extent *extent = take(own, BYTES, writable);

                CHECK(extent);
                peer = mmap(NULL, BYTES, PROT_READ, MAP_SHARED, extent->file.memfd, PAGE_BYTES);
                CHECK(peer != MAP_FAILED);
                memset(own, 1, BYTES + PAGE_BYTES);
                CHECK(advise(own + PAGE_BYTES, BYTES, MADV_DONTNEED) == 0);
                for (int i = 0; i < BYTES + PAGE_BYTES; i++)
                        CHECK(own[i] == (i < PAGE_BYTES));
                CHECK(peer[0] == 1 && !peer[PAGE_BYTES] && !peer[BYTES - 1]);
                own[2 * PAGE_BYTES] = 2;
                CHECK(peer[2 * PAGE_BYTES] == 2);
                CHECK(advise(own, BYTES, MADV_FREE) == 0 && advise(own, BYTES, MADV_DOFORK) == 0);
                CHECK(advise(own, BYTES, MADV_WILLNEED) == 0 && own[2 * PAGE_BYTES] == 2);
                extent_leave(extent);
                settle();
                CHECK(advise(own, BYTES, MADV_DONTNEED) == 0 && !own[0]);
                CHECK(munmap(own, BYTES + PAGE_BYTES) == 0 && munmap(peer, BYTES) == 0);
        }
}

static void await_good(pid_t child)
{
        int status;

        CHECK(waitpid(child, &status, 0) == child && status == 0);
}

static unsigned char *late;

static void *write_late(void *argument)
{
        struct extent_header *header = argument;

        usleep(20000);
        *late = 5;
        atomic_fetch_sub(&header->writers, 1);
        return NULL;
}

/* What a queue pair was told of is withdrawn when it ends: what peers have begun to write by then
 * is there, and nothing later. */
static void check_withdrawn(void)
{
        unsigned char *own = map(BYTES), *other = map(BYTES), *peer;
        struct extent *extent = take(own, BYTES, true), *second = take(other, BYTES, true);
        struct extent_set mine = {0};
        struct extent_header *header;
        pthread_t thread;

        CHECK(extent && second && allow(extent, 9, &mine) && allow(second, 8, &told));
        peer = mmap(NULL, EXTENT_PAGE + BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, extent->file.memfd, 0);
        CHECK(peer != MAP_FAILED);
        late = peer + EXTENT_PAGE;
        atomic_fetch_add(&((struct extent_header *)(void *)peer)->writers, 1);
        CHECK(pthread_create(&thread, NULL, write_late, peer) == 0);
        extents_withdraw(&mine);
        settle();
        CHECK(pthread_join(thread, NULL) == 0);
        CHECK(own[0] == 5 && !extent->header->key && !extent->header->abandoned);
        *late = 6;
        CHECK(own[0] == 5);
        CHECK(pages_are_there(&second->pages) && second->header->key == 8);
        /* Whoever never ends is not waited for, and can know. */
        header = mmap(NULL, EXTENT_PAGE, PROT_READ, MAP_SHARED, second->file.memfd, 0);
        CHECK(header != MAP_FAILED);
        atomic_fetch_add(&second->header->writers, 1);
        extent_leave(extent);
        extent_leave(second);
        CHECK(header->abandoned && munmap(header, EXTENT_PAGE) == 0);
        settle();
        CHECK(own[0] == 5 && !table.count && munmap(peer, EXTENT_PAGE + BYTES) == 0);
        CHECK(munmap(own, BYTES) == 0 && munmap(other, BYTES) == 0);
}

static _Atomic bool in_child;

/* Until a standstill has failed for this thread, which waits for its child and can't be stopped: a
 * second one has begun. */
static void *wait_for_child(void *unused)
{
        enum { MOST = 10000 /* ms */ };
        volatile uint64_t *deadline = &helper.deadline, before = *deadline, first = before;
        volatile pid_t child = vfork();

        if (!child) {
                in_child = true;
                for (int i = 0; i < MOST && (first == before || *deadline == first); i++) {
                        if (first == before)
                                first = *deadline;
                        usleep(1000);
                }
                _exit(0);
        }
        await_good(child);
        return unused;
}

/* Deregistering leaves nothing shared that can be made private in a moment. */
static void check_tried_again(void)
{
        unsigned char *own = map(BYTES), *peer;
        struct extent *extent = take(own, BYTES, true);
        pthread_t thread;

        CHECK(extent);
        peer = mmap(NULL, BYTES, PROT_READ, MAP_SHARED, extent->file.memfd, EXTENT_PAGE);
        CHECK(peer != MAP_FAILED);
        own[0] = 1;
        CHECK(pthread_create(&thread, NULL, wait_for_child, NULL) == 0);
        while (!in_child)
                usleep(1000);
        extent_leave(extent);
        own[0] = 2;
        CHECK(peer[0] == 1 && !table.count);
        CHECK(pthread_join(thread, NULL) == 0);
        CHECK(munmap(own, BYTES) == 0 && munmap(peer, BYTES) == 0);
}

/* When one peer's queue pair has ended there is another file for the others, if one of them asks,
 * but not again at once. What is to be withdrawn soon is, by whoever settles extents. */
static void check_renewed(void)
{
        unsigned char *own = map(BYTES);
        struct extent *extent = take(own, BYTES, true);
        struct extent_set mine = {0}, others = {0};
        unsigned int before;
        uint64_t first;

        CHECK(extent && allow(extent, 9, &mine));
        first = extent->file.memory;
        own[BYTES - 1] = 4;
        extents_withdraw(&mine);
        settle();
        /* Nobody has asked. */
        CHECK(extent->withdrawn && extent->file.memory == first);
        await_renewal(extent, &others);
        CHECK(extent->file.memory != first && extent->header->key == 9 && pages_are_there(&extent->pages));
        CHECK(own[BYTES - 1] == 4);
        before = files;
        extents_withdraw_soon(&others);
        CHECK(!others.bits[0] && extent->header->key == 9);
        settle();
        CHECK(extent->withdrawn && extent->restored && !extent->header->key);
        CHECK(extent_allow(extent, 9, &mine, &new_file, &new_pages) == EXTENT_LATER);
        settle();
        CHECK(extent->withdrawn && files == before);
        extent->not_before = 0;
        await_renewal(extent, &others);
        /* Whoever ends a queue pair waits for those that failed before. */
        extents_withdraw_soon(&others);
        extents_withdraw(&others);
        CHECK(extent->withdrawn);
        extent_leave(extent);
        settle();
        CHECK(own[BYTES - 1] == 4 && !table.count && munmap(own, BYTES) == 0);
        /* Copying much would stop the program for too long. */
        own = map(MOST_RENEWED + PAGE_BYTES);
        extent = take(own, MOST_RENEWED + PAGE_BYTES, true);
        CHECK(extent && allow(extent, 9, &mine));
        extents_withdraw(&mine);
        CHECK(extent_allow(extent, 9, &mine, &new_file, &new_pages) == EXTENT_NEVER);
        extent_leave(extent);
        settle();
        CHECK(munmap(own, MOST_RENEWED + PAGE_BYTES) == 0);
}

/* What the program moves is its own again. */
static void check_moved(void)
{
        unsigned char *own = map(BYTES), *there, *peer;
        struct extent *extent = take(own, BYTES, true);

        CHECK(extent);
        peer = mmap(NULL, BYTES, PROT_READ, MAP_SHARED, extent->file.memfd, PAGE_BYTES);
        CHECK(peer != MAP_FAILED);
        own[5] = 1;
        CHECK(allow(extent, 9, &told));
        extents_move((uintptr_t)own + PAGE_BYTES, PAGE_BYTES);
        there = mremap(own, BYTES, 2 * BYTES, MREMAP_MAYMOVE);
        CHECK(there != MAP_FAILED && there[5] == 1 && !extent->header->key);
        there[5] = 2;
        CHECK(peer[5] == 1);
        extent_leave(extent);
        settle();
}

static pid_t fork_as_library(void)
{
        pid_t made;

        extents_fork();
        made = fork();
        if (made)
                extents_fork_done(made > 0);
        else
                extents_forked();
        return made;
}

/* A child has what was there when it was made, and none of what either side writes later. */
static void check_fork(void)
{
        unsigned char *own = map(BYTES);
        struct extent *extent = take(own, BYTES, true);
        int ready[2];
        char byte;
        pid_t child;

        CHECK(extent && pipe(ready) == 0);
        memset(own, 1, BYTES);
        CHECK(mprotect(own + PAGE_BYTES, PAGE_BYTES, PROT_READ) == 0);
        child = fork_as_library();
        if (!child) {
                CHECK(read(ready[0], &byte, 1) == 1);
                for (int i = 0; i < BYTES; i++)
                        CHECK(own[i] == 1);
                own[0] = 3;
                _exit(0);
        }
        own[0] = own[BYTES - 1] = 2;
        CHECK(write(ready[1], "", 1) == 1);
        await_good(child);
        CHECK(own[0] == 2 && own[1] == 1);
        CHECK(mprotect(own + PAGE_BYTES, PAGE_BYTES, PROT_READ | PROT_WRITE) == 0);
        extent_leave(extent);
        settle();
}

static ucontext_t outside, inside;
static unsigned char *stack;

static void fork_inside(void)
{
        volatile int kept = 1;
        pid_t child = fork_as_library();

        if (!child) {
                kept = 2;
                _exit(kept != 2);
        }
        await_good(child);
        CHECK(kept == 1);
}

/* A stack in registered memory, on which nobody was when it was registered. */
static void check_stack(void)
{
        struct extent *extent;

        stack = map(BYTES);
        extent = take(stack, BYTES, true);
        CHECK(extent && getcontext(&inside) == 0);
        inside.uc_stack.ss_sp = stack;
        inside.uc_stack.ss_size = BYTES;
        inside.uc_link = &outside;
        makecontext(&inside, fork_inside, 0);
        CHECK(swapcontext(&outside, &inside) == 0);
        CHECK(!pages_are_there(&extent->pages));
        extent_leave(extent);
        settle();
}

/* --- race */

static time_t end_of_race;
static unsigned char *common;

static void *use_regions(void *argument)
{
        uint64_t number = (uint64_t)(uintptr_t)argument, dice = seed + number;
        uint64_t *words = (uint64_t *)(void *)common, mine[16] = {0};

        while (time(NULL) < end_of_race) {
                size_t first = any(&dice, PAGES), count = 1 + any(&dice, PAGES - first);
                struct extent *extent =
                    extent_take((uintptr_t)common + first * PAGE_BYTES, count * PAGE_BYTES, true);

                for (int i = 0; i < 1000; i++) {
                        uint64_t at = any(&dice, 16);

                        CHECK(words[at * (BYTES / 16 / 8) + number] == mine[at]);
                        words[at * (BYTES / 16 / 8) + number] = ++mine[at];
                }
                if (!number) {
                        pid_t child = fork_as_library();

                        if (!child) {
                                for (int at = 0; at < 16; at++)
                                        CHECK(words[at * (BYTES / 16 / 8)] == mine[at]);
                                memset(common, 0xff, BYTES);
                                _exit(0);
                        }
                        await_good(child);
                }
                if (extent)
                        extent_leave(extent);
        }
        return NULL;
}

static void race(void)
{
        pthread_t threads[THREADS];

        common = map(BYTES);
        for (uintptr_t i = 0; i < THREADS; i++)
                CHECK(pthread_create(&threads[i], NULL, use_regions, (void *)i) == 0);
        for (int i = 0; i < THREADS; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
        settle();
        CHECK(files && ended == files);
        printf("%u\n", files);
}

int main(int count, char **arguments)
{
        extent_maker = &maker;
        if (is_race(count, arguments, &end_of_race)) {
                race();
                return 0;
        }
        check_regions();
        check_unmapped();
        check_advice();
        check_withdrawn();
        check_tried_again();
        check_renewed();
        check_moved();
        check_fork();
        check_stack();
        return 0;
}
