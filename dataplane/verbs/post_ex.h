/* Posting work requests by ibv_wr_start(), ibv_wr_send() and so on, one call for each part of one.
 */
#ifndef FREEFLOW_POST_EX_H
#define FREEFLOW_POST_EX_H

#include "queue_pair.h"

/* Let programs post such operations (enum ibv_qp_create_send_ops_flags) that way. False: no memory.
 */
bool post_ex_start(struct queue_pair *queue);
void post_ex_end(struct queue_pair *queue);

#endif
