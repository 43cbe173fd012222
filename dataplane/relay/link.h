/* A link: the relay's end of what leads to one peer's relay, and the messages on it.
 *
 *      NEW     a number
 *      MADE    has an end; its address goes to the peer
 *      UP      connected
 *      DOWN    lost: its connections wait for it to be made again, or for frames
 *      STREAM  over frames that the routers carry, for the rest of its life
 *
 * Who sends a message has been granted it: `granted` in each header says how many may have been sent, all in
 * all. The last one is kept for a message that only grants, so that both can't wait for each other.
 */
#ifndef FREEFLOW_RELAY_LINK_H
#define FREEFLOW_RELAY_LINK_H

#include "list.h"
#include "transport.h"

enum link_state { LINK_NEW, LINK_MADE, LINK_UP, LINK_DOWN, LINK_STREAM };

struct mirror;

struct link {
        struct node all;
        struct node mirrors; /* its connections */
        struct node ready;   /* those with something to say */
        struct node ending;  /* those that are dropped */
        uint32_t number;
        enum link_state state;
        bool connecting; /* R_CONNECTED is owed */
        bool lost;       /* it has been down: who goes on counts as resumed */
        const struct transport *transport;
        void *end;        /* the transport's own */
        uint64_t sent;    /* messages */
        uint64_t granted; /* by the peer */
        uint64_t arrived; /* messages */
        uint64_t told;    /* what we granted last */
        uint64_t batch, completed;
        struct orphan *orphans;
        uint32_t orphan_count;
};

struct link *link_find(uint32_t number);
struct link *link_make(uint32_t number);
/* The three steps of the router; errno with a text. */
int link_offer(struct link *link, struct wire_address *address, char *text);
int link_connect(struct link *link, const struct wire_address *address, char *text);
void link_stream(struct link *link);
void link_remove(struct link *link);
bool link_is_live(const struct link *link);
/* All links send what is ready. Did any? */
bool links_flush(void);
bool links_have_ends(void);
/* Is everything that was sent complete? */
bool links_quiet(void);
/* What is due by time. Returns when to come again, 0: nothing waits. */
uint64_t links_beat(uint64_t present);
/* A mirror has something to say. False: the link can't. */
bool link_ready(struct link *link, struct mirror *mirror);

/* R_CONNECT has come to its end: answers it. */
void link_connected(struct link *link, int error, const char *text);
/* From the transport. After link_down() the link has no end any more. */
void link_message(struct link *link, const void *data, size_t size);
void link_completed(struct link *link, uint64_t batch);
void link_down(struct link *link, int error, const char *text);

#endif
