#include "cm_events.h"

#include "port.h"

#include <string.h>

enum { HOPS = 64, MULTICAST_QPN = 0xffffff };

static uint8_t copy_said(uint8_t *to, const struct v_connection *message, size_t most)
{
        memcpy(to, message->private_data, message->private_size < most ? message->private_size : most);
        return (uint8_t)most;
}

void cm_path_to(struct ib_uverbs_ah_attr *path, const struct cm_id *id, const union ibv_gid *gid)
{
        memcpy(path->grh.dgid, gid->raw, sizeof path->grh.dgid);
        path->grh.sgid_index = (uint8_t)cm_address_place(&id->source);
        path->grh.hop_limit = HOPS;
        path->grh.traffic_class = id->type_of_service;
        path->is_global = 1;
        path->port_num = PORT_NUMBER;
}

/* What one side may ask for at once the other has to answer. */
static void say_parameters(struct rdma_ucm_conn_param *to, const struct v_connection *message)
{
        to->qp_num = message->qpn;
        to->responder_resources = message->initiator_depth;
        to->initiator_depth = message->responder_resources;
        to->flow_control = message->flow_control;
        to->retry_count = message->retry;
        to->rnr_retry_count = message->rnr_retry;
        to->srq = message->srq;
}

void cm_event_request(struct cm_event *event, struct cm_id *asking, const struct v_connection *request)
{
        struct rdma_ucm_conn_param *connection = &event->said.param.conn;
        struct rdma_ucm_ud_param *datagrams = &event->said.param.ud;

        event->asking = asking;
        event->said.id = asking->place;
        if (asking->type == IBV_QPT_UD) {
                datagrams->private_data_len = copy_said(datagrams->private_data, request, CM_SAID_RESOLVE);
                return;
        }
        say_parameters(connection, request);
        connection->private_data_len = copy_said(connection->private_data, request, CM_SAID_REQUEST);
}

void cm_event_reply(struct cm_event *event, const struct v_connection *reply)
{
        struct rdma_ucm_conn_param *connection = &event->said.param.conn;

        say_parameters(connection, reply);
        connection->retry_count = 0;
        connection->private_data_len = copy_said(connection->private_data, reply, CM_SAID_REPLY);
}

void cm_event_reject(struct cm_event *event, const struct v_connection *reject)
{
        struct rdma_ucm_conn_param *connection = &event->said.param.conn;

        connection->private_data_len = copy_said(connection->private_data, reject, CM_SAID_REJECT);
}

void cm_event_resolved(struct cm_event *event, const struct cm_id *id, const struct v_connection *answer)
{
        struct rdma_ucm_ud_param *datagrams = &event->said.param.ud;

        datagrams->private_data_len = copy_said(datagrams->private_data, answer, CM_SAID_RESOLVED);
        if (answer->reject)
                return;
        datagrams->qp_num = answer->qpn;
        datagrams->qkey = answer->qkey;
        cm_path_to(&datagrams->ah_attr, id, &id->peer.gid);
}

void cm_event_joined(struct cm_event *event, const struct cm_group *group)
{
        struct rdma_ucm_ud_param *datagrams = &event->said.param.ud;
        union ibv_gid gid = cm_address_gid(&group->address);

        event->group = (struct cm_group *)group;
        event->said.uid = group->uid;
        event->said.id = group->place;
        datagrams->qp_num = MULTICAST_QPN;
        datagrams->qkey = group->id->qkey;
        cm_path_to(&datagrams->ah_attr, group->id, &gid);
}
