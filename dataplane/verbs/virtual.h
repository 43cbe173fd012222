/* Files of the device for programs that open them themselves.
 *
 * A library with versions of symbols can't stand before the C library. So the calls that open files
 * are wrapped in the companion, libibverbs.so, which has none. It exports a pointer, by which it
 * finds what to do here: NULL until the program has asked for devices.
 */
#ifndef FREEFLOW_VIRTUAL_H
#define FREEFLOW_VIRTUAL_H

#include <stdatomic.h>

#define VIRTUAL_NAME "freeflow_virtual_files"

struct virtual_files {
        /* The path of a file that stands for this one; NULL: none does. */
        const char *(*other)(const char *path);
        /* A new descriptor with the text of the device's file of that path, closed on exec if it is
         * to be; -1: the device has no such file. */
        int (*open)(const char *path, int cloexec);
};

typedef const struct virtual_files *_Atomic virtual_files;

#endif
