/* Commands that give an id its addresses. Each returns 0 or a negative errno, and is for whoever
 * holds cm_mutex.
 */
#ifndef FREEFLOW_CM_RESOLVE_H
#define FREEFLOW_CM_RESOLVE_H

#include "cm.h"

/* Releases cm_mutex while it waits for the router: the id may be gone then (-EINVAL). */
int cm_bind(struct cm_id *id, const union cm_address *address);
/* `from` may be none. */
int cm_resolve(struct cm_id *id, const union cm_address *from, const union cm_address *to);
int cm_resolve_route(struct cm_id *id);
/* Releases cm_mutex as cm_bind() does. */
int cm_listen(struct cm_id *id, uint32_t backlog);
int cm_set_option(struct cm_id *id, uint32_t level, uint32_t name, const void *value, uint32_t size);
int cm_join(struct cm_id *id, const union cm_address *address, uint64_t uid, uint32_t *place);

#endif
