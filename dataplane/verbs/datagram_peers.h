/* The rings by which datagrams come and go: one slot for each two processes and each two GIDs.
 *
 * The router gives a slot to both processes once one of them has a datagram for a queue pair of the
 * other one. It serves all queue pairs of the two. What one process sends to itself is in a ring of
 * its own, which nobody else knows.
 *
 *      FREE --a datagram--> ASKED --peer_up()--> UP --peer_end()--> FREE
 *                             |  ^                |
 *                             v  |                | returned
 *             refused, or   NOBODY, for a while <-+
 *             no answer
 *
 * The rings of a slot between hosts show when it has ended. It is not used any more then, and the
 * next datagram asks for another one. A process that has too many slots returns those that it has
 * not asked for. What is sent to it is lost then, and it is asked again after a while.
 *
 * No datagram waits for long. It waits for a moment while its peer is asked for, and while the
 * peer's ring is full. After that datagrams are lost until the peer is there, or takes some.
 *
 * The payload of a record to one queue pair is the message. To a group (DATAGRAM_GROUP), the
 * group's GID is in front of it. In the process's own ring both GIDs are, whatever it is for.
 *
 * A place of the table is never freed, only used again. Mutexes, in this order: `receiving` of a
 * peer, those of queue pairs, that of the table, `sending` of a peer. What a peer is changes under
 * all three.
 */
#ifndef FREEFLOW_DATAGRAM_PEERS_H
#define FREEFLOW_DATAGRAM_PEERS_H

#include "../library/place.h"
#include "../library/waiters.h"
#include "mutex.h"
#include "port.h"
#include "record.h"
#include "verb.h"

enum {
        MOST_DATAGRAM_PEERS = 1024,
        DATAGRAM_GROUP = 0xffffff, /* the number of the queue pairs of a group */
        DATAGRAM_MESSAGE = 4096,   /* bytes */
        DATAGRAM_PARTS = MOST_PIECES + 1,
};

_Static_assert(RECORD_DATAGRAM_BYTES == DATAGRAM_MESSAGE + 2 * sizeof(union ibv_gid),
               "a message, with GIDs in front");

enum datagram_state { PEER_FREE, PEER_ASKED, PEER_NOBODY, PEER_UP };

struct queue_pair;

struct datagram_peer {
        _Atomic uint32_t state; /* enum datagram_state */
        union ibv_gid from, to; /* this side, the other side */
        uint32_t first, count;  /* the other side's queue pairs; before it is UP the one that is wanted */
        uint32_t number;        /* the router's, of the slot */
        uint32_t epoch;         /* of its socket */
        struct place place;
        uint32_t index;   /* in the table */
        _Atomic int bell; /* of whoever waits for its arena; -1: nobody can */
        /* Hints, without a mutex: the rings, and up to where the one that comes in was taken. */
        struct ring *_Atomic in, *_Atomic out;
        _Atomic uint64_t seen;
        _Atomic bool relayed; /* the other side is on another host */
        _Atomic bool crowded; /* a datagram waits for room, and the bell rings if there is some */

        /* Of the table: */
        uint32_t request; /* the number of what is asked for */
        bool refused;     /* the router has answered, though there may be one in a moment */
        uint64_t since;   /* ns: when it was asked for, or refused, or became NOBODY or UP */
        uint64_t again;   /* ns: when to ask again */
        bool unasked;     /* UP: the slot's */

        struct mutex sending;
        struct record_sender sender;
        uint64_t full_since;  /* ns; 0: there was room */
        uint64_t waited;      /* ns, since the ring was empty, or the other side took half of one */
        uint64_t waited_from; /* where the other side was then */

        struct mutex receiving;
        struct record_receiver receiver;
};

/* A datagram that is sent. */
struct datagram {
        union ibv_gid from, to;
        uint32_t from_number, to_number;
        uint32_t key; /* Q_Key */
        uint32_t immediate;
        uint8_t flags; /* enum record_flag */
        bool awaits;   /* room, asleep */
        const struct iovec *message;
        uint32_t length;
};

