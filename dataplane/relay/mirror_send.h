/* What this relay tells the peer about one connection. */
#ifndef FREEFLOW_RELAY_MIRROR_SEND_H
#define FREEFLOW_RELAY_MIRROR_SEND_H

#include "mirror.h"

/* Adds the connection's bytes to batch `batch` of its link, and fills in the block that goes with
 * them. */
void mirror_send(struct mirror *mirror, struct wire_block *block, uint64_t batch);

#endif
