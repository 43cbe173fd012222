#include "far_segments.h"

#include <stdlib.h>

struct far_segment *far_segment_find(struct far_segment *first, uint32_t key)
{
        while (first && first->key != key)
                first = first->next;
        return first;
}

void far_segment_drop(struct far_segment **first, const struct far_segment *dropped)
{
        struct far_segment *found;

        while (*first && *first != dropped)
                first = &(*first)->next;
        found = *first;
        if (!found)
                return;
        *first = found->next;
        free(found);
}

void far_segments_end(struct far_segment **first)
{
        while (*first)
                far_segment_drop(first, *first);
}
