/* Queue pairs as programs make, change and destroy them. */
#ifndef FREEFLOW_QP_H
#define FREEFLOW_QP_H

#include "verb.h"

/* For the operations of a context. */
struct ibv_qp *qp_create_extended(struct ibv_context *context, struct ibv_qp_init_attr_ex *wanted);

#endif
