/* The calls that the library wraps. Each first checks, by one load, whether the descriptor is one
 * of a tracked connection. Everything else goes straight to the C library.
 */
#ifndef FREEFLOW_CALLS_H
#define FREEFLOW_CALLS_H

#include "family.h"
#include "real.h"

#define CALL __attribute__((visibility("default")))
/* Another name of the same function that programs are linked with. It is declared as strictly as
 * any that it may stand for; nobody here calls it. */
#define ALSO(name) __attribute__((visibility("default"), nothrow, leaf, alias(#name)))

/* Variadic system calls: a caller passes as many arguments as its call has; the function reads
 * more, as the kernel does. */
#define TAKES_MORE __attribute__((no_sanitize("address")))

/* The check of _FORTIFY_SOURCE: ends the program if `size` is more than there is room for. */
void call_check(size_t size, size_t room);

#endif
