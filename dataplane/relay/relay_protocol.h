/* Messages between the router and its relay, over the SOCK_SEQPACKET socket that the relay has as
 * descriptor 3: one message per packet, integers in the host's order, sizes fixed except that
 * of R_FRAME. The router is trusted. A message of a wrong size or kind is a bug in one of the two:
 * the relay ends.
 *
 * The router numbers links, connections and arenas, and uses each number once in the life of a
 * relay. `address` and `place` are for the peer's relay (wire.h); the routers only carry them.
 *
 *      router                                 relay
 *      R_OPEN transport, device           ->  again: closes the transport's device and opens another
 *                                         <-  R_OPENED error, text, mtu
 *      R_LINK link, transport             ->  again: with a new channel, the old one is destroyed
 *                                         <-  R_LINKED link, error, text, address
 *      R_SOCKET link, index + socket      ->  no answer; before R_CONNECT: a TCP socket that is
 *                                             connected to the peer's relay
 *      R_CONNECT link, peer's address     ->
 *                                         <-  R_CONNECTED link, error, text
 *                                         <-  R_DOWN link, error, text: unasked; channel lost
 *      R_STREAM link                      ->  RDMA is gone for good on this link: use frames
 *      R_FRAME link, bytes                <-> for or from the peer's relay, over the session
 *      R_UNLINK link                      ->  no answer; connections that are left are reset
 *      R_EXPIRE link, count, user         ->  no answer. Link is down: connections, or queue pairs,
 *                                             that have waited for the peer at the last `count` of
 *                                             these are reset. It is up: the peer's relay has to
 *                                             say something soon, or the link is down
 *      R_ARENA arena + memfd, bell        ->  no answer; `bell`: receiving end of bell 0 of side 1
 *      R_BELL arena, index + bell         ->  no answer; sending end of a bell of side 0, which
 *                                             replaces an older one
 *      R_SHARE arena, share               ->  no answer; the relay works for the arena in that part
 *                                             of the time
 *      R_DISCARD arena                    ->  no answer; all its slots must be dropped
 *      R_FILE file, token, owner + memfd  ->  no answer; registered memory of a process, for moves
 *      R_FILE_END file                    ->  it is given up
 *                                         <-  R_FILE_ENDED file: neither relay can reach it any more
 *      R_SLOT connection, link,           ->
 *             arena, slot, user           <-  R_PLACED connection, error, text, place
 *      R_PAIR connection, peer's place    ->
 *                                         <-  R_PAIRED connection, error, text
 *      R_CLOSE connection                 ->  no process of this host has the connection any more
 *                                         <-  R_FINISHED connection, state: the peer has all bytes
 *                                         <-  R_ENDED connection, state: unasked; no more bytes
 *      R_LEAVE connection                 ->  both directions have to fall back to TCP; a queue
 *                                             pair breaks
 *                                         <-  R_LEFT connection: the relay is not needed any more
 *      R_DROP connection, state           ->  state RELAY_BROKEN: both ends see a reset
 *                                         <-  R_DROPPED connection: the slot may be used again
 *      R_COUNT                            ->
 *                                         <-  R_COUNTS counters, then R_USAGE arena or link,
 *                                             values: for each that has done something since the
 *                                             last R_COUNT
 *
 * Every R_SLOT is followed by one R_DROP, whatever the answer was. R_DROPPED comes when the peer
 * has promised to write no more, or the link is down. R_LEFT also comes unasked, when both
 * processes have ended their rings or the peer's router wants it. R_FINISHED, R_ENDED and R_LEFT
 * come once. A connection that breaks is reported by R_ENDED with RELAY_BROKEN, and by R_FINISHED
 * if it is closed.
 */
#ifndef FREEFLOW_RELAY_PROTOCOL_H
#define FREEFLOW_RELAY_PROTOCOL_H

#include <stddef.h>
#include <stdint.h>

#define RELAY_VERSION 7

enum {
        RELAY_SOCKET = 3,
        RELAY_TEXT = 96,     /* bytes of a text, 0-terminated */
        RELAY_WORDS = 128,   /* bytes of a place or an address */
        RELAY_FRAME = 60000, /* bytes of a frame */
        RELAY_COUNTERS = 28,
        RELAY_LINK_CONNECTIONS = 16384, /* of a link; routers make no more */
};

