/* What a queue pair notes of keys of the other side without direct memory (direct.h). */
#ifndef FREEFLOW_DIRECT_NOTES_H
#define FREEFLOW_DIRECT_NOTES_H

#include "queue_pair.h"

enum { DIRECT_WITHOUT = sizeof((struct queue_direct){0}.without) / sizeof(uint32_t) };

/* Under `sending`, as all that follows: the key has no such memory. */
static inline void direct_note_none(struct queue_direct *direct, uint32_t key)
{
        direct->without[direct->next_without++ % DIRECT_WITHOUT] = key;
}

static inline bool direct_has_none(const struct queue_direct *direct, uint32_t key)
{
        for (int i = 0; i < DIRECT_WITHOUT; i++)
                if (direct->without[i] == key)
                        return true;
        return false;
}

/* Nothing is known of the key, and the request that is about to begin could use its memory. */
static inline void direct_note_lacking(struct queue_direct *direct, uint32_t key)
{
        if (direct->left)
                direct->left--;
        else if (!direct->asked && !direct->wanted && key && !direct_has_none(direct, key))
                direct->lacking = key;
}

#endif
