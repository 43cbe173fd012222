/* Where a ring is in the shared memory, and where each of its bytes is.
 */
#ifndef FREEFLOW_VIEW_H
#define FREEFLOW_VIEW_H

#include "layout.h"

#include <stdbool.h>

/* A ring. Two words, so that it is passed in registers. */
struct view {
        struct ring *ring;
        uintptr_t bulk; /* address of the bulk area, which is a page's, and in the low bits log2 of the ring's
                           size */
};

enum { RING_SHIFT = 22 };

_Static_assert(1 << RING_SHIFT == RING_SIZE, "the size of a local ring");

static inline struct view view_of(struct ring *ring, unsigned char *bulk, uint32_t shift)
{
        return (struct view){.ring = ring, .bulk = (uintptr_t)bulk | shift};
}

static inline uint64_t view_size(const struct view *view)
{
        return UINT64_C(1) << (view->bulk & 63);
}

static inline unsigned char *view_bulk(const struct view *view)
{
        return (unsigned char *)(view->bulk & ~(uintptr_t)(PAGE - 1));
}

/* Is the other side the relay? The size says so (layout.h). */
static inline bool view_remote(const struct view *view)
{
        return __builtin_expect((view->bulk & 63) != RING_SHIFT, 0);
}

/* The address of an offset, and how far it goes on from there. */
static inline unsigned char *ring_at(const struct view *view, uint64_t offset, size_t *run)
{
        uint64_t size = view_size(view);

        offset &= size - 1;
        if (offset < SMALL_SIZE) {
                *run = SMALL_SIZE - offset;
                return (unsigned char *)view->ring + RING_HEADER + offset;
        }
        *run = size - offset;
        return view_bulk(view) + offset;
}

#endif
