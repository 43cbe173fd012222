/* Address space that is large and touched only in part, in programs that lock their memory.
 *
 * mlockall() would have every page of it made: hundreds of MiB for a program of two. So our own mappings are
 * never locked. A program that has asked for its future memory to be locked gets them without: they are made
 * inaccessible, unlocked, and only then made accessible. And mlockall() of what there is locks everything
 * else (sparse.c).
 */
#ifndef FREEFLOW_SPARSE_H
#define FREEFLOW_SPARSE_H

#include "layout.h"

#include <stddef.h>

/* Zeroed memory that costs nothing until it is touched; `kind` is MAP_PRIVATE or MAP_SHARED. NULL: there is
 * none. */
void *reserve(size_t size, int kind);
/* The same for large memory that stays as long as the process. */
void *reserve_for_good(size_t size, int kind);

/* The next part of what was reserved as a whole: each mapping costs something at every fork, exec and exit.
 */
static inline void *take_part(char **place, size_t size)
{
        void *part = *place;

        *place += (size + PAGE - 1) / PAGE * PAGE;
        return part;
}

/* A mapping of a file, or of nothing (-1), that nobody locks. It takes the place of `before` at once, so that
 * who looks there sees the one or the other; NULL: any place, which is kept for good. -errno. */
long sparse_map(void *before, size_t size, int flags, int fd);

#endif
