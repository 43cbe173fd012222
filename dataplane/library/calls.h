/* The calls that stand in front of the C library's. Each asks first whether the descriptor is one of a
 * connection that we look at: one load; everything else goes straight on.
 */
#ifndef FREEFLOW_CALLS_H
#define FREEFLOW_CALLS_H

#include "family.h"
#include "real.h"

#define CALL __attribute__((visibility("default")))
/* Other names of the same function that programs are linked with. */
#define ALSO(name) __attribute__((visibility("default"), alias(#name)))

/* Callers give as many arguments as the call that they mean has; more are taken, as the kernel does. */
#define TAKES_MORE __attribute__((no_sanitize("address")))

/* The check of _FORTIFY_SOURCE: ends the program if `size` is more than there is room for. */
void call_check(size_t size, size_t room);

#endif
