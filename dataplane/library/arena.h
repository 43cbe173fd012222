/* The life of an arena in this process: mapped when the router grants the first slot, unmapped with
 * the last one. See mapping.h for what is mapped, bells.h for how waiters are woken.
 */
#ifndef FREEFLOW_ARENA_H
#define FREEFLOW_ARENA_H

#include "bells.h"
#include "mapping.h"
#include "own.h"

struct release;

/* What the router has granted: GRANT and V_GRANT. */
struct granted {
        uint64_t arena, token, incarnation;
        uint32_t side, slot;
};

/* Take it, for an end or for a queue pair. Returns a reason, 0 if the slot is taken. `memfd` stays
 * the caller's; `receiving` is the receiving end of bell 0 or -1, and becomes -1 if it is kept. */
uint32_t arena_attach(struct end *end, const struct granted *granted, int memfd, int *receiving);
uint32_t arena_take(struct place *place, const struct granted *granted, int memfd, int *receiving);
/* The end is done with its slot, if it has one. */
void arena_release(struct end *end);
/* The queue pair is: true: `message` is to be sent. */
bool arena_give_back(struct place *place, struct release *message);
/* Copy bytes of a ring from its file instead of its mapping. False: the file can't be read. */
bool arena_copy(const struct end *end, const unsigned char *place, unsigned char *to, size_t size);
void arena_forked(void);
/* Close all bells that this process has. */
void arena_close_bells(void);

#endif
