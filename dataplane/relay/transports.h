/* The transports that R_OPEN can name, and those of them that are open. `stream`, which a link
 * falls back to, is in stream.h. */
#ifndef FREEFLOW_RELAY_TRANSPORTS_H
#define FREEFLOW_RELAY_TRANSPORTS_H

#include "transport.h"

extern const struct transport verbs_transport, tcp_transport;

/* Only in builds for tests and measurements. */
#ifdef FREEFLOW_MEMORY
extern const struct transport loopback_transport;
#endif

#ifdef FREEFLOW_TEST
/* In place of `loopback` and `tcp` in builds for tests: the same with faults on purpose
 * (tests/relay/faults.c, tcp_faults.c). */
extern const struct transport faulty_transport;
extern struct transport faulty_tcp_transport;
#endif

/* R_OPEN. errno, with a text. */
int transports_open(const struct relay_open *request, uint32_t *mtu, char *text);
/* Microseconds for which the relay spins: the most that R_OPEN named for one that is open. */
uint32_t transports_spin(void);
/* Is none open that brings its messages to memory, where only a spin finds them soon? */
bool transports_yield(void);
/* NULL: there is no such transport, or it is not open. */
const struct transport *transport_opened(uint32_t kind);
/* As the functions of a transport, for all that are open. */
bool transports_poll(void);
bool transports_flush(void);
bool transports_arm(void);
uint64_t transports_tick(uint64_t present);

#endif
