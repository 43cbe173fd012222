/* Pages of a file in the place of a program's: `direct_pages.h`, with a file made by hand.
 *
 *      direct_pages rules
 *      direct_pages race SECONDS SEED
 *
 * race: threads add to words of some pages, while these become a file's and private again. While
 * they are the file's, one more adds to words there through another mapping. Nothing is lost.
 */
#include "../../dataplane/verbs/direct_pages.c"
#include "../../dataplane/verbs/standstill.c"
#include "../dataplane/check.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, PAGES = 16, BYTES = PAGES * PAGE_BYTES, WORDS = BYTES / 8, ADDERS = 3 };

static int memfd;
static uint64_t inode;
static unsigned char *peer;

static void make_file(void)
{
        struct stat status;

        memfd = memfd_create("pages", MFD_CLOEXEC);
        CHECK(memfd >= 0 && ftruncate(memfd, PAGE_BYTES + BYTES) == 0 && fstat(memfd, &status) == 0);
        inode = status.st_ino;
        peer = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, PAGE_BYTES);
        CHECK(peer != MAP_FAILED);
}

static unsigned char *map(int flags, int fd)
{
        unsigned char *made = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, flags, fd, 0);

        CHECK(made != MAP_FAILED);
        return made;
}

static struct direct_pages pages_at(unsigned char *first, size_t length)
{
        return (struct direct_pages){.first = (uintptr_t)first,
                                     .length = length,
                                     .memfd = memfd,
                                     .inode = inode,
                                     .offset = PAGE_BYTES};
}

/* On a busy machine a thread may need longer to stop than is waited for. */
static bool replace_soon(const struct direct_pages *pages)
{
        bool done = false;

        for (int i = 0; i < 20 && !done; i++)
                done = pages_replace(pages);
        return done;
}

static bool restore_soon(const struct direct_pages *pages)
{
        bool done = false;

        for (int i = 0; i < 20 && !done; i++)
                done = pages_restore(pages);
        return done;
}

/* --- rules */

static void check_there_and_back(void)
{
        unsigned char *own = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
        struct direct_pages pages = pages_at(own, BYTES);

        for (int i = 0; i < BYTES; i++)
                own[i] = (unsigned char)(i * 7 + i / PAGE_BYTES);
        CHECK(!pages_are_there(&pages));
        CHECK(replace_soon(&pages) && pages_are_there(&pages));
        CHECK(memcmp(own, peer, BYTES) == 0);
        own[5000] = 1;
        peer[5001] = 2;
        CHECK(peer[5000] == 1 && own[5001] == 2);
        CHECK(restore_soon(&pages) && !pages_are_there(&pages));
        CHECK(memcmp(own, peer, BYTES) == 0);
        own[5000] = 3;
        peer[5001] = 4;
        CHECK(peer[5000] == 1 && own[5001] == 2);
        CHECK(munmap(own, BYTES) == 0);
}

static void check_refused(void)
{
        unsigned char local[4 * PAGE_BYTES], *own;
        unsigned char *on_stack =
            (unsigned char *)(((uintptr_t)local + PAGE_BYTES) & ~(uintptr_t)(PAGE_BYTES - 1));
        struct direct_pages pages = pages_at(map(MAP_SHARED | MAP_ANONYMOUS, -1), BYTES);

        CHECK(!pages_replace(&pages));
        pages = pages_at(map(MAP_PRIVATE, memfd), BYTES);
        CHECK(!pages_replace(&pages));
        pages = pages_at(on_stack, PAGE_BYTES);
        CHECK(!pages_replace(&pages));
        own = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
        pages = pages_at(own, BYTES);
        CHECK(mprotect(own + PAGE_BYTES, PAGE_BYTES, PROT_READ) == 0 && !pages_replace(&pages));
        CHECK(munmap(own + PAGE_BYTES, PAGE_BYTES) == 0 && !pages_replace(&pages));
        CHECK(!pages_are_there(&pages));
}

/* The kernel may be writing to any page, as asynchronous I/O does. */
static void check_asynchronous(void)
{
        unsigned char *own = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
        struct direct_pages pages = pages_at(own, BYTES);
        uint64_t context = 0;

        if (syscall(SYS_io_setup, 8, &context))
                return;
        CHECK(!pages_replace(&pages));
        CHECK(syscall(SYS_io_destroy, context) == 0 && replace_soon(&pages));
        context = 0;
        CHECK(syscall(SYS_io_setup, 8, &context) == 0 && !pages_restore(&pages) && pages_are_there(&pages));
        CHECK(syscall(SYS_io_destroy, context) == 0 && restore_soon(&pages));
}

