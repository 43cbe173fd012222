#include "sleep.h"

#include "bells.h"
#include "raw.h"
#include "ready.h"
#include "reclaim.h"
#include "remote.h"
#include "statistics.h"

#define MS INT64_C(1000000)

enum {
        FIRST = 1, /* ms */
        LONGEST_UNRINGABLE = 1000,
        LONGEST_WITHOUT = 16, /* without a bell, or without the kernel */
};

void sleep_start(struct sleep *sleep, uint64_t deadline)
{
        sleep->deadline = deadline;
        sleep->next = FIRST * MS;
}

int64_t sleep_left(const struct sleep *sleep)
{
        uint64_t present;

        if (!sleep->deadline)
                return -1;
        present = now();
        return present < sleep->deadline ? (int64_t)(sleep->deadline - present) : 0;
}

static int64_t shorter(int64_t left, int64_t most)
{
        return left < 0 || left > most ? most : left;
}

int64_t sleep_duration(struct sleep *sleep, int64_t left, unsigned reasons)
{
        if (reasons & SLEEP_NO_BELL)
                sleep->next = shorter(sleep->next, LONGEST_WITHOUT * MS);
        if (reasons & (SLEEP_NO_BELL | SLEEP_UNRINGABLE) && shorter(left, sleep->next) != left) {
                left = sleep->next;
                sleep->next = shorter(2 * sleep->next, LONGEST_UNRINGABLE * MS);
        }
        if (reasons & SLEEP_DEFERRED)
                left = shorter(left, REMOTE_SLEEP * MS);
        if (reasons & SLEEP_BETWEEN)
                left = shorter(left, FIRST * MS);
        if (reasons & SLEEP_BEYOND)
                left = shorter(left, LONGEST_WITHOUT * MS);
        raw_settle();
        return reclaim_before_sleep(left);
}

int sleep_in_poll(struct pollfd *fds, nfds_t count, int64_t duration, const sigset_t *mask,
                  struct spinner *spinner)
{
        struct timespec time = {.tv_sec = duration / 1000000000, .tv_nsec = duration % 1000000000};
        uint64_t begin = now();
        int got;

        statistics_count(&statistics.sleeps);
        got = real()->ppoll(fds, count, duration < 0 ? NULL : &time, mask);
        if (spinner)
                spin_slept(spinner, now() - begin);
        return got;
}

void sleep_arm(struct end *end, int bell, bool bytes, bool room)
{
        if (bytes)
                wait_begin(&end_receives(end).ring->receivers, bell);
        if (room) {
                ready_set_threshold(end);
                wait_begin(&end_sends(end).ring->senders, bell);
        }
}

bool sleep_without_bell(struct end *end, uint32_t arena)
{
        if (bell_is_ordered(arena))
                return false;
        request_stop(end);
        return true;
}
