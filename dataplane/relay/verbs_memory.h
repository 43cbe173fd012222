/* Memory of the transport `verbs`: the rings of this host's connections, as the device and the
 * peer's device know them.
 *
 * The peer may write behind the first ring's header in a slot's two pages, and into both bulk
 * areas. All of that belongs to its own connection; the header of direction 1 is in it, and is
 * untrusted anyway.
 */
#ifndef FREEFLOW_RELAY_VERBS_MEMORY_H
#define FREEFLOW_RELAY_VERBS_MEMORY_H

#include "mirror.h"
#include "verbs_device.h"

/* The rings of a connection on this host, and those on the peer's. */
struct registration {
        struct verbs_device *device;
        struct ibv_mr *small, *bulk;
};

struct target {
        uint64_t small, bulk;
        uint32_t small_key, bulk_key;
};

/* As the functions of a transport (transport.h). */
int verbs_register_rings(struct mirror *m, struct wire_place *place, char *text);
void verbs_deregister(struct mirror *m);
int verbs_attach(struct mirror *m, const struct wire_place *place, char *text);
void verbs_detach(struct mirror *m);

#endif
