/* The router's requests: each is carried out at once and answered (protocol.h). */
#ifndef FREEFLOW_RELAY_REQUESTS_H
#define FREEFLOW_RELAY_REQUESTS_H

void requests_start(void);

#endif
