/* The connections of one process over one link: the unit of fairness.
 *
 * The relay serves sources in turn, not connections, so a process with thousands of connections
 * does not delay one with two. Each turn scans so many connections of each source at most
 * (mirror_scan.c). On each lane sources send by deficit round robin (Shreedhar and Varghese, 1995):
 * one whose turn it is may send until its credit is used up; then it gets new credit and waits
 * until the others had theirs (link.c).
 */
#ifndef FREEFLOW_RELAY_SOURCE_H
#define FREEFLOW_RELAY_SOURCE_H

#include "queue.h"

/* What a source has to send on one lane. */
struct part {
        struct node turn;  /* in lane->round */
        struct node queue; /* its connections that have something to send */
        int64_t credit;    /* bytes that it may still send in this turn; negative: it sent more */
};

struct source {
        struct link *link;
        struct node of_link; /* in link->sources */
        struct node scanned; /* in mirrors.active: some of its connections are active */
        struct node active;  /* these */
        uint64_t owner;      /* the process, a number of the router */
        unsigned mirrors;    /* its connections */
        struct part parts[LANES];
};

/* The source of a process on a link, for one more connection. */
struct source *source_enter(struct link *link, uint64_t owner);
/* A connection of it is gone. */
void source_leave(struct source *source);

/* A connection has something to send on this lane. False: the link is down. */
static inline bool source_enqueue(struct source *source, unsigned lane, struct node *connection)
{
        struct part *part = &source->parts[lane];

        if (!link_is_live(source->link))
                return false;
        list_add(&part->queue, connection);
        list_add(&source->link->lanes[lane].round, &part->turn);
        return true;
}

#endif
