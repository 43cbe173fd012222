#include "mapping.h"

#include "sparse.h"

#include <sys/mman.h>

struct mapping *_Atomic mappings;

static inline struct view sends(const struct place *place)
{
        return arena_view(load_relaxed(&place->arena), load_relaxed(&place->slot),
                          load_relaxed(&place->side));
}

static inline struct view receives(const struct place *place)
{
        return arena_view(load_relaxed(&place->arena), load_relaxed(&place->slot),
                          1 - load_relaxed(&place->side));
}

struct view place_sends(const struct place *place)
{
        return sends(place);
}

struct view place_receives(const struct place *place)
{
        return receives(place);
}

struct view end_sends(const struct end *end)
{
        return sends(&end->place);
}

struct view end_receives(const struct end *end)
{
        return receives(&end->place);
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
