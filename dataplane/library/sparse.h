/* Large address space of which only a part is touched, in programs that lock their memory.
 *
 * mlockall() would make every page of it: hundreds of MiB for a program of two. So the library's
 * mappings are never locked. In a program that has locked its future memory, a new mapping is made
 * inaccessible, is unlocked, and only then becomes accessible. mlockall() of the present memory
 * locks everything but the library's mappings (calls_mlock.c).
 */
#ifndef FREEFLOW_SPARSE_H
#define FREEFLOW_SPARSE_H

#include "layout.h"

#include <stddef.h>
#include <stdint.h>

/* Zeroed memory that costs nothing until it is touched. `kind` is MAP_PRIVATE or MAP_SHARED.
 * Returns NULL if there is none. */
void *reserve(size_t size, int kind);
/* The same, for large memory that stays as long as the process. */
void *reserve_for_good(size_t size, int kind);

/* Take the next part of memory that was reserved as a whole: each mapping has a cost at fork, exec
 * and exit.
 */
static inline void *take_part(char **place, size_t size)
{
        void *part = *place;

        *place += (size + PAGE - 1) / PAGE * PAGE;
        return part;
}

/* An unlocked mapping of a file, or of zeroed memory if `fd` is -1. It replaces the mapping at
 * `before` in one step, so that a concurrent reader sees one or the other. If `before` is NULL it
 * gets a new address, which stays the library's for good. Returns the address or -errno. */
long sparse_map(void *before, size_t size, int flags, int fd);

/* Call `visit` with the parts of a range of addresses that aren't the library's. */
void sparse_each_outside(uintptr_t first, uintptr_t last, void (*visit)(uintptr_t, uintptr_t, void *),
                         void *data);
/* Unlock all of the library's mappings. */
void sparse_unlock(void);

#endif
