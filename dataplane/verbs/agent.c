#include "agent.h"

#include "client.h"
#include "datagrams.h"
#include "extents.h"
#include "monotonic.h"
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
        ONCE_MORE = 1000,    /* for want of a router, or of a moment to replace pages */
        SPIN = 50000,        /* ns since something was found */
        SPIN_MOST = 1000000, /* ns: others wait */
        SPIN_ONCE = 8,       /* looks between two at the clock */
        SPIN_REST = 8,       /* sleeps without a spin after one in vain, doubled each time up to */
        SPIN_REST_MOST = 256,
        /* To the router, of what queue pairs have done: */
        BETWEEN_REPORTS = 1000,
        REPORTED = 64, /* queue pairs at once, about: the router serves others, too */
};

/* An arena with queue pairs. */
struct watched {
        uint32_t arena;
        uint32_t users;
        int bell;                       /* -1: none yet */
        uint32_t numbers[SIDES][SLOTS]; /* of whose slots they are; 0: of others */
};

static struct {
        struct mutex mutex; /* of what follows */
        struct watched arenas[MOST_ARENAS];
        uint32_t count;
        int wake;                             /* an eventfd, 1 + its number */
        const struct freeflow_services *here; /* that know whether it is still ours */
        bool runs;
        _Atomic bool stopping, ended;
} agent;

static int (*_Atomic visited)(void);

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
        uint64_t one = 1;

        if (agent.wake && agent.here->is_own_descriptor(agent.wake - 1))
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

void agent_serve(const struct place *place, uint32_t number)
{
        uint32_t side = atomic_load_explicit(&place->side, memory_order_relaxed);
        uint32_t slot = atomic_load_explicit(&place->slot, memory_order_relaxed);
        struct watched *watched;

        mutex_take(&agent.mutex);
        watched = find(atomic_load_explicit(&place->arena, memory_order_relaxed));
        if (watched)
                watched->numbers[side % SIDES][slot % SLOTS] = number;
        mutex_release(&agent.mutex);
}

void agent_leave(const struct place *place)
{
        const struct freeflow_services *here = client_services();
        struct watched *watched;

        agent_serve(place, 0);
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
        bool all;       /* queue pairs, or only those whose bells have rung */
        bool arm;       /* no program polls */
        bool unarmed;   /* one did when some queue pairs went on: not all are armed */
        bool spins;     /* and looks by itself */
        bool did;       /* something was executed */
        bool waits;     /* requests are open */
        bool no_bell;   /* some queue pair can't be armed */
        bool unasked;   /* the router does not know of some */
        bool unsettled; /* some extents can't be settled for now */
        int visit;      /* ms until the next visit() is due; -1: not for its own sake */
        /* Of what they have done: */
        bool tells;       /* the router is to hear of it */
        uint32_t untold;  /* queue pairs of which it has not */
        uint32_t reports; /* so far */
        uint32_t rounds;  /* reports in which all are told of */
        int64_t reported; /* when the last one was, in ms */
};

/* Slots of an arena in which something has happened. */
struct rung {
        uint32_t arena;
        uint64_t slots;
};

/* What the thread waits for: the bells of arenas, and others behind them. */
static struct pollfd sources[MOST_ARENAS + OTHER_SOURCES];
static struct rung rings[MOST_ARENAS];
static uint32_t bells;
/* An arena has another bell than before, of which its queue pairs don't know. */
static bool rehung;

/* A router that is not quick to read hears no more this time. */
static void report(struct queue_pair *queue, struct turn *turn)
{
        bool now = turn->tells && queue->plain.qp_base.qp_num % turn->rounds == turn->reports % turn->rounds;

        if (queue_pairer->tell(queue, now))
                return;
        /* Those whose bells ring come more than once. */
        turn->untold = turn->all ? turn->untold + 1 : turn->untold | 1;
        turn->tells &= !now;
}

