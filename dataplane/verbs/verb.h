/* The types of libibverbs, and how its functions are defined here.
 *
 * Debian's header is of one release; ours serves programs of all of them. The structures only grow,
 * and callers say how much of one they know, so any release's header does.
 */
#ifndef FREEFLOW_VERB_H
#define FREEFLOW_VERB_H

#include <infiniband/verbs.h>

/* A function that programs call: `real` in symbols.txt. */
#define VERB __attribute__((visibility("default")))

#endif
