/* What events say, beside that they happened. */
#ifndef FREEFLOW_CM_EVENTS_H
#define FREEFLOW_CM_EVENTS_H

#include "cm.h"

/* Bytes that a program may say to its peer, as RDMA_PS_TCP and RDMA_PS_UDP leave them of an
 * InfiniBand message. An event has them all, with zeros behind what was said. */
enum {
        CM_SAID_REQUEST = 56,
        CM_SAID_REPLY = 196,
        CM_SAID_REJECT = 148,
        CM_SAID_RESOLVE = 180,
        CM_SAID_RESOLVED = 136,
};

/* To a listener: somebody asks, for whom there is this id now. */
void cm_event_request(struct cm_event *event, struct cm_id *asking, const struct v_connection *request);
void cm_event_reply(struct cm_event *event, const struct v_connection *reply);
void cm_event_reject(struct cm_event *event, const struct v_connection *reject);
void cm_event_resolved(struct cm_event *event, const struct cm_id *id, const struct v_connection *answer);
void cm_event_joined(struct cm_event *event, const struct cm_group *group);

/* The way to a GID, as the kernel has it in its structures. */
void cm_path_to(struct ib_uverbs_ah_attr *path, const struct cm_id *id, const union ibv_gid *gid);

#endif
