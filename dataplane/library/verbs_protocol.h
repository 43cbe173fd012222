/* The messages of verbs between the library and the router, on the same socket as those of
 * protocol.h and by the same rules. The router knows by the socket which container and which
 * process asks: a number of a queue pair or a connection is checked to be the asker's own.
 *
 *      library                                router
 *      V_OPEN version                 ->      answered at once, and again when the answer changes
 *                                     <-       V_DEVICE one for each GID, or one without any
 *      V_QUEUE_PAIR request           ->      answered once the other side has asked for this one
 *                                     <-       V_GRANT arena, slot + memfd, as GRANT; RELEASE gives it back
 *                                     <-       V_REFUSE reason: never; or no more, REASON_PEER_CLOSED: the
 *                                                peer's queue pair has ended, whatever is in the rings
 *      V_QUEUE_PAIR_END               ->       the queue pair is reset or destroyed; no answer. A slot
 *                                                that it was granted is released
 *      V_DATAGRAMS open or closed     ->       datagrams may come to this queue pair; no answer
 *      V_DATAGRAM_PEER                ->      datagrams are to go to a queue pair of a GID
 *                                     <-       V_GRANT, to both processes, or V_REFUSE. One slot is for
 *                                                all that two processes send from one GID to another
 *                                     <-       V_REFUSE of V_GRANT: the slot has ended, release it
 *      V_DATAGRAM_PEER of a group     ->
 *                                     <-       V_GROUP for each process with members, after its V_GRANT
 *                                                if it is new; at last one with number 0. Later others,
 *                                                as processes join and leave
 *      V_GROUP join or leave          ->       a multicast group; no answer but V_REFUSE
 *      V_LISTEN                       ->      a port, for an id that is bound, or listens
 *                                     <-       V_LISTENING port, or V_REFUSE, REASON_SHARED: another has it
 *      V_LISTEN_END                   ->       no answer
 *      V_CONNECTION step              ->       passed on to the process at the other end, or V_REFUSE
 *                                     <-       V_CONNECTION step, from there, or what it would say if it
 *                                                were there
 *      V_STATUS                       ->       for lists; no answer
 *      V_MEMORY bytes                 ->       a file for registered memory, which peers may map
 *                                     <-       V_MEMORY_MADE number, token + memfd, or V_REFUSE
 *      V_MEMORY_MAPPED number         ->       the process has mapped a file that peers may only read: nobody
 *                                                else can map it to write there, and now they get it;
 *                                                no answer
 *      V_MEMORY_END number            ->       nobody gets it any more; no answer
 *      V_REACH number, token          ->       a file of the peer of a queue pair
 *                                     <-       V_REACHED + memfd, or V_REFUSE
 */
#ifndef FREEFLOW_VERBS_PROTOCOL_H
#define FREEFLOW_VERBS_PROTOCOL_H

#include "protocol.h"

enum {
        VERBS_VERSION = 1,
        VERBS_PRIVATE = 256, /* bytes of private data of a connection, at most */
};

enum verbs_kind {
        V_OPEN = 32,
        V_DEVICE = 33,
        V_QUEUE_PAIR = 34,
        V_GRANT = 35,
        V_REFUSE = 36,
        V_QUEUE_PAIR_END = 37,
        V_DATAGRAMS = 38,
        V_DATAGRAM_PEER = 39,
        V_GROUP = 40,
        V_LISTEN = 41,
        V_LISTENING = 42,
        V_LISTEN_END = 43,
        V_CONNECTION = 44,
        V_STATUS = 45,
        V_MEMORY = 46,
        V_MEMORY_MADE = 47,
        V_MEMORY_MAPPED = 48,
        V_MEMORY_END = 49,
        V_REACH = 50,
        V_REACHED = 51,
        /* 52: reserved */
};

enum verbs_slot { V_SLOT_CONNECTED = 1, V_SLOT_DATAGRAMS = 2 };

enum verbs_step {
        V_STEP_REQUEST = 1,
        V_STEP_REPLY = 2,
        V_STEP_READY = 3,
        V_STEP_REJECT = 4,
        V_STEP_DISCONNECT = 5,
        V_STEP_DISCONNECTED = 6,
        V_STEP_RESOLVE = 7, /* of datagrams: which queue pair and Q_Key */
        V_STEP_RESOLVED = 8,
        V_STEP_RESUME = 9, /* made by an earlier router; only an end of the peer is of interest */
};

/* A GID as verbs have it: an IPv4 address as ::ffff:a.b.c.d. */
struct verbs_gid {
        uint8_t bytes[16];
};

/* The first message of verbs, to a router whose WELCOME says that it knows this version. */
struct v_open {
        struct message message;
        uint32_t version;
        uint32_t qpn_first; /* of the numbers that an earlier router gave the process; 0: none */
};

struct v_device {
        struct message message;
        uint32_t index;                /* of the GID */
        uint32_t count;                /* of GIDs; 0: there is no device */
        uint32_t qpn_first, qpn_count; /* numbers that the process may give to queue pairs */
        uint32_t queue_pairs, regions; /* limits */
        uint32_t direct;               /* 1: direct memory is allowed */
        uint64_t guid;
        uint64_t direct_bytes;
        struct verbs_gid gid; /* 0: the container has this address no more */
};

