/* Which slot of which arena somebody has: an end of a connection (end.h), or a queue pair of
 * libibverbs (services.h). arena.h takes slots and gives them back.
 */
#ifndef FREEFLOW_PLACE_H
#define FREEFLOW_PLACE_H

#include <stdatomic.h>
#include <stdint.h>

struct place {
        _Atomic uint64_t incarnation; /* of the slot, as the router granted it; 0: there is no slot */
        _Atomic uint32_t arena;       /* index into family.arenas */
        _Atomic uint16_t side;
        _Atomic uint16_t slot;
};

#endif
