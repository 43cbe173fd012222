/* The contexts that are open. */
#ifndef FREEFLOW_OPENING_H
#define FREEFLOW_OPENING_H

/* A GID of the port is another one: each context has an event. */
void opening_tell_gids_changed(void);
/* With port_forget(). */
void opening_forget(void);

#endif
