/* What the router said about how to work, and the environment's few words. */
#ifndef FREEFLOW_SETTINGS_H
#define FREEFLOW_SETTINGS_H

#include <stdbool.h>
#include <stdint.h>

struct settings {
        bool welcomed; /* the router has said all this */
        uint32_t enabled;
        uint32_t operations;
        uint32_t age; /* us */
        uint32_t bytes;
        uint32_t bulk;
        uint32_t spin; /* us */
        uint32_t ring_limit;
};

extern struct settings settings;

/* A variable of the environment; NULL. */
const char *environment(const char *name);

#endif