enum datagram_outcome {
        DATAGRAM_DONE, /* it is on its way, or lost */
        DATAGRAM_WAIT,
};

/* What the router says of a slot. */
struct datagram_slot {
        union ibv_gid from, to;
        uint32_t first, count, number, epoch;
        bool unasked; /* the other process alone has asked for it */
        const struct place *place;
        int bell;
        struct view out, in;
};

/* What gives slots: pair.h. */
struct datagram_router {
        /* A queue pair of this process, `number`, has a datagram for one of somebody else. */
        void (*seek)(const union ibv_gid *from, const union ibv_gid *to, uint32_t number, uint32_t wanted,
                     uint32_t request);
        /* A queue pair is in a group, or no more. */
        void (*join)(const struct queue_pair *queue, const union ibv_gid *group, bool on);
        /* Of its socket: another one is asked again. */
        uint32_t (*epoch)(void);
        /* Something was published in a ring, for those who wait there. */
        void (*ring)(struct datagram_peer *peer, struct waiters *waiters);
        /* The slot with this number has ended. */
        void (*end)(struct datagram_peer *peer, uint32_t number);
};

extern const struct datagram_router *datagram_router;
extern struct datagram_peer *_Atomic datagram_peers[MOST_DATAGRAM_PEERS];
extern _Atomic uint32_t datagram_peer_count; /* places that have been used */

static inline enum datagram_state peer_state(const struct datagram_peer *peer)
{
        return (enum datagram_state)atomic_load_explicit(&peer->state, memory_order_acquire);
}

/* Do the rings say that nobody is at the other side any more? */
static inline bool peer_is_over(const struct datagram_peer *peer)
{
        const struct ring *in = atomic_load_explicit(&peer->in, memory_order_acquire);

        return in && atomic_load_explicit(&peer->relayed, memory_order_relaxed) &&
               (atomic_load_explicit(&in->broken, memory_order_acquire) ||
                atomic_load_explicit(&in->over, memory_order_acquire));
}

/* Has the process on the other host not taken the slot? */
static inline bool peer_is_unused(const struct datagram_peer *peer)
{
        const struct ring *out = atomic_load_explicit(&peer->out, memory_order_acquire);

        return out && atomic_load_explicit(&peer->relayed, memory_order_relaxed) &&
               !atomic_load_explicit(&out->ready, memory_order_acquire);
}

/* Send to whoever has the queue pair; asks for it if nobody is known. */
enum datagram_outcome peers_send(const struct datagram *datagram);
/* Send to this process. */
enum datagram_outcome peers_send_here(const struct datagram *datagram);
/* Send to the peer with this slot, if there still is one. */
enum datagram_outcome peers_send_to(uint32_t number, uint32_t epoch, const struct datagram *datagram);
/* Does the peer with this slot wait for its process on another host, which has not got it yet? */
bool peer_starts(uint32_t number, uint32_t epoch);
/* The number of a request. */
uint32_t peer_request(void);
/* The process itself; NULL: it has sent itself nothing. */
struct datagram_peer *peer_own(void);
/* Is a slot to be used that the router has given? Of those that only other processes have asked
 * for, this one has `most_unasked` at most. */
bool peer_may_come(const struct datagram_slot *slot, uint64_t most_unasked);
/* The router has given a slot. NULL: there is no room for it. */
struct datagram_peer *peer_up(const struct datagram_slot *slot);
/* The router knows nobody with the queue pair that was asked for; `later`: there may be in a
 * moment. */
void peer_refused(uint32_t request, bool later);
/* Who has the slot with this number; NULL: nobody. */
struct datagram_peer *peer_with(uint32_t number, uint32_t epoch);
/* Another one that is for the same queue pairs, from a router before; NULL: there is none. */
struct datagram_peer *peer_before(const struct datagram_slot *slot);
/* Under `receiving`: its rings are used no more. `returned`: nor has the other side used them. */
void peer_end(struct datagram_peer *peer, bool returned);
/* In a child of fork(): there are none. */
void peers_forget(void);

#endif