struct v_queue_pair {
        struct message message;
        uint32_t request; /* the library's number of it, which answers repeat */
        uint32_t qpn, peer_qpn;
        uint32_t gid_index;
        uint32_t type;   /* enum ibv_qp_type */
        uint32_t paired; /* 1: by an earlier router; only an end of the peer is of interest */
        struct verbs_gid peer_gid;
};

struct v_grant {
        struct message message;
        uint32_t request;       /* of V_SLOT_DATAGRAMS: 0 if the other process has asked */
        uint32_t qpn, peer_qpn; /* of V_SLOT_DATAGRAMS: 0, and the first of the peer's numbers */
        uint32_t slot_kind;     /* enum verbs_slot */
        uint32_t side;
        uint32_t slot;
        uint32_t gid_index;
        uint64_t arena;
        uint64_t incarnation;
        uint64_t token;
        struct verbs_gid peer_gid;
        uint32_t peer_count; /* of V_SLOT_DATAGRAMS: how many numbers the peer has */
        uint32_t number;     /* of V_SLOT_DATAGRAMS: the router's number of the slot; never 0; else 1 if
                              * the peer knows direct memory and the network allows it */
};

struct v_refuse {
        struct message message;
        uint32_t kind;    /* of the message that is refused */
        uint32_t request; /* of a queue pair, or of V_DATAGRAM_PEER; else 0 */
        uint32_t number;  /* the queue pair that was asked for or with; of V_GRANT, the slot's number;
                           * of V_LISTEN and V_CONNECTION, the id */
        uint32_t reason;  /* enum reason */
};

/* V_QUEUE_PAIR_END, V_LISTEN_END. */
struct v_end {
        struct message message;
        uint32_t number;
};

/* V_DATAGRAMS, V_DATAGRAM_PEER, V_GROUP. */
struct v_datagrams {
        struct message message;
        uint32_t request;     /* V_DATAGRAM_PEER: the library's number of it, which answers repeat */
        uint32_t qpn;         /* of the process's own queue pair; 0 from the router */
        uint32_t gid_index;   /* its own; of no meaning in V_DATAGRAMS */
        uint32_t peer_qpn;    /* V_DATAGRAM_PEER; of no meaning for a group */
        uint32_t on;          /* 1: open, join, send to; 0: closed, leave, send no more (of a group) */
        uint32_t number;      /* from the router: of the slot; 0: these were all */
        struct verbs_gid gid; /* V_DATAGRAM_PEER, V_GROUP: of the peer or the group */
};

/* V_LISTEN, V_LISTENING. */
struct v_listen {
        struct message message;
        uint32_t id;
        uint32_t space;       /* the port space of rdma_cm */
        uint32_t port;        /* V_LISTEN: 0: any */
        uint32_t backlog;     /* 0: it is bound so far; V_LISTEN comes again when it listens */
        uint32_t reuse;       /* 1: others that say so may be bound to the port, as long as none listens */
        struct verbs_gid gid; /* 0: all of the container's; ::ffff:0.0.0.0: all of IPv4; ::1: of IPv6 */
};

struct v_connection {
        struct message message;
        uint32_t step;       /* enum verbs_step */
        uint32_t id;         /* of this end; the listener, where a request comes; 0: not known yet */
        uint32_t connection; /* the router's number of it, at both ends; 0: who asks doesn't know it */
        uint32_t gid_index;  /* of this end */
        uint32_t space;
        uint32_t port;      /* of the listener */
        uint32_t from_port; /* of who asks; V_STEP_REQUEST and V_STEP_RESOLVE */
        uint32_t qpn;
        uint32_t type; /* enum ibv_qp_type */
        uint32_t psn;
        uint32_t qkey;
        uint32_t reject; /* V_STEP_REJECT, V_STEP_RESOLVED: the reason, as InfiniBand numbers it */
        uint8_t responder_resources;
        uint8_t initiator_depth;
        uint8_t flow_control;
        uint8_t retry;
        uint8_t rnr_retry;
        uint8_t srq;
        uint16_t private_size;
        struct verbs_gid peer_gid; /* of the other end */
        uint8_t private_data[VERBS_PRIVATE];
};

/* V_MEMORY, V_MEMORY_MADE, V_MEMORY_MAPPED, V_MEMORY_END, V_REACH, V_REACHED. What a message does
 * not need is 0. */
struct v_memory {
        struct message message;
        uint32_t request;  /* V_MEMORY, V_REACH: the library's number of it, which answers repeat */
        uint32_t qpn;      /* V_REACH: the process's own queue pair */
        uint32_t writable; /* V_MEMORY, V_REACHED: 1: peers can map it to write there */
        uint64_t bytes;    /* V_MEMORY: a multiple of a page */
        uint64_t memory;   /* the router's number; never 0 */
        uint64_t token;    /* V_MEMORY_MADE, V_REACH: whoever has it may reach the file */
};

struct v_status {
        struct message message;
        uint32_t qpn;
        uint32_t state; /* enum ibv_qp_state */
        uint32_t moved; /* 1: the relays' device has executed some for it */
        uint64_t operations;
        uint64_t bytes;
};

#endif
