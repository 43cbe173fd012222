#include "agent.h"

#include "client.h"
#include "numbers.h"
#include "progress.h"

#include <dlfcn.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>

enum {
        MOST_ARENAS = 1024,
        OTHER_SOURCES = 3,
        FEW = 16, /* polls: of a program that sleeps in between */
        /* How long it sleeps, in ms: */
        WHILE_POLLED = 1,
        WITH_TIMES = 10, /* requests may have to wait no longer */
        WITHOUT_BELL = 16,
        UNKNOWN_BELL = 1000,
        WITHOUT_ROUTER = 1000,
};

/* An arena with queue pairs. */
struct watched {
        uint32_t arena;
        uint32_t users;
        int bell; /* -1: none yet */
};

static struct {
        struct mutex mutex; /* of what follows */
        struct watched arenas[MOST_ARENAS];
        uint32_t count;
        int wake; /* an eventfd, 1 + its number */
        bool runs;
        _Atomic bool stopping, ended;
} agent;

/* --- bells */

/* Under the mutex: the arena's entry; NULL: none. */
static struct watched *find(uint32_t arena)
{
        for (uint32_t i = 0; i < agent.count; i++)
                if (agent.arenas[i].arena == arena)
                        return &agent.arenas[i];
        return NULL;
}

static void set_bell(void *owner, void *argument)
{
        const struct watched *watched = argument;
        struct queue_pair *queue = owner;

        if (queue_paired(queue) != QUEUE_ALONE &&
            atomic_load_explicit(&queue->place.incarnation, memory_order_relaxed) &&
            atomic_load_explicit(&queue->place.arena, memory_order_relaxed) == watched->arena)
                atomic_store_explicit(&queue->bell, watched->bell, memory_order_release);
}

/* Under the mutex. */
static void wake(void)
{
        const struct freeflow_services *here = client_services();
        uint64_t one = 1;

        if (here && agent.wake && here->is_own_descriptor(agent.wake - 1))
                sys_3(SYS_write, agent.wake - 1, &one, sizeof one);
}

int agent_join(const struct place *place)
{
        const struct freeflow_services *here = client_services();
        uint32_t arena = atomic_load_explicit(&place->arena, memory_order_relaxed);
        struct watched *watched;
        int bell = -1;

        mutex_take(&agent.mutex);
        watched = find(arena);
        if (!watched && agent.count < MOST_ARENAS) {
                watched = &agent.arenas[agent.count++];
                *watched = (struct watched){.arena = arena, .bell = here ? here->bell_take(arena) : -1};
        }
        if (watched) {
                watched->users++;
                bell = watched->bell;
        }
        wake();
        mutex_release(&agent.mutex);
        return bell;
}

void agent_leave(const struct place *place)
{
        const struct freeflow_services *here = client_services();
        struct watched *watched;

        mutex_take(&agent.mutex);
        watched = find(atomic_load_explicit(&place->arena, memory_order_relaxed));
        if (watched && !--watched->users) {
                if (here && watched->bell >= 0)
                        here->bell_return(watched->arena, watched->bell);
                *watched = agent.arenas[--agent.count];
        }
        mutex_release(&agent.mutex);
}

/* --- a turn */

struct turn {
        bool arm;
        bool did;     /* something was executed */
        bool waits;   /* requests are open */
        bool no_bell; /* some queue pair can't be armed */
        bool unasked; /* the router does not know of some */
};

static void go_on(void *owner, void *argument)
{
        struct queue_pair *queue = owner;
        struct turn *turn = argument;

        if (turn->arm && queue_paired(queue) == QUEUE_PAIRED && !progress_arm(queue))
                turn->no_bell = true;
        turn->unasked |= !queue_pairer->ask_again(queue);
        turn->did |= progress_make(queue, NULL, true);
        turn->waits |=
            atomic_load_explicit(&queue->open, memory_order_relaxed) || queue_paired(queue) == QUEUE_ASKED;
}

/* What to wait for, and for how long at most; -1: without end. */
static uint32_t list_sources(const struct freeflow_services *here, struct pollfd *sources, int *patience)
{
        uint32_t count = 0;

        mutex_take(&agent.mutex);
        for (uint32_t i = 0; i < agent.count; i++) {
                struct watched *watched = &agent.arenas[i];
                int most = 0;

                if (watched->bell < 0 && (watched->bell = here->bell_take(watched->arena)) >= 0)
                        most = WHILE_POLLED; /* the next turn arms with it */
                else if (watched->bell < 0)
                        most = WITHOUT_BELL;
                else if (!here->bell_is_known(watched->arena, watched->bell))
                        most = UNKNOWN_BELL;
                if (most && (*patience < 0 || *patience > most))
                        *patience = most;
                sources[count++] = (struct pollfd){
                    .fd = watched->bell < 0 ? -1 : here->bell_descriptor(watched->arena, watched->bell),
                    .events = POLLIN};
        }
        sources[count++] = (struct pollfd){.fd = agent.wake - 1, .events = POLLIN};
        mutex_release(&agent.mutex);
        sources[count++] = (struct pollfd){.fd = here->router_descriptor(), .events = POLLIN};
        sources[count++] = (struct pollfd){.fd = client_descriptor(), .events = POLLIN};
        return count;
}

