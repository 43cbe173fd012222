/* What test programs share: to say what is wrong, and random numbers that a seed repeats. */
#ifndef FREEFLOW_TEST_CHECK_H
#define FREEFLOW_TEST_CHECK_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* What the program's random numbers begin with; 0: it has none. */
static uint64_t seed;

static inline void fail(const char *file, int line, const char *what)
{
        fprintf(stderr, "%s:%d: %s (seed %llu): %s\n", file, line, what, (unsigned long long)seed,
                strerror(errno));
        _exit(1);
}

#define FAIL(what) fail(__FILE__, __LINE__, what)
#define CHECK(condition) ((condition) ? (void)0 : FAIL(#condition))

/* The next of a series of random numbers, less than `below` (SplitMix64: Steele, Lea and Flood,
 * "Fast splittable pseudorandom number generators", 2014). */
static inline uint64_t any(uint64_t *state, uint64_t below)
{
        *state += UINT64_C(0x9e3779b97f4a7c15);
        uint64_t x = *state;

        x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
        return (x ^ (x >> 31)) % below;
}

/* Is the program to run as `race SECONDS SEED`, until `end`? False: as `rules`. */
static inline bool is_race(int count, char **arguments, time_t *end)
{
        CHECK(count > 1);
        if (strcmp(arguments[1], "rules") == 0)
                return false;
        CHECK(count == 4 && strcmp(arguments[1], "race") == 0);
        *end = time(NULL) + atoi(arguments[2]);
        seed = strtoull(arguments[3], NULL, 10);
        return true;
}

#endif
