/* TCP_CORK and TCP_NODELAY of a connection that sends through a ring.
 *
 * Both say whether the kernel holds bytes back to fill a packet. A ring has no packets. So while
 * the ring lasts, the program's settings are only kept here, and setsockopt() needs no system call:
 * there are programs that set and clear TCP_CORK around each answer. When the ring begins, the
 * kernel is made to send what it holds back, because the receiver reads those bytes first. When
 * the ring ends, the kernel gets the program's settings before it gets a byte.
 *
 * A sender with TCP_CORK or MSG_MORE rings its bells as any other does. The kernel sends what it
 * has held back for 200 ms. Nobody could ring a bell at that time if the program computes
 * meanwhile.
 *
 * All changes are compare-and-swap operations on one word, without a lock. cork_end() sets the
 * kernel's options first, and clears the word only if it hasn't changed since. So a thread that
 * finds the word cleared, and calls the kernel, does so last.
 */
#ifndef FREEFLOW_CORK_H
#define FREEFLOW_CORK_H

#include "family.h"

/* Under the sender's lock: its ring has begun. */
void cork_begin(int fd, struct end *end);
/* Its ring ends, and nothing has gone over TCP since it began. */
void cork_end(int fd, struct end *end);
/* Are the program's settings kept, and is this option one of the two? */
bool cork_keeps(const struct end *end, int level, int name);
/* Is this the end of a TCP_CORK that is kept? Nobody needs to ask whether the descriptor still is
 * the connection's: another socket that has got its number has no TCP_CORK to clear. */
bool cork_clears(const struct end *end, int name, int value);
/* The program sets an option. False: it isn't kept, and is the kernel's to set. */
bool cork_set(struct end *end, int level, int name, int value);
/* The program's own value of an option, if it is kept. */
bool cork_get(const struct end *end, int level, int name, int *value);

#endif
