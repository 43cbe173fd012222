/* From TCP to the ring: each direction of an attached connection moves by itself, at a byte
 * position.
 *
 * A receiver sets `ready` at a moment when no call that can't see the ring waits in the kernel. A
 * sender that sees it writes down its position as `start`, at a moment when no send is in the
 * kernel, and goes on in the ring. The receiver takes bytes from TCP up to `start`, never more than
 * were queued before it last found `start` unset, and then from the ring. So it doesn't matter
 * which end attaches first, and whether the other one ever does.
 *
 * fallback.h has the way back.
 */
#ifndef FREEFLOW_UPGRADE_H
#define FREEFLOW_UPGRADE_H

#include "mapping.h"

/* Under the receiver's lock: become ready if that is possible now. Not while several processes have
 * the connection: calls of another one that wait in the kernel can't be told. */
void upgrade_receiver(struct end *end);
/* Under the sender's lock: go to the ring if that is possible now. */
void upgrade_sender(int fd, struct end *end);
/* Under the sender's lock: before the first byte is published. */
void upgrade_start(struct end *end, const struct view *view);

#endif
