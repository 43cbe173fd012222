/* One connection: a ring here that a process fills and its mirror at the peer, and the reverse.
 *
 * Positions of direction 0, which the process here sends:
 *
 *      head <= acked <= sent <= tail
 *
 *      head      the peer's process has taken all below
 *      acked     the peer's process can read all below
 *      sent      all below was given to the link
 *      tail      the process here has written all below
 *
 * Positions of direction 1, which the process here receives:
 *
 *      reported <= consumed <= arrived
 *
 *      reported  the peer knows that all below is free
 *      consumed  the process here has taken all below
 *      arrived   the process here can read all below
 *
 * Both rings of a direction have one size and the same `base`, so a byte has the same offset in
 * both. The peer's ring has room for all that is in ours, so a receiver that does not read cannot
 * block a relay.
 *
 *      REGISTERED  the transport can reach the rings, but the peer's place is not known: messages
 *                  of the peer are handled, none is sent
 *      PAIRED      the peer's place is known: messages go both ways
 *      BROKEN      bytes are lost, or a process or peer wrote invalid data: `broken` is set in the
 *                  rings, and nothing moves any more
 *      DROPPING    the router has dropped it; the memory stays registered until the peer has
 *                  promised to write no more and our own writes are complete, or the link is down
 *
 * Within PAIRED each direction ends by itself: `stopped` (the process cannot or will not send
 * more), then LEFT or OVER is sent with the last byte, then the peer confirms.
 *
 * After a link was lost and made again, nothing is sent before the peer has reported over the new
 * channel what it has (`resync`). Bytes from there on are written again, to the same offsets with
 * the same contents: the ring keeps them until the peer's process has taken them.
 *
 * An idle mirror is not scanned. Bits in its rings ask the process to ring the relay's bell. It
 * costs nothing but the reports of what its process has taken meanwhile (`lazy`), at growing
 * intervals.
 */
#ifndef FREEFLOW_RELAY_MIRROR_H
#define FREEFLOW_RELAY_MIRROR_H

#include "arenas.h"
#include "source.h"
#include "transport.h"

enum mirror_state { MIRROR_REGISTERED, MIRROR_PAIRED, MIRROR_BROKEN, MIRROR_DROPPING };

struct mirror {
        struct node same;     /* in its hash bucket */
        struct node of_link;  /* in link->mirrors */
        struct node queued;   /* in the queue of its source's part of its lane: has something to send */
        struct node active;   /* in its source's active: scanned in every turn, or in every few */
        struct node lazy;     /* in mirrors.lazy: has taken bytes that the peer does not know of */
        struct node stopping; /* in mirrors.stopping: waits for the process to stop sending */
        struct node dropping; /* in link->dropping: dropped, and its memory is not free yet */
        uint32_t number, peer;
        uint64_t cookie, peer_cookie;
        struct link *link;
        struct source *source;
        struct shared *shared; /* NULL: the arena is gone */
        uint32_t slot;
        uint32_t group;        /* its arena's number, which outlives the arena */
        uint32_t size;         /* of a ring */
        struct ring *out, *in; /* direction 0 and 1 */
        unsigned char *out_bulk, *in_bulk;
        enum mirror_state state;
        const struct transport *transport; /* that has registered it */
        void *registration, *target;       /* the transport's */
        unsigned lane;                     /* of the link, for all that is sent about it */
        uint64_t last_batch;               /* the last one that reads our ring */
        uint64_t last_message;             /* the last one on its lane that is about it */
        uint32_t bulk_batches;             /* how clearly its direction 0 is in bulk (mirror_send.c) */
        bool bulk;                         /* it is: it has a lane apart from messages */
        uint32_t idle_turns;
        /* direction 0; `start` and `end` as in struct ring */
        uint64_t tail, base, start, end, sent, acked, head;
        /* direction 1 */
        uint64_t arrived, in_base, in_start, in_end, consumed, reported;
        struct moves *moves;           /* NULL: it has none */
        uint64_t moved;                /* bytes of moves that were given to the link */
        uint64_t stop_due, dropped_at; /* ns */
        uint32_t expired;              /* how often in a row R_EXPIRE found that it waits for the peer */
        uint32_t sent_flags;           /* enum wire_flag of the last block that was sent */
        uint32_t peer_flags;           /* enum wire_flag of all blocks that have come */
        bool queue_pair;               /* there is no TCP to fall back to */
        bool offers_moves;             /* the router and the transport allow them */
        bool knows_moves;              /* the process here does */
        bool block_due;                /* a block has to be sent even if nothing has changed */
        bool report_due;               /* `consumed` has to be sent */
        bool resync;                   /* the position to go on from is not known */
        bool end_sent;
        bool in_ended;           /* `in_end` is published in the ring */
        bool process_ready;      /* the process here reads direction 1 from the ring */
        bool broken;             /* its rings are marked as broken */
        bool stop_requested;     /* the process here wants the peer to fall back to TCP */
        bool leaves;             /* the router, or the relay's end, wants both directions on TCP */
        bool stopped;            /* the process sends no more */
        bool closed;             /* no process here has the connection's end any more */
        bool peer_dropped;       /* the peer has dropped it: nothing is sent any more */
        bool peer_gone;          /* the peer writes no more */
        bool has_left, has_over; /* direction 1: the peer has sent LEFT, OVER; all bytes are here */
        bool told_finished, told_ended, told_left; /* the router knows */
};

