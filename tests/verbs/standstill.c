/* Moments in which all other threads stand still: `standstill.h`.
 *
 *      standstill rules
 *      standstill race SECONDS SEED
 *
 * race: pages are replaced by others again and again while threads of all kinds write to them, come
 * and go. None of what they write is lost.
 */
#include "../../dataplane/verbs/standstill.c"
#include "../dataplane/check.h"

#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { WRITERS = 3, PAGES = 16, BYTES = PAGES * 4096, WORDS = BYTES / 8 };

static uint64_t *pages;
static _Atomic bool ends;

/* --- rules */

static void note(void *argument)
{
        *(int *)argument = (int)sys_0(SYS_getpid);
}

static void *count_up(void *argument)
{
        _Atomic uint64_t *number = argument;

        while (!ends)
                atomic_fetch_add(number, 1);
        return NULL;
}

static _Atomic uint64_t counted;
static uint64_t seen[2];

static void look_twice(void *argument)
{
        (void)argument;
        seen[0] = counted;
        sys_sleep(5000000);
        seen[1] = counted;
}

/* It waits for all signals there are. */
static void *wait_for_signals(void *argument)
{
        struct timespec patience = {.tv_sec = 60};
        sigset_t all;
        int got = 0;

        (void)argument;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, NULL);
        while ((got = sigtimedwait(&all, NULL, &patience)) < 0 && errno == EINTR)
                ;
        return (void *)(intptr_t)got;
}

static void *sleep_for_a_second(void *argument)
{
        struct timespec second = {.tv_sec = 1};

        CHECK(nanosleep(&second, NULL) == 0 && poll(NULL, 0, 100) == 0);
        sem_wait(argument);
        return NULL;
}

static void check_rules(void)
{
        pthread_t counter, waiter, sleeper;
        sem_t semaphore;
        void *got;
        int process = 0;

        CHECK(standstill(note, &process) && process != getpid());
        CHECK(sem_init(&semaphore, 0, 0) == 0);
        CHECK(pthread_create(&counter, NULL, count_up, &counted) == 0);
        CHECK(pthread_create(&waiter, NULL, wait_for_signals, NULL) == 0);
        CHECK(pthread_create(&sleeper, NULL, sleep_for_a_second, &semaphore) == 0);
        while (!counted)
                ;
        for (int i = 0; i < 20; i++) {
                for (int tries = 0; !standstill(look_twice, NULL); tries++)
                        CHECK(tries < 20); /* on a busy machine */
                CHECK(seen[0] == seen[1]);
                usleep(1000);
        }
        for (int i = 0; counted == seen[1]; i++) {
                CHECK(i < 10000);
                usleep(1000);
        }
        sleep(2);
        CHECK(sem_post(&semaphore) == 0 && pthread_join(sleeper, NULL) == 0);
        CHECK(pthread_kill(waiter, SIGUSR1) == 0 && pthread_join(waiter, &got) == 0);
        CHECK((intptr_t)got == SIGUSR1);
        ends = true;
        CHECK(pthread_join(counter, NULL) == 0);
        /* No child is left, and none was ever there for the program. */
        CHECK(waitpid(-1, NULL, __WALL) == -1 && errno == ECHILD);
}

static _Atomic int32_t traced;

static void *be_traced(void *argument)
{
        (void)argument;
        traced = gettid();
        while (!ends)
                usleep(1000);
        return NULL;
}

/* While somebody else traces a thread there is no standstill, and nothing has happened to any. */
static void check_traced(void)
{
        int told[2], ready[2], status;
        pthread_t thread;
        pid_t tracer;
        char byte;

        ends = false;
        CHECK(pipe(told) == 0 && pipe(ready) == 0);
        CHECK(pthread_create(&thread, NULL, be_traced, NULL) == 0);
        while (!traced)
                ;
        tracer = fork();
        if (!tracer) {
                CHECK(read(told[0], &byte, 1) == 1);
                CHECK(ptrace(PTRACE_SEIZE, traced, NULL, NULL) == 0 && write(ready[1], "", 1) == 1);
                CHECK(read(told[0], &byte, 1) == 1);
                _exit(0);
        }
        prctl(PR_SET_PTRACER, tracer, 0, 0, 0);
        CHECK(write(told[1], "", 1) == 1 && read(ready[0], &byte, 1) == 1);
        for (int i = 0; i < 3; i++)
                CHECK(!standstill(look_twice, NULL));
        CHECK(write(told[1], "", 1) == 1 && waitpid(tracer, &status, 0) == tracer && status == 0);
        for (int tries = 0; !standstill(look_twice, NULL); tries++)
                CHECK(tries < 20);
        ends = true;
        CHECK(pthread_join(thread, NULL) == 0);
}

