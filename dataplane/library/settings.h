/* What the router said about how to work, and the environment's few words. */
#ifndef FREEFLOW_SETTINGS_H
#define FREEFLOW_SETTINGS_H

#include <stdbool.h>
#include <stdint.h>

/* Written by whichever thread hears from the router. */
struct settings {
        _Atomic bool welcomed; /* the router has said all this */
        _Atomic uint32_t enabled;
        _Atomic uint32_t operations;
        _Atomic uint32_t age; /* us */
        _Atomic uint32_t bytes;
        _Atomic uint32_t bulk;
        _Atomic uint32_t spin; /* us */
        _Atomic uint32_t ring_limit;
};

extern struct settings settings;

/* A variable of the environment; NULL. */
const char *environment(const char *name);

#endif
