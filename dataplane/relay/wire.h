/* What two relays tell each other: an address per link and a place per connection, which the
 * routers carry for them, and the messages on a link.
 *
 * A message is a header and up to BLOCKS blocks. A block is the complete state of one connection at
 * its sender: a block that is lost with its link is made good by the next one, and one that comes
 * twice changes nothing. Messages never contain a connection's bytes; these are written into the
 * peer's ring before the message.
 *
 * Integers are in the host's byte order. A peer of the other order is recognised by the magic
 * number, and refused. Everything here comes from another host: its reader checks it.
 */
#ifndef FREEFLOW_RELAY_WIRE_H
#define FREEFLOW_RELAY_WIRE_H

#include "relay_protocol.h"

#define WIRE_MAGIC UINT32_C(0x6c657231)
#define WIRE_VERSION 1

enum { BLOCKS = 16 };

/* Of a link: where its channel can be reached. */
struct wire_address {
        uint32_t magic;
        uint16_t version;
        uint16_t transport; /* enum relay_transport */
        union {
                struct {
                        uint32_t queue_pair;
                        uint32_t sequence; /* number of the first packet */
                        uint32_t mtu;      /* enum ibv_mtu */
                        uint16_t lid;
                        uint16_t routed; /* 1: Ethernet; the GID is used, not the LID */
                        uint8_t gid[16];
                } verbs;
                struct {
                        int32_t process;
                        int32_t channel; /* its descriptor of the inbox for messages */
                        int32_t bell;    /* its descriptor of the eventfd that wakes it */
                        uint32_t unused;
                        uint64_t cookie; /* of the inbox */
                } loopback;
                struct {
                        uint8_t key[32]; /* under which this relay receives on this channel */
                        uint16_t sockets;
                        uint16_t encryption; /* enum relay_encryption */
                } tcp;
                uint8_t size[48];
        } to;
};

/* Of a connection: where the peer writes the bytes that this end receives. */
struct wire_place {
        uint32_t magic;
        uint16_t version;
        uint16_t transport;
        uint32_t size_of_ring;
        uint32_t features; /* enum wire_feature */
        uint64_t cookie;   /* of the connection, in every block: numbers are used again */
        union {
                struct {
                        uint64_t small; /* address of the ring's first byte in the slot's page */
                        uint64_t bulk;  /* of offset 0 of its bulk area */
                        uint32_t small_key;
                        uint32_t bulk_key;
                } verbs;
                struct {
                        int32_t process;
                        int32_t arena; /* its descriptor */
                        uint32_t slot;
                        uint32_t unused;
                } loopback;
                uint8_t size[48];
        } to;
};

/* What a relay offers for a connection. An earlier one offers nothing, and ignores what it doesn't
 * know; flags and blocks of a feature are sent only if both offer it. */
enum wire_feature { WIRE_MOVING = 1 /* moves.h */ };

struct wire_header {
        uint32_t magic;
        uint16_t blocks;
        uint16_t flags;   /* enum wire_header_flag */
        uint64_t granted; /* messages that the reader may have sent since the link came up */
};

enum wire_header_flag {
        WIRE_ASKS = 1,  /* the writer awaits the reader's next grant */
        WIRE_MOVES = 2, /* messages are to use this lane from now on: another one is stalled */
};

enum wire_flag {
        WIRE_READY = 1,          /* the process here reads from its ring: bytes may come */
        WIRE_LEAVE = 2,          /* the peer's process has to stop sending, and fall back to TCP */
        WIRE_LEFT = 4,           /* the process here has stopped: nothing comes above `tail` */
        WIRE_HAS_LEFT = 8,       /* confirms LEFT */
        WIRE_CLOSED = 16,        /* no process has this end any more: bytes for it are thrown away */
        WIRE_OVER = 32,          /* as LEFT, because no process has this end any more */
        WIRE_HAS_OVER = 64,      /* confirms OVER */
        WIRE_BROKEN = 128,       /* bytes are lost: both ends see a reset */
        WIRE_DROPPED = 256,      /* the memory here is released: write no more, and confirm */
        WIRE_GONE = 512,         /* confirms DROPPED, after the last write; the block has no positions */
        WIRE_KNOWS_MOVES = 1024, /* the library of the process here does */
        /* Each alone in its block, which has no positions: moves.h. */
        WIRE_REACH = 2048,
        WIRE_REACHED = 4096,
        WIRE_MOVED = 8192,
        WIRE_SEEN = 16384,
        WIRE_REVOKE = 32768,
        WIRE_REVOKED = 65536,
};

enum {
        WIRE_OF_MOVES = WIRE_REACH | WIRE_REACHED | WIRE_MOVED | WIRE_SEEN | WIRE_REVOKE | WIRE_REVOKED,
};

struct wire_block {
        uint32_t connection; /* the reader's number of it */
        uint32_t flags;
        uint64_t cookie; /* from the reader's place */
        /* of the ring that this block's writer sends; as in struct ring */
        uint64_t tail; /* the reader's ring has all below */
        uint64_t base;
        uint64_t start; /* DROPPED: the writer's number of the connection */
        uint64_t end;   /* DROPPED: the cookie of its place */
        /* of the ring that this block's reader sends */
        uint64_t head;     /* the process has taken all below */
        uint64_t received; /* the process can read all below */
};

struct wire_message {
        struct wire_header header;
        struct wire_block blocks[BLOCKS];
};

/* In frames: bytes that RDMA would have written, or a message. Each record begins at a multiple
 * of 8. */
struct wire_record {
        uint32_t size;       /* of the data that follow */
        uint32_t connection; /* 0: a message */
        uint64_t cookie;
        uint32_t offset; /* in the ring */
        uint32_t unused;
};

_Static_assert(sizeof(struct wire_address) == 56, "sizes are part of the version");
_Static_assert(sizeof(struct wire_place) == 72, "sizes are part of the version");
_Static_assert(sizeof(struct wire_header) == 16, "sizes are part of the version");
_Static_assert(sizeof(struct wire_block) == 64, "sizes are part of the version");
_Static_assert(sizeof(struct wire_record) == 24, "sizes are part of the version");
_Static_assert(sizeof(struct wire_place) <= RELAY_WORDS, "a place fits its message");

#endif
