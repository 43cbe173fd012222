/* Completion queues alone: `completion.h` without queue pairs and channels.
 *
 *      completion rules
 *      completion race SECONDS SEED
 *
 * race: threads put completions in, and one arms, polls and sleeps as programs do. Each completion
 * comes once and in order, and no event is lost, while the queue's size changes.
 */
#include "../../dataplane/verbs/completion.c"
#include "../dataplane/check.h"

#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 2, LIMIT = 64, PATIENCE = 20 };

static struct completions queue;
static time_t end;

static enum completion_outcome put(uint64_t number, bool solicited, bool polling)
{
        struct ibv_wc completion = {.wr_id = number};

        return completions_put(&queue, &completion, solicited, polling);
}

/* --- rules */

/* The numbers of the completions that are there are those from `first` on, so many. */
static void check_there(uint64_t first, uint32_t many)
{
        struct ibv_wc taken[LIMIT];

        CHECK(completions_are_there(&queue) == (many != 0));
        CHECK(completions_take(&queue, LIMIT, taken) == many);
        for (uint32_t i = 0; i < many; i++)
                CHECK(taken[i].wr_id == first + i);
        CHECK(!completions_are_there(&queue));
}

static void check_size(void)
{
        struct ibv_wc taken[2];

        CHECK(completions_start(&queue, 5));
        for (uint64_t i = 0; i < 5; i++)
                CHECK(put(i, false, false) == COMPLETION_QUIET);
        CHECK(completions_take(&queue, 2, taken) == 2 && taken[0].wr_id == 0 && taken[1].wr_id == 1);
        CHECK(completions_resize(&queue, 2) == EINVAL);
        CHECK(completions_resize(&queue, 3) == 0);
        check_there(2, 3);
        for (uint64_t i = 0; i < 3; i++)
                CHECK(put(i, false, false) == COMPLETION_QUIET);
        CHECK(completions_resize(&queue, 20) == 0);
        for (uint64_t i = 3; i < 20; i++)
                CHECK(put(i, false, false) == COMPLETION_QUIET);
        CHECK(put(20, false, false) == COMPLETION_OVERRUN);
        CHECK(put(21, false, false) == COMPLETION_QUIET);
        check_there(0, 20);
        /* A queue that was full has lost something, and stays of no use. */
        CHECK(put(22, false, false) == COMPLETION_QUIET);
        check_there(0, 0);
        completions_end(&queue);
}

static void check_events(void)
{
        struct ibv_wc failed = {.status = IBV_WC_WR_FLUSH_ERR};

        CHECK(completions_start(&queue, LIMIT));
        CHECK(put(0, true, false) == COMPLETION_QUIET);
        /* What was there before is no reason. */
        completions_arm(&queue, false);
        CHECK(completions_settle(&queue) == COMPLETION_QUIET);
        CHECK(put(1, false, false) == COMPLETION_EVENT);
        CHECK(put(2, true, false) == COMPLETION_QUIET);
        completions_arm(&queue, true);
        CHECK(put(3, false, false) == COMPLETION_QUIET);
        CHECK(put(4, true, false) == COMPLETION_EVENT);
        completions_arm(&queue, true);
        CHECK(completions_put(&queue, &failed, false, false) == COMPLETION_EVENT);
        /* Armed for any is more than armed for solicited ones, in either order. */
        completions_arm(&queue, true);
        completions_arm(&queue, false);
        CHECK(put(5, false, false) == COMPLETION_EVENT);
        completions_arm(&queue, false);
        completions_arm(&queue, true);
        CHECK(put(6, false, false) == COMPLETION_EVENT);
        CHECK(completions_take(&queue, LIMIT, (struct ibv_wc[LIMIT]){{0}}) == 8);

        /* A thread that polls takes what it has put in: no event, but the next one causes it. */
        completions_arm(&queue, false);
        CHECK(put(7, false, true) == COMPLETION_QUIET);
        check_there(7, 1);
        CHECK(completions_settle(&queue) == COMPLETION_QUIET);
        CHECK(put(8, false, false) == COMPLETION_EVENT);
        check_there(8, 1);
        /* It leaves some: an event, and only one. */
        completions_arm(&queue, false);
        CHECK(put(9, false, true) == COMPLETION_QUIET && put(10, false, true) == COMPLETION_QUIET);
        CHECK(completions_take(&queue, 1, (struct ibv_wc[1]){{0}}) == 1);
        CHECK(completions_settle(&queue) == COMPLETION_EVENT);
        CHECK(completions_settle(&queue) == COMPLETION_QUIET);
        CHECK(put(11, false, false) == COMPLETION_QUIET);
        check_there(10, 2);
        /* Another thread causes the event before: there is no second one. */
        completions_arm(&queue, false);
        CHECK(put(12, false, true) == COMPLETION_QUIET);
        CHECK(put(13, false, false) == COMPLETION_EVENT);
        CHECK(completions_settle(&queue) == COMPLETION_QUIET);
        check_there(12, 2);
        completions_end(&queue);
}

