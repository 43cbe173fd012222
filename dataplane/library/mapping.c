#include "mapping.h"

#include "sparse.h"

#include <sys/mman.h>

struct mapping *_Atomic mappings;

struct view end_sends(const struct end *end)
{
        return arena_view(load_relaxed(&end->arena), load_relaxed(&end->slot), load_relaxed(&end->side));
}

struct view end_receives(const struct end *end)
{
        return arena_view(load_relaxed(&end->arena), load_relaxed(&end->slot), 1 - load_relaxed(&end->side));
}

bool mappings_make(void)
{
        if (!mappings)
                mappings = reserve_for_good(ARENAS * sizeof *mappings, MAP_PRIVATE);
        return mappings != NULL;
}

struct mapping *mapping_find(uint64_t id, uint32_t side)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t i = 0; mappings && id && i < high && i < ARENAS; i++)
                if (atomic_load(&mappings[i].id) == id && atomic_load(&family->arenas[i].id) == id &&
                    atomic_load(&family->arenas[i].side) == side)
                        return &mappings[i];
        return NULL;
}
