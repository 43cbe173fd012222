/* The transports that R_OPEN can name. `stream`, which a link falls back to, is in stream.h. */
#ifndef FREEFLOW_RELAY_TRANSPORTS_H
#define FREEFLOW_RELAY_TRANSPORTS_H

#include "transport.h"

extern const struct transport verbs_transport, loopback_transport;

#ifdef FREEFLOW_TEST
/* In place of `loopback` in builds for tests: the same with faults on purpose
 * (tests/relay/faults.c). */
extern const struct transport faulty_transport;
#endif

#endif