enum relay_kind {
        R_OPEN = 1,
        R_OPENED = 2,
        R_LINK = 3,
        R_LINKED = 4,
        R_CONNECT = 5,
        R_CONNECTED = 6,
        R_UNLINK = 7,
        R_ARENA = 8,
        R_BELL = 9,
        R_DISCARD = 10,
        R_SLOT = 11,
        R_PLACED = 12,
        R_PAIR = 13,
        R_PAIRED = 14,
        R_CLOSE = 15,
        R_FINISHED = 16,
        R_LEAVE = 17,
        R_LEFT = 18,
        R_DROP = 19,
        R_DROPPED = 20,
        R_FRAME = 21,
        R_STREAM = 22,
        R_COUNT = 23,
        R_COUNTS = 24,
        R_DOWN = 25,
        R_ENDED = 26,
        R_SOCKET = 27,
        R_USAGE = 28,
        R_EXPIRE = 29,
        R_SHARE = 30,
        R_FILE = 31,
        R_FILE_END = 32,
        R_FILE_ENDED = 33,
};

enum relay_transport {
        RELAY_VERBS = 1,
        RELAY_LOOPBACK = 2, /* relays of one machine, for tests (loopback.c) */
        RELAY_TCP = 3,      /* TCP connections, which the routers have made */
};

/* What is encrypted between two relays over TCP. The stricter of both relays' choices counts.
 * Messages of the relays are encrypted and authenticated always. */
enum relay_encryption {
        RELAY_ENCRYPT_NOTHING = 0,  /* no bytes of connections */
        RELAY_ENCRYPT_MESSAGES = 1, /* those of connections that are not in bulk */
        RELAY_ENCRYPT_ALL = 2,
};

/* How a connection ended. */
enum relay_state {
        RELAY_WHOLE = 0,  /* all bytes are delivered */
        RELAY_BROKEN = 1, /* bytes are lost: both ends see a reset */
};

struct relay_message {
        uint16_t kind;
        uint16_t size; /* of the whole message */
};

/* R_OPEN */
struct relay_open {
        struct relay_message message;
        char device[64]; /* verbs: its name; otherwise empty */
        uint8_t port;
        uint8_t version; /* RELAY_VERSION */
        uint16_t gid_index;
        uint32_t transport;
        uint32_t spin;       /* microseconds, as for libraries; 0: no spinning */
        uint32_t encryption; /* enum relay_encryption; for TCP */
};

/* R_OPENED */
struct relay_opened {
        struct relay_message message;
        int32_t error; /* errno; 0: the device is open */
        char text[RELAY_TEXT];
        uint32_t mtu;
};

/* R_LINK: a link and its transport; R_SOCKET: a link and the index of its socket;
 * R_UNLINK, R_STREAM: a link; R_CLOSE, R_LEAVE, R_LEFT, R_DROPPED: a connection; R_FINISHED,
 * R_ENDED, R_DROP: a connection and a state; R_COUNT: neither. */
struct relay_number {
        struct relay_message message;
        uint32_t number;
        uint32_t state;
};

/* R_CONNECTED, R_DOWN: a link; R_PAIRED: a connection */
struct relay_outcome {
        struct relay_message message;
        uint32_t number;
        int32_t error;
        char text[RELAY_TEXT];
        uint32_t received; /* R_DOWN: the peer's messages since the link came up; otherwise 0 */
};

/* R_LINKED: a link and its address; R_PLACED: a connection and its place */
struct relay_offer {
        struct relay_message message;
        uint32_t number;
        int32_t error;
        char text[RELAY_TEXT];
        uint16_t size;
        uint16_t unused;
        uint8_t words[RELAY_WORDS];
};

/* R_CONNECT: a link and the peer's address; R_PAIR: a connection, the peer's number of it and its
 * place */
struct relay_accept {
        struct relay_message message;
        uint32_t number;
        uint32_t peer; /* R_CONNECT: 0 */
        uint16_t size;
        uint16_t unused;
        uint8_t words[RELAY_WORDS];
};

/* R_ARENA: `value` is its size_of_ring; R_BELL: the index of the bell; R_SHARE: thousandths of the
 * time, 0: all of it; R_DISCARD: 0 */
struct relay_arena {
        struct relay_message message;
        uint32_t value;
        uint64_t arena;
        uint64_t owner; /* R_ARENA: number of its process; each has its share of the relay. Otherwise 0 */
};

/* Who uses a slot. */
enum relay_user {
        RELAY_CONNECTION = 0,
        /* A queue pair of verbs, which has no TCP connection: where one would have to fall back, it
         * breaks. */
        RELAY_QUEUE_PAIR = 1,
        /* The same, and the relays may move bytes between registered memory of both processes. */
        RELAY_MOVING_QUEUE_PAIR = 2,
};

/* R_FILE; R_FILE_END and R_FILE_ENDED: the number alone. */
struct relay_file {
        struct relay_message message;
        uint32_t writable; /* 1: peers may write there */
        uint64_t file;
        uint64_t token; /* whoever shows it may reach the file */
        uint64_t owner; /* as in struct relay_arena */
};

