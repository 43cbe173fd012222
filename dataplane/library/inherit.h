/* What another program gets of our connections has to be plain TCP, or a pump (pump.h).
 *
 * It gets what stays open over exec, under whatever number. In a child of fork that is what the child's own
 * table says. A child of vfork, and any other that runs in our memory with descriptors of its own, is a
 * guest: the table is its host's, and what the guest changes must not be written there. So a connection that
 * a guest duplicates is handed over at once, and before it becomes another program the kernel is asked what
 * its numbers mean.
 */
#ifndef FREEFLOW_INHERIT_H
#define FREEFLOW_INHERIT_H

#include "family.h"

#include <spawn.h>

/* Hand this connection over, wherever it stands. */
void inherit(int fd, struct end *end, uint64_t key);
/* Before this process, or a child of it, becomes another program: all that it inherits. */
void inherit_all(void);
/* The same for a child that posix_spawn makes, which may duplicate some first. */
void inherit_spawned(const posix_spawn_file_actions_t *actions);
/* The program wants a number to be duplicated in a spawned child; and forgets what it wanted. */
void spawned_duplicates(const posix_spawn_file_actions_t *actions, int fd);
void spawned_forgets(const posix_spawn_file_actions_t *actions);

/* In the host of a guest (guest.h), after that has gone: replace what it has handed over. */
void inherit_from_guest(void);

#endif
