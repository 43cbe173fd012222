/* What connections of rdma_cm are made of.
 *
 * librdmacm writes the commands of the kernel's user interface (rdma/rdma_user_cm.h, version 4) to
 * /dev/infiniband/rdma_cm, and reads events by one of these commands. Here that file is an eventfd,
 * and the library executes what is written to it. An id is rdma_cm's name for a listener, or for a
 * connection, also before it is made.
 *
 * What a program may do in which state, and what its peer is told, is as in the kernel's
 * drivers/infiniband/core/{ucma,cma,cm}.c, for a device with RoCE.
 *
 * One mutex guards it all: connections are made and ended seldom.
 */
#ifndef FREEFLOW_CM_H
#define FREEFLOW_CM_H

#include "cm_address.h"

#include "../library/verbs_protocol.h"

#include <rdma/rdma_user_cm.h>

enum {
        CM_IDS = 65536, /* librdmacm's table has no more */
        CM_GROUPS = 4096,
        CM_BACKLOG = 1024,
        CM_UDP_QKEY = 0x01234567,
        /* Reasons of a rejection, as InfiniBand numbers them. */
        CM_REJECT_TIMEOUT = 4,
        CM_REJECT_NO_SERVICE = 8,
        CM_REJECT_BY_PROGRAM = 28,
        /* Those of datagrams. */
        CM_RESOLVE_UNSUPPORTED = 1,
        CM_RESOLVE_REJECTED = 2,
};

/* Events, as enum rdma_cm_event_type of librdmacm numbers them. */
enum {
        CM_EVENT_ADDRESS_RESOLVED = 0,
        CM_EVENT_ADDRESS_ERROR = 1,
        CM_EVENT_ROUTE_RESOLVED = 2,
        CM_EVENT_REQUEST = 4,
        CM_EVENT_REPLY = 5,
        CM_EVENT_UNREACHABLE = 7,
        CM_EVENT_REJECTED = 8,
        CM_EVENT_ESTABLISHED = 9,
        CM_EVENT_DISCONNECTED = 10,
        CM_EVENT_JOINED = 12,
        CM_EVENT_LATE_OVER = 15, /* TIMEWAIT_EXIT */
};

/* What an event channel's descriptor stands for. */
struct cm_file {
        struct cm_file *next;
        uint32_t generation;  /* cm_table.h */
        int fd;               /* one of its descriptors */
        uint32_t descriptors; /* and those that are duplicates */
        struct cm_event *first, **last;
};

struct cm_event {
        struct cm_event *next;
        struct cm_id *owner;    /* whose events_reported counts it */
        struct cm_group *group; /* likewise; NULL: it is about none */
        struct cm_id *asking;   /* of a request: the new id, until the program has seen it */
        struct rdma_ucm_event_resp said;
};

/* What a program may do: as enum rdma_cm_state in cma.c. */
enum cm_state {
        CM_IDLE,
        CM_BOUND,
        CM_ADDRESS_RESOLVED,
        CM_ROUTE_RESOLVED,
        CM_CONNECT, /* until it is disconnected */
        CM_DISCONNECT,
        CM_LISTEN,
};

/* How far a connection is: as enum ib_cm_state. */
enum cm_stage {
        CM_NONE,
        CM_REQUESTED,   /* a request was sent */
        CM_ASKED,       /* a request has come */
        CM_REPLIED,     /* it was accepted */
        CM_ANSWERED,    /* the peer has accepted */
        CM_ESTABLISHED, /* both know */
        CM_LEAVING,     /* it was disconnected here */
        CM_LEFT,        /* it was disconnected by the peer */
        CM_WAITING,     /* both know, and late packets may be under way */
        CM_RESOLVING,   /* of datagrams, as CM_REQUESTED */
        CM_RESOLVE_ASKED,
        CM_ENDED,
};

/* What a peer says of itself. */
struct cm_peer {
        union ibv_gid gid;
        uint32_t qpn, psn;
};

struct cm_id {
        uint32_t number;      /* for the router and peers */
        uint32_t place;       /* for the program: its index in the table */
        struct cm_file *file; /* NULL: the program hasn't read the event that brings it */
        uint64_t uid;         /* 0: the program is told nothing */
        uint32_t events_reported;
        enum cm_state state;
        enum cm_stage stage;
        uint16_t space; /* RDMA_PS_* */
        uint8_t type;   /* enum ibv_qp_type */
        uint8_t type_of_service, timeout;
        bool reuse, only_family, timeout_set;
        bool registered;  /* with the router, which has its port */
        bool asks;        /* the router hasn't answered that yet */
        uint32_t told_by; /* the epoch of the router's socket by which it knows of this */
        int refused;      /* a negative errno that the router's answer came to */
        union cm_address source, target;
        int gid; /* the place of `source` in the port's table; -1: no device yet */
        uint32_t backlog;
        uint32_t qkey;
        /* Of a connection. */
        uint32_t connection; /* the router's number of it; 0: unknown */
        bool answers;        /* the peer has asked */
        struct cm_peer peer;
        uint32_t qpn, psn;
        uint8_t responder_resources, initiator_depth, retry, rnr_retry;
        /* Something is to be done then; 0: nothing. In ms. */
        uint64_t deadline;
        uint32_t tries;
        struct v_connection *sent; /* what is sent again until then */
        uint64_t patient_until;    /* that nobody listens may be so for a moment only, in ms */
        uint32_t pause;            /* ms: until it is asked for again */
};

/* A multicast group of an id. */
struct cm_group {
        struct cm_id *id;
        uint32_t place;
        uint32_t events_reported;
        uint64_t uid;
        union cm_address address;
};

#endif
