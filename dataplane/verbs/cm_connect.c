#include "cm_connect.h"

#include "agent.h"
#include "cm_events.h"
#include "cm_send.h"
#include "cm_steps.h"
#include "port.h"

#include <errno.h>
#include <string.h>

enum {
        RETRIES = 7,
        PSNS = 1 << 24,   /* and as many queue pairs */
        ACK_TIMEOUT = 18, /* 4.096 us << 18 is a second */
        LEAVE = 60000,    /* ms: how long the peer's program may take until it disconnects as well */
        ATOMICS = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC,
};

static uint32_t some_psn(void)
{
        uint32_t psn = 0;

        sys_3(SYS_getrandom, &psn, sizeof psn, 0);
        return psn % PSNS;
}

static uint8_t lesser(uint8_t one, uint8_t other)
{
        return one < other ? one : other;
}

/* What the program says of its side. */
static void take_parameters(struct cm_id *id, const struct rdma_ucm_conn_param *wanted)
{
        id->qpn = wanted->qp_num % PSNS;
        id->psn = some_psn();
        id->responder_resources = wanted->responder_resources;
        id->initiator_depth = wanted->initiator_depth;
}

static struct v_connection step_with(struct cm_id *id, uint32_t step,
                                     const struct rdma_ucm_conn_param *wanted)
{
        struct v_connection message = cm_step(id, step);

        message.flow_control = wanted->flow_control;
        message.retry = lesser(RETRIES, wanted->retry_count);
        message.rnr_retry = lesser(RETRIES, wanted->rnr_retry_count);
        message.srq = wanted->srq != 0;
        cm_step_private(&message, wanted->private_data, wanted->private_data_len);
        return message;
}

int cm_connect(struct cm_id *id, const struct rdma_ucm_conn_param *wanted)
{
        bool datagrams = id->type == IBV_QPT_UD;
        struct v_connection message;

        if (id->state != CM_ROUTE_RESOLVED)
                return -EINVAL;
        if (wanted->private_data_len > (datagrams ? CM_SAID_RESOLVE : CM_SAID_REQUEST))
                return -EINVAL;
        agent_start();
        take_parameters(id, wanted);
        id->retry = lesser(RETRIES, wanted->retry_count);
        id->rnr_retry = lesser(RETRIES, wanted->rnr_retry_count);
        message = step_with(id, datagrams ? V_STEP_RESOLVE : V_STEP_REQUEST, wanted);
        id->patient_until = cm_now() + cm_grace(id);
        id->state = CM_CONNECT;
        id->stage = datagrams ? CM_RESOLVING : CM_REQUESTED;
        if (cm_send_until_answered(id, &message))
                return 0;
        id->state = CM_ROUTE_RESOLVED;
        id->stage = CM_NONE;
        return -ENOMEM;
}

/* Of datagrams: nothing follows. */
static int accept_datagrams(struct cm_id *id, const struct rdma_ucm_conn_param *wanted)
{
        struct v_connection answer;

        if (wanted->private_data_len > CM_SAID_RESOLVED)
                return -EINVAL;
        id->qpn = wanted->qp_num % PSNS;
        id->stage = CM_ENDED;
        answer = cm_step(id, V_STEP_RESOLVED);
        answer.qkey = id->qkey;
        cm_step_private(&answer, wanted->private_data, wanted->private_data_len);
        cm_send(&answer);
        return 0;
}

static int reply(struct cm_id *id, const struct rdma_ucm_conn_param *wanted)
{
        struct v_connection message;

        if (wanted->private_data_len > CM_SAID_REPLY)
                return -EINVAL;
        agent_start();
        take_parameters(id, wanted);
        message = step_with(id, V_STEP_REPLY, wanted);
        id->stage = CM_REPLIED;
        cm_told(id);
        return cm_send_until_answered(id, &message) ? 0 : -ENOMEM;
}

int cm_accept(struct cm_id *id, const struct rdma_ucm_conn_param *wanted)
{
        if (id->state != CM_CONNECT)
                return -EINVAL;
        if (id->stage == CM_RESOLVE_ASKED && wanted->valid)
                return accept_datagrams(id, wanted);
        if (id->stage == CM_ASKED && wanted->valid)
                return reply(id, wanted);
        if (id->stage != CM_ANSWERED)
                return -EINVAL;
        id->stage = CM_ESTABLISHED;
        cm_send_step(id, V_STEP_READY);
        return 0;
}

