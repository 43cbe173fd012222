/* The messages between the library and the router, over a SOCK_SEQPACKET unix socket: one message
 * per packet, all integers in the host's order, sizes fixed. A message of another size or kind ends
 * the connection; the library then stays on TCP and tries again later. The router tells a library
 * of another version by a WELCOME that switches it off.
 *
 * Only the router sends descriptors. The receiver of a descriptor may have to do its last close(),
 * which can wait for as long as the sender likes, so the router takes none from a container.
 *
 * The router identifies a process by the kernel's word, never by a message. A process has one
 * socket. A child of fork opens its own, and proves by the arena's token that it inherited the
 * arena.
 *
 *      library                                router
 *      HELLO version                  ->
 *                                     <-       WELCOME settings
 *      REQUEST connection             ->       answered once both ends have sent theirs
 *                                     <-       GRANT arena, slot + memfd; the first of an arena: + the
 *                                                receiving end of bell 0, and soon RING with the sending
 *                                                end of the other side's
 *                                     <-       REFUSE reason
 *      BELL arena, index              ->       make a bell of the library's side
 *                                     <-       HEAR arena, index + its receiving end; without: there is none
 *      FETCH arena, index             ->       ring a bell of the other side, and hand it out
 *                                     <-       RING arena, index + its sending end; without: not known
 *      RELEASE arena, slot            ->       this side is done with the slot; no answer
 *      NOTE connection, reason        ->       why a connection stays on TCP, for status; no answer
 */
#ifndef FREEFLOW_PROTOCOL_H
#define FREEFLOW_PROTOCOL_H

#include <stdint.h>

#define ROUTER_SOCKET "/run/freeflow/router.sock"
#define PROTOCOL_VERSION 2

enum kind {
        HELLO = 1,
        WELCOME = 2,
        REQUEST = 3,
        GRANT = 4,
        REFUSE = 5,
        BELL = 6,
        FETCH = 7,
        RING = 8,
        RELEASE = 9,
        NOTE = 10,
        HEAR = 11,
};

/* Why a connection is, or stays, on TCP. The names that people see are in
 * dataplane/router/reasons.py. */
enum reason {
        REASON_NONE = 0,
        REASON_OFF = 1,          /* acceleration is off for the network or the container */
        REASON_REMOTE = 2,       /* the peer is on another host */
        REASON_FOREIGN = 3,      /* the address isn't an endpoint of a freeflow network */
        REASON_LIMIT = 4,        /* a limit of the container is reached */
        REASON_NOT_FOUND = 5,    /* the kernel knows no such connection there */
        REASON_RAW = 6,          /* bytes bypassed the library: io_uring, raw system calls */
        REASON_STDIO = 7,        /* the C library's streams read or write it, or it is a standard stream */
        REASON_PASSED = 8,       /* handed to another process or program */
        REASON_OPTION = 9,       /* a socket option that rings can't carry */
        REASON_MEMORY = 11,      /* no address space, no memory or no descriptor in the process */
        REASON_CORRUPT = 12,     /* the other side wrote invalid words into the ring */
        REASON_PEER_CLOSED = 13, /* the other end has closed its side */
        REASON_SHARED = 14,      /* several processes hold this end */
        REASON_BROKEN = 15,      /* the RDMA path was lost */
        REASON_SANDBOX = 16,     /* the process confines itself to certain system calls */
};

struct message {
        uint16_t kind;
        uint16_t size; /* of the whole message */
};

struct hello {
        struct message message;
        uint32_t version;
        uint32_t layout_version;
        uint32_t unused;
        char build[32]; /* the library's build id, hexadecimal, 0-filled: for `freeflow doctor` */
};

struct welcome {
        struct message message;
        uint32_t version;
        uint32_t layout_version;
        uint32_t enabled;    /* 0: acceleration is off for this container */
        uint32_t operations; /* upgrade rule: all three of these are reached, or */
        uint32_t age;        /* microseconds since connect or accept */
        uint32_t bytes;      /* in both directions together */
        uint32_t bulk;       /* so many bytes at once are enough, whatever the rest */
        uint32_t spin;       /* microseconds */
        uint32_t ring_limit; /* bytes of a ring that may be used, at most RING_SIZE */
        uint32_t verbs;      /* version of verbs_protocol.h that the router knows; older ones: 0 */
};

/* An address as the kernel prints it: IPv4 in the first four bytes, IPv6 in all sixteen. Port in
 * host order.
 */
struct address {
        uint8_t bytes[16];
        uint16_t family; /* AF_INET or AF_INET6 */
        uint16_t port;
        uint32_t unused;
};

struct request {
        struct message message;
        uint32_t connection; /* the library's number of it, which the answer repeats */
        uint64_t cookie;     /* SO_COOKIE of the socket */
        struct address local;
        struct address remote;
};

struct grant {
        struct message message;
        uint32_t connection;
        uint64_t cookie;
        uint64_t arena;
        uint64_t incarnation; /* never 0, never the same twice in an arena */
        uint64_t token;       /* the side's secret; the same in all grants of the arena to this side */
        uint32_t side;
        uint32_t slot;
};

struct refuse {
        struct message message;
        uint32_t connection;
        uint64_t cookie;
        uint32_t reason;
        uint32_t passes; /* 1: the reason may be gone later, so it is worth another request */
};

struct bell {
        struct message message;
        uint32_t index;
        uint64_t arena;
        uint64_t token; /* of the library's side; HEAR, RING: 0 */
        uint32_t side;  /* whose bell it is: BELL and HEAR the library's own side, FETCH and RING the other */
        uint32_t unused;
};

struct release {
        struct message message;
        uint32_t slot;
        uint64_t arena;
        uint64_t incarnation;
        uint64_t token;
};

struct note {
        struct message message;
        uint32_t reason;
        uint64_t cookie;
};

#endif
