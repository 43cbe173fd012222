/* Extents: registered memory whose pages are a file's, so that peers on this host can map it.
 *
 * An extent is the whole pages inside a registered region. The router makes the file. Its first
 * page has a header, by which peers know whether they may use it. When the region is deregistered
 * its pages are private again, and nobody uses the file any more. So they are when a queue pair
 * ends whose other side was told of it: that one may be writing, or be about to. The extent then
 * has another file soon, for the other sides of other queue pairs, if one of them asks.
 *
 * Two regions never share an extent: who maps the file for one would reach the other's pages, and
 * keep them when its own region is gone. So a region that overlaps another one's extent has none.
 *
 * Peers that heed the header are honest. Whoever is not reaches no more than the pages of a region
 * that it was told the key of, until that one is deregistered or the queue pair ends.
 */
#ifndef FREEFLOW_EXTENTS_H
#define FREEFLOW_EXTENTS_H

#include "direct_pages.h"
#include "mutex.h"

#include <stdatomic.h>

enum {
        EXTENT_PAGE = 4096,
        EXTENT_PATIENCE = 50, /* ms: for copies of peers to end */
        MOST_EXTENTS = 1024,
        /* Bytes: all threads stand still while so many are copied, for nothing that they do. */
        MOST_RENEWED = 64 << 20,
};

/* Who writes there counts itself before it looks at the key, and until it has written. So whoever
 * takes the key away knows when nobody writes any more, if all are honest. It does not wait for
 * long for one that stands still. So whoever has written looks whether it was waited for: if not,
 * what it has written may be lost.
 */
struct extent_header {
        _Atomic uint64_t key; /* the region's, while peers may use it; 0: they may not */
        _Atomic uint64_t writers;
        _Atomic uint64_t abandoned; /* 1: some of them were not waited for */
};

/* Of those that there are at a time. */
struct extent_set {
        uint64_t bits[MOST_EXTENTS / 64];
};

/* A file that the router has made. */
struct extent_file {
        uint64_t memory; /* its number */
        uint64_t token;  /* who has it may map the file */
        int memfd;       /* an own descriptor */
};

struct extent {
        const struct extent_maker *maker;
        struct direct_pages pages;
        struct extent_file file;
        struct extent_header *header;
        struct mutex telling;
        /* Under `telling`: */
        bool withdrawn;      /* peers may not use it any more */
        bool wanted;         /* some peer has asked: another file is to be made */
        uint64_t not_before; /* ns: for yet another one */
        uint32_t renewals;   /* so far, as long as the pause grows */

        bool writable;  /* by peers */
        bool used;      /* its region is registered */
        bool restored;  /* its pages are private again */
        uint32_t place; /* in the list that is read without a mutex */
};

/* Who makes files: pair.c, or a test. */
struct extent_maker {
        /* A file of so many bytes. False: there is none. May wait so many ms. */
        bool (*make)(size_t bytes, bool writable, int patience, struct extent_file *file);
        /* The file is mapped, of which peers may only read. */
        void (*protect)(const struct extent_file *file);
        /* Nobody of this process needs it. Closes the descriptor. */
        void (*end)(const struct extent_file *file);
        /* Something is to be settled later. */
        void (*unsettled)(void);
};

extern const struct extent_maker *extent_maker; /* NULL: there is no direct memory */

/* The extent for a region. NULL: there is none, and peers have to send records. */
struct extent *extent_take(uintptr_t address, size_t length, bool writable);
enum extent_answer { EXTENT_NEVER, EXTENT_LATER, EXTENT_NOW };

/* Peers may use the region by its key from now on, and one of them is told: put it in the set.
 * `file` and `pages`: what to tell. LATER: it is not to be used, but may be when it asks again. */
enum extent_answer extent_allow(struct extent *extent, uint32_t key, struct extent_set *told,
                                struct extent_file *file, struct direct_pages *pages);
/* Are these bytes of the process in the extent's file now, and where? Whoever reads them there
 * reads what was there when this was asked, whatever becomes of the extent. */
bool extent_has(struct extent *extent, uintptr_t first, size_t length, uint64_t *file, uint64_t *offset);
/* No peer uses the files of those of the set any more, nor of those of extents_withdraw_soon(). */
void extents_withdraw(const struct extent_set *told);
/* The same, soon; the set is empty afterwards. May be called under any mutex of others. */
void extents_withdraw_soon(struct extent_set *told);
/* The region is deregistered. */
void extent_leave(struct extent *extent);
/* Do what was left for later: withdraw, make private, make new files. False: something is left. */
bool extents_settle(void);
/* Make all of them private, as far as that can be done, and no more of them. */
void extents_end(void);

/* The program advises the kernel (madvise): what it discards there is to read as 0 afterwards. May
 * be called with any lock of the program's held. True: the kernel is not to hear of it. */
bool extents_advise(uintptr_t first, size_t length, int advice);
/* The program moves what is there (mremap): it is private from now on. */
void extents_move(uintptr_t first, size_t length);

/* Around fork(): in the parent before, in the child before anything else runs there, and in the
 * parent afterwards, which waits until the child has its copies. */
void extents_fork(void);
void extents_forked(void);
void extents_fork_done(bool made);

#endif
