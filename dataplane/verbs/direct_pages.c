#include "direct_pages.h"

#include "../library/process_maps.h"
#include "standstill.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum { MOST_PARTS = 64 };

/* --- what is mapped (proc_pid_maps(5)) */

static bool begins(const char *text, const char *beginning)
{
        return strncmp(text, beginning, strlen(beginning)) == 0;
}

/* `writes`: a ring of asynchronous I/O, by which the kernel writes to a program's pages at any
 * time. */
static struct pages_part read_line(const char *text, bool *writes)
{
        struct pages_part part = {0};

        part.first = process_maps_number(&text, 16);
        text++;
        part.end = process_maps_number(&text, 16);
        text++;
        part.protection = (text[0] == 'r' ? PROT_READ : 0) | (text[1] == 'w' ? PROT_WRITE : 0) |
                          (text[2] == 'x' ? PROT_EXEC : 0);
        part.shared = text[3] == 's';
        text += 5;
        part.offset = process_maps_number(&text, 16);
        while (*++text && *text != ' ')
                ; /* the device */
        text++;
        part.inode = process_maps_number(&text, 10);
        /* The kernel's own, such as the first thread's stack. */
        while (*text == ' ')
                text++;
        *writes = begins(text, "/[aio]") || begins(text, "anon_inode:[io_uring]");
        if (*text == '[' && text[1] != 'h' && text[1] != 'a')
                part.inode = UINT64_MAX;
        return part;
}

/* The parts of the process's mappings that lie between two addresses. False: they are too many, or
 * not known. `writers`, if it is not NULL, is set if the kernel may be writing somewhere. */
static bool list_parts(uintptr_t first, uintptr_t end, struct pages_part *parts, uint32_t *count,
                       bool *writers)
{
        struct process_maps maps;
        char line[128];
        bool fits = true;

        *count = 0;
        if (!process_maps_open(&maps, "/proc/thread-self/maps"))
                return false;
        while (fits && process_maps_line(&maps, line, sizeof line)) {
                bool writes;
                struct pages_part part = read_line(line, &writes);

                if (writers)
                        *writers |= writes;
                if (part.end <= first || part.first >= end)
                        continue;
                fits = *count < MOST_PARTS;
                if (fits)
                        parts[(*count)++] = part;
        }
        process_maps_close(&maps);
        for (uint32_t i = 0; i < *count; i++) {
                if (parts[i].first < first) {
                        parts[i].offset += first - parts[i].first;
                        parts[i].first = first;
                }
                parts[i].end = parts[i].end < end ? parts[i].end : end;
        }
        return fits && maps.got >= 0;
}

static bool is_of_file(const struct pages_part *part, const struct direct_pages *pages)
{
        return part->shared && part->inode == pages->inode &&
               part->offset == pages->offset + (part->first - pages->first);
}

/* --- replacing */

struct change {
        const struct direct_pages *pages;
        bool done;
        struct pages_part parts[MOST_PARTS];
        uint32_t count;
};

/* A program may have closed the descriptor unseen, and have another file there. */
static bool is_ours(const struct direct_pages *pages)
{
        struct stat status;

        return !sys_2(SYS_fstat, pages->memfd, &status) && status.st_ino == pages->inode;
}

static bool transfer(long number, int memfd, uintptr_t place, size_t length, uint64_t offset)
{
        while (length) {
                long moved = sys_4(number, memfd, place, length, offset);

                if (moved == -EINTR)
                        continue;
                if (moved <= 0)
                        return false;
                place += (size_t)moved;
                offset += (uint64_t)moved;
                length -= (size_t)moved;
        }
        return true;
}

/* Put a mapping in the place of what is there. */
static bool put(long made, uintptr_t place, size_t length)
{
        long moved = sys_5(SYS_mremap, made, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, place);

        if (sys_failed(moved))
                sys_2(SYS_munmap, made, length);
        return !sys_failed(moved);
}

/* With the file's contents: from its descriptor, or from its pages, which are still there unless
 * these have taken their place. */
static bool fill(const struct direct_pages *pages, const struct pages_part *part, long made, uintptr_t place)
{
        size_t length = part->end - part->first;

        if (is_ours(pages))
                return transfer(SYS_pread64, pages->memfd, (uintptr_t)made, length,
                                pages->offset + (part->first - pages->first));
        if (place || !(part->protection & PROT_READ))
                return false;
        memcpy((void *)made, (const void *)part->first, length);
        return true;
}

/* Private pages with the file's contents, anywhere or at this place, where there is nothing.
 * Returns the place, or an error. */
