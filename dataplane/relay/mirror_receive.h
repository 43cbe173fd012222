/* What the peer's relay tells this one about one connection. */
#ifndef FREEFLOW_RELAY_MIRROR_RECEIVE_H
#define FREEFLOW_RELAY_MIRROR_RECEIVE_H

#include "mirror.h"

/* Handles a block of the peer's. Invalid ones break the connection. May free it. */
void mirror_receive(struct mirror *mirror, const struct wire_block *block);

#endif