static void go_on(void *owner, void *argument)
{
        struct queue_pair *queue = owner;
        struct turn *turn = argument;

        if (turn->spins)
                progress_disarm(queue);
        else if (turn->arm && queue_paired(queue) == QUEUE_PAIRED && !progress_arm(queue))
                turn->no_bell = true;
        if (turn->all)
                turn->unasked |= !queue_pairer->ask_again(queue);
        turn->did |= progress_make(queue, NULL, true);
        report(queue, turn);
        turn->waits |=
            atomic_load_explicit(&queue->open, memory_order_relaxed) || queue_paired(queue) == QUEUE_ASKED;
}

static void go_on_sending(void *owner, void *argument)
{
        struct queue_pair *queue = owner;

        if (queue_has_datagrams(queue) && atomic_load_explicit(&queue->open, memory_order_relaxed))
                go_on(queue, argument);
}

/* Something has come of a peer, or there is room in its ring for datagrams of whatever queue pairs
 * wait. */
static void go_on_with_peer(struct datagram_peer *peer, struct turn *turn)
{
        if (turn->spins)
                datagrams_disarm_one(peer);
        else if (turn->arm && !datagrams_arm_one(peer))
                turn->no_bell = true;
        turn->did |= datagrams_take_from(peer);
        turn->waits |= datagrams_are_held();
        if (atomic_load_explicit(&peer->crowded, memory_order_relaxed) &&
            atomic_exchange_explicit(&peer->crowded, false, memory_order_relaxed))
                numbers_each(go_on_sending, turn);
        datagrams_check_one(peer);
}

/* The owner of a slot whose bell has rung. */
static void go_on_with(uint32_t owner, struct turn *turn)
{
        if (owner & AGENT_DATAGRAMS)
                go_on_with_peer(atomic_load(&datagram_peers[owner % MOST_DATAGRAM_PEERS]), turn);
        else
                number_use(owner, go_on, turn);
}

/* True: there is a slot whose owner is not known. */
static bool owners_of(const struct rung *rung, uint32_t numbers[SIDES * SLOTS], uint32_t *count)
{
        const struct watched *watched;
        bool unknown = true;

        *count = 0;
        mutex_take(&agent.mutex);
        watched = find(rung->arena);
        if (watched) {
                unknown = false;
                for (uint64_t slots = rung->slots; slots; slots &= slots - 1) {
                        int slot = __builtin_ctzll(slots);
                        uint32_t before = *count;

                        for (int side = 0; side < SIDES; side++)
                                if (watched->numbers[side][slot])
                                        numbers[(*count)++] = watched->numbers[side][slot];
                        unknown |= *count == before;
                }
        }
        mutex_release(&agent.mutex);
        return unknown;
}

/* Those whose bells have rung. */
static void go_on_some(struct turn *turn)
{
        uint32_t numbers[SIDES * SLOTS], count;

        for (uint32_t i = 0; i < bells; i++) {
                if (!rings[i].slots)
                        continue;
                owners_of(&rings[i], numbers, &count);
                for (uint32_t j = 0; j < count; j++)
                        go_on_with(numbers[j], turn);
        }
}

static void add_source(int fd)
{
        sources[bells++] = (struct pollfd){.fd = fd, .events = POLLIN};
}

/* List the bells. Returns for how long it may wait at most, in ms, for want of one; -1: without
 * end. */
static int list_bells(const struct freeflow_services *here)
{
        int patience = -1;

        bells = 0;
        mutex_take(&agent.mutex);
        for (uint32_t i = 0; i < agent.count; i++) {
                struct watched *watched = &agent.arenas[i];
                int most = 0;

                if (watched->bell >= 0 && here->bell_descriptor(watched->arena, watched->bell) < 0)
                        watched->bell = -1;
                if (watched->bell < 0 && (watched->bell = here->bell_take(watched->arena)) >= 0)
                        rehung = true;
                else if (watched->bell < 0)
                        most = WITHOUT_BELL;
                else if (!here->bell_is_known(watched->arena, watched->bell))
                        most = UNKNOWN_BELL;
                if (most && (patience < 0 || patience > most))
                        patience = most;
                rings[bells] = (struct rung){.arena = watched->arena};
                add_source(watched->bell < 0 ? -1 : here->bell_descriptor(watched->arena, watched->bell));
        }
        mutex_release(&agent.mutex);
        /* The next turn arms with it. */
        return rehung ? WHILE_POLLED : patience;
}

