/* How a thread waits, whatever it waits for: a read or write of one connection (wait.c), poll() and
 * select() (poll_wait.c), or an epoll instance (poller_wait.c). The steps, in this order:
 *
 *      1. check      is it there already?
 *      2. spin       check for a while, if that pays: spin_until(), spin.h
 *      3. arm        have the peer ring our bell: sleep_arm()
 *      4. check      again: what came between 1 and 3 rings no bell
 *      5. sleep      in the kernel, on TCP's descriptors and bells; sleep_duration() says how long
 *      6. disarm     an epoll instance stays armed instead
 *
 * Steps 3 and 4 pair with the peer's: it publishes, then reads the waiter's bit. Full fences
 * between the two steps of either side (wait_begin(), wake()) make sure that the peer sees the bit
 * or we see what it has published. So no wake-up is lost.
 *
 * A sleep is short where no bell and no descriptor would end it: while there is no bell, while the
 * peer can't ring it yet, or while TCP's descriptor is left out. Short sleeps double each time.
 */
#ifndef FREEFLOW_SLEEP_H
#define FREEFLOW_SLEEP_H

#include "clock.h"
#include "family.h"
#include "spin.h"
#include "sys.h"

#include <poll.h>
#include <signal.h>

/* Reasons for a short sleep. */
enum {
        SLEEP_UNRINGABLE = 1, /* the peer can't ring the bell yet: at most 1 s */
        SLEEP_NO_BELL = 2,    /* there is none: at most 16 ms */
        SLEEP_DEFERRED = 4,   /* TCP's descriptor is left out (remote.h): at most REMOTE_SLEEP */
        SLEEP_BETWEEN = 8,    /* see ready_between(): 1 ms */
        SLEEP_BEYOND = 16,    /* see wait_for(): the kernel can't report that: at most 16 ms */
};

struct sleep {
        uint64_t deadline; /* ns of now(); 0: none */
        int64_t next;      /* ns: the next short sleep */
};

/* The deadline of a wait with this timeout in ns; negative: without a time limit. */
static inline uint64_t sleep_deadline(int64_t timeout)
{
        return timeout > 0 ? now() + (uint64_t)timeout : 0;
}

void sleep_start(struct sleep *sleep, uint64_t deadline);
/* ns until the deadline, 0 if it has passed, negative if there is none. */
int64_t sleep_left(const struct sleep *sleep);
/* How long to sleep with `left` ns until the deadline, in ns; negative: until something comes. Does
 * what has to be done before a sleep. */
int64_t sleep_duration(struct sleep *sleep, int64_t left, unsigned reasons);
/* ppoll() for so many ns. `spinner` learns how long it took; NULL. */
int sleep_in_poll(struct pollfd *fds, nfds_t count, int64_t duration, const sigset_t *mask,
                  struct spinner *spinner);

/* Have the peer ring this bell when bytes, or room, come to the end. The caller checks again
 * afterwards. */
void sleep_arm(struct end *end, int bell, bool bytes, bool room);
/* A reader has no bell: unless one is on its way, have the sender fall back to TCP, where the
 * kernel wakes the reader. Until then the reader's sleeps are short. Returns false if a bell is on
 * its way. */
bool sleep_without_bell(struct end *end, uint32_t arena);

/* Milliseconds of poll() and a timespec in ns; negative: without a time limit. */
static inline int64_t sleep_ms(int ms)
{
        return ms < 0 ? -1 : ms * INT64_C(1000000);
}

/* Some hundred years, which ns can't express, are without a time limit. */
static inline int64_t sleep_timespec(const struct timespec *time)
{
        return time && time->tv_sec < INT64_MAX / INT64_C(2000000000)
                   ? time->tv_sec * INT64_C(1000000000) + time->tv_nsec
                   : -1;
}

static inline bool sleep_is_timespec(const struct timespec *time)
{
        return !time || (time->tv_sec >= 0 && time->tv_nsec >= 0 && time->tv_nsec < 1000000000);
}

/* Spin for `budget` ns until `check` finds something. Returns what it found, 0: nothing. Inlined,
 * so that the check is no call through a pointer. */
static inline __attribute__((always_inline)) int spin_until(struct spinner *spinner, uint64_t budget,
                                                            int (*check)(void *), void *context)
{
        uint64_t begin;
        int found = 0;

        if (!budget)
                return 0;
        begin = now();
        do
                for (int i = 0; i < SPIN_CHECKS && !found; i++) {
                        relax();
                        found = check(context);
                }
        while (!found && now() - begin < budget);
        spin_learn(spinner, found != 0, budget, now() - begin);
        return found;
}

#endif
