/* The router's requests: each is carried out at once and answered (relay_protocol.h). */
#ifndef FREEFLOW_ROUTER_REQUESTS_H
#define FREEFLOW_ROUTER_REQUESTS_H

void router_requests_start(void);

#endif