/* --- race */

static time_t end;
static _Atomic uint64_t written[WRITERS + 1];

/* Each has words of its own. */
static void *write_words(void *argument)
{
        uint64_t number = (uint64_t)(uintptr_t)argument, dice = seed + number, sum = 0;

        while (!ends) {
                volatile uint64_t *word = &pages[any(&dice, WORDS / 4) * 4 + number];

                *word += 1;
                sum++;
        }
        atomic_fetch_add(&written[number], sum);
        return NULL;
}

static void *live_for_a_moment(void *argument)
{
        usleep(100);
        return argument;
}

/* Threads that live for a moment only. */
static void *make_threads(void *argument)
{
        pthread_t thread;

        (void)argument;
        while (!ends) {
                CHECK(pthread_create(&thread, NULL, live_for_a_moment, NULL) == 0);
                CHECK(pthread_join(thread, NULL) == 0);
        }
        return NULL;
}

static int memory;
static _Atomic bool shared;

static void switch_pages(void *argument)
{
        uint64_t *copy = argument;
        int flags = shared ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;

        for (int i = 0; i < WORDS; i++)
                copy[i] = pages[i];
        sys_6(SYS_mmap, pages, BYTES, PROT_READ | PROT_WRITE, flags | MAP_FIXED, shared ? -1 : memory, 0);
        for (int i = 0; i < WORDS; i++)
                pages[i] = copy[i];
        shared = !shared;
}

static void race(void)
{
        pthread_t threads[WRITERS + 1];
        uint64_t sums[4] = {0}, *copy = malloc(BYTES);
        uint32_t switched = 0, failed = 0;

        pages = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memory = memfd_create("pages", MFD_CLOEXEC);
        CHECK(pages != MAP_FAILED && copy && memory >= 0 && ftruncate(memory, BYTES) == 0);
        for (uintptr_t i = 0; i < WRITERS; i++)
                CHECK(pthread_create(&threads[i], NULL, write_words, (void *)i) == 0);
        CHECK(pthread_create(&threads[WRITERS], NULL, make_threads, NULL) == 0);
        while (time(NULL) < end)
                if (standstill(switch_pages, copy))
                        switched++;
                else
                        failed++;
        ends = true;
        for (int i = 0; i <= WRITERS; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
        for (int i = 0; i < WORDS; i++)
                sums[i % 4] += pages[i];
        for (int i = 0; i < WRITERS; i++)
                CHECK(sums[i] == written[i] && sums[i]);
        CHECK(switched > failed);
        printf("%u %u\n", switched, failed);
}

/* Nothing is left of a process that is killed meanwhile. A helper would keep its descriptors. */
static void check_killed(void)
{
        enum { ROUNDS = 300, SECOND = 1000 };

        for (int i = 0; i < ROUNDS; i++) {
                struct pollfd source = {.events = POLLIN};
                int held[2], status, process;
                pid_t child;
                char byte;

                CHECK(pipe(held) == 0);
                child = fork();
                if (!child) {
                        CHECK(write(held[1], "", 1) == 1);
                        while (true)
                                standstill(note, &process);
                }
                close(held[1]);
                CHECK(read(held[0], &byte, 1) == 1);
                usleep((useconds_t)i * 7 % 1000);
                CHECK(kill(child, SIGKILL) == 0 && waitpid(child, &status, 0) == child);
                source.fd = held[0];
                CHECK(poll(&source, 1, 10 * SECOND) == 1 && source.revents & POLLHUP);
                close(held[0]);
        }
}

int main(int count, char **arguments)
{
        if (is_race(count, arguments, &end)) {
                race();
                return 0;
        }
        check_rules();
        check_traced();
        check_killed();
        return 0;
}
