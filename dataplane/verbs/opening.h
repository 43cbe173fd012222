/* The contexts that are open. */
#ifndef FREEFLOW_OPENING_H
#define FREEFLOW_OPENING_H

#include <stdbool.h>

/* A GID of the port is another one: each context has an event. */
void opening_tell_gids_changed(void);
/* The port has become active, or down: of both, each context has the last one. */
void opening_tell_port(bool active);
/* With port_forget(). */
void opening_forget(void);

#endif
