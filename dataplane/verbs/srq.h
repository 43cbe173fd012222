/* Shared receive queues as programs make, change and destroy them, and post to them. */
#ifndef FREEFLOW_SRQ_H
#define FREEFLOW_SRQ_H

#include "verb.h"

/* For the operations of a context. */
struct ibv_srq *srq_create_extended(struct ibv_context *context, struct ibv_srq_init_attr_ex *wanted);
int srq_post(struct ibv_srq *plain, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);

#endif
