/* Pairing queue pairs: the router gives each two that have asked for each other a slot of an arena.
 */
#ifndef FREEFLOW_PAIR_H
#define FREEFLOW_PAIR_H

/* The device is there: serve its queue pairs from now on. */
void pair_start(void);

#endif
