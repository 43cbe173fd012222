/* Answers to the queries of an id, as the kernel writes them. For whoever holds cm_mutex. */
#ifndef FREEFLOW_CM_QUERY_H
#define FREEFLOW_CM_QUERY_H

#include "cm.h"

void cm_query_route(const struct cm_id *id, struct rdma_ucm_query_route_resp *to);
/* Each writes at most `room` bytes, and returns how many, or a negative errno. */
int cm_query_address(const struct cm_id *id, void *to, size_t room);
int cm_query_gid(const struct cm_id *id, void *to, size_t room);
int cm_query_path(const struct cm_id *id, void *to, size_t room);

#endif