static long make_private(const struct direct_pages *pages, const struct pages_part *part, uintptr_t place)
{
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | (place ? MAP_FIXED : 0);
        size_t length = part->end - part->first;
        long made = sys_6(SYS_mmap, place, length, PROT_READ | PROT_WRITE, flags, -1, 0);

        if (sys_failed(made))
                return made;
        if (fill(pages, part, made, place) &&
            (part->protection == (PROT_READ | PROT_WRITE) ||
             !sys_failed(sys_3(SYS_mprotect, made, length, part->protection))))
                return made;
        sys_2(SYS_munmap, made, length);
        return -ENOMEM;
}

bool pages_copy(const struct direct_pages *pages, const struct pages_part *part)
{
        return !sys_failed(make_private(pages, part, part->first));
}

/* May all of the place be replaced? */
static bool is_replaceable(struct change *change)
{
        const struct direct_pages *pages = change->pages;
        uintptr_t end = pages->first + pages->length, at = pages->first;
        bool writers = false;

        if (standstill_has_stack(pages->first, end) ||
            !list_parts(pages->first, end, change->parts, &change->count, &writers) || writers)
                return false;
        for (uint32_t i = 0; i < change->count; i++) {
                const struct pages_part *part = &change->parts[i];

                if (part->first != at || part->shared || part->inode ||
                    part->protection != (PROT_READ | PROT_WRITE))
                        return false;
                at = part->end;
        }
        return at == end;
}

static void replace(void *argument)
{
        struct change *change = argument;
        const struct direct_pages *pages = change->pages;
        struct pages_part all = {
            .first = pages->first, .end = pages->first + pages->length, .protection = PROT_READ | PROT_WRITE};
        long made;

        if (!is_replaceable(change) ||
            !transfer(SYS_pwrite64, pages->memfd, pages->first, pages->length, pages->offset))
                return;
        made = sys_6(SYS_mmap, 0, pages->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                     pages->memfd, pages->offset);
        if (sys_failed(made))
                return;
        if (sys_failed(sys_3(SYS_madvise, made, pages->length, MADV_DONTFORK))) {
                sys_2(SYS_munmap, made, pages->length);
                return;
        }
        change->done = put(made, pages->first, pages->length);
        /* The kernel may have unmapped what was there before it ran out of memory. */
        if (!change->done)
                pages_copy(pages, &all);
}

bool pages_replace(const struct direct_pages *pages)
{
        struct change change = {.pages = pages};

        return standstill(replace, &change) && change.done;
}

static bool put_private(const struct direct_pages *pages, const struct pages_part *part)
{
        long made = make_private(pages, part, 0);

        return !sys_failed(made) && put(made, part->first, part->end - part->first);
}

/* False: that is not known, or the kernel may be writing to these pages, too. */
static bool list_for_restore(struct change *change)
{
        const struct direct_pages *pages = change->pages;
        bool writers = false;

        return list_parts(pages->first, pages->first + pages->length, change->parts, &change->count,
                          &writers) &&
               !writers;
}

static void restore(void *argument)
{
        struct change *change = argument;
        const struct direct_pages *pages = change->pages;

        change->done = list_for_restore(change);
        for (uint32_t i = 0; change->done && i < change->count; i++)
                if (is_of_file(&change->parts[i], pages))
                        change->done = put_private(pages, &change->parts[i]);
}

bool pages_restore(const struct direct_pages *pages)
{
        struct change change = {.pages = pages};

        /* Nothing stands still in vain while the program uses asynchronous I/O. */
        return list_for_restore(&change) && standstill(restore, &change) && change.done;
}

bool pages_are_there(const struct direct_pages *pages)
{
        uintptr_t end = pages->first + pages->length, at = pages->first;
        struct pages_part parts[MOST_PARTS];
        uint32_t count;

        if (!list_parts(pages->first, end, parts, &count, NULL))
                return false;
        for (uint32_t i = 0; i < count && parts[i].first == at && is_of_file(&parts[i], pages); i++)
                at = parts[i].end;
        return at == end;
}

uint32_t pages_parts(const struct direct_pages *pages, struct pages_part *parts, uint32_t most)
{
        struct pages_part all[MOST_PARTS];
        uint32_t count, kept = 0;

        if (!list_parts(pages->first, pages->first + pages->length, all, &count, NULL))
                return 0;
        for (uint32_t i = 0; i < count && kept < most; i++)
                if (is_of_file(&all[i], pages))
                        parts[kept++] = all[i];
        return kept;
}
