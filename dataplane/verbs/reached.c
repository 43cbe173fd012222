#include "reached.h"

#include "extents.h"
#include "keys.h"
#include "mutex.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>

static struct mutex mutex; /* of what follows */
static struct reached *all;

/* Under the mutex, as what follows. */
static struct reached *find(uint64_t memory, uint64_t token)
{
        struct reached *reached = all;

        while (reached && (reached->memory != memory || reached->token != token))
                reached = reached->next;
        return reached;
}

static struct reached *map(uint64_t memory, uint64_t token, int memfd, bool writable)
{
        const int sealed = F_SEAL_SHRINK;
        long seals = sys_2(SYS_fcntl, memfd, F_GET_SEALS), size = sys_3(SYS_lseek, memfd, 0, SEEK_END), made;
        struct reached *reached;

        /* A file that could shrink would be a SIGBUS in the program. */
        if (seals < 0 || !(seals & sealed) || size <= 0)
                return NULL;
        reached = calloc(1, sizeof *reached);
        if (!reached)
                return NULL;
        made = sys_6(SYS_mmap, 0, size, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, memfd, 0);
        if (sys_failed(made)) {
                free(reached);
                return NULL;
        }
        /* A child has no queue pair to reach it by. */
        sys_3(SYS_madvise, made, size, MADV_DONTFORK);
        sys_3(SYS_madvise, made, size, MADV_DONTDUMP);
        *reached = (struct reached){.next = all,
                                    .memory = memory,
                                    .token = token,
                                    .base = (unsigned char *)made,
                                    .size = (size_t)size,
                                    .writable = writable};
        all = reached;
        return reached;
}

struct reached *reached_add(uint64_t memory, uint64_t token, int memfd, bool writable)
{
        struct reached *reached;

        mutex_take(&mutex);
        reached = find(memory, token);
        if (!reached)
                reached = map(memory, token, memfd, writable);
        if (reached)
                reached->users++;
        mutex_release(&mutex);
        return reached;
}

struct reached *reached_find(uint64_t memory, uint64_t token)
{
        struct reached *reached;

        mutex_take(&mutex);
        reached = find(memory, token);
        if (reached)
                reached->users++;
        mutex_release(&mutex);
        return reached;
}

void reached_leave(struct reached *reached)
{
        struct reached **at = &all;

        mutex_take(&mutex);
        if (!--reached->users) {
                while (*at != reached)
                        at = &(*at)->next;
                *at = reached->next;
                sys_2(SYS_munmap, reached->base, reached->size);
                free(reached);
        }
        mutex_release(&mutex);
}

void reached_forget(void)
{
        mutex = (struct mutex){0};
        all = NULL;
}

/* --- segments */

static bool fits(const struct reached *reached, const struct record_direct *direct)
{
        return direct->length && direct->base + direct->length >= direct->base &&
               direct->offset >= EXTENT_PAGE && direct->offset <= reached->size &&
               direct->length <= reached->size - direct->offset && !direct->later;
}

bool segment_add(struct segment **list, struct reached *reached, uint32_t key,
                 const struct record_direct *direct)
{
        const uint32_t writes = KEY_REMOTE_WRITE | KEY_REMOTE_ATOMIC;
        struct segment *segment = fits(reached, direct) ? calloc(1, sizeof *segment) : NULL;

        if (!segment) {
                reached_leave(reached);
                return false;
        }
        *segment = (struct segment){.next = *list,
                                    .reached = reached,
                                    .key = key,
                                    .access = direct->access & (reached->writable ? UINT32_MAX : ~writes),
                                    .base = direct->base,
                                    .length = direct->length,
                                    .first = reached->base + direct->offset};
        *list = segment;
        return true;
}

static struct extent_header *header_of(const struct segment *segment)
{
        return (void *)segment->reached->base;
}

/* Does its owner allow it? Pairs with extent_allow(). */
static bool is_allowed(const struct segment *segment)
{
        return atomic_load(&header_of(segment)->key) == segment->key;
}

/* Has its owner not waited for somebody who writes? Pairs with await_writers() in extents.c. */
static bool is_abandoned(const struct segment *segment)
{
        return atomic_load(&header_of(segment)->abandoned);
}

bool segment_enter(const struct segment *segment)
{
        if (segment->reached->writable)
                atomic_fetch_add(&header_of(segment)->writers, 1);
        if (is_allowed(segment) && !is_abandoned(segment))
                return true;
        segment_leave(segment);
        return false;
}

bool segment_leave(const struct segment *segment)
{
        if (!segment->reached->writable)
                return true;
        /* What was written comes before the look: if it does not see that the owner goes on, the
         * owner copies all of it. */
        atomic_fetch_sub(&header_of(segment)->writers, 1);
        return !is_abandoned(segment);
}

static void drop(struct segment **at)
{
        struct segment *segment = *at;

        *at = segment->next;
        reached_leave(segment->reached);
        free(segment);
}

struct segment *segment_find(struct segment **list, uint32_t key)
{
        for (struct segment **at = list; *at; at = &(*at)->next) {
                if ((*at)->key != key)
                        continue;
                if (is_allowed(*at))
                        return *at;
                drop(at);
                return NULL;
        }
        return NULL;
}

void segments_end(struct segment **list)
{
        while (*list)
                drop(list);
}
