/* Connections that another program inherits must be plain TCP, or a pump (pump.h).
 *
 * A program inherits what stays open over exec, under whatever number. In a child of fork, the
 * child's own table says what that is. A guest (guest.h) uses its host's table, where its changes
 * must not be written. So a connection that a guest duplicates is handed over at once, and before
 * it becomes another program the kernel is asked what its numbers mean.
 */
#ifndef FREEFLOW_INHERIT_H
#define FREEFLOW_INHERIT_H

#include "family.h"

#include <spawn.h>

/* Hand this connection over, whatever its stage is. */
void inherit(int fd, struct end *end, uint64_t key);
/* Before this process, or a child of it, becomes another program: all that it inherits. */
void inherit_all(void);
/* The same for a child that posix_spawn makes, which may duplicate some first. */
void inherit_spawned(const posix_spawn_file_actions_t *actions);
/* The program adds a dup2() of this number to a spawned child's file actions; it destroys the
 * actions. */
void spawned_duplicates(const posix_spawn_file_actions_t *actions, int fd);
void spawned_forgets(const posix_spawn_file_actions_t *actions);

/* In the host of a guest (guest.h), after that has gone: replace what it has handed over. */
void inherit_from_guest(void);

#endif
