/* Frames over the session of the routers: how a link goes on whose RDMA can't be had again. */
#ifndef FREEFLOW_RELAY_STREAM_H
#define FREEFLOW_RELAY_STREAM_H

#include "transport.h"

#include <stddef.h>

void stream_frame(struct link *link, const uint8_t *data, size_t size);

#endif
