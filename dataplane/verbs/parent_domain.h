/* Thread domains and parent domains: a program's promise that only one thread at a time uses some
 * objects. Nothing here is cheaper for that, so it changes nothing.
 */
#ifndef FREEFLOW_PARENT_DOMAIN_H
#define FREEFLOW_PARENT_DOMAIN_H

#include "verb.h"

/* For the operations of a context. */
struct ibv_td *thread_domain_make(struct ibv_context *context, struct ibv_td_init_attr *wanted);
int thread_domain_end(struct ibv_td *plain);
struct ibv_pd *parent_domain_make(struct ibv_context *context, struct ibv_parent_domain_init_attr *wanted);

#endif
