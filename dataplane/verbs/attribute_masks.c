#include "attribute_masks.h"

#include <stddef.h>

enum {
        KEYED = IBV_QP_PKEY_INDEX | IBV_QP_PORT,
        PATHS = IBV_QP_ALT_PATH | IBV_QP_ACCESS_FLAGS,
        RUNNING = IBV_QP_CUR_STATE | PATHS | IBV_QP_PATH_MIG_STATE,
        PEER = IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN,
        RETRIES = IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC,
};

/* InfiniBand architecture specification, volume 1, 11.2.5.2. Any state may become RESET or ERR,
 * without attributes; RESET does not become ERR. */
static const struct transition {
        uint8_t from, to, type;
        int needed, allowed;
} transitions[] = {
    {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPT_RC, KEYED | IBV_QP_ACCESS_FLAGS, 0},
    {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPT_UC, KEYED | IBV_QP_ACCESS_FLAGS, 0},
    {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPT_UD, KEYED | IBV_QP_QKEY, 0},
    {IBV_QPS_INIT, IBV_QPS_INIT, IBV_QPT_RC, 0, KEYED | IBV_QP_ACCESS_FLAGS},
    {IBV_QPS_INIT, IBV_QPS_INIT, IBV_QPT_UC, 0, KEYED | IBV_QP_ACCESS_FLAGS},
    {IBV_QPS_INIT, IBV_QPS_INIT, IBV_QPT_UD, 0, KEYED | IBV_QP_QKEY},
    {IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPT_RC, PEER | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
     PATHS | IBV_QP_PKEY_INDEX},
    {IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPT_UC, PEER, PATHS | IBV_QP_PKEY_INDEX},
    {IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPT_UD, 0, IBV_QP_PKEY_INDEX | IBV_QP_QKEY},
    {IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPT_RC, RETRIES | IBV_QP_SQ_PSN, RUNNING | IBV_QP_MIN_RNR_TIMER},
    {IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPT_UC, IBV_QP_SQ_PSN, RUNNING},
    {IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPT_UD, IBV_QP_SQ_PSN, IBV_QP_CUR_STATE | IBV_QP_QKEY},
    {IBV_QPS_RTS, IBV_QPS_RTS, IBV_QPT_RC, 0, RUNNING | IBV_QP_MIN_RNR_TIMER},
    {IBV_QPS_RTS, IBV_QPS_RTS, IBV_QPT_UC, 0, RUNNING},
    {IBV_QPS_RTS, IBV_QPS_RTS, IBV_QPT_UD, 0, IBV_QP_CUR_STATE | IBV_QP_QKEY},
    {IBV_QPS_RTS, IBV_QPS_SQD, IBV_QPT_RC, 0, IBV_QP_EN_SQD_ASYNC_NOTIFY},
    {IBV_QPS_RTS, IBV_QPS_SQD, IBV_QPT_UC, 0, IBV_QP_EN_SQD_ASYNC_NOTIFY},
    {IBV_QPS_RTS, IBV_QPS_SQD, IBV_QPT_UD, 0, IBV_QP_EN_SQD_ASYNC_NOTIFY},
    {IBV_QPS_SQD, IBV_QPS_RTS, IBV_QPT_RC, 0, RUNNING | IBV_QP_MIN_RNR_TIMER},
    {IBV_QPS_SQD, IBV_QPS_RTS, IBV_QPT_UC, 0, RUNNING},
    {IBV_QPS_SQD, IBV_QPS_RTS, IBV_QPT_UD, 0, IBV_QP_CUR_STATE | IBV_QP_QKEY},
    {IBV_QPS_SQD, IBV_QPS_SQD, IBV_QPT_RC, 0,
     KEYED | PATHS | RETRIES | IBV_QP_AV | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER |
         IBV_QP_PATH_MIG_STATE},
    {IBV_QPS_SQD, IBV_QPS_SQD, IBV_QPT_UC, 0, PATHS | IBV_QP_PKEY_INDEX | IBV_QP_AV | IBV_QP_PATH_MIG_STATE},
    {IBV_QPS_SQD, IBV_QPS_SQD, IBV_QPT_UD, 0, IBV_QP_PKEY_INDEX | IBV_QP_QKEY},
    {IBV_QPS_SQE, IBV_QPS_RTS, IBV_QPT_UC, 0, IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS},
    {IBV_QPS_SQE, IBV_QPS_RTS, IBV_QPT_UD, 0, IBV_QP_CUR_STATE | IBV_QP_QKEY},
};

bool attribute_mask_is_valid(enum ibv_qp_type type, enum ibv_qp_state from, enum ibv_qp_state to, int mask)
{
        mask &= ~IBV_QP_STATE;
        if (to == IBV_QPS_RESET || (to == IBV_QPS_ERR && from != IBV_QPS_RESET))
                return !(mask & ~IBV_QP_CUR_STATE);
        for (size_t i = 0; i < sizeof transitions / sizeof *transitions; i++) {
                const struct transition *at = &transitions[i];

                if (at->from == from && at->to == to && at->type == type)
                        return (mask & at->needed) == at->needed && !(mask & ~(at->needed | at->allowed));
        }
        return false;
}