/* Take what rings. */
static void drain(const struct freeflow_services *here)
{
        uint64_t count;

        mutex_take(&agent.mutex);
        for (uint32_t i = 0; i < agent.count; i++) {
                struct watched *watched = &agent.arenas[i];

                if (watched->bell < 0)
                        continue;
                if (here->bell_descriptor(watched->arena, watched->bell) < 0 ||
                    !here->bell_drain(watched->arena, watched->bell))
                        watched->bell = -1;
                else
                        here->bell_slots(watched->arena, watched->bell);
        }
        sys_3(SYS_read, agent.wake - 1, &count, sizeof count);
        mutex_release(&agent.mutex);
}

/* Each queue pair has the bell of its arena. */
static void share_bells(void)
{
        static struct watched known[MOST_ARENAS];
        uint32_t count;

        mutex_take(&agent.mutex);
        count = agent.count;
        memcpy(known, agent.arenas, count * sizeof *known);
        mutex_release(&agent.mutex);
        for (uint32_t i = 0; i < count; i++)
                numbers_each(set_bell, &known[i]);
}

static void sleep_until_rung(const struct freeflow_services *here, int patience)
{
        static struct pollfd sources[MOST_ARENAS + OTHER_SOURCES];
        uint32_t count = list_sources(here, sources, &patience);
        struct timespec most = {.tv_sec = patience / 1000, .tv_nsec = patience % 1000 * 1000000L};

        sys_5(SYS_ppoll, sources, count, patience < 0 ? NULL : &most, 0, 0);
}

/* Its eventfd; a program that closes descriptors that it does not know may have closed it. */
static void check_wake(const struct freeflow_services *here)
{
        mutex_take(&agent.mutex);
        if (!agent.wake || !here->is_own_descriptor(agent.wake - 1))
                agent.wake =
                    1 + here->own_descriptor((int)sys_2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK));
        mutex_release(&agent.mutex);
}

static int patience_of(const struct turn *turn)
{
        if (!turn->arm)
                return WHILE_POLLED;
        if (turn->waits)
                return WITH_TIMES;
        if (turn->no_bell)
                return WITHOUT_BELL;
        return turn->unasked ? WITHOUT_ROUTER : -1;
}

static void *run(void *unused)
{
        uint32_t before = 0;
        bool unasked = false;

        (void)unused;
        sys_2(SYS_prctl, PR_SET_NAME, "freeflow-verbs");
        while (!atomic_load(&agent.stopping)) {
                const struct freeflow_services *here = client_services();
                uint32_t polls = progress_polls();
                struct turn turn = {.arm = polls - before < FEW};

                if (!here)
                        break;
                before = polls;
                check_wake(here);
                if (unasked)
                        client_open(0);
                client_receive();
                numbers_each(go_on, &turn);
                unasked = turn.unasked;
                if (turn.did && turn.arm)
                        continue;
                sleep_until_rung(here, patience_of(&turn));
                drain(here);
                if (turn.no_bell)
                        share_bells();
        }
        atomic_store(&agent.ended, true);
        return NULL;
}

/* --- its life */

/* Since glibc 2.34 and in musl these are in the C library, before that in others of glibc. */
static void *find_symbol(const char *name)
{
        void *found = dlsym(RTLD_DEFAULT, name);
        void *(*open)(const char *, int) = dlsym(RTLD_DEFAULT, "dlopen");
        void *library = found || !open ? NULL : open("libpthread.so.0", RTLD_NOW);

        return library ? dlsym(library, name) : found;
}

/* Signals go to the program's threads. */
static bool make_thread(void)
{
        int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) =
            find_symbol("pthread_create");
        uint64_t all = UINT64_MAX, before = 0;
        pthread_t thread;
        bool made;

        if (!create)
                return false;
        sys_4(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof all);
        made = create(&thread, NULL, run, NULL) == 0;
        sys_4(SYS_rt_sigprocmask, SIG_SETMASK, &before, 0, sizeof before);
        return made;
}

bool agent_start(void)
{
        mutex_take(&agent.mutex);
        if (!agent.runs)
                agent.runs = make_thread();
        wake();
        mutex_release(&agent.mutex);
        return agent.runs;
}

void agent_forget(void)
{
        memset(&agent, 0, sizeof agent);
}

void agent_stop(void)
{
        enum { PATIENCE = 1000 /* ms */ };
        const struct timespec pause = {.tv_nsec = 1000000};
        uint64_t one = 1;

        atomic_store(&agent.stopping, true);
        for (int i = 0; agent.runs && !atomic_load(&agent.ended) && i < PATIENCE; i++) {
                sys_3(SYS_write, agent.wake - 1, &one, sizeof one);
                sys_2(SYS_nanosleep, &pause, 0);
        }
}
