/*
 * Reads and replaces small files that others may have made: nothing is followed, awaited or
 * trusted.
 */
#ifndef FREEFLOW_PLAIN_FILE_H
#define FREEFLOW_PLAIN_FILE_H

#include <stddef.h>
#include <sys/stat.h>

struct text {
        char *bytes; /* ends with a NUL that `length` does not count; NULL: it could not be read */
        size_t length;
        struct stat status;
};

/*
 * A plain file of at most MOST_BYTES. With `roots_own`, only the user of this process may own it
 * or write to it. `folder` is as for openat(2).
 */
struct text read_text(int folder, const char *name, int roots_own);

/* Replaces a file by renaming, with the mode and the owner of `before`. Returns 0 or -1. */
int replace_text(int folder, const char *name, const char *bytes, size_t length, const struct stat *before);

#endif
