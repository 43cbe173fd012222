/* Posting work requests. */
#ifndef FREEFLOW_POST_H
#define FREEFLOW_POST_H

#include "queue_pair.h"

/* For the operations of a context. */
int post_send(struct ibv_qp *plain, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
int post_receive(struct ibv_qp *plain, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);

/* The same for a window of type 1, which has a new key then. */
int post_bind(struct ibv_qp *plain, struct ibv_mw *window, struct ibv_mw_bind *bind);

/* May all of these operations (enum ibv_qp_create_send_ops_flags) be posted to queue pairs of this
 * type? */
bool post_is_known(enum ibv_qp_type type, uint64_t wanted);
/* Under `sending`: copy a request to the send queue. Returns 0, or what posting it fails with. */
int post_add(struct queue_pair *queue, const struct ibv_send_wr *wr);
/* Under `sending`, which it releases: make what was added go on. */
void post_finish(struct queue_pair *queue);

#endif
