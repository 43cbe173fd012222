/* Keepalive probes of a TCP connection whose bytes go through a ring.
 *
 * Connection tracking, address translation and firewalls on the path forget a connection over which
 * no packet has come for a while. A busy connection in shared memory sends none. Once it is
 * forgotten, its FIN is lost, and so is all that goes over TCP after a fallback. So the kernel
 * sends keepalive probes for it, as often as the container's own connection tracking needs, and at
 * least every LONGEST seconds.
 *
 * The program sees its own settings of SO_KEEPALIVE and its times, and they hold again after a
 * fallback. A dead peer is detected after the time that the program has set. If the program has no
 * keepalive of its own, detection takes as many unanswered probes as the kernel sends at most.
 */
#ifndef FREEFLOW_KEEP_H
#define FREEFLOW_KEEP_H

#include "family.h"

/* The end is attached. */
void keep_begin(int fd, struct end *end);
/* It falls back to TCP. */
void keep_end(int fd, struct end *end);
/* The program has set an option. */
void keep_set(int fd, struct end *end, int level, int name);
/* The program's own value of an option, if the kernel has another one. */
bool keep_get(const struct end *end, int level, int name, int *value);

#endif