/* --- race */

static sem_t events;
static _Atomic uint32_t under_way; /* put in or about to be, and not taken */
static _Atomic uint32_t running = THREADS;

/* Before it is put in, as the queue must not overrun. */
static bool reserve(void)
{
        if (atomic_fetch_add(&under_way, 1) < LIMIT / 2)
                return true;
        atomic_fetch_sub(&under_way, 1);
        return false;
}

static void tell(enum completion_outcome outcome)
{
        CHECK(outcome != COMPLETION_OVERRUN);
        if (outcome == COMPLETION_EVENT)
                sem_post(&events);
}

static void *put_in(void *argument)
{
        uint64_t thread = (uintptr_t)argument, random = seed + thread, number = 0;

        while (time(NULL) < end || number < 1000) {
                if (!reserve()) {
                        sched_yield();
                        continue;
                }
                if (any(&random, 50) == 0)
                        usleep(any(&random, 50));
                tell(put(thread << 56 | number++, true, false));
        }
        atomic_fetch_sub(&running, 1);
        /* Whoever sleeps by now would wait for a completion that nobody puts in. */
        sem_post(&events);
        return NULL;
}

static void sleep_until_event(void)
{
        struct timespec until;

        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += PATIENCE;
        while (sem_timedwait(&events, &until) < 0)
                if (errno != EINTR)
                        FAIL("an event was lost");
}

/* Take what is there; now and then, as one who polls, execute something of its own before. */
static uint32_t poll_some(uint64_t *random, uint64_t *next)
{
        struct ibv_wc taken[8];
        uint32_t many;

        if (any(random, 4) == 0 && reserve())
                tell(put((uint64_t)THREADS << 56 | next[THREADS + 1]++, any(random, 2), true));
        many = completions_take(&queue, 1 + (uint32_t)any(random, 8), taken);
        tell(completions_settle(&queue));
        for (uint32_t i = 0; i < many; i++) {
                CHECK((taken[i].wr_id & (UINT64_MAX >> 8)) == next[taken[i].wr_id >> 56]);
                next[taken[i].wr_id >> 56]++;
                atomic_fetch_sub(&under_way, 1);
        }
        return many;
}

static void race(void)
{
        uint64_t random = ~seed, next[THREADS + 2] = {0}, slept = 0;
        pthread_t threads[THREADS];

        CHECK(completions_start(&queue, LIMIT));
        sem_init(&events, 0, 0);
        for (uintptr_t i = 0; i < THREADS; i++)
                CHECK(pthread_create(&threads[i], NULL, put_in, (void *)i) == 0);
        while (atomic_load(&running) || completions_are_there(&queue)) {
                if (any(&random, 100) == 0)
                        CHECK(completions_resize(&queue, LIMIT / 2 + (uint32_t)any(&random, 200)) == 0);
                completions_arm(&queue, any(&random, 2));
                if (poll_some(&random, next) || !atomic_load(&running))
                        continue;
                if (atomic_load(&running) == THREADS && time(NULL) < end) {
                        sleep_until_event();
                        slept++;
                }
        }
        for (int i = 0; i < THREADS; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
        while (poll_some(&random, next))
                ;
        CHECK(next[THREADS] == next[THREADS + 1] && slept);
        completions_end(&queue);
        printf("slept %llu\n", (unsigned long long)slept);
}

int main(int arguments, char **argument)
{
        if (arguments == 2 && strcmp(argument[1], "rules") == 0) {
                check_size();
                check_events();
                return 0;
        }
        if (arguments != 4)
                return 2;
        end = time(NULL) + 1 + atoi(argument[2]);
        seed = strtoull(argument[3], NULL, 0);
        race();
        return 0;
}
