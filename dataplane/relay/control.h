/* The relay's socket to the router: what it asks for is done here, step by step, and answered.
 *
 * Answers that don't fit into the socket wait in a list; the router is believed to read.
 */
#ifndef FREEFLOW_RELAY_CONTROL_H
#define FREEFLOW_RELAY_CONTROL_H

#include "protocol.h"

#include <stdbool.h>

void control_start(void);
void control_number(enum relay_kind kind, uint32_t number, uint32_t state);
void control_outcome(enum relay_kind kind, uint32_t number, int error, const char *text);
/* Takes over a frame that malloc() gave; its message's kind and size are set here. */
void control_frame(struct relay_frame *frame, uint32_t size);
/* Is there a router? */
bool control_is_there(void);
/* Does nothing wait to be written? */
bool control_has_room(void);

#endif
