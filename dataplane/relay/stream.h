/* The transport `stream`: frames over the session of the two routers. A link falls back to it when
 * its device is lost. */
#ifndef FREEFLOW_RELAY_STREAM_H
#define FREEFLOW_RELAY_STREAM_H

#include "transport.h"

#include <stddef.h>

extern const struct transport stream_transport;

/* A frame has come from the peer's relay. */
void stream_receive(struct link *link, const uint8_t *data, size_t size);

#endif
