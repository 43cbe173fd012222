/* Direct memory without a router: files made by hand, which whoever asks for them gets a moment
 * later.
 */
#ifndef FREEFLOW_TEST_DIRECT_BED_H
#define FREEFLOW_TEST_DIRECT_BED_H

#include "../../dataplane/verbs/direct.h"
#include "../../dataplane/verbs/extents.h"
#include "../dataplane/check.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

enum { MOST_WISHES = 64 };
#define TOKEN UINT64_C(0x123456789)

static _Atomic uint32_t reached_files;

static struct {
        struct mutex mutex;
        struct wish {
                struct queue_pair *queue;
                uint64_t memory, token;
        } wishes[MOST_WISHES];
        uint32_t count;
} wished;

/* A file's number says where it is: the process, and its descriptor. */
static inline bool bed_make(size_t bytes, bool writable, int patience, struct extent_file *file)
{
        int memfd = memfd_create("extent", MFD_CLOEXEC | MFD_ALLOW_SEALING);

        (void)writable;
        (void)patience;
        CHECK(memfd >= 0 && ftruncate(memfd, (off_t)bytes) == 0);
        CHECK(fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0);
        file->memory = (uint64_t)getpid() << 32 | (uint32_t)memfd;
        file->token = file->memory ^ TOKEN;
        file->memfd = memfd;
        return true;
}

static inline void bed_protect(const struct extent_file *file)
{
        CHECK(fcntl(file->memfd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE) == 0);
}

static inline void bed_end(const struct extent_file *file)
{
        CHECK(close(file->memfd) == 0);
}

static inline void bed_ask(struct queue_pair *queue, const struct record_direct *direct)
{
        mutex_take(&wished.mutex);
        CHECK(wished.count < MOST_WISHES);
        wished.wishes[wished.count++] =
            (struct wish){.queue = queue, .memory = direct->memory, .token = direct->token};
        mutex_release(&wished.mutex);
}

static inline void bed_unsettled(void)
{
}

static const struct extent_maker bed_maker = {
    .make = bed_make, .protect = bed_protect, .end = bed_end, .unsettled = bed_unsettled};
static const struct direct_reacher bed_reacher = {.ask = bed_ask};

static inline void use_direct_memory(bool on)
{
        extent_maker = on ? &bed_maker : NULL;
        direct_reacher = on ? &bed_reacher : NULL;
}

static inline bool take_wish(const struct queue_pair *queue, struct wish *wish)
{
        bool found = false;

        mutex_take(&wished.mutex);
        for (uint32_t i = 0; i < wished.count && !found; i++)
                if (!queue || wished.wishes[i].queue == queue) {
                        *wish = wished.wishes[i];
                        wished.wishes[i] = wished.wishes[--wished.count];
                        found = true;
                }
        mutex_release(&wished.mutex);
        return found;
}

/* The router answers: one queue pair, or all (NULL). */
static inline void reach_files(struct queue_pair *queue)
{
        struct wish wish;
        char path[64];
        int memfd;

        while (take_wish(queue, &wish)) {
                snprintf(path, sizeof path, "/proc/%u/fd/%u", (unsigned)(wish.memory >> 32),
                         (unsigned)wish.memory);
                memfd = wish.token == (wish.memory ^ TOKEN) ? open(path, O_RDWR | O_CLOEXEC) : -1;
                if (memfd < 0) {
                        direct_missed(wish.queue);
                        continue;
                }
                direct_reached(wish.queue, wish.memory, memfd,
                               !(fcntl(memfd, F_GET_SEALS) & F_SEAL_FUTURE_WRITE));
                close(memfd);
                reached_files++;
        }
}

/* Queue pairs are gone. */
static inline void forget_wishes(void)
{
        wished.count = 0;
}

#endif