/* Take what rings. True: it is not known for whom. */
static bool drain(const struct freeflow_services *here)
{
        uint32_t numbers[SIDES * SLOTS], count;
        struct watched *watched;
        bool unknown = false;

        for (uint32_t i = 0; i < bells; i++) {
                if (!sources[i].revents)
                        continue;
                mutex_take(&agent.mutex);
                watched = find(rings[i].arena);
                if (watched && watched->bell >= 0) {
                        if (!here->bell_drain(watched->arena, watched->bell))
                                watched->bell = -1;
                        else
                                rings[i].slots = here->bell_slots(watched->arena, watched->bell);
                }
                unknown |= !watched || watched->bell < 0;
                mutex_release(&agent.mutex);
                unknown |= owners_of(&rings[i], numbers, &count);
        }
        return unknown;
}

/* Each queue pair has the bell of its arena. */
static void share_bells(void)
{
        rehung = false;
        for (uint32_t i = 0; i < bells; i++) {
                struct watched known = {.arena = rings[i].arena, .bell = -1};
                const struct watched *watched;

                mutex_take(&agent.mutex);
                watched = find(known.arena);
                if (watched)
                        known.bell = watched->bell;
                mutex_release(&agent.mutex);
                numbers_each(set_bell, &known);
                datagrams_set_bell(known.arena, known.bell);
        }
}

/* The shorter one of two times; -1 is without end. */
static int shorter(int one, int other)
{
        return other < 0 || (one >= 0 && one < other) ? one : other;
}

/* Wait for so long at most. True: all queue pairs are to go on, as something else than a bell has
 * woken it, or nothing. */
static bool sleep_until_rung(const struct freeflow_services *here, int patience)
{
        struct timespec most;
        uint64_t taken;
        bool woken = false;
        int found;

        patience = shorter(patience, list_bells(here));
        most = (struct timespec){.tv_sec = patience / 1000, .tv_nsec = patience % 1000 * 1000000L};
        sources[bells] = (struct pollfd){.fd = agent.wake - 1, .events = POLLIN};
        sources[bells + 1] = (struct pollfd){.fd = here->router_descriptor(),
                                             .events = client_keeps() ? POLLIN | POLLOUT : POLLIN};
        sources[bells + 2] = (struct pollfd){.fd = client_descriptor(), .events = POLLIN};
        found = (int)sys_5(SYS_ppoll, sources, bells + OTHER_SOURCES, patience < 0 ? NULL : &most, 0, 0);
        if (found <= 0)
                return true;
        for (int i = 0; i < OTHER_SOURCES; i++)
                woken |= sources[bells + (uint32_t)i].revents != 0;
        if (sources[bells].revents & POLLIN)
                sys_3(SYS_read, agent.wake - 1, &taken, sizeof taken);
        return drain(here) || woken || rehung;
}

/* Its eventfd; a program that closes descriptors that it does not know may have closed it. */
static void check_wake(const struct freeflow_services *here)
{
        mutex_take(&agent.mutex);
        agent.here = here;
        if (!agent.wake || !here->is_own_descriptor(agent.wake - 1))
                agent.wake =
                    1 + here->own_descriptor((int)sys_2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK));
        mutex_release(&agent.mutex);
}

static int patience_of(const struct turn *turn)
{
        if (turn->unarmed)
                return WHILE_POLLED;
        if (turn->waits)
                return WITH_TIMES;
        if (turn->no_bell)
                return WITHOUT_BELL;
        if (turn->unasked || turn->unsettled)
                return ONCE_MORE;
        return turn->untold ? BETWEEN_REPORTS : -1;
}

static int visit(void)
{
        int (*turn)(void) = atomic_load(&visited);

        return turn ? turn() : -1;
}

