/* The relay's messages to the router: answers to its requests, and what it has to know unasked.
 *
 * Messages that do not fit into the socket wait in a list without a limit: the router is trusted to
 * read.
 */
#ifndef FREEFLOW_RELAY_ANSWERS_H
#define FREEFLOW_RELAY_ANSWERS_H

#include "context.h"

#include <stddef.h>

/* Watches the router's socket; `readable` handles its events. */
void answers_start(void (*readable)(struct watch *watch, uint32_t events));
/* The socket takes data again. */
void answers_flush(void);
/* The router has closed its socket. */
void answers_close(void);
bool router_is_connected(void);
/* False: messages wait to be written. */
bool answers_have_room(void);

/* The first member of every message is a struct relay_message; kind and size are set here. */
void answer(const void *message, size_t size, enum relay_kind kind);
void answer_number(enum relay_kind kind, uint32_t number, uint32_t state);
void answer_outcome(enum relay_kind kind, uint32_t number, int error, const char *text);
/* Frees `frame`, which malloc() gave, once it is written. `size` is that of its data. */
void answer_frame(struct relay_frame *frame, uint32_t size);

#endif
