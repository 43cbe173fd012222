/* Memory for calls with many descriptors. A thread keeps it until it ends. A signal handler that
 * comes while its thread uses it gets memory of its own, for one call.
 */
#ifndef FREEFLOW_SCRATCH_H
#define FREEFLOW_SCRATCH_H

#include <stdbool.h>
#include <stddef.h>

enum scratch_use { SCRATCH_WAIT, SCRATCH_KERNEL, SCRATCH_SELECT, SCRATCH_KEYS, SCRATCH_USES };

struct scratch {
        void *memory;
        size_t size;
        bool used;
};

/* Returns NULL with errno set. `own` is for scratch_return(). */
void *scratch_take(enum scratch_use use, size_t size, struct scratch *own);
void scratch_return(enum scratch_use use, struct scratch *own);

#endif
