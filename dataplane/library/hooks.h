/* Calls from lower files to higher ones. main.c names the functions. */
#ifndef FREEFLOW_HOOKS_H
#define FREEFLOW_HOOKS_H

#include <stddef.h>

struct hooks {
        /* In a child of fork: what each file must not share with its parent. */
        void (*forked)(void);
        /* Own descriptors were closed by somebody else (own.h): forget those. */
        void (*descriptors_lost)(void);
        /* Under the router's lock: a message has come from the router, with these descriptors. A
         * function that keeps one puts -1 in its place. */
        void (*received)(const void *message, size_t size, int *descriptors, int count);
};

extern const struct hooks hooks;

#endif
