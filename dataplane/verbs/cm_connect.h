/* Commands that make and end connections. Each returns 0 or a negative errno, and is for whoever
 * holds cm_mutex.
 */
#ifndef FREEFLOW_CM_CONNECT_H
#define FREEFLOW_CM_CONNECT_H

#include "cm.h"

int cm_connect(struct cm_id *id, const struct rdma_ucm_conn_param *wanted);
/* `wanted->valid` 0: the peer has accepted, and the program has seen it. */
int cm_accept(struct cm_id *id, const struct rdma_ucm_conn_param *wanted);
int cm_reject(struct cm_id *id, const void *data, uint8_t size, uint32_t reason);
int cm_disconnect(struct cm_id *id);
/* The queue pair has told the program of an asynchronous event. */
int cm_notify(struct cm_id *id, uint32_t event);
/* What the queue pair has to be given for its next state. */
int cm_attributes(const struct cm_id *id, uint32_t state, struct ib_uverbs_qp_attr *to);

#endif
