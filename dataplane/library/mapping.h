/* The arenas that this process has mapped, and where the rings of an end are in them.
 *
 * A mapping stays readable and writable memory when its arena goes (an anonymous one takes its
 * place), because waiters check rings without a lock. Only what a thread does under a flow's lock,
 * after it has compared the end's generation, counts.
 */
#ifndef FREEFLOW_MAPPING_H
#define FREEFLOW_MAPPING_H

#include "family.h"
#include "ring.h"

/* A process's own part of an arena. */
struct mapping {
        unsigned char *_Atomic base;
        _Atomic uint32_t shift; /* log2 of a ring's size, checked once: the arena's own word isn't reread */
        _Atomic bool remote;    /* side 1 is the relay */
        _Atomic uint64_t id;    /* 0: nothing is mapped */
        _Atomic int32_t memfd;  /* 1 + descriptor of a local arena's file */
        _Atomic uint64_t inode;
        _Atomic bool unreachable;           /* the router has no bell for us, or one of ours has been lost */
        _Atomic uint32_t unreachable_since; /* of a remote arena: ticks() | 1; 0: it isn't */
        _Atomic uint32_t ordered;           /* bells requested from the router and not yet received */
        _Atomic uint32_t ordered_at;        /* ticks() */
        _Atomic uint32_t fetches;           /* of the other side's bells, less what time has taken off */
        _Atomic uint32_t fetched_at;        /* ticks() */
        _Atomic uint32_t kept;              /* of the other side's bells */
        _Atomic uint32_t attached;          /* connections in the arena */
        _Atomic int32_t bells[BELLS];       /* 1 + receiving end of ours */
        _Atomic int32_t peers[BELLS];       /* 1 + sending end of the other side's */
        _Atomic uint32_t armed[BELLS]; /* of epoll instances: wake-ups possibly sent since it was drained */
        _Atomic uint64_t idle[BELL_WORDS]; /* bells of ours that no thread waits with */
        _Atomic uint32_t slots[SLOTS];     /* 1 + number of the end in the slot */
};

extern struct mapping *_Atomic mappings;

static inline struct mapping *mapping_of(uint32_t arena)
{
        return &mappings[arena % ARENAS];
}

static inline uint32_t mapping_number(const struct mapping *mapping)
{
        return (uint32_t)(mapping - mappings);
}

/* Reserve the table of mappings. Returns false if there is no memory. */
bool mappings_make(void);
/* The mapping of an arena of which `side` is ours, or NULL. Under family.arenas_lock. */
struct mapping *mapping_find(uint64_t id, uint32_t side);

static inline struct arena *arena_header(const struct mapping *mapping)
{
        return (struct arena *)load_acquire(&mapping->base);
}

/* The ring of a direction in a slot. */
static inline struct view arena_view(uint32_t arena, uint32_t slot, uint32_t direction)
{
        const struct mapping *mapping = mapping_of(arena);
        unsigned char *base = (unsigned char *)arena_header(mapping);
        uint32_t shift = load_relaxed(&mapping->shift);
        size_t number = (size_t)slot * SIDES + direction;

        return view_of((struct ring *)(base + SLOT_OFFSET + number * PAGE),
                       base + BULK_OFFSET + (number << shift), shift);
}

/* The rings of a slot of ours: the one that we send into, and the one that we receive from. */
struct view place_sends(const struct place *place);
struct view place_receives(const struct place *place);

/* Of a slot of ours: its peer is on another host. */
static inline bool place_is_remote(const struct place *place)
{
        return load_relaxed(&mapping_of(load_relaxed(&place->arena))->remote);
}

/* The same of an attached end. */
struct view end_sends(const struct end *end);
struct view end_receives(const struct end *end);

static inline bool end_is_remote(const struct end *end)
{
        return place_is_remote(&end->place);
}

#endif