/* The last block about a connection that was released while the link didn't work: the peer has not
 * confirmed that it knows. It is said whenever the link works again, until the peer confirms it.
 * Otherwise the peer's end would wait for ever. */
struct farewell {
        struct node of_link; /* in link->farewells or link->said */
        struct node same;    /* those whose number is in the same bucket */
        struct link *link;
        struct wire_block block;
};

/* Lists that mirror_scan.c and mirror_end.c work on. */
struct mirrors {
        struct node active; /* sources with active connections */
        struct node lazy, stopping;
};

extern struct mirrors mirrors;

/* What moves.c does for connections that have `moves`. */
struct mirror_moves {
        void (*start)(struct mirror *mirror); /* both relays offer them */
        void (*end)(struct mirror *mirror);   /* it is released */
        /* The link is down; nothing of its channel reads or writes here any more. */
        void (*suspend)(struct mirror *mirror);
        /* It is broken: what is under way ends, as soon as the device reads it no more. */
        void (*interrupt)(struct mirror *mirror);
        bool (*have_work)(const struct mirror *mirror);
};

void mirrors_start(const struct mirror_moves *moves);
struct mirror *mirror_find(uint32_t number);
/* Calls `visit` for all connections in state PAIRED until it returns false; then returns false. */
bool mirrors_visit_paired(bool (*visit)(struct mirror *mirror));
/* R_SLOT. With an error, and a text, the connection exists all the same until it is dropped.
 * `place` is for the peer. */
struct mirror *mirror_add(const struct relay_slot *slot, struct link *link, struct shared *shared,
                          struct wire_place *place, int32_t *error, char *text);
/* R_PAIR; errno. */
int mirror_pair(struct mirror *mirror, uint32_t peer, const struct wire_place *place, char *text);
/* R_DROP; `broken`: with a reset of both ends. May free it. */
void mirror_drop(struct mirror *mirror, bool broken);
/* R_DISCARD: the arena goes. Its connections stay, broken, until they are dropped. */
void mirrors_abandon(struct shared *shared);
/* The peer confirms the farewell of a connection by its number and cookie. */
void mirror_confirm_farewell(struct link *link, uint32_t number, uint64_t cookie);
/* Frees it. */
void farewell_forget(struct farewell *farewell);
/* The link is down. */
void mirror_suspend(struct mirror *mirror);
/* The link is up, for the first time or again. */
void mirror_resume(struct mirror *mirror);
/* Can its bytes go over this transport? */
bool mirror_is_registered(const struct mirror *mirror, const struct transport *transport);
/* Deregisters all connections of a transport whose device is gone. */
void mirrors_deregister(const struct transport *transport);
/* Does the link still read its sending ring? */
bool mirror_is_read(const struct mirror *mirror);
/* Frees it if it is dropped, the peer can write into its memory no more, and nothing of ours is
 * read any more. */
void mirror_try_release(struct mirror *mirror);

/* The lane that it should be on. All that are not in bulk share one: the more blocks share a
 * message, and the more messages a system call, the less each costs. Only if that one is stalled
 * do they go over to another, as far as they can (link.c). */
unsigned mirror_wants_lane(const struct mirror *mirror);
/* The peer has received all that was sent about it. */
void mirror_set_lane(struct mirror *mirror, unsigned lane);

/* Scans it in the next turns: something may have happened in its rings. */
void mirror_activate(struct mirror *mirror);
/* Bytes are lost: both ends see a reset. */
void mirror_break(struct mirror *mirror);
/* A process or a peer wrote invalid data: as mirror_break(), and counted. */
void mirror_corrupt(struct mirror *mirror);
/* Tell the router, once, that the peer has all that was sent, or that nothing more comes. */
void mirror_tell_finished(struct mirror *mirror, enum relay_state state);
void mirror_tell_ended(struct mirror *mirror, enum relay_state state);

/* Is the relay no longer needed for this connection? */
static inline bool mirror_is_through(const struct mirror *m)
{
        return m->peer_flags & (WIRE_HAS_LEFT | WIRE_HAS_OVER) && (m->has_left || m->has_over);
}

static inline bool mirror_may_write(const struct mirror *m)
{
        return m->state == MIRROR_PAIRED && m->peer_flags & WIRE_READY && !(m->peer_flags & WIRE_CLOSED) &&
               !m->resync && !m->peer_dropped;
}

/* For its arena and its link. */
static inline void mirror_use(struct mirror *m, enum relay_usage_value value, uint64_t more)
{
        if (m->shared)
                usage_add(&m->shared->usage, value, more);
        usage_add(&m->link->usage, value, more);
}

/* Is it not to be served now? It stays active then, and is scanned again later. */
static inline bool mirror_rests(const struct mirror *m)
{
        return m->state == MIRROR_PAIRED && m->shared && arena_rests(m->shared);
}

/* It has something to send. False: the link is down. */
static inline bool mirror_enqueue(struct mirror *m)
{
        return source_enqueue(m->source, m->lane, &m->queued);
}

/* The flags of its next block. */
uint32_t mirror_flags(const struct mirror *mirror);
/* Has it something to send that can be sent now? */
bool mirror_has_work(const struct mirror *mirror);

#endif
