/* The contract between the relay and a transport, which carries bytes and messages from one relay
 * to another. A transport is a table of functions; there is one per kind (transports.h).
 *
 * Objects:
 *
 *      channel         a link's end on this host, in link->channel; the peer's relay has the other
 *      registration    in mirror->registration: the transport may read the connection's sending
 *                      ring, and the peer may write into its receiving ring. Set, even if there is
 *                      no memory to register, as long as the connection can use this transport.
 *      target          in mirror->target: where writes of the connection go, at the peer
 *      lane            one of the link's orders of messages and batches: 0 .. transport->lanes - 1
 *      batch           any number of writes, at most WRITES per connection, then exactly one send,
 *                      which starts them, all on one lane; the batches of a lane are numbered
 *                      without gaps
 *
 * A transport promises:
 *
 * 1. Messages of a lane arrive once each, in the order of their sends, or it calls link_down().
 * 2. The bytes of a batch are in the peer's ring before the message of that batch arrives.
 * 3. link_completed(n) means that nothing reads our rings for batches up to n any more; it does not
 *    mean that the peer has them. A batch may complete late, and together with later ones, unless
 *    `soon` was set.
 * 4. After destroy_channel() nothing of the channel is read or written on this host, and the peer
 *    cannot write into rings through it. After deregister() the connection's rings are unreachable.
 * 5. No function blocks. All are called on the relay's one thread, and so are link_receive(),
 *    link_completed(), link_down() and link_connected() (link.h). A transport calls these from
 *    poll(), send(), flush(), tick() and handlers of its own watches; never from create_channel(),
 *    connect_channel(), register_rings(), attach() or write().
 *
 * The relay promises:
 *
 * 1. No more than `window` messages of a lane are on the way that the peer has not granted
 *    (link.c), so the receiver always has a place for the next one.
 * 2. A batch is given to a channel only while the link is up, and after has_room() has allowed as
 *    many writes.
 * 3. Bytes that were given to write() do not change before their batch is complete, or the channel
 *    is destroyed.
 * 4. write() is called for a connection only between attach() and detach(), and while its rings are
 *    registered.
 * 5. deregister() comes when the peer has promised to write no more, when the link is not up, or
 *    for a connection that was never attached.
 *
 * Errors are errno values with a text of at most RELAY_TEXT bytes; 0: success.
 */
#ifndef FREEFLOW_RELAY_TRANSPORT_H
#define FREEFLOW_RELAY_TRANSPORT_H

#include "wire.h"

#include <stdbool.h>

struct lent_file;
struct link;
struct mirror;

enum {
        RING_WRITES = 4, /* of one connection in one batch, at most */
        MOVE_WRITES = 1, /* the same */
        WRITES = RING_WRITES + MOVE_WRITES,
        WINDOW = 128, /* messages on the way, at most */
};

struct transport {
        enum relay_transport kind;
        uint32_t window;        /* messages that the peer may have sent before we grant more */
        uint32_t piece;         /* bytes of one connection in one batch, at most */
        uint32_t lanes;         /* of a link */
        uint32_t message_lanes; /* of these, the first ones: for messages. Others are for bulk. */

        /* Opens the device. Can be called again while no link has a channel of it; close() is
         * called before. */
        int (*open)(const struct relay_open *request, uint32_t *mtu, char *text);
        void (*close)(void);

        /* Makes the link's channel and fills in the address that the peer connects to. On an error
         * that leaves link->channel set, destroy_channel() follows. */
        int (*create_channel)(struct link *link, struct wire_address *address, char *text);
        /* A socket that is connected to the peer's relay; takes it over. NULL: it needs none. */
        void (*add_socket)(struct link *link, uint32_t index, int socket);
        /* EINPROGRESS: link_connected() will be called, unless the channel is destroyed before. */
        int (*connect_channel)(struct link *link, const struct wire_address *address, char *text);
        void (*destroy_channel)(struct link *link);

        /* Fills in the transport's own part of `place`, which the peer's attach() needs. */
        int (*register_rings)(struct mirror *mirror, struct wire_place *place, char *text);
        void (*deregister)(struct mirror *mirror);
        int (*attach)(struct mirror *mirror, const struct wire_place *place, char *text);
        void (*detach)(struct mirror *mirror);

        /* Does a batch with this many more writes fit into the channel? */
        bool (*has_room)(struct link *link, unsigned lane, unsigned writes);
        /* Adds a write to the batch of the connection's lane: `size` bytes at `offset` of the
         * connection's sending ring, to the same offset of the peer's receiving ring. They lie in
         * one piece: all below SMALL_SIZE, or all above. */
        void (*write)(struct link *link, struct mirror *mirror, uint32_t offset, uint32_t size);
        /* Ends batch `number`. `soon`: report its completion even if the transport does not need
         * to. */
        void (*send)(struct link *link, unsigned lane, const void *message, uint32_t size, uint64_t number,
                     bool soon);

        /* For moves (moves.h); NULL: it makes none.
         *
         * The device may read the file, and, if it is writable, the peer may write into it, as long
         * as it knows `address` and `key`. errno, with a text. */
        int (*register_file)(struct lent_file *file, char *text);
        void (*deregister_file)(struct lent_file *file);
        void (*place_file)(const struct lent_file *file, uint64_t *address, uint64_t *key);
        /* A file of so many bytes that the peer's relay has registered; NULL: it can't be reached.
         */
        void *(*reach)(uint64_t address, uint64_t key, uint64_t size);
        void (*unreach)(void *reached);
        /* Adds to the batch: bytes of a file go to a file of the peer. It counts as a write. */
        void (*move)(struct link *link, const struct lent_file *from, uint64_t from_offset, void *to,
                     uint64_t to_offset, uint32_t size);

        /* Starts what send() has collected; may call link_completed() and link_down(). Called at
         * the end of each turn. True: there was something. NULL: send() starts it. */
        bool (*flush)(void);
        /* How many bytes of a lane the peer's host has acknowledged; `all`: all that was sent.
         * NULL: complete batches say so. */
        uint64_t (*acknowledged)(struct link *link, unsigned lane, bool *all);
        /* Handles what has arrived: calls link_receive(), link_completed(), link_down(). True:
         * there was something. */
        bool (*poll)(void);
        /* Called before the thread sleeps: from now on something that arrives makes a descriptor in
         * the relay's epoll instance readable. False: something has arrived already. */
        bool (*arm)(void);
        /* Does what is due by time. Returns when to call it again, 0: never. NULL: nothing is ever
         * due. */
        uint64_t (*tick)(uint64_t present);
};

#endif
