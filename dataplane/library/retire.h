/* The process does something after which the library must keep out of it: it confines itself to the
 * system calls that it makes itself (seccomp), loads code that is bound past the library, or gets
 * an io_uring.
 */
#ifndef FREEFLOW_RETIRE_H
#define FREEFLOW_RETIRE_H

#include "family.h"

/* Bring all connections of this process back to TCP, and do nothing more: afterwards each call is
 * the C library's own. The process and its family release what they hold of the library. If the
 * reason concerns connections alone (REASON_RAW), a process with verbs keeps those, and only has no
 * connection accelerated any more. */
void retire(uint32_t reason);
/* Before a thread sleeps, without a lock: scan for an io_uring from time to time (io_uring.h), and
 * retire if there is one. */
void retire_if_io_uring(void);
/* Programs that this one becomes or starts are confined as well. */
void retire_heirs(void);

/* Without a lock: retire if `process.retires` says so. */
static inline void retire_if_due(void)
{
        uint32_t reason = load_relaxed(&process.retires);

        if (__builtin_expect(reason != 0, 0))
                retire(reason);
}

#endif
