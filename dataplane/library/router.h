/* The process's socket to the router. No call waits for the router's answer.
 *
 * One lock guards the socket. A signal handler that interrupts its own thread under this lock does
 * without the router.
 */
#ifndef FREEFLOW_ROUTER_H
#define FREEFLOW_ROUTER_H

#include "family.h"

enum { ROUTER_PATIENCE = 20 }; /* ms that a message which must not be lost waits for room */

/* Connect, unless some process of this family has received the router's WELCOME, which says when
 * connections are to be upgraded. */
void router_connect(void);
/* Changes when the router's socket is lost: what was requested before has to be requested again. */
uint32_t router_epoch(void);
/* Take all messages that have come: hooks.received() gets each. */
void router_receive(void);

/* Take the lock. False: this thread has it already, and router_end() must not follow. */
bool router_begin(void);
void router_end(void);
/* Under the lock: connect if there is no socket. False: there is no router now. */
bool router_reach(void);
/* Under the lock: send one message. `patience`: ms to wait for room. Returns 0 or an errno. */
int router_send(const void *message, size_t size, int patience);

/* Tell the router why a connection is, or stays, on TCP. */
void router_note(struct end *end, uint32_t reason);
/* Request a bell of our side: bell_received() gets it. False: the request can't be sent. */
bool router_bell(uint64_t arena, uint64_t token, uint32_t side, uint32_t bell);
/* Have the router ring a bell of the other side and send it: bell_ringer_received() gets it. */
void router_fetch(uint64_t arena, uint64_t token, uint32_t side, uint32_t bell);
void router_release(uint64_t arena, uint64_t token, uint32_t slot, uint64_t incarnation);
void router_forked(void);
void router_disconnect(void);

#endif
