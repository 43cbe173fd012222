/* Calls from lower files to higher ones. main.c names the functions. */
#ifndef FREEFLOW_HOOKS_H
#define FREEFLOW_HOOKS_H

#include <stdbool.h>
#include <stddef.h>

struct hooks {
        /* Before a child of fork is made, and afterwards in the parent. */
        void (*forks)(void);
        void (*fork_done)(bool made);
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
