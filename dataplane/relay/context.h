/* The relay's one context: its epoll instance, clock, settings and counters. The relay has one
 * thread. */
#ifndef FREEFLOW_RELAY_CONTEXT_H
#define FREEFLOW_RELAY_CONTEXT_H

#include "relay_protocol.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/* A parameter that a function has for the sake of its type. */
#define UNUSED __attribute__((unused))

/* A descriptor in the relay's epoll instance, and the function that handles its events. */
struct watch {
        int fd; /* -1: none */
        void (*call)(struct watch *watch, uint32_t events);
};

struct relay {
        int epoll;
        uint32_t core;    /* 1 + core that the thread is on; 0: unknown, or nobody need spin for it */
        bool yields;      /* it lets others run while it spins */
        uint64_t stop_at; /* ns; 0: not asked to stop */
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

void context_start(void);

/* Events are those of epoll; a second call changes them. False: the kernel has no memory for it. */
bool watch_add(struct watch *watch, uint32_t events);
/* Does nothing if it is not being watched. Does not close the descriptor. */
void watch_remove(struct watch *watch);
/* Waits for events, up to `timeout` ms as in epoll_wait(), and handles them. True: there were some.
 */
bool watches_poll(int timeout);

/* Microseconds to spin before a sleep, as libraries do; 0: never. `yields`: let others run
 * meanwhile. */
void relay_set_spin(uint32_t time, bool yields);
/* From now on the relay brings all connections back to TCP, for DRAIN ms at most, and then ends. */
void relay_stop(void);
/* Ends the process: an error after which the relay cannot work. */
_Noreturn void relay_die(const char *what, int error);
/* Zeroed memory. Without any the process ends, and says what it was for. */
void *relay_memory(size_t size, const char *what);
/* Writes the text of an answer that is an error. Returns the error. */
int relay_refuse(char *text, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* A random number that no peer can guess. */
uint64_t relay_random(void);

#endif
