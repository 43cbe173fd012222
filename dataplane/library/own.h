/* Descriptors of the library's own in the program's table: high numbers, closed on exec, marked FD_OWN in
 * `process.fds`.
 */
#ifndef FREEFLOW_OWN_H
#define FREEFLOW_OWN_H

#include "family.h"

/* Move `fd`, which this function closes, to a high number. Returns the new descriptor, or -1. */
int own_descriptor(int fd);
bool is_own_descriptor(int fd);
/* Close an own descriptor. */
void close_own(int fd);

/* Call `visit` with each open descriptor of the process from `first` on, and with the target of its link in
 * /proc, until `visit` returns false. */
enum visited { VISITED_ALL, VISITED_SOME, VISITED_NONE };
enum visited each_descriptor(int first, bool (*visit)(int fd, const char *link));

#endif
