/* What keeps a connection alive on its way while its bytes don't take that way.
 *
 * Connection tracking, address translation and firewalls in between forget a connection over which no packet
 * has come for a while. A busy connection in shared memory sends none; once it is forgotten, its FIN gets
 * lost, and so does all that goes back to TCP. So the kernel sends keepalive probes for it, as often as the
 * container's own connection tracking needs, and at least every LONGEST seconds.
 *
 * The program sees its own settings of SO_KEEPALIVE and its times, and these hold again when the connection
 * is handed on. A dead peer is found after the time that the program has set. Without keepalive of its own,
 * that takes as many unanswered probes as the kernel sends at most.
 */
#ifndef FREEFLOW_KEEP_H
#define FREEFLOW_KEEP_H

#include "family.h"

#include <sys/socket.h>

/* The connection has moved. */
void keep_begin(int fd, struct end *end);
/* It is handed on. */
void keep_end(int fd, struct end *end);
/* The program has set an option. */
void keep_set(int fd, struct end *end, int level, int name);
/* What the program has set, if the kernel has something else. */
bool keep_get(const struct end *end, int level, int name, int *value);

#endif