int cm_reject(struct cm_id *id, const void *data, uint8_t size, uint32_t reason)
{
        bool datagrams = id->stage == CM_RESOLVE_ASKED;
        struct v_connection message;

        if (id->stage < CM_REQUESTED || (id->stage > CM_ANSWERED && !datagrams) ||
            size > (datagrams ? CM_SAID_RESOLVED : CM_SAID_REJECT))
                return -EINVAL;
        cm_quiet(id);
        message = cm_step(id, datagrams ? V_STEP_RESOLVED : V_STEP_REJECT);
        message.reject = datagrams ? CM_RESOLVE_REJECTED : reason;
        cm_step_private(&message, data, size);
        id->stage = CM_ENDED;
        cm_send(&message);
        return 0;
}

int cm_disconnect(struct cm_id *id)
{
        if (id->stage == CM_NONE || id->type == IBV_QPT_UD)
                return -EINVAL;
        if (id->stage == CM_ESTABLISHED) {
                id->stage = CM_LEAVING;
                cm_send_step(id, V_STEP_DISCONNECT);
                cm_set_deadline(id, LEAVE);
        } else if (id->stage == CM_LEFT) {
                cm_send_step(id, V_STEP_DISCONNECTED);
                cm_late(id);
        }
        return 0;
}

int cm_notify(struct cm_id *id, uint32_t event)
{
        if (event != IBV_EVENT_COMM_EST)
                return -EINVAL;
        if (id->stage == CM_ESTABLISHED)
                return -EISCONN;
        if (id->stage != CM_REPLIED)
                return -EINVAL;
        cm_establish(id);
        return 0;
}

/* --- attributes of the queue pair */

static int attributes_init(const struct cm_id *id, struct ib_uverbs_qp_attr *to)
{
        to->qp_attr_mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT;
        to->port_num = PORT_NUMBER;
        if (id->type == IBV_QPT_UD) {
                to->qp_attr_mask |= IBV_QP_QKEY;
                to->qkey = id->qkey;
                return 0;
        }
        to->qp_attr_mask |= IBV_QP_ACCESS_FLAGS;
        if (id->stage == CM_NONE)
                return 0;
        if (id->stage > CM_ESTABLISHED)
                return -EINVAL;
        to->qp_access_flags = IBV_ACCESS_REMOTE_WRITE | (id->responder_resources ? ATOMICS : 0);
        return 0;
}

static int attributes_rtr(const struct cm_id *id, struct ib_uverbs_qp_attr *to)
{
        to->qp_attr_mask = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
        to->path_mtu = IBV_MTU_4096;
        /* The peer may have said anything. */
        to->dest_qp_num = id->peer.qpn % PSNS;
        to->rq_psn = id->peer.psn % PSNS;
        cm_path_to(&to->ah_attr, id, &id->peer.gid);
        if (id->type == IBV_QPT_RC) {
                to->qp_attr_mask |= IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
                to->max_dest_rd_atomic = lesser(MOST_READS, id->responder_resources);
        }
        return 0;
}

static int attributes_rts(const struct cm_id *id, struct ib_uverbs_qp_attr *to)
{
        to->qp_attr_mask = IBV_QP_STATE | IBV_QP_SQ_PSN;
        to->sq_psn = id->psn;
        if (id->type == IBV_QPT_RC) {
                to->qp_attr_mask |=
                    IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
                to->timeout = id->timeout_set ? id->timeout : ACK_TIMEOUT;
                to->retry_cnt = id->retry;
                to->rnr_retry = id->rnr_retry;
                to->max_rd_atomic = lesser(MOST_READS, id->initiator_depth);
        }
        return 0;
}

int cm_attributes(const struct cm_id *id, uint32_t state, struct ib_uverbs_qp_attr *to)
{
        bool has_peer = id->stage >= CM_ASKED && id->stage <= CM_ESTABLISHED;

        *to = (struct ib_uverbs_qp_attr){.qp_state = state};
        if (id->gid < 0)
                return -EINVAL;
        if (state == IBV_QPS_INIT)
                return attributes_init(id, to);
        if (!has_peer || id->type == IBV_QPT_UD)
                return -EINVAL;
        if (state == IBV_QPS_RTR)
                return attributes_rtr(id, to);
        return state == IBV_QPS_RTS ? attributes_rts(id, to) : -EINVAL;
}
