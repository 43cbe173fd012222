/* How programs connect a queue pair of type RC, by the functions that libibverbs has, and what one
 * side of it consists of.
 */
#ifndef FREEFLOW_TEST_CONNECTING_H
#define FREEFLOW_TEST_CONNECTING_H

#include "../dataplane/check.h"

#include <infiniband/verbs.h>

enum {
        ALL_ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
                     IBV_ACCESS_REMOTE_ATOMIC,
        INIT_MASK = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
        RTR_MASK = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                   IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
        RTS_MASK = IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                   IBV_QP_MAX_QP_RD_ATOMIC
};

/* One side: a queue pair, and what it needs. */
struct end {
        struct ibv_context *context;
        struct ibv_pd *pd;
        struct ibv_cq *sent, *received;
        struct ibv_qp *qp;
};

static inline struct ibv_qp_attr usual_attributes(uint32_t peer)
{
        return (struct ibv_qp_attr){.path_mtu = IBV_MTU_1024,
                                    .dest_qp_num = peer,
                                    .qp_access_flags = ALL_ACCESS,
                                    .ah_attr = {.is_global = 1, .port_num = 1},
                                    .max_rd_atomic = 4,
                                    .max_dest_rd_atomic = 4,
                                    .min_rnr_timer = 1,
                                    .port_num = 1,
                                    .retry_cnt = 7,
                                    .rnr_retry = 7};
}

static inline int modify(struct ibv_qp *qp, enum ibv_qp_state state, struct ibv_qp_attr attributes, int mask)
{
        attributes.qp_state = state;
        return ibv_modify_qp(qp, &attributes, mask);
}

static inline void become_ready(struct ibv_qp *qp, struct ibv_qp_attr attributes)
{
        CHECK(modify(qp, IBV_QPS_INIT, attributes, INIT_MASK) == 0);
        CHECK(modify(qp, IBV_QPS_RTR, attributes, RTR_MASK) == 0);
        CHECK(modify(qp, IBV_QPS_RTS, attributes, RTS_MASK) == 0);
}

#endif
