/* The arenas that this process has mapped, and the bells with which waiters are woken.
 *
 * A bell is a pair of connected unix sockets for one waiter and one arena. The router makes it, and gives the
 * waiter's side the end that hears, the other side the end that rings by sending a byte. Not an eventfd: its
 * two holders share one file description, so either could make the other block in write(), or take the
 * other's wake-ups away; MSG_DONTWAIT is the call's own, and who fills or breaks his bell deafens nobody
 * else.
 *
 * A unix socket can carry descriptors, and the last close() of one that lingers waits. So nothing can be sent
 * to the end that rings (the router has shut that direction down), and no descriptor to the end that hears
 * (SO_PASSRIGHTS, Linux 6.16). Before Linux 6.16 a bell is looked into before it is read: one with a
 * descriptor in it is never read, and never closed either.
 *
 * A mapping stays readable and writable memory when its arena goes (an anonymous one takes its place),
 * because waiters look at rings without a lock. Only what happens under a flow's lock, after the generation
 * was compared, means anything.
 */
#ifndef FREEFLOW_ARENA_H
#define FREEFLOW_ARENA_H

#include "family.h"
#include "ring.h"

struct end;

/* A process's own part of an arena. */
struct mapping {
        unsigned char *_Atomic base;
        _Atomic uint32_t
            shift; /* log2 of a ring's size; what the arena says about itself isn't believed twice */
        _Atomic bool remote; /* side 1 is the relay */
        _Atomic uint64_t id;
        _Atomic int32_t memfd; /* 1 + descriptor of a local arena's file */
        _Atomic uint64_t inode;
        _Atomic bool unreachable;            /* bells can't be had from the router, or have been lost */
        _Atomic uint32_t unreachable_since;     /* of a remote arena: ticks() | 1 */
        _Atomic uint32_t ordered;     /* bells that the router has been asked for and hasn't sent */
        _Atomic uint32_t ordered_at;  /* ticks() */
        _Atomic uint32_t fetches;     /* of the other side's bells, less what time has taken off */
        _Atomic uint32_t fetched_at;  /* ticks() */
        _Atomic uint32_t kept;        /* of the other side's bells */
        _Atomic uint32_t attached;    /* connections that the arena has */
        _Atomic int32_t bells[BELLS]; /* 1 + receiving end of ours */
        _Atomic int32_t peers[BELLS]; /* 1 + sending end of the other side's */
        _Atomic uint32_t
            armed[BELLS]; /* of epoll instances: rings there may have been since it was emptied */
        _Atomic uint64_t idle[BELL_WORDS]; /* bells of ours that no thread waits with */
        _Atomic uint32_t slots[SLOTS];     /* 1 + number of the end in the slot */
};

struct mapping *mapping_of(uint32_t arena);

static inline struct arena *arena_header(const struct mapping *mapping)
{
        return (struct arena *)atomic_load_explicit(&mapping->base, memory_order_acquire);
}

/* The ring of a direction in a slot. */
static inline struct view arena_view(uint32_t arena, uint32_t slot, uint32_t direction)
{
        const struct mapping *mapping = mapping_of(arena);
        unsigned char *base = (unsigned char *)arena_header(mapping);
        uint32_t shift = atomic_load_explicit(&mapping->shift, memory_order_relaxed);
        size_t number = (size_t)slot * SIDES + direction;

        return view_of((struct ring *)(base + SLOT_OFFSET + number * PAGE),
                       base + BULK_OFFSET + (number << shift), shift);
}

/* The rings of an attached end: the one it sends into, and the one it receives from. */
struct view end_sends(const struct end *end);
struct view end_receives(const struct end *end);

/* Of an attached end: its peer is on another host. */
static inline bool end_is_remote(const struct end *end)
{
        return atomic_load_explicit(
            &mapping_of(atomic_load_explicit(&end->arena, memory_order_relaxed))->remote,
            memory_order_relaxed);
}

/* Take what the router granted. Returns a reason, 0 if the end is attached. `memfd` stays the caller's;
 * `hears` is bell 0 or -1, and becomes -1 if it is kept. */
uint32_t arena_attach(struct end *end, uint64_t id, uint64_t token, uint32_t side, uint32_t slot,
                      uint64_t incarnation, int memfd, int *hears);
/* The end is done with its slot, if it has one. */
void arena_release(struct end *end);
/* Copy bytes of a ring from its file instead of its mapping. False: the file can't be read. */
bool arena_copy(const struct end *end, const unsigned char *place, unsigned char *to, size_t size);
void arena_forked(void);
/* Close what this process has of bells. */
void arena_retire(void);

/* A bell for one wait of a thread, or one that an epoll instance keeps; -1: there is none now. */
int bell_take(uint32_t arena);
/* The same, and one more is ordered if there is none, whatever others have ordered. */
int bell_take_or_order(uint32_t arena);
/* After they had none: is one under way from the router? */
bool bell_is_ordered(uint32_t arena);
/* What the router has sent: an end of a bell, -1 if there is none to be had. Kept ones become -1. */
void bell_received(uint64_t id, uint32_t side, uint32_t bell, int *fd);
void bell_ringer_received(uint64_t id, uint32_t side, uint32_t bell, int *fd);
/* Close a descriptor that the router has sent and nobody wants. */
void bell_discard(int fd);
void bell_return(uint32_t arena, int bell);
int bell_descriptor(uint32_t arena, int bell);
/* Has the other side said that it can ring it? */
bool bell_is_known(uint32_t arena, uint32_t side, int bell);
/* Take the bytes out of a bell that rings. False: it isn't to be heard any more. */
bool bell_drain(uint32_t arena, int bell);
/* For who naps because he has no bell: a remote arena that has been deaf for long is broken. */
void arena_break_if_unreachable(uint32_t arena);

/* Say that this bell's waiter is about to sleep. The caller looks at the ring once more afterwards. */
static inline void wait_begin(struct waiters *waiters, int bell)
{
        atomic_fetch_or_explicit(&waiters->bells[bell / 64], UINT64_C(1) << (bell % 64),
                                 memory_order_relaxed);
        atomic_store_explicit(&waiters->any, 1, memory_order_relaxed);
        /* Pairs with wake(): either it sees `any`, or we see what it published. */
        atomic_thread_fence(memory_order_seq_cst);
}

static inline void wait_end(struct waiters *waiters, int bell)
{
        atomic_fetch_and_explicit(&waiters->bells[bell / 64], ~(UINT64_C(1) << (bell % 64)),
                                  memory_order_relaxed);
}

void ring_bells(struct waiters *waiters, const struct end *end);

/* Something was published in a ring of this end for those who wait here. */
static inline void wake(struct waiters *waiters, const struct end *end)
{
        atomic_thread_fence(memory_order_seq_cst);
        if (__builtin_expect(atomic_load_explicit(&waiters->any, memory_order_relaxed) != 0, 0))
                ring_bells(waiters, end);
}

/* Descriptors of the library's own: above where programs look, and closed on exec. Takes over `fd`; -1 if it
 * can't. */
int own_descriptor(int fd);
bool is_own_descriptor(int fd);
/* One of them has been closed by a call that nobody stands in front of: find the others that have. Their
 * numbers may be given again, to us or to the program. */
void own_lost(void);
/* Close an own descriptor. */
void close_own(int fd);
/* Call `visit` with each open descriptor of the process from `first` on, and what it is a link to, until it
 * returns false.
 */
enum visited { VISITED_ALL, VISITED_SOME, VISITED_NONE };
enum visited each_descriptor(int first, bool (*visit)(int fd, const char *link));

#endif
