/* What a queue pair knows of the memory of the other side on another host (far_memory.h). */
#ifndef FREEFLOW_FAR_SEGMENTS_H
#define FREEFLOW_FAR_SEGMENTS_H

#include <stdint.h>

/* Memory of one key. */
struct far_segment {
        struct far_segment *next;
        uint32_t key;
        uint64_t base; /* the key's address of the first byte */
        uint64_t length;
        uint64_t file, token, offset; /* where it is, in the other relay's file */
};

/* NULL: there is none. */
struct far_segment *far_segment_find(struct far_segment *first, uint32_t key);
void far_segment_drop(struct far_segment **first, const struct far_segment *dropped);
void far_segments_end(struct far_segment **first);

#endif