/* R_EXPIRE */
struct relay_expire {
        struct relay_message message;
        uint32_t link;
        uint16_t count;
        uint16_t user; /* enum relay_user */
};

/* R_SLOT */
struct relay_slot {
        struct relay_message message;
        uint32_t connection;
        uint32_t link;
        uint16_t slot;
        uint16_t user; /* enum relay_user */
        uint64_t arena;
        uint64_t incarnation;
};

/* R_FRAME: message.size says how many bytes there are */
struct relay_frame {
        struct relay_message message;
        uint32_t link;
        uint8_t data[];
};

/* R_COUNTS */
enum relay_counter {
        COUNT_CONNECTIONS, /* present */
        COUNT_BYTES_OUT,   /* of connections */
        COUNT_BYTES_IN,
        COUNT_MESSAGES_OUT, /* between relays */
        COUNT_MESSAGES_IN,
        COUNT_BLOCKS_OUT, /* parts of messages, about one connection each */
        COUNT_BLOCKS_IN,
        COUNT_WRITES,      /* RDMA WRITEs */
        COUNT_POSTS,       /* doorbells */
        COUNT_POLLS,       /* of a completion queue */
        COUNT_COMPLETIONS, /* entries of a completion queue */
        COUNT_CALLS,       /* system calls */
        COUNT_SLEEPS,
        COUNT_BELLS,  /* rung */
        COUNT_SPINS,  /* that found work */
        COUNT_COPIED, /* bytes that the processor has copied: none over RDMA */
        COUNT_FRAMES_OUT,
        COUNT_FRAMES_IN,
        COUNT_DOWNS,      /* links lost */
        COUNT_RESUMED,    /* connections that went on over a new channel */
        COUNT_BROKEN,     /* connections reset by the relay */
        COUNT_CORRUPT,    /* of these: because a process or a peer wrote invalid data */
        COUNT_REGISTERED, /* bytes of memory that the device can reach now */
        COUNT_TURNS,      /* of the main loop */
        COUNT_MOVES,      /* that are done, of processes here */
        COUNT_BYTES_MOVED,
        COUNT_MOVES_REFUSED, /* the device, the relay or the peer's relay can't use the memory */
        COUNT_MOVES_LOST,    /* the link was lost, the connection ended, or the file was given up */
};

struct relay_counts {
        struct relay_message message;
        uint32_t unused;
        uint64_t counters[RELAY_COUNTERS];
};

/* Of an arena or a link, since it began. `messages` are a link's alone, bells and slots an arena's.
 */
enum relay_usage_value {
        USAGE_BYTES_OUT, /* of connections */
        USAGE_BYTES_IN,
        USAGE_BLOCKS_OUT, /* parts of messages, about one connection each */
        USAGE_BLOCKS_IN,
        USAGE_MESSAGES_OUT, /* between relays */
        USAGE_MESSAGES_IN,
        USAGE_BELLS_IN,  /* times that the process has woken the relay */
        USAGE_SLOTS_IN,  /* connections for which it had */
        USAGE_BELLS_OUT, /* times that the relay has woken the process */
        USAGE_SLOTS_OUT, /* connections for which it had */
        USAGE_CPU,       /* ns of the relay's thread, its share by the work done (usage.h) */
        USAGE_VALUES,
};

/* R_USAGE */
struct relay_usage {
        struct relay_message message;
        uint32_t link;  /* 0: of an arena */
        uint64_t arena; /* 0: of a link */
        uint64_t values[USAGE_VALUES];
};

_Static_assert(sizeof(struct relay_usage) == 104, "sizes are part of the version");
_Static_assert(sizeof(struct relay_message) == 4, "sizes are part of the version");
_Static_assert(sizeof(struct relay_open) == 84, "sizes are part of the version");
_Static_assert(sizeof(struct relay_opened) == 108, "sizes are part of the version");
_Static_assert(sizeof(struct relay_number) == 12, "sizes are part of the version");
_Static_assert(sizeof(struct relay_outcome) == 112, "sizes are part of the version");
_Static_assert(sizeof(struct relay_offer) == 240, "sizes are part of the version");
_Static_assert(sizeof(struct relay_accept) == 144, "sizes are part of the version");
_Static_assert(sizeof(struct relay_arena) == 24, "sizes are part of the version");
_Static_assert(sizeof(struct relay_slot) == 32, "sizes are part of the version");
_Static_assert(sizeof(struct relay_file) == 32, "sizes are part of the version");
_Static_assert(sizeof(struct relay_frame) == 8, "sizes are part of the version");
_Static_assert(sizeof(struct relay_counts) == 232, "sizes are part of the version");
_Static_assert(COUNT_MOVES_LOST + 1 == RELAY_COUNTERS, "there is room for each counter");

#endif