void agent_visit(int (*turn)(void))
{
        atomic_store(&visited, turn);
}

/* When the next turn for all queue pairs is due. */
static struct {
        int64_t last; /* ms */
        int patience; /* ms from then on; -1: whenever something happens */
} due;

static int64_t milliseconds(void)
{
        return (int64_t)(monotonic() / 1000000);
}

/* --- spinning */

static struct {
        uint32_t rest; /* after the next spin in vain */
        uint32_t left; /* sleeps without one */
} spinning;

/* True: something was executed. */
static bool look(struct turn *turn)
{
        turn->did = false;
        go_on_some(turn);
        return turn->did;
}

static void learn(bool found)
{
        if (found)
                spinning.rest = 0;
        else if (spinning.rest < SPIN_REST_MOST)
                spinning.rest = spinning.rest ? spinning.rest * 2 : SPIN_REST;
        spinning.left = spinning.rest;
}

/* Look for more of those whose bells have rung. They are not armed afterwards. */
static void spin(struct turn *turn)
{
        uint64_t begin = monotonic(), now = begin, last = begin;
        bool found = false;

        do {
                for (int i = 0; i < SPIN_ONCE; i++) {
                        relax();
                        if (!look(turn))
                                continue;
                        found = true;
                        last = now;
                }
                now = monotonic();
        } while (now - last < SPIN && now - begin < SPIN_MOST);
        learn(found);
}

/* Those whose bells have rung go on. */
static void serve(struct turn *turn)
{
        turn->spins = turn->arm && !spinning.left;
        if (turn->spins) {
                look(turn);
                spin(turn);
                turn->spins = false;
        } else if (turn->arm) {
                spinning.left--;
        }
        look(turn);
}

/* All queue pairs go on, which takes the longer the more there are. */
static void go_on_all(struct turn *turn)
{
        if (turn->no_bell || rehung)
                share_bells();
        turn->waits = turn->no_bell = false;
        if (turn->untold && milliseconds() - turn->reported >= BETWEEN_REPORTS) {
                turn->tells = true;
                turn->reported = milliseconds();
                turn->rounds = 1 + turn->untold / REPORTED;
                turn->reports++;
        }
        turn->untold = 0;
        if (turn->unasked)
                client_open(0);
        turn->unasked = false;
        turn->unsettled = !extents_settle();
        client_receive();
        if (turn->arm && !datagrams_arm())
                turn->no_bell = true;
        numbers_each(go_on, turn);
        turn->did |= datagrams_take(NULL, true);
        turn->waits |= datagrams_are_held();
        datagrams_check();
        turn->tells = false;
        turn->visit = visit();
}

static void *run(void *unused)
{
        struct turn turn = {.all = true};
        uint32_t polls, before = 0;

        (void)unused;
        sys_2(SYS_prctl, PR_SET_NAME, "freeflow-verbs");
        while (!atomic_load(&agent.stopping)) {
                const struct freeflow_services *here = client_services();
                int64_t left = 0;

                if (!here)
                        break;
                check_wake(here);
                polls = progress_polls();
                turn.arm = polls - before < FEW;
                before = polls;
                turn.did = false;
                if (turn.all)
                        go_on_all(&turn);
                else
                        serve(&turn);
                turn.unarmed = !turn.arm || (turn.unarmed && !turn.all);
                if (turn.all)
                        due.last = milliseconds();
                due.patience = shorter(patience_of(&turn), turn.visit);
                if (turn.did && turn.arm)
                        continue;
                if (due.patience >= 0)
                        left = due.last + due.patience - milliseconds();
                turn.all = left < 0 || sleep_until_rung(here, due.patience < 0 ? -1 : (int)left);
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

        atomic_store(&agent.stopping, true);
        for (int i = 0; agent.runs && !atomic_load(&agent.ended) && i < PATIENCE; i++) {
                mutex_take(&agent.mutex);
                wake();
                mutex_release(&agent.mutex);
                sys_2(SYS_nanosleep, &pause, 0);
        }
}
