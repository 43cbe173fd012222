/* What the router and the peers say of connections, and what is due after some time. */
#ifndef FREEFLOW_CM_STEPS_H
#define FREEFLOW_CM_STEPS_H

#include "cm.h"

#include "../library/services.h"

/* Changes, and is woken, when the router has answered whether somebody may have a port. */
extern _Atomic uint32_t cm_answers;
/* A message of the router. False: it is about something else. Takes cm_mutex. */
bool cm_handle(const struct verbs_message *message);
/* What is due now. Returns how many ms from now the next is; -1: nothing. Takes cm_mutex. */
int cm_turn(void);
/* Undo what an id is, and whatever it has with its peer and the router, and free it. cm_mutex is
 * held. */
void cm_end(struct cm_id *id);
/* The connection is made: READY has come, or the queue pair has heard of the peer. */
void cm_establish(struct cm_id *id);
/* If nobody listens where it asks: how long that may be so for a moment only, in ms. */
uint64_t cm_grace(const struct cm_id *id);
/* Both sides know that it is over. */
void cm_late(struct cm_id *id);

#endif
