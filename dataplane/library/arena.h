/* The life of an arena in this process: mapped when the router grants the first slot, unmapped with
 * the last connection. See mapping.h for what is mapped, bells.h for how waiters are woken.
 */
#ifndef FREEFLOW_ARENA_H
#define FREEFLOW_ARENA_H

#include "bells.h"
#include "mapping.h"
#include "own.h"

/* Take what the router granted. Returns a reason, 0 if the end is attached. `memfd` stays the
 * caller's; `receiving` is the receiving end of bell 0 or -1, and becomes -1 if it is kept. */
uint32_t arena_attach(struct end *end, uint64_t id, uint64_t token, uint32_t side, uint32_t slot,
                      uint64_t incarnation, int memfd, int *receiving);
/* The end is done with its slot, if it has one. */
void arena_release(struct end *end);
/* Copy bytes of a ring from its file instead of its mapping. False: the file can't be read. */
bool arena_copy(const struct end *end, const unsigned char *place, unsigned char *to, size_t size);
void arena_forked(void);
/* Close all bells that this process has. */
void arena_close_bells(void);

#endif
