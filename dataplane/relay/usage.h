/* What each arena and each link uses of the relay, for R_USAGE.
 *
 * The relay has one thread, so nobody measures what a single connection costs. Instead, what is
 * done is counted where it is done, and has a price: so much per byte, block, message and bell
 * (usage.c). Once per R_COUNT the thread's processor time since the last one is divided among
 * arenas in proportion to the prices, and once more among links. So the shares of all arenas add up
 * to what the relay has used, turns without work included, unless nobody had work. Only what it
 * spends on letting others run is not in it: it would sleep instead.
 */
#ifndef FREEFLOW_RELAY_USAGE_H
#define FREEFLOW_RELAY_USAGE_H

#include "list.h"
#include "relay_protocol.h"

struct usage {
        struct node used; /* in `usages` */
        uint64_t arena;   /* number; 0: a link's */
        uint32_t link;    /* number; 0: an arena's */
        uint64_t values[USAGE_VALUES];
        uint64_t reported[USAGE_VALUES];
};

/* Arenas and links that have done something since the last R_COUNT. */
extern struct node usages;

void usage_start(struct usage *usage, uint64_t arena, uint32_t link);
/* The arena or link goes. */
void usage_end(struct usage *usage);
/* Something was done for it. */
static inline void usage_add(struct usage *usage, enum relay_usage_value value, uint64_t more)
{
        usage->values[value] += more;
        list_add(&usages, &usage->used);
}

/* So many ns of the thread went to a spin that lets others run, and found nothing. */
void usage_spun(uint64_t time);
/* R_USAGE for all arenas and links with work since the last time. */
void usage_report(void);

#endif
