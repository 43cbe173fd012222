/* Which attributes a queue pair needs, and which it may have, to get from one state to another.
 */
#ifndef FREEFLOW_ATTRIBUTE_MASKS_H
#define FREEFLOW_ATTRIBUTE_MASKS_H

#include "verb.h"

#include <stdbool.h>

/* Is `mask` (enum ibv_qp_attr_mask) all that is needed, and nothing that is not allowed? */
bool attribute_mask_is_valid(enum ibv_qp_type type, enum ibv_qp_state from, enum ibv_qp_state to, int mask);

#endif
