/* The library's own descriptors, and the list of all of the process's. */
#ifndef FREEFLOW_OWN_H
#define FREEFLOW_OWN_H

#include "family.h"

/* Moves `fd` above where programs expect descriptors, closed on exec, and returns its new number.
 * Takes over `fd`; -1 if that fails. */
int own_descriptor(int fd);
bool is_own_descriptor(int fd);
/* A system call that the library does not see has closed one of them: clear the table's entries of
 * those that are gone, before their numbers are given again, to the library or to the program. */
void own_lost(void);
/* Close an own descriptor. */
void close_own(int fd);
/* Call `visit` with each open descriptor of the process from `first` on, and with the target of its
 * link in /proc/self/fd, until it returns false. */
enum visited { VISITED_ALL, VISITED_SOME, VISITED_NONE };
enum visited each_descriptor(int first, bool (*visit)(int fd, const char *link));

#endif