/* The program has changed what is there meanwhile. */
static void check_changed(void)
{
        unsigned char *own = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
        struct direct_pages pages = pages_at(own, BYTES);
        struct pages_part parts[MOST_PARTS];
        uint32_t count;

        memset(own, 1, BYTES);
        CHECK(replace_soon(&pages));
        CHECK(munmap(own + PAGE_BYTES, PAGE_BYTES) == 0);
        CHECK(mprotect(own + 4 * PAGE_BYTES, PAGE_BYTES, PROT_READ) == 0);
        CHECK(mmap(own + 8 * PAGE_BYTES, PAGE_BYTES, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
        own[8 * PAGE_BYTES] = 2;
        CHECK(!pages_are_there(&pages));
        CHECK(restore_soon(&pages));
        CHECK(own[0] == 1 && own[4 * PAGE_BYTES] == 1 && own[8 * PAGE_BYTES] == 2 && own[BYTES - 1] == 1);
        CHECK(list_parts(pages.first, pages.first + BYTES, parts, &count, NULL));
        for (uint32_t i = 0; i < count; i++)
                CHECK(!parts[i].shared && !parts[i].inode);
        CHECK(count >= 4 && parts[0].end == pages.first + PAGE_BYTES);
        CHECK(parts[1].first == pages.first + 2 * PAGE_BYTES);
}

/* A child of fork() has none of the file's pages. */
static void check_child(void)
{
        unsigned char *own = map(MAP_PRIVATE | MAP_ANONYMOUS, -1), there;
        struct direct_pages pages = pages_at(own, BYTES);
        int status;
        pid_t child;

        CHECK(replace_soon(&pages));
        child = fork();
        if (!child)
                _exit(mincore(own, BYTES, &there) == 0);
        CHECK(waitpid(child, &status, 0) == child && status == 0);
        CHECK(restore_soon(&pages));
        child = fork();
        if (!child) {
                own[0] = 1;
                _exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child && status == 0 && !own[0]);
}

/* --- race */

static uint64_t *words;
static time_t end;
static _Atomic bool ends;
static _Atomic uint64_t added[ADDERS + 1];

static void *add_some(void *argument)
{
        uint64_t number = (uint64_t)(uintptr_t)argument, dice = seed + number, sum = 0;

        while (!ends) {
                volatile uint64_t *word = &words[any(&dice, WORDS / 4) * 4 + number];

                *word += 1;
                sum++;
        }
        atomic_fetch_add(&added[number], sum);
        return NULL;
}

static void add_as_peer(uint64_t *dice)
{
        for (int i = 0; i < 1000; i++) {
                volatile uint64_t *word = &((uint64_t *)(void *)peer)[any(dice, WORDS / 4) * 4 + ADDERS];

                *word += 1;
                added[ADDERS]++;
        }
}

static void race(void)
{
        unsigned char *own = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
        struct direct_pages pages = pages_at(own, BYTES);
        uint64_t sums[ADDERS + 1] = {0}, dice = seed;
        pthread_t threads[ADDERS];
        uint32_t times = 0;

        words = (uint64_t *)(void *)own;
        for (uintptr_t i = 0; i < ADDERS; i++)
                CHECK(pthread_create(&threads[i], NULL, add_some, (void *)i) == 0);
        for (; time(NULL) < end; times++) {
                CHECK(replace_soon(&pages));
                add_as_peer(&dice);
                CHECK(restore_soon(&pages));
        }
        ends = true;
        for (int i = 0; i < ADDERS; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
        for (int i = 0; i < WORDS; i++)
                sums[i % (ADDERS + 1)] += words[i];
        for (int i = 0; i <= ADDERS; i++)
                CHECK(sums[i] == added[i] && sums[i]);
        printf("%u\n", times);
}

int main(int count, char **arguments)
{
        make_file();
        if (is_race(count, arguments, &end)) {
                race();
                return 0;
        }
        check_there_and_back();
        check_refused();
        check_changed();
        check_asynchronous();
        check_child();
        return 0;
}
