/* The process's socket to the router. No call waits for the router's answer.
 *
 * One lock guards the socket. A signal handler that interrupts its own thread under this lock does
 * without the router.
 */
#ifndef FREEFLOW_ROUTER_H
#define FREEFLOW_ROUTER_H

#include "family.h"

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
/* Under the lock: as router_receive(). */
void router_take(void);
/* Under the lock: nothing is taken from the socket until this is undone. */
void router_hold(bool held);
/* Under the lock: the socket, or -1. */
int router_descriptor(void);

/* Tell the router why a connection is, or stays, on TCP. */
void router_note(struct end *end, uint32_t reason);
/* BELL: request a bell of our side, which bell_received() gets. FETCH: have the router ring a bell
 * of the other side and send it, which bell_ringer_received() gets. False: it can't be sent. */
bool router_bell(uint16_t kind, uint64_t arena, uint64_t token, uint32_t side, uint32_t bell);
struct release;

/* We are done with a slot. */
struct release release_of(uint64_t arena, uint64_t token, uint32_t slot, uint64_t incarnation);
/* Send it, waiting some ms for room: under the lock, and without. */
void router_send_release(const struct release *release);
void router_release(const struct release *release);
void router_forked(void);
void router_disconnect(void);

#endif
