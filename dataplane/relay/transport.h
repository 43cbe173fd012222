/* How bytes and messages get from one relay to the other.
 *
 * A link is a pair of ends. Everything on one link arrives in the order in which it was given, once, or the
 * link is down; what a write has put is in the peer's ring before a later message of the link arrives. A
 * batch is any number of writes and the message behind them; only the message starts it, and the bytes that
 * are written must stay as they are until the batch is complete.
 */
#ifndef FREEFLOW_RELAY_TRANSPORT_H
#define FREEFLOW_RELAY_TRANSPORT_H

#include "wire.h"

#include <stdbool.h>

struct link;
struct mirror;

enum {
        WRITES = 4,   /* of one connection in one batch, at most */
        WINDOW = 128, /* messages that may be on the way */
};

struct transport {
        enum relay_transport kind;
        uint32_t window; /* messages that the peer may have sent and we haven't seen */
        uint32_t piece;  /* bytes of a connection in one batch, at most */
        /* Errors are errno, with a text of RELAY_TEXT bytes; 0: it is done. Opening again is possible when no
         * link has an end. */
        int (*open)(const struct relay_open *open, uint32_t *mtu, char *text);
        void (*close)(void);
        /* The two halves of a link's end: made, and connected with the peer's; EINPROGRESS: link_connected()
         * will be called, if it isn't unmade before. */
        int (*make)(struct link *link, struct wire_address *address, char *text);
        int (*connect)(struct link *link, const struct wire_address *address, char *text);
        /* When it returns nothing of this end is read or written any more, by nobody. */
        void (*unmake)(struct link *link);
        /* Let the peer write into a connection's ring; the rest of `place` is filled in. */
        int (*lend)(struct mirror *mirror, struct wire_place *place, char *text);
        void (*take_back)(struct mirror *mirror);
        /* The peer's ring, where writes of this connection go. */
        int (*reach)(struct mirror *mirror, const struct wire_place *place, char *text);
        void (*forget)(struct mirror *mirror);
        /* May a batch with so many more writes be given now? */
        bool (*room)(struct link *link, unsigned writes);
        /* From the connection's ring of direction 0 to the peer's of direction 1; one run. */
        void (*write)(struct link *link, struct mirror *mirror, uint32_t offset, uint32_t size);
        /* Ends the batch. `number`: of the batch; link_completed() is told such numbers, those below
         * included; `soon`: even if nothing else needs it. */
        void (*send)(struct link *link, const void *message, uint32_t size, uint64_t number, bool soon);
        /* Take what has come: calls link_message(), link_completed(), link_down(). Did anything? */
        bool (*poll)(void);
        /* From now on a descriptor in epoll says that something comes; false: something has. */
        bool (*arm)(void);
        /* What is due by time; when to come again, 0: nothing waits. NULL: nothing ever does. */
        uint64_t (*beat)(uint64_t present);
};

extern const struct transport verbs_transport, memory_transport, stream_transport;

#endif
