/* The router's settings, and the environment. */
#ifndef FREEFLOW_SETTINGS_H
#define FREEFLOW_SETTINGS_H

#include <stdbool.h>
#include <stdint.h>

/* Written by the thread that takes the router's WELCOME. */
struct settings {
        _Atomic bool welcomed; /* the router's WELCOME has come */
        _Atomic bool off;      /* whatever the router says */
        _Atomic uint32_t enabled;
        _Atomic uint32_t operations;
        _Atomic uint32_t age; /* us */
        _Atomic uint32_t bytes;
        _Atomic uint32_t bulk;
        _Atomic uint32_t spin; /* us */
        _Atomic uint32_t ring_limit;
        _Atomic uint32_t verbs;   /* the router knows our verbs_protocol.h */
        _Atomic uint32_t greeted; /* 1 + epoch of the socket by which the last WELCOME came */
};

extern struct settings settings;

/* A variable of the environment; NULL. */
const char *environment(const char *name);

#endif
