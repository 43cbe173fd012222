/* Files of the device for programs that open them themselves, and calls about memory whose pages
 * are not the program's own any more (extents.h).
 *
 * A library with versions of symbols can't stand before the C library. So the calls that open files
 * are wrapped in the companion, libibverbs.so, which has none. It exports a pointer, by which it
 * finds what to do here: NULL until the program has asked for devices.
 */
#ifndef FREEFLOW_VIRTUAL_H
#define FREEFLOW_VIRTUAL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VIRTUAL_NAME "freeflow_virtual_files_2"

struct virtual_files {
        /* The path of a file that stands for this one; NULL: none does. */
        const char *(*other)(const char *path);
        /* A new descriptor of the device's file of that path, as open() makes it, or a negative
         * errno; -ENOENT: the device has no such file. */
        int (*open)(const char *path, int flags);
        /* The path of a file that this descriptor passes for; NULL: it is what it is. The number of
         * the device is this one, unless it is left at 0. */
        const char *(*disguise)(int fd, uint64_t *number);
        /* Before madvise(). True: nothing more is to be done. */
        bool (*advise)(uintptr_t first, size_t length, int advice);
        /* Before mremap(). */
        void (*move)(uintptr_t first, size_t length);
};

typedef const struct virtual_files *_Atomic virtual_files;

#endif
