/* The thread that makes queue pairs go on while the program sleeps, or does something else.
 *
 * There is one in a process that has queue pairs, or waits for events. It sleeps until a bell
 * rings: one for each arena that has queue pairs of this process. The bell says for which of them.
 * A program that polls in a loop makes them go on by itself. As long as it polls, the thread waits
 * on no ring, so that no peer rings its bell in vain, and only checks them from time to time.
 *
 * After it has executed something it spins for a moment, if that has paid lately, since more may
 * come.
 *
 * A program that is about to sleep arms a completion queue first. That registers the thread's bell
 * with the rings of the queue pairs of that completion queue (progress_arm()), so the thread need
 * not be woken to do it.
 */
#ifndef FREEFLOW_AGENT_H
#define FREEFLOW_AGENT_H

#include "queue_pair.h"

enum { AGENT_DATAGRAMS = 1 << 24 /* above the numbers of queue pairs */ };

/* Run from now on, and look at once at all there is. False: there is no thread. */
bool agent_start(void);
/* Have it call this in each turn, too. Returns how many ms from then on it is to be called again at
 * the latest; -1: when something else happens. */
void agent_visit(int (*turn)(void));
/* A queue pair is about to have this place. Returns the bell of its arena, or -1: there is none
 * yet. */
int agent_join(const struct place *place);
/* The bell's rings for this place are for the queue pair with this number, or for the peer of whom
 * datagrams come (AGENT_DATAGRAMS | its index); until this is called, or with 0, all queue pairs go
 * on when it rings. */
void agent_serve(const struct place *place, uint32_t number);
/* It is about to give it back. */
void agent_leave(const struct place *place);
/* In a child of fork(): there is no thread. */
void agent_forget(void);
/* End it. */
void agent_stop(void);

#endif
