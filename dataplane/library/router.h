/* The process's talk with the router: never waited for. */
#ifndef FREEFLOW_ROUTER_H
#define FREEFLOW_ROUTER_H

#include <stdbool.h>
#include <stdint.h>

struct end;

/* Say hello, if nobody in this family of processes has yet: the answer says when connections are to be
 * upgraded. */
void router_connect(void);
/* Ask for a connection's upgrade; false: not now. */
bool router_request(struct end *end, int fd);
/* Take what the router has answered, if it's time to look. */
void router_poll(struct end *end);
/* Changes when the router went and came: what was asked before has to be asked again. */
uint32_t router_epoch(void);
void router_note(struct end *end, uint32_t reason);
/* Take all that the router has answered. */
void router_receive(void);
/* Ask for a bell of our side: bell_received() gets it. False: it can't be asked. */
bool router_bell(uint64_t arena, uint64_t token, uint32_t side, uint32_t bell);
/* Have the router ring a bell of the other side, and send it: bell_ringer_received() gets it. */
void router_fetch(uint64_t arena, uint64_t token, uint32_t side, uint32_t bell);
void router_release(uint64_t arena, uint64_t token, uint32_t slot, uint64_t incarnation);
void router_forked(void);
void router_retire(void);

#endif
