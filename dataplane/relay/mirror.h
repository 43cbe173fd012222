/* One connection: a ring here that a process fills, and its mirror at the peer; and the reverse.
 *
 * Of direction 0, that the process here sends:
 *
 *      head <= acked <= sent <= tail       what the peer's process has taken; what its relay has made
 * readable; what has been given to the link; what the process has put
 *
 * Of direction 1, that the process here receives:
 *
 *      reported <= consumed <= got         the peer has heard that this is free; the process has taken it;
 * the process can have it
 *
 * Both rings of a direction have one size and the same `base`, so a byte lies at the same offset in both. The
 * peer's ring has room for all that is in ours: no receiver that doesn't read can make a relay wait.
 *
 *      LENT      registered, the peer's place isn't known: what the peer says is heard, nothing is said
 *      PAIRED    the peer's place is known: news go both ways
 *      BROKEN    bytes are lost, or somebody wrote nonsense: `broken` is set, and nothing moves any more
 *      DROPPING  the router has dropped it; the memory is lent until the peer has said that it writes no
 * more, and our own writes are complete, or the link is down
 *
 * Within PAIRED each direction ends by itself: `stopped` (the process can't or won't put more), then LEFT or
 * OVER is said with the last byte, then the peer has answered.
 *
 * A link that was lost and comes again: nothing is sent before the peer has said on the new one what it has
 * (`resync`). Bytes at and above that are written again, at the same place with the same contents, for the
 * ring keeps them until the peer's process has taken them.
 *
 * A mirror that has had no news for a while rests: bits in the ring ask the process to ring. It costs nothing
 * then but for reporting what its process has taken meanwhile (`lazy`), once in a while.
 */
#ifndef FREEFLOW_RELAY_MIRROR_H
#define FREEFLOW_RELAY_MIRROR_H

#include "arenas.h"
#include "link.h"

enum mirror_state { MIRROR_LENT, MIRROR_PAIRED, MIRROR_BROKEN, MIRROR_DROPPING };

struct mirror {
        struct node same;    /* in its hash bucket */
        struct node of_link; /* all of a link */
        struct node ready;   /* of the link: has something to say */
        struct node active;  /* is looked at in every turn */
        struct node lazy;    /* has taken bytes that the peer hasn't heard of */
        struct node leaving; /* waits for the process to stop */
        struct node ending;  /* of the link: dropped, and not free yet */
        uint32_t number, peer;
        uint64_t cookie, peer_cookie;
        struct link *link;
        struct shared *shared;
        uint32_t slot;
        uint32_t size;
        struct ring *out, *in; /* direction 0 and 1 */
        unsigned char *out_bulk, *in_bulk;
        enum mirror_state state;
        /* The transport's own. */
        const struct transport *lender;
        void *lent, *reached;
        uint64_t posted; /* last batch that reads our ring */
        uint32_t quiet;  /* turns without news */
        /* direction 0 */
        uint64_t tail, base, start, end, sent, acked, head;
        /* direction 1 */
        uint64_t got, in_base, in_start, in_end, consumed, reported;
        uint64_t leave_at, dropped_at; /* ns */
        uint32_t said, heard;          /* enum wire_flag: in the last block, and in all that came */
        bool news;                     /* a block is due, whatever else */
        bool report;                   /* `consumed` is due */
        bool resync;                   /* where to go on isn't known */
        bool in_ends;                  /* `in_end` is published */
        bool said_end;
        bool looks; /* the process here looks at direction 1 */
        bool broken;
        bool asked;              /* the process has asked for `leave` */
        bool leaves;             /* the router, or the relay's own end, wants both directions to stop */
        bool stopped;            /* nothing comes from the process any more */
        bool closed;             /* the end is gone here */
        bool muted;              /* the peer has dropped it: nothing is written any more */
        bool gone;               /* the peer writes no more */
        bool has_left, has_over; /* of direction 1: all is here */
        bool told_finished, told_ended, told_left;
};

void mirrors_start(void);
struct mirror *mirror_find(uint32_t number);
/* R_SLOT; NULL: it can't be, with a text. `place` is to be given to the peer. */
struct mirror *mirror_make(const struct relay_slot *slot, struct link *link, struct shared *shared,
                           struct wire_place *place, int32_t *error, char *text);
/* R_PAIR. errno. */
int mirror_pair(struct mirror *mirror, uint32_t peer, const struct wire_place *place, char *text);
void mirror_close(struct mirror *mirror);
void mirror_leave(struct mirror *mirror);
void mirror_drop(struct mirror *mirror, bool broken);
/* Its link or arena goes. It stays, broken, until it is dropped. */
void mirror_abandon(struct mirror *mirror);

/* Something may have happened in its rings. */
void mirror_wake(struct mirror *mirror);
/* The peer has said something. */
void mirror_heard(struct mirror *mirror, const struct wire_block *block);
/* The link is up (again). */
void mirror_resume(struct mirror *mirror);
/* The link is down. */
void mirror_suspend(struct mirror *mirror);
/* Can its bytes go over the device that is open? */
bool mirror_is_lent(const struct mirror *mirror);
/* A batch that may have been the last one is complete. May free it. */
void mirror_completed(struct mirror *mirror);
/* Has it something to say that it can say now? */
bool mirror_wants(const struct mirror *mirror);
/* Give what it has to the link, and say so in the block. */
void mirror_say(struct mirror *mirror, struct wire_block *block, uint64_t batch);

/* All that this transport was lent, which can't be reached by anybody any more. */
void mirrors_take_back(const struct transport *lender);
/* Look at all that are active. Did any have news? */
bool mirrors_look(void);
/* All active ones rest; false: one has news. */
bool mirrors_rest(void);
bool mirrors_active(void);
/* What is due by time. Returns when to come again, 0: nothing waits. */
uint64_t mirrors_beat(uint64_t present);
/* The relay ends: ask all to leave; have all left; break those that haven't. */
void mirrors_leave(void);
bool mirrors_left(void);
void mirrors_break(void);

#endif
