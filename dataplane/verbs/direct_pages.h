/* Pages of a file in the place of a program's own, and back.
 *
 * What a program registers are private pages, which nobody else can map. To have a peer read and
 * write them as its own memory, pages of a file (a memfd) take their place, with the same contents
 * at the same addresses. All other threads stand still meanwhile (standstill.h), so nothing that
 * they store is lost.
 *
 * None are replaced, nor restored, while the kernel may write to them by itself, for asynchronous
 * I/O.
 *
 * Only whole pages are replaced that are private, anonymous and writable, and on none of which a
 * thread has its stack: a child of fork() would go on there, and share it with its parent. Pages of
 * files are not copied for a child (MADV_DONTFORK): pages_fork().
 */
#ifndef FREEFLOW_DIRECT_PAGES_H
#define FREEFLOW_DIRECT_PAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Part of a file, and the pages whose place it takes. All are multiples of a page. */
struct direct_pages {
        uintptr_t first;
        size_t length;
        int memfd;
        uint64_t inode; /* of the file */
        uint64_t offset;
};

/* Part of what is mapped between two addresses. */
struct pages_part {
        uintptr_t first, end;
        uint64_t offset, inode;
        int protection;
        bool shared;
};

/* Put the file's pages in the place of the program's. False: that can't be done, or not now, and
 * nothing has changed. */
bool pages_replace(const struct direct_pages *pages);
/* Put private pages with the same contents in their place, wherever the file's are still there.
 * False: that can't be done now, and nothing has changed. */
bool pages_restore(const struct direct_pages *pages);
/* Are the file's pages in all of the place? The program may have mapped something else there. */
bool pages_are_there(const struct direct_pages *pages);

/* Around fork(). In the parent: the parts of the place where the file's pages still are, `most` at
 * most. In the child, which has nothing there: put private pages with the same contents. */
uint32_t pages_parts(const struct direct_pages *pages, struct pages_part *parts, uint32_t most);
bool pages_copy(const struct direct_pages *pages, const struct pages_part *part);

#endif
