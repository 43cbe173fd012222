/* Memory of the transport `verbs`: the rings of this host's connections, as the device and the
 * peer's device know them.
 *
 * The peer may write behind the first ring's header in a slot's two pages, and into both bulk
 * areas. All of that belongs to its own connection; the header of direction 1 is in it, and is
 * untrusted anyway.
 *
 * And files for registered memory of this host's processes, which the peer may write to that was
 * told the address and the key (moves.h).
 */
#ifndef FREEFLOW_RELAY_VERBS_MEMORY_H
#define FREEFLOW_RELAY_VERBS_MEMORY_H

#include "lent_files.h"
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

/* A lent file. */
struct file_registration {
        struct verbs_device *device;
        struct ibv_mr *region;
};

/* One of the peer's. */
struct reached_file {
        uint64_t address;
        uint32_t key;
};

/* As the functions of a transport (transport.h). */
int verbs_register_rings(struct mirror *m, struct wire_place *place, char *text);
void verbs_deregister(struct mirror *m);
int verbs_attach(struct mirror *m, const struct wire_place *place, char *text);
void verbs_detach(struct mirror *m);
int verbs_register_file(struct lent_file *file, char *text);
void verbs_deregister_file(struct lent_file *file);
void verbs_place_file(const struct lent_file *file, uint64_t *address, uint64_t *key);
void *verbs_reach(uint64_t address, uint64_t key, uint64_t size);
void verbs_unreach(void *reached);

#endif
