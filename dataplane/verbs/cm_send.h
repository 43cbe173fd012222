/* What the router is told of connections, at once and again later. For whoever holds cm_mutex. */
#ifndef FREEFLOW_CM_SEND_H
#define FREEFLOW_CM_SEND_H

#include "cm.h"

/* A step of this connection, for its peer. */
struct v_connection cm_step(const struct cm_id *id, uint32_t step);
/* Add what the program says to its peer, at most VERBS_PRIVATE bytes. */
void cm_step_private(struct v_connection *message, const void *data, size_t size);
/* False: there is no router now. */
bool cm_send(const struct v_connection *message);
void cm_send_step(const struct cm_id *id, uint32_t step);
void cm_send_reject(const struct cm_id *id, uint32_t reason);
/* The same to somebody who has asked, and for whom there is no id. */
void cm_refuse(const struct v_connection *request, uint32_t reason);
/* The router that is there now knows of the listener or the connection, or is about to. False:
 * there is none. */
bool cm_told(struct cm_id *id);
/* Have the port of `source`, or any. */
bool cm_send_listen(struct cm_id *id);
void cm_send_listen_end(const struct cm_id *id);

/* --- times */

uint64_t cm_now(void); /* ms */
/* Send a message, and again until cm_quiet(), but not for ever: then the deadline is reached.
 * False: there is no memory, and nothing was sent. */
bool cm_send_until_answered(struct cm_id *id, const struct v_connection *message);
/* So many ms from now the deadline is reached. */
void cm_set_deadline(struct cm_id *id, uint64_t after);
void cm_quiet(struct cm_id *id);
/* Of all ids, or earlier; 0: none. */
uint64_t cm_earliest(void);
void cm_set_earliest(uint64_t time);

#endif
