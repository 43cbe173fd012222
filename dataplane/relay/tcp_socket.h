/* One socket of a link over TCP: a lane. What it sends and receives is a sequence of records:
 *
 *      head        4 bytes, the size of what is sealed next, and RECORD_SEALED; authenticated with it
 *      sealed      a message (wire.h), and for each of its blocks how many bytes come with it
 *      tag
 *      payload     the bytes of all blocks, in their order; sealed or not
 *      tag         of a payload that is sealed
 *
 * A block's bytes are those of its connection right below the block's `tail`. They are received
 * before the message is handled.
 */
#ifndef FREEFLOW_RELAY_TCP_SOCKET_H
#define FREEFLOW_RELAY_TCP_SOCKET_H

#include "context.h"
#include "list.h"
#include "queue.h"
#include "records.h"
#include "wire.h"

#define RECORD_SEALED (UINT32_C(1) << 31) /* in a record's head: its payload is sealed */

enum {
        TCP_MESSAGE_LANES = 2,  /* lanes for messages */
        TCP_PIECE = 64 * 1024,  /* bytes of one connection in one record */
        TCP_BATCH = 256 * 1024, /* bytes of all connections in one record */
        /* Bytes of a socket that the kernel may hold and not have sent, for bulk and for messages.
         * It asks for more at half of that, which has to last until the relay runs: 128 KiB for
         * 0.1 ms at 10 Gbit/s. Messages seldom fill a network, and should not wait. */
        TCP_UNSENT = 256 * 1024,
        TCP_UNSENT_MESSAGES = 64 * 1024,
        PIECES = 256,      /* of memory that a socket waits to send */
        STAGE = 64 * 1024, /* bytes received at once that do not go to their place directly */
};

/* Before it is sealed. */
struct record {
        struct wire_message message;
        uint32_t sizes[BLOCKS];
};

struct piece {
        const uint8_t *at;
        uint32_t size;
        uint64_t batch; /* that ends with it; 0: none */
};

/* Bytes of one connection in the batch that is being made, by their positions. */
struct run {
        uint32_t connection;
        uint64_t cookie, at, end;
};

struct outgoing {
        struct node node; /* in the list of sockets that have something to send, and take it */
        struct seal seal;
        bool full;     /* the kernel's buffer; an event says when it is not any more */
        bool encrypts; /* the payload */
        /* A circle of what is not in rings: heads, sealed messages, sealed payload. */
        uint8_t *circle;
        uint64_t end; /* where its next bytes go */
        struct piece pieces[PIECES];
        uint64_t first, last; /* numbers of pieces: to be sent next, to be added next */
        uint64_t queued;      /* bytes of them */
        uint64_t most;        /* bytes that wait before no more are added */
        uint64_t given;       /* bytes that the kernel has taken */
        /* the batch that is being made; its pieces are behind `last` */
        unsigned runs, parts;
        uint32_t bytes;
        struct run run[BLOCKS];
};

struct incoming {
        struct node node; /* in the list of sockets that have something to read */
        struct seal seal;
        bool ends;         /* the kernel has reported an end or an error */
        bool wants_sealed; /* payload that is not sealed is invalid */
        uint8_t *stage;
        size_t begin, end;
        bool in_payload, sealed, large;
        /* the record that is being received */
        struct record record;
        unsigned blocks, block;
        uint32_t done, left; /* bytes of the current block that are there; bytes of all that are not */
};

struct tcp_channel;

struct tcp_socket {
        struct watch watch;
        struct tcp_channel *channel;
        unsigned lane;
        struct outgoing out;
        struct incoming in;
};

struct tcp_channel {
        struct link *link;
        uint8_t key[RECORD_KEY]; /* under which we receive */
        struct tcp_socket sockets[LANES];
};

#endif
