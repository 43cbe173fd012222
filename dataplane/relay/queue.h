/* A link as its connections see it: its state, its transport, and for each lane the sources that
 * have something to send (source.h). link.c alone changes the state.
 *
 *      NEW     it has a number
 *      MADE    it has a channel; the channel's address goes to the peer
 *      UP      the channel is connected
 *      DOWN    the channel is lost: connections wait until the link is made again or uses frames
 *      STREAM  it uses frames, which the routers carry, for the rest of its life
 *
 * A link has as many lanes as its transport. Each has its own order and its own grants, so one that
 * is stalled does not delay the others. What a relay sends about one connection is always on one
 * lane; it goes over to another only when the peer has received all of it (link.c).
 */
#ifndef FREEFLOW_RELAY_QUEUE_H
#define FREEFLOW_RELAY_QUEUE_H

#include "list.h"
#include "usage.h"

#include <stdint.h>

struct transport;

enum { LANES = 4 /* of one link, at most */ };

enum link_state { LINK_NEW, LINK_MADE, LINK_UP, LINK_DOWN, LINK_STREAM };

struct lane {
        struct link *link;
        struct node round;     /* of sources that have something to send: one part of each */
        struct node moving;    /* connections that wait until they may go over to another lane */
        struct reply *replies; /* that are owed to the peer */
        uint32_t reply_count;
        bool asks;          /* the peer's next grant is awaited: the next message says so */
        bool answers;       /* the peer awaits ours */
        bool moves;         /* messages use this lane now, and the next one says so */
        uint64_t sent;      /* messages */
        uint64_t allowed;   /* messages that we may have sent: the peer's last grant */
        uint64_t received;  /* messages */
        uint64_t granted;   /* messages that the peer may have sent: our last grant */
        uint64_t batch;     /* number of the last one */
        uint64_t completed; /* batches up to this one are complete */
};

struct link {
        struct node all;
        struct node mirrors;         /* its connections */
        struct node sources;         /* the same by process */
        struct node dropping;        /* connections that are dropped, and whose memory is not free yet */
        struct node movers;          /* moves.c: of connections of which bytes are on the way */
        struct node revoked;         /* moves.c: files that the peer's relay has not given back */
        struct node farewells, said; /* mirror.h: to be said, and said on this channel */
        unsigned farewell_count;
        uint32_t number;
        enum link_state state;
        bool connecting;                   /* R_CONNECTED is owed to the router */
        bool lost;                         /* it has been down: connections that go on count as resumed */
        const struct transport *named;     /* the one of R_LINK; NULL: there was none yet */
        const struct transport *transport; /* the one in use: `named`, or frames */
        void *channel;                     /* the transport's */
        struct lane lanes[LANES];
        uint64_t heard_at;     /* ns; while connections are dropped: when the peer sent a message */
        uint64_t asked_at;     /* ns: when the peer was asked, if it has sent nothing since; or 0 */
        unsigned message_lane; /* the lane of all connections that are not in bulk */
        /* of that lane */
        uint64_t check_at;     /* ns; 0: nothing is on the way */
        uint64_t checked;      /* messages sent at the last check */
        uint64_t acknowledged; /* bytes, at the last check that found more than the one before */
        uint64_t progress_at;  /* ns, when that was; 0: there was none */
        struct usage usage;
};

static inline bool link_is_live(const struct link *link)
{
        return link->state == LINK_UP || link->state == LINK_STREAM;
}

#endif
