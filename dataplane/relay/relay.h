/* The relay's one context: what it waits for, the clock, and what it counts. */
#ifndef FREEFLOW_RELAY_H
#define FREEFLOW_RELAY_H

#include "protocol.h"

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

struct transport;

/* A descriptor in the relay's epoll instance, and who is called when it has news. */
struct watch {
        int fd; /* -1: none */
        void (*call)(struct watch *watch, uint32_t events);
};

struct relay {
        int epoll;
        uint32_t core;                     /* 1 + core that the thread is on; 0: not known */
        const struct transport *transport; /* what R_OPEN asked for; NULL: nothing yet */
        uint64_t stop_at;                  /* ns; 0: not asked to stop */
        uint64_t counters[RELAY_COUNTERS];
};

extern struct relay relay;

static inline void count(enum relay_counter counter, uint64_t more)
{
        relay.counters[counter] += more;
}

/* Nanoseconds of the monotonic clock. */
static inline uint64_t now(void)
{
        struct timespec time;

        clock_gettime(CLOCK_MONOTONIC, &time);
        return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* False: the kernel has no memory for it. Events are those of epoll; a second call changes them. */
bool watch_add(struct watch *watch, uint32_t events);
/* Also when it isn't there. Doesn't close the descriptor. */
void watch_remove(struct watch *watch);
/* Microseconds to spin before a sleep, as libraries do; 0: never. */
void relay_spin(uint32_t time);
/* Ask all connections to go back to TCP, and end when they have. */
void relay_stop(void);
/* A fault that nothing can go on after. */
_Noreturn void relay_die(const char *what, int error);
/* A random number that no peer can guess. */
uint64_t relay_random(void);

#endif
