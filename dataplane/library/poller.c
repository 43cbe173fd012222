#include "poller.h"

#include "arena.h"
#include "clock.h"
#include "lock.h"
#include "protocol.h"
#include "ready.h"
#include "real.h"
#include "reclaim.h"
#include "remote.h"
#include "sparse.h"
#include "spin.h"
#include "statistics.h"
#include "sys.h"
#include "upgrade.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

enum {
        POLLERS = 4096,
        REGISTRATIONS = 1 << 18,
        GENERATIONS = 1 << 14, /* with a registration's number 32 bits */
        ASKED = 8,             /* times that the kernel is asked by one call */
        LISTED = 256,          /* ring events of one call */
        SHARE = 8,             /* calls with room for one event in which the rings come first */
        QUIET = 64,            /* looks without an event before a registration is armed */
        FIRST_NAP = 1,         /* ms, while a bell isn't known to the other side: doubled each time */
        LONGEST_NAP = 1000,
        BATCH = 64,
        FULL_BELL =
            64, /* bytes in a bell of an epoll instance; the kernel's smallest default takes more than 200 */
};

enum state { STATE_KERNEL, STATE_ACTIVE, STATE_ARMED, STATE_OFF };

#define NONE UINT32_MAX
#define SEVERAL UINT32_MAX
/* What epoll says of our own descriptors: nothing that a program's pointers or numbers look like. */
#define OURS UINT64_C(0xf4ee5bad00000000)
#define OURS_MASK UINT64_C(0xffffffff00000000)
/* Below it a registration's number and generation: see named(). */
#define OURS_REGISTRATION UINT64_C(0xf4ee5bae00000000)
#define NUDGE (OURS | 0xffffffff)

_Atomic uint32_t ready_news;

struct registration {
        /* These two are looked at without the lock of the poller that it belongs to. */
        _Atomic uint32_t poller;     /* POLLERS: free */
        _Atomic uint32_t generation; /* another one each time that the kernel is told something else */
        uint64_t key;                /* of the end, 0: of an epoll instance */
        uint64_t data;
        uint32_t events; /* as the program wants them */
        int32_t fd;
        uint32_t state;
        uint32_t next_of_fd;     /* chain per descriptor; also of free ones */
        uint32_t next, previous; /* the poller's active list */
        uint32_t quiet;
        uint64_t seen;   /* edge-triggered: tail at the last report */
        uint32_t full;   /* flow.full at the last report */
        uint32_t first;  /* edge-triggered: nothing reported since it was made or changed */
        uint32_t mask;   /* what the kernel tells us of */
        uint32_t kernel; /* what the kernel has reported and we found true since */
        bool edge;       /* the kernel has reported something that we haven't */
        bool remote;     /* the peer is on another host */
        bool withheld;   /* the kernel has reported something that is too early (remote.h) */
        bool broken;     /* the path's loss has been reported */
        bool ghost;      /* the program has removed it; the kernel's part waits for it to come back */
        bool named;      /* STATE_KERNEL: the kernel has our name for it in the place of the program's data */
        bool fired;      /* such a one: EPOLLONESHOT has */
        uint32_t told;   /* poller.turn at the last report */
        uint32_t place;  /* in the program's list then */
        uint32_t next_nested;
};

struct poller {
        struct lock lock;
        int epfd;                  /* 1 + descriptor, 0: free */
        uint32_t active;           /* first of the list, NONE */
        _Atomic uint32_t rings;    /* registrations that aren't STATE_KERNEL */
        _Atomic uint32_t nested;   /* chain of epoll instances inside */
        _Atomic uint32_t sleepers; /* threads that sleep in it, or are about to */
        _Atomic bool watched;      /* it is in another instance, or in a poll(): no bell may be left in it */
        uint32_t aliases;          /* descriptors for it, besides the first */
        uint32_t turn;
        struct spinner spinner;
        int nudge;            /* 1 + eventfd that wakes a sleeper of this process */
        bool nudged;          /* nobody has heard of it yet */
        bool unknown;         /* the other side of an active one can't ring yet */
        bool adrift;          /* the same, and TCP may not say anything either */
        _Atomic bool late;    /* answer_late() is to be called */
        _Atomic bool lost;    /* a bell is, or a signal handler came in between: all are to be looked at */
        uint32_t news[BATCH]; /* registrations of which the kernel has just told */
        uint32_t news_count;
        _Atomic uint32_t
            added;       /* descriptors ever registered: with one there is nothing that could be earlier */
        uint64_t *bells; /* per arena: its id << 9 | 1 + bell */
};

static struct poller *pollers;
static struct registration *registrations;
static _Atomic uint32_t *of_fd; /* per descriptor: 1 + first registration */
static _Atomic uint32_t *only;  /* per end: 1 + its only registration, or SEVERAL */
static struct lock table;       /* chains, `only` and free list; taken before a poller's lock */
static uint32_t free_list = NONE, unused_from;
static uint32_t pollers_used; /* numbers below were ever in use */

size_t poller_memory(void)
{
        return REGISTRATIONS * sizeof *registrations + DESCRIPTORS * sizeof *of_fd + ENDS * sizeof *only +
               POLLERS * sizeof *pollers + 4 * (size_t)PAGE;
}

void poller_start_ends(char **place)
{
        only = take_part(place, ENDS * sizeof *only);
}

void poller_start(char **place)
{
        of_fd = take_part(place, DESCRIPTORS * sizeof *of_fd);
        registrations = take_part(place, REGISTRATIONS * sizeof *registrations);
        pollers = take_part(place, POLLERS * sizeof *pollers);
}

static struct poller *poller_of(int epfd)
{
        uint64_t found;

        if (!process.on || (unsigned)epfd >= DESCRIPTORS || !pollers)
                return NULL;
        found = atomic_load_explicit(&process.fds[epfd], memory_order_relaxed);
        if (!((uint32_t)found & FD_POLLER) || (uint32_t)found == FD_OWN)
                return NULL;
        return &pollers[((uint32_t)found & ~FD_POLLER) % POLLERS];
}

bool poller_is(int fd)
{
        return poller_of(fd) != NULL;
}

void poller_made(int epfd)
{
        enum taken taken;

        if (!process.on || (unsigned)epfd >= DESCRIPTORS)
                return;
        taken = lock_take(&table, self());
        for (uint32_t i = 0; i < POLLERS; i++) {
                struct poller *poller = &pollers[i];
                uint64_t *bells;

                /* Who still sleeps in the one that was here before must not meet this one. */
                if (poller->epfd || poller->sleepers)
                        continue;
                if (i >= pollers_used)
                        pollers_used = i + 1;
                bells = poller->bells;
                memset(poller, 0, sizeof *poller);
                poller->bells = bells;
                poller->epfd = epfd + 1;
                poller->active = NONE;
                poller->nested = NONE;
                fd_set_word(epfd, FD_POLLER | i);
                break;
        }
        lock_release(&table, taken);
}

void poller_alias(int old, int new)
{
        struct poller *poller = poller_of(old);

        if (!poller || (unsigned)new >= DESCRIPTORS)
                return;
        poller->aliases++;
        fd_set_word(new, atomic_load(&process.fds[old]));
}

/* --- registrations --- */

static uint32_t number_of(const struct registration *r)
{
        return (uint32_t)(r - registrations);
}

static bool is_of(const struct poller *poller, const struct registration *r)
{
        return atomic_load_explicit(&r->poller, memory_order_relaxed) == (uint32_t)(poller - pollers);
}

static uint64_t name_of(const struct registration *r)
{
        return OURS_REGISTRATION |
               atomic_load_explicit(&r->generation, memory_order_relaxed) % GENERATIONS * REGISTRATIONS |
               number_of(r);
}

/* What the kernel has said and nobody has looked at yet isn't meant any more. */
static void rename_it(struct registration *r)
{
        atomic_fetch_add_explicit(&r->generation, 1, memory_order_relaxed);
}

/* The registration that the kernel means, of this poller, whose lock is held. NULL: it has been changed since
 * a thread fetched the event. Then the kernel was told so after that, and says again what still holds. */
static struct registration *named(const struct poller *poller, uint64_t name)
{
        struct registration *r = &registrations[(uint32_t)name % REGISTRATIONS];

        return is_of(poller, r) && name_of(r) == name ? r : NULL;
}

static struct registration *find(const struct poller *poller, int fd)
{
        uint32_t i = (unsigned)fd < DESCRIPTORS ? atomic_load_explicit(&of_fd[fd], memory_order_relaxed) : 0;

        for (i--; i != NONE; i = registrations[i].next_of_fd)
                if (is_of(poller, &registrations[i]))
                        return &registrations[i];
        return NULL;
}

static struct registration *add(struct poller *poller, int fd, uint64_t key)
{
        uint32_t number = free_list;
        struct registration *r;

        if (number != NONE)
                free_list = registrations[number].next_of_fd;
        else if (unused_from < REGISTRATIONS)
                number = unused_from++;
        else
                return NULL;
        r = &registrations[number];
        memset(&r->key, 0, sizeof *r - offsetof(struct registration, key));
        r->key = key;
        r->fd = fd;
        atomic_store(&r->poller, (uint32_t)(poller - pollers));
        r->next = r->previous = NONE;
        r->next_of_fd = atomic_load(&of_fd[fd]) - 1;
        atomic_store(&of_fd[fd], number + 1);
        if (key) {
                uint32_t nothing = 0;

                if (!atomic_compare_exchange_strong(&only[(uint32_t)key - 1], &nothing, number + 1))
                        atomic_store(&only[(uint32_t)key - 1], SEVERAL);
        }
        return r;
}

void poller_forget_end(uint32_t number)
{
        atomic_store_explicit(&only[number], 0, memory_order_relaxed);
}

static void activate(struct poller *poller, struct registration *r)
{
        if (r->state == STATE_ACTIVE)
                return;
        r->state = STATE_ACTIVE;
        r->quiet = 0;
        r->previous = NONE;
        r->next = poller->active;
        if (poller->active != NONE)
                registrations[poller->active].previous = number_of(r);
        poller->active = number_of(r);
}

static void deactivate(struct poller *poller, struct registration *r, enum state state)
{
        if (r->state == STATE_ACTIVE) {
                if (r->previous != NONE)
                        registrations[r->previous].next = r->next;
                else
                        poller->active = r->next;
                if (r->next != NONE)
                        registrations[r->next].previous = r->previous;
        }
        r->state = state;
}

static void unchain(const struct registration *r)
{
        uint32_t number = number_of(r), i = atomic_load(&of_fd[r->fd]) - 1;

        if (i == number) {
                atomic_store(&of_fd[r->fd], r->next_of_fd + 1);
                return;
        }
        while (i != NONE && registrations[i].next_of_fd != number)
                i = registrations[i].next_of_fd;
        if (i != NONE)
                registrations[i].next_of_fd = r->next_of_fd;
}

/* Under both locks. */
static void drop(struct poller *poller, struct registration *r)
{
        uint32_t number = number_of(r);

        if (r->state != STATE_KERNEL)
                poller->rings--;
        deactivate(poller, r, STATE_KERNEL);
        unchain(r);
        if (r->key) {
                uint32_t this = number + 1;

                atomic_compare_exchange_strong(&only[(uint32_t)r->key - 1], &this, 0);
        } else if (poller->nested == number) {
                poller->nested = r->next_nested;
        } else {
                uint32_t i = poller->nested;

                while (i != NONE && registrations[i].next_nested != number)
                        i = registrations[i].next_nested;
                if (i != NONE)
                        registrations[i].next_nested = r->next_nested;
        }
        rename_it(r);
        atomic_store(&r->poller, POLLERS);
        r->next_of_fd = free_list;
        free_list = number;
}

static struct end *end_of_registration(const struct registration *r)
{
        struct end *end = &family->ends[(uint32_t)r->key - 1];

        return end_is(end, r->key) ? end : NULL;
}

/* --- bells --- */

/* The bell of this instance for an arena; -1. Under a number there may be another arena by now. */
static int bell_of(const struct poller *poller, uint32_t arena)
{
        uint64_t word = poller->bells ? poller->bells[arena] : 0;

        if (word && bell_descriptor(arena, (int)(word & 511) - 1) < 0)
                return -1;
        return word && word >> 9 == (atomic_load(&mapping_of(arena)->id) & UINT64_MAX >> 9)
                   ? (int)(word & 511) - 1
                   : -1;
}

static void forget_bells(struct poller *poller)
{
        uint32_t high = atomic_load(&family->next_arena);

        if (poller->bells)
                memset(poller->bells, 0, (high < ARENAS ? high : ARENAS) * sizeof *poller->bells);
}

static bool give_bell(struct poller *poller, uint32_t arena)
{
        /* Edge-triggered: each byte is an event, and none has to be read for that (answer()). */
        struct epoll_event event = {.events = EPOLLIN | EPOLLET};
        uint64_t id = atomic_load(&mapping_of(arena)->id);
        int bell;

        if (!poller->bells) {
                poller->bells = reserve(ARENAS * sizeof *poller->bells, MAP_PRIVATE);
                if (!poller->bells)
                        return false;
        }
        if (bell_of(poller, arena) >= 0)
                return true;
        bell = bell_take(arena);
        if (bell < 0)
                return false;
        event.data.u64 = OURS | arena << 8 | (uint32_t)bell;
        /* What came late for whoever had it before. */
        bell_drain(arena, bell);
        if (bell_descriptor(arena, bell) < 0)
                return give_bell(poller, arena);
        sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_ADD, bell_descriptor(arena, bell), &event);
        poller->bells[arena] = id << 9 | (uint32_t)(bell + 1);
        return true;
}

/* With no descriptor to be had for an eventfd: a bell is asked about something that it can always do. */
static void nudge_by_bell(const struct poller *poller)
{
        uint32_t high = atomic_load(&family->next_arena);

        for (uint32_t arena = 0; poller->bells && arena < high && arena < ARENAS; arena++) {
                int bell = bell_of(poller, arena);
                struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET,
                                            .data.u64 = OURS | arena << 8 | (uint32_t)bell};

                if (bell >= 0 && sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD,
                                       bell_descriptor(arena, bell), &event) >= 0)
                        return;
        }
}

/* Wakes one of those who sleep in the instance, or outside of it because of it. Under the lock. */
static void nudge(struct poller *poller)
{
        uint64_t one = 1;

        if (poller->nudged)
                return;
        if (!poller->nudge) {
                struct epoll_event event = {.events = EPOLLIN, .data.u64 = NUDGE};
                int fd = own_descriptor((int)sys_2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK));

                if (fd >= 0 && sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_ADD, fd, &event) < 0) {
                        close_own(fd);
                        fd = -1;
                }
                if (fd < 0) {
                        nudge_by_bell(poller);
                        return;
                }
                poller->nudge = fd + 1;
        }
        poller->nudged = true;
        sys_3(SYS_write, poller->nudge - 1, &one, sizeof one);
}

/* Whoever takes a nudge does what it was for, or gives it on: watch(). */
static void take_nudge(struct poller *poller)
{
        uint64_t drained;

        if (poller->nudge)
                sys_3(SYS_read, poller->nudge - 1, &drained, sizeof drained);
        poller->nudged = false;
}

static bool is_slept_on(const struct poller *poller)
{
        return poller->sleepers || poller->watched;
}

/* All registrations of an end, whichever of its descriptors they were made with. Under the table's lock. */
static struct registration *next_of_end(const struct end *end, const struct registration *r)
{
        int fd = r ? r->fd : end_next_descriptor(end, -1);
        uint32_t i = r ? r->next_of_fd : NONE;

        if (!r && fd >= 0)
                i = atomic_load(&of_fd[fd]) - 1;
        while (fd >= 0) {
                for (; i != NONE; i = registrations[i].next_of_fd)
                        if ((uint32_t)registrations[i].key - 1 == end_number(end))
                                return &registrations[i];
                fd = end_next_descriptor(end, fd);
                i = fd >= 0 ? atomic_load(&of_fd[fd]) - 1 : NONE;
        }
        return NULL;
}

static bool is_ring(struct end *end)
{
        uint32_t rx = atomic_load_explicit(&end->rx.phase, memory_order_relaxed);

        return rx == PHASE_READY || rx == PHASE_RING ||
               atomic_load_explicit(&end->tx.phase, memory_order_relaxed) == PHASE_RING;
}

/* What we want to hear of: the connection's end, bytes of TCP, and its room while bytes still go there. */
static uint32_t mask_of(const struct registration *r, struct end *end)
{
        bool room = r->events & (EPOLLOUT | EPOLLWRNORM) && atomic_load(&end->tx.phase) != PHASE_RING;

        return EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET | (room ? EPOLLOUT : 0u);
}

static bool tell_kernel(struct poller *poller, struct registration *r, struct end *end)
{
        struct epoll_event event = {.events = mask_of(r, end), .data.u64 = name_of(r)};

        if ((r->mask & event.events) == event.events)
                return true;
        r->mask = event.events;
        return sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD, r->fd, &event) >= 0;
}

/* From now on the ring is looked at for this registration, of which the kernel knows what mask_of() says.
 * Under the poller's lock. */
static void enter_ring(struct poller *poller, struct registration *r, struct end *end)
{
        poller->rings++;
        r->kernel = 0;
        r->edge = r->withheld = r->broken = false;
        r->remote = end_is_remote(end);
        r->seen = atomic_load(&end->rx.edge);
        r->full = atomic_load(&end->tx.full);
        if (r->fired)
                r->state = STATE_OFF;
        else
                activate(poller, r);
        r->named = r->fired = false;
}

/* The same for one of which the kernel has told the program so far. It tells us, and each thing once: then
 * what the program changes about it, often with each request, needs no call. */
static bool to_ring(struct poller *poller, struct registration *r, struct end *end)
{
        if (r->state == STATE_KERNEL) {
                uint32_t generation = atomic_load(&r->generation);

                r->mask = 0;
                rename_it(r);
                if (!tell_kernel(poller, r, end)) {
                        atomic_store(&r->generation, generation);
                        return false;
                }
                enter_ring(poller, r, end);
        } else if (r->state != STATE_OFF && !r->ghost) {
                activate(poller, r);
        }
        return true;
}

/* The kernel is told what the program wants to hear. A one-shot event has to pass us all the same: whether it
 * has fired the kernel doesn't say, and the ring must not say it again. */
static struct epoll_event for_program(struct registration *r, bool last)
{
        struct epoll_event event = {.events = r->events, .data.u64 = r->data};

        r->named = !last && r->events & EPOLLONESHOT;
        if (r->named)
                event.data.u64 = name_of(r);
        return event;
}

/* Both rings have ended: the kernel tells the program again. `last`: we won't know of the registration any
 * more. */
static void to_kernel(struct poller *poller, struct registration *r, bool last)
{
        uint32_t generation = atomic_load(&r->generation);
        struct epoll_event event;

        rename_it(r);
        event = for_program(r, last);
        r->fired = r->state == STATE_OFF && !r->ghost;
        if (r->fired)
                event.events &= EPOLLONESHOT;
        deactivate(poller, r, STATE_KERNEL);
        poller->rings--;
        if (r->ghost) {
                sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_DEL, r->fd, &event);
        } else if (sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD, r->fd, &event) < 0) {
                /* It was made with a number that has been closed: the kernel goes on with what it knows. */
                atomic_store(&r->generation, generation);
                r->named = true;
        }
}

static void watch(struct poller *poller);

/* epoll_ctl() for a registration that the kernel reports to us. */
static int change(struct poller *poller, struct registration *r, struct end *end, int operation,
                  const struct epoll_event *event)
{
        if (operation == EPOLL_CTL_ADD && !r->ghost)
                return (int)result(-EEXIST);
        if (operation != EPOLL_CTL_ADD && r->ghost)
                return (int)result(-ENOENT);
        if (operation == EPOLL_CTL_DEL) {
                r->ghost = true;
                deactivate(poller, r, STATE_OFF);
                return 0;
        }
        if (!event)
                return (int)result(-EFAULT);
        if (operation == EPOLL_CTL_MOD && event->events & EPOLLEXCLUSIVE)
                return (int)result(-EINVAL);
        r->ghost = false;
        r->events = event->events & ~(uint32_t)EPOLLEXCLUSIVE;
        r->data = event->data.u64;
        r->first = 1;
        if (r->state == STATE_OFF)
                r->state = STATE_ARMED;
        tell_kernel(poller, r, end);
        to_ring(poller, r, end);
        return 0;
}

static bool listens(int fd)
{
        int value = 0;
        uint32_t size = sizeof value;

        return sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_ACCEPTCONN, &value, &size) == 0 && value;
}

/* epoll_ctl() for a registration that the kernel reports to the program, or will report to us if the
 * connection is in a ring by now. */
static int tell(struct poller *poller, struct registration *r, struct end *end, int operation,
                const struct epoll_event *event)
{
        /* What the kernel lets stand beside it; the rest it refuses. */
        const uint32_t beside =
            EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLWAKEUP | EPOLLET | EPOLLEXCLUSIVE;
        const uint32_t events = r->events, generation = atomic_load(&r->generation);
        const uint64_t data = r->data;
        const bool was_named = r->named, ring = end && is_ring(end);
        struct epoll_event told = *event;
        int outcome;

        /* Such a registration can't be changed, so not to_ring() either. All of a connection's waiters wake
         * then, instead of one at least. */
        if (operation == EPOLL_CTL_ADD && end && told.events & EPOLLEXCLUSIVE && !(told.events & ~beside) &&
            !listens(r->fd))
                told.events &= ~(uint32_t)EPOLLEXCLUSIVE;
        rename_it(r);
        r->events = (told.events & ~(uint32_t)EPOLLEXCLUSIVE) | EPOLLERR | EPOLLHUP;
        r->data = told.data.u64;
        if (ring && !(told.events & EPOLLEXCLUSIVE)) {
                told = (struct epoll_event){.events = mask_of(r, end), .data.u64 = name_of(r)};
        } else {
                told.data = for_program(r, false).data;
        }
        outcome = real()->epoll_ctl(poller->epfd - 1, operation, r->fd, &told);
        if (outcome < 0) {
                r->events = events;
                r->data = data;
                r->named = was_named;
                atomic_store(&r->generation, generation);
                return outcome;
        }
        r->first = 1;
        r->fired = false;
        if (ring && !(told.events & EPOLLEXCLUSIVE)) {
                r->mask = told.events;
                enter_ring(poller, r, end);
        }
        return outcome;
}

/* One instance in another: who sleeps in the outer one has to be heard of by the inner one. */
static void nest(struct poller *poller, struct registration *r, bool made)
{
        struct poller *inner = poller_of(r->fd);

        if (made) {
                r->next_nested = poller->nested;
                poller->nested = number_of(r);
        }
        if (inner)
                inner->watched = true;
        if (is_slept_on(poller))
                nudge(poller);
}

/* `*kept`: we know of the registration, if there is one now. */
static int control(struct poller *poller, int operation, int fd, uint64_t key, struct epoll_event *event,
                   bool *kept)
{
        struct end *end = key ? &family->ends[(uint32_t)key - 1] : NULL;
        enum taken outer = lock_take(&table, self()), taken = lock_take(&poller->lock, self());
        struct registration *r = find(poller, fd);
        bool made = false;
        int outcome;

        if (r && r->key != key) {
                /* Left by a descriptor of this number that was closed behind our back. */
                drop(poller, r);
                r = NULL;
        }
        if (r && r->state != STATE_KERNEL && end && is_ring(end)) {
                outcome = change(poller, r, end, operation, event);
        } else {
                if (r && r->state != STATE_KERNEL)
                        to_kernel(poller, r, false);
                if (r && r->ghost) {
                        drop(poller, r);
                        r = NULL;
                }
                if (operation == EPOLL_CTL_ADD && !r) {
                        r = add(poller, fd, key);
                        made = *kept = r != NULL;
                }
                outcome = r && event && operation != EPOLL_CTL_DEL
                              ? tell(poller, r, end, operation, event)
                              : real()->epoll_ctl(poller->epfd - 1, operation, fd, event);
                if (outcome < 0 ? made : r && operation == EPOLL_CTL_DEL)
                        drop(poller, r);
                else if (outcome >= 0 && r && !end)
                        nest(poller, r, made);
        }
        watch(poller);
        lock_release(&poller->lock, taken);
        lock_release(&table, outer);
        return outcome;
}

int poller_control(int epfd, int operation, int fd, struct epoll_event *event)
{
        struct poller *poller = poller_of(epfd), *inner = poller ? poller_of(fd) : NULL;
        uint64_t key = 0;
        struct end *end = end_of(fd, &key);
        bool kept = poller != NULL;
        int outcome;

        if (poller && operation == EPOLL_CTL_ADD)
                atomic_fetch_add_explicit(&poller->added, 1, memory_order_relaxed);
        outcome = poller && (end || inner) ? control(poller, operation, fd, end ? key : 0, event, &kept)
                                           : real()->epoll_ctl(epfd, operation, fd, event);
        /* Who waits in an instance that we don't know would never hear of a ring. */
        if (end && !kept && outcome >= 0 && operation == EPOLL_CTL_ADD)
                fall_back(fd, end, key, REASON_RAW);
        return outcome;
}

/* A signal handler has come in the middle of its own thread's work on the lists: that work, or the next wait,
 * looks at all of them again. */
static void leave_for_later(struct poller *poller)
{
        uint64_t one = 1;

        atomic_store(&poller->lost, true);
        atomic_store(&poller->late, true);
        if (poller->nudge)
                sys_3(SYS_write, poller->nudge - 1, &one, sizeof one);
        else
                nudge_by_bell(poller);
}

static void leave_all_for_later(void)
{
        for (uint32_t i = 0; i < pollers_used; i++)
                if (pollers[i].epfd)
                        leave_for_later(&pollers[i]);
}

bool poller_attach(struct end *end)
{
        enum taken outer;
        bool all = true;

        outer = lock_take(&table, self());
        if (outer == LOCK_NESTED)
                return false;
        for (struct registration *r = next_of_end(end, NULL); r && all; r = next_of_end(end, r)) {
                struct poller *poller = &pollers[r->poller];
                enum taken taken = lock_take(&poller->lock, self());

                all = taken == LOCK_TAKEN && give_bell(poller, atomic_load(&end->arena)) &&
                      to_ring(poller, r, end);
                if (taken == LOCK_TAKEN)
                        watch(poller);
                lock_release(&poller->lock, taken);
        }
        lock_release(&table, outer);
        return all;
}

/* What the program is to hear of this registration may have changed. `more`: also what it has heard already.
 * Under both locks. */
static void look_over(struct poller *poller, struct registration *r, struct end *end, bool more)
{
        if (is_ring(end)) {
                r->first |= more;
                to_ring(poller, r, end);
                tell_kernel(poller, r, end);
        } else if (r->state != STATE_KERNEL) {
                to_kernel(poller, r, false);
        }
}

static void changed(struct end *end, bool more)
{
        enum taken outer = lock_take(&table, self());

        if (outer == LOCK_NESTED) {
                leave_all_for_later();
                return;
        }
        for (struct registration *r = next_of_end(end, NULL); r; r = next_of_end(end, r)) {
                struct poller *poller = &pollers[r->poller];
                enum taken taken = lock_take(&poller->lock, self());

                if (taken == LOCK_NESTED) {
                        leave_for_later(poller);
                } else {
                        look_over(poller, r, end, more);
                        watch(poller);
                }
                lock_release(&poller->lock, taken);
        }
        lock_release(&table, outer);
}

void poller_sender_changed(struct end *end)
{
        changed(end, false);
}

void poller_receiver_changed(struct end *end)
{
        changed(end, true);
}

/* Nobody was to be called when there is room, as there was some. Under the poller's lock. */
static void await_room(struct poller *poller, struct registration *r, enum taken taken)
{
        if (taken == LOCK_NESTED) {
                leave_for_later(poller);
        } else if (r->state == STATE_ARMED && r->events & EPOLLET && r->events & (EPOLLOUT | EPOLLWRNORM)) {
                activate(poller, r);
                watch(poller);
        }
}

void poller_sender_full(struct end *end)
{
        uint32_t number = atomic_load_explicit(&only[end_number(end)], memory_order_relaxed);
        enum taken outer, taken;
        struct poller *poller;

        atomic_fetch_add_explicit(&end->tx.full, 1, memory_order_relaxed);
        if (number && number != SEVERAL) {
                struct registration *r = &registrations[number - 1];
                uint32_t place = atomic_load_explicit(&r->poller, memory_order_relaxed);

                if (place == POLLERS)
                        return;
                poller = &pollers[place];
                taken = lock_take(&poller->lock, self());
                if (is_of(poller, r) && atomic_load(&only[end_number(end)]) == number)
                        await_room(poller, r, taken);
                lock_release(&poller->lock, taken);
        } else if (number) {
                outer = lock_take(&table, self());
                for (struct registration *r = outer == LOCK_NESTED ? NULL : next_of_end(end, NULL); r;
                     r = next_of_end(end, r)) {
                        poller = &pollers[r->poller];
                        taken = lock_take(&poller->lock, self());
                        await_room(poller, r, taken);
                        lock_release(&poller->lock, taken);
                }
                if (outer == LOCK_NESTED)
                        leave_all_for_later();
                lock_release(&table, outer);
        }
}

/* Under the table's lock. */
static bool move_to_alias(int fd, struct registration *r)
{
        struct end *end = end_of_registration(r);
        int other = end ? end_next_descriptor(end, -1) : -1;

        while (other == fd)
                other = end_next_descriptor(end, other);
        if (other < 0)
                return false;
        unchain(r);
        r->fd = other;
        r->next_of_fd = atomic_load(&of_fd[other]) - 1;
        atomic_store(&of_fd[other], number_of(r) + 1);
        return true;
}

/* The kernel keeps a registration as long as anybody has the file open, and our name for it means another one
 * by then. `stays`: the descriptor does. Under both locks. */
static void give_up(struct poller *poller, struct registration *r, bool stays)
{
        struct end *end = r->key ? end_of_registration(r) : NULL;
        struct epoll_event event;

        stays = stays || !end || end_held_elsewhere(end) || atomic_load(&process.local[end_number(end)]) > 1;
        if (stays && r->state != STATE_KERNEL) {
                to_kernel(poller, r, true);
        } else if (stays && r->named && !r->fired) {
                event = for_program(r, true);
                sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD, r->fd, &event);
        }
}

/* All registrations of a descriptor are forgotten. The kernel's own stay or have gone with the descriptor. */
static void forget(int fd, uint64_t key)
{
        enum taken outer;

        if (!pollers || (unsigned)fd >= DESCRIPTORS || !atomic_load(&of_fd[fd]))
                return;
        outer = lock_take(&table, self());
        for (uint32_t i = atomic_load(&of_fd[fd]) - 1; i != NONE;) {
                struct registration *r = &registrations[i];
                struct poller *poller = &pollers[r->poller];
                enum taken taken;

                i = r->next_of_fd;
                if (key && r->key != key)
                        continue;
                /* Of a duplicate: the kernel goes on with it as long as the connection is open somewhere. */
                if (!key && fd_is_end(r->key) && move_to_alias(fd, r))
                        continue;
                taken = lock_take(&poller->lock, self());
                give_up(poller, r, key != 0);
                drop(poller, r);
                lock_release(&poller->lock, taken);
        }
        lock_release(&table, outer);
}

/* A child shares the kernel's instances with its parent, but has no bells in them yet. */
void poller_forked(void)
{
        if (!pollers)
                return;
        atomic_store(&table.word, 0);
        for (uint32_t i = 0; i < pollers_used; i++) {
                struct poller *poller = &pollers[i];

                if (!poller->epfd)
                        continue;
                atomic_store(&poller->lock.word, 0);
                poller->sleepers = 0;
                poller->nudge = 0;
                poller->nudged = false;
                forget_bells(poller);
        }
        for (uint32_t i = 0; i < unused_from; i++)
                if (registrations[i].state == STATE_ARMED)
                        activate(&pollers[registrations[i].poller], &registrations[i]);
}

void poller_leave(int fd, uint64_t key)
{
        forget(fd, key);
}

void poller_replace(int fd, uint64_t key, int file, int flags)
{
        uint32_t first = pollers && (unsigned)fd < DESCRIPTORS ? atomic_load(&of_fd[fd]) : 0;
        enum taken outer;

        if (!first) {
                sys_3(SYS_dup3, file, fd, flags);
                return;
        }
        outer = lock_take(&table, self());
        first = atomic_load(&of_fd[fd]);
        for (uint32_t i = first - 1; i != NONE; i = registrations[i].next_of_fd)
                sys_4(SYS_epoll_ctl, pollers[registrations[i].poller].epfd - 1, EPOLL_CTL_DEL, fd, 0);
        sys_3(SYS_dup3, file, fd, flags);
        for (uint32_t i = first - 1; i != NONE;) {
                struct registration *r = &registrations[i];
                struct poller *poller = &pollers[r->poller];
                struct epoll_event event = {.events = r->events, .data.u64 = r->data};
                enum taken taken;

                i = r->next_of_fd;
                if (r->key != key)
                        continue;
                taken = lock_take(&poller->lock, self());
                if (r->state == STATE_OFF || r->fired)
                        event.events &= EPOLLONESHOT;
                if (!r->ghost)
                        sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_ADD, fd, &event);
                drop(poller, r);
                lock_release(&poller->lock, taken);
        }
        lock_release(&table, outer);
}

void poller_closed(int fd)
{
        struct poller *poller = poller_of(fd);
        enum taken outer, taken;

        forget(fd, 0);
        if (!poller)
                return;
        if (poller->aliases) {
                poller->aliases--;
                fd_set_word(fd, 0);
                for (int other = 0; poller->epfd == fd + 1 && other < DESCRIPTORS; other++)
                        if (poller_of(other) == poller)
                                poller->epfd = other + 1;
                return;
        }
        outer = lock_take(&table, self());
        taken = lock_take(&poller->lock, self());
        for (uint32_t i = 0; i < unused_from; i++)
                if (is_of(poller, &registrations[i]))
                        drop(poller, &registrations[i]);
        if (poller->nudge)
                close_own(poller->nudge - 1);
        if (poller->bells) {
                for (uint32_t arena = 0; arena < ARENAS && arena < atomic_load(&family->next_arena); arena++)
                        if (bell_of(poller, arena) >= 0)
                                bell_return(arena, bell_of(poller, arena));
                /* The memory is its successor's. */
                forget_bells(poller);
        }
        poller->nudge = 0;
        fd_set_word(fd, 0);
        poller->epfd = 0;
        lock_release(&poller->lock, taken);
        lock_release(&table, outer);
}

/* --- waiting --- */

static uint32_t now_of_tcp(int fd, short events)
{
        struct pollfd polled = {.fd = fd, .events = events};
        struct timespec at_once = {0};

        sys_5(SYS_ppoll, &polled, 1, &at_once, 0, 0);
        /* poll's bits are epoll's. */
        return (uint32_t)(uint16_t)polled.revents;
}

/* What the program may hear of it, of a connection whose peer is on another host. */
static uint32_t look_at_remote(struct registration *r, struct end *end)
{
        uint32_t told;

        if (ready_broken(end)) {
                if (!r->broken)
                        r->broken = r->edge = true;
                return remote_broken_events(r->events) | r->kernel;
        }
        told = remote_visible(end, r->fd, r->kernel);
        if (told != r->kernel && !atomic_load_explicit(&end->rx.deferred, memory_order_relaxed))
                /* Bytes that have been read since. */
                r->kernel &= told | EPOLLRDHUP | EPOLLHUP;
        if (told != r->kernel) {
                r->withheld = true;
        } else if (r->withheld) {
                r->withheld = false;
                r->edge = true;
        }
        return told;
}

/* What TCP has for a registration. What may have passed since the kernel reported it is looked at again. */
static uint32_t look_at_tcp(struct registration *r, struct end *end)
{
        const uint32_t lasting = EPOLLHUP | EPOLLERR | EPOLLRDHUP;
        bool in = atomic_load_explicit(&end->rx.phase, memory_order_relaxed) != PHASE_RING;
        bool out = atomic_load_explicit(&end->tx.phase, memory_order_relaxed) != PHASE_RING;
        uint32_t wanted = r->events | EPOLLERR | EPOLLHUP, passing, told;

        if (__builtin_expect(ready_end(end), 0) && !(r->kernel & EPOLLRDHUP))
                r->kernel |= now_of_tcp(r->fd, POLLRDHUP);
        if (__builtin_expect(!r->kernel, 1) && !(__builtin_expect(r->remote, 0) && ready_broken(end)))
                return 0;
        if (!out) {
                r->kernel &= ~(uint32_t)(EPOLLOUT | EPOLLWRNORM);
                /* When TCP's room counts again, the kernel has to say again that there is some. */
                r->mask &= ~(uint32_t)EPOLLOUT;
        }
        passing = r->kernel & wanted & ~lasting & ~(uint32_t)(in ? 0 : EPOLLIN | EPOLLRDNORM);
        if (passing) {
                uint32_t true_now = now_of_tcp(r->fd, POLLIN | POLLOUT | POLLPRI);

                r->kernel &= true_now | lasting | (in ? 0u : EPOLLIN | EPOLLRDNORM);
        }
        told = __builtin_expect(r->remote, 0) ? look_at_remote(r, end) : r->kernel;
        /* A peer that has closed its side may never read the ring: the next send goes back to TCP, where
         * there is room, or an error. */
        if (!out && r->kernel & EPOLLRDHUP)
                return (told & wanted) | (r->events & (EPOLLOUT | EPOLLWRNORM));
        return told & wanted;
}

/* What to report for a registration, 0: nothing. Changes what edge-triggered ones have seen. */
static uint32_t look(struct registration *r, struct end *end, bool take)
{
        bool bytes = r->events & (EPOLLIN | EPOLLRDNORM) && ready_bytes(end);
        bool space = r->events & (EPOLLOUT | EPOLLWRNORM) && ready_space(end);
        uint32_t tcp = look_at_tcp(r, end);
        uint32_t found = (bytes ? r->events & (EPOLLIN | EPOLLRDNORM) : 0) |
                         (space ? r->events & (EPOLLOUT | EPOLLWRNORM) : 0) | tcp;

        if (found && r->events & EPOLLET) {
                uint64_t tail =
                    is_ring(end) ? atomic_load_explicit(&end_receives(end).ring->tail, memory_order_relaxed)
                                 : 0;
                uint32_t full = atomic_load_explicit(&end->tx.full, memory_order_relaxed);

                if (!r->first && !(bytes && tail != r->seen) && !(space && full != r->full) &&
                    !(tcp && r->edge))
                        return 0;
                if (take) {
                        if (bytes)
                                r->seen = tail;
                        if (space)
                                r->full = full;
                }
        }
        if (found && take) {
                r->first = 0;
                r->edge = false;
        }
        return found;
}

/* Let the bell ring for a registration, for all that may come and isn't there: the caller looks once more
 * afterwards. False: the other side can't ring it yet. */
static bool arm_one(struct poller *poller, struct registration *r, struct end *end)
{
        uint32_t arena = atomic_load(&end->arena);
        int bell;

        /* Another process that has the connection too may have ended the ring. */
        tell_kernel(poller, r, end);
        if (!give_bell(poller, arena))
                return false;
        bell = bell_of(poller, arena);
        atomic_fetch_add_explicit(&mapping_of(arena)->armed[bell], 2, memory_order_relaxed);
        /* Of a remote ring's end, and of its loss, the kernel doesn't tell. */
        if (r->events & (EPOLLIN | EPOLLRDNORM) || r->remote)
                wait_begin(&end_receives(end).ring->receivers, bell);
        /* An edge-triggered one that has been told of room is asked for when a sender finds none
         * (poller_sender_full()). All others are asked for now: another thread may take the room that is
         * there before the caller looks. */
        if (r->events & (EPOLLOUT | EPOLLWRNORM) && atomic_load(&end->tx.phase) == PHASE_RING &&
            (!(r->events & EPOLLET) || r->first || atomic_load(&end->tx.full) != r->full ||
             !ready_space(end))) {
                ready_ask(end);
                wait_begin(&end_sends(end).ring->senders, bell);
        }
        return bell_is_known(arena, atomic_load(&end->side), bell);
}

/* An active registration is armed, if there is nothing to report. True: there is. */
static bool arm_active(struct poller *poller, struct registration *r)
{
        struct end *end = end_of_registration(r);
        bool known;

        if (end && !is_ring(end)) {
                to_kernel(poller, r, false);
                return false;
        }
        known = !end || arm_one(poller, r, end);
        if (end && look(r, end, false))
                return true;
        /* Nobody will ring: it stays on the list, and the sleep is a nap. */
        if (!known) {
                poller->unknown = true;
                poller->adrift |= r->remote;
        } else {
                deactivate(poller, r, STATE_ARMED);
        }
        return false;
}

/* Before sleeping: all active registrations are armed. True: something is there by now. */
static bool arm(struct poller *poller)
{
        bool found = false;

        poller->unknown = poller->adrift = false;
        for (uint32_t i = poller->active; i != NONE;) {
                struct registration *r = &registrations[i];

                i = r->next;
                found = arm_active(poller, r) || found;
        }
        return found || poller->late;
}

/* See poller.h: whoever has put something on the active list, or leaves with it, while others
 * sleep. */
static void watch(struct poller *poller)
{
        bool due = false;

        if (__builtin_expect(poller->active == NONE, 1) || !is_slept_on(poller))
                return;
        for (uint32_t i = poller->active; i != NONE && !due;) {
                struct registration *r = &registrations[i];
                struct end *end = end_of_registration(r);

                i = r->next;
                due = (end && is_ring(end) && look(r, end, false)) || arm_active(poller, r);
                /* Nobody rings yet. Who sleeps in the instance naps then; who sleeps outside of it does so
                 * only where nobody else would tell (poller_arm()). */
                if (r->state == STATE_ACTIVE && (poller->sleepers || r->remote))
                        due = true;
        }
        if (due)
                nudge(poller);
}

/* Slots in which something happened, as the other side says. */
static _Atomic uint64_t *dirty_slots(uint32_t arena, int bell)
{
        return &arena_header(mapping_of(arena))
                    ->sides[atomic_load(&family->arenas[arena].side) % SIDES]
                    .dirty[bell];
}

/* With too many for the list, some are found at the next look at all that are active. */
static void note_news(struct poller *poller, const struct registration *r)
{
        if (poller->news_count < BATCH)
                poller->news[poller->news_count++] = number_of(r);
}

/* A registration of another poller may change meanwhile; one of ours can't. */
static void arouse(struct poller *poller, struct registration *r, uint32_t number)
{
        if (is_of(poller, r) && (uint32_t)r->key == number && r->state == STATE_ARMED) {
                activate(poller, r);
                note_news(poller, r);
        }
}

/* What a bell of ours has been rung for is looked at again. */
static void attend(struct poller *poller, uint32_t arena, int bell)
{
        uint64_t dirty = atomic_exchange(dirty_slots(arena, bell), 0);

        for (; dirty; dirty &= dirty - 1) {
                uint32_t number = atomic_load(&mapping_of(arena)->slots[__builtin_ctzll(dirty)]), i;

                if (!number)
                        continue;
                i = atomic_load_explicit(&only[number - 1], memory_order_relaxed);
                if (i && i != SEVERAL) {
                        arouse(poller, &registrations[i - 1], number);
                } else if (i) {
                        /* Chains are looked at under the lock that comes before ours. */
                        atomic_fetch_or(dirty_slots(arena, bell), dirty & -dirty);
                        poller->late = true;
                }
        }
}

/* Events of rings, and when each came. */
struct list {
        struct epoll_event *events;
        int count;
        uint64_t stamps[LISTED];
};

static void report(struct poller *poller, struct registration *r, struct end *end, uint32_t found,
                   struct list *list, uint32_t turn)
{
        list->events[list->count] = (struct epoll_event){.events = found, .data.u64 = r->data};
        /* What comes of the kernel alone was there before what a ring has now, as far as anybody knows. */
        list->stamps[list->count] =
            ready_bytes(end) ? atomic_load_explicit(&end_receives(end).ring->stamp, memory_order_relaxed) : 0;
        r->quiet = 0;
        r->told = turn;
        r->place = (uint32_t)list->count++;
        if (r->events & EPOLLONESHOT)
                deactivate(poller, r, STATE_OFF);
}

/* As the kernel would have them: who came first is first. */
static void put_in_order(struct list *list)
{
        for (int gap = list->count / 2; gap; gap /= 2)
                for (int i = gap; i < list->count; i++) {
                        struct epoll_event event = list->events[i];
                        uint64_t stamp = list->stamps[i];
                        int k = i;

                        for (; k >= gap && list->stamps[k - gap] > stamp; k -= gap) {
                                list->events[k] = list->events[k - gap];
                                list->stamps[k] = list->stamps[k - gap];
                        }
                        list->events[k] = event;
                        list->stamps[k] = stamp;
                }
}

/* Ring events of the active registrations. Under the poller's lock. */
static void harvest(struct poller *poller, struct list *list, int size, bool spinning)
{
        uint32_t i = poller->active, last = NONE;

        while (i != NONE && list->count < size) {
                struct registration *r = &registrations[i];
                struct end *end = end_of_registration(r);
                uint32_t found, next = r->next;

                if (!end) {
                        deactivate(poller, r, STATE_ARMED);
                        i = next;
                        continue;
                }
                if (!is_ring(end)) {
                        to_kernel(poller, r, false);
                        i = next;
                        continue;
                }
                found = look(r, end, true);
                if (found) {
                        report(poller, r, end, found, list, poller->turn);
                        last = i;
                } else if (!spinning && ++r->quiet > QUIET && arm_one(poller, r, end) &&
                           !look(r, end, false)) {
                        deactivate(poller, r, STATE_ARMED);
                }
                i = next;
        }
        /* With more ready than there is room for, the next call begins behind the last one reported. */
        if (list->count == size && last != NONE && registrations[last].state == STATE_ACTIVE && i != NONE) {
                uint32_t tail = i;

                while (registrations[tail].next != NONE)
                        tail = registrations[tail].next;
                registrations[tail].next = poller->active;
                registrations[poller->active].previous = tail;
                registrations[i].previous = NONE;
                registrations[last].next = NONE;
                poller->active = i;
        }
}

/* A bell of ours rang. */
static void answer(struct poller *poller, uint32_t arena, int bell, uint32_t events)
{
        struct mapping *mapping = mapping_of(arena);
        int fd = bell_descriptor(arena, bell);

        if (fd < 0)
                return;
        /* Each time that we are armed the other side rings once at most: the bell can't be full before this.
         */
        if (events & (EPOLLHUP | EPOLLERR) ||
            atomic_load_explicit(&mapping->armed[bell], memory_order_relaxed) > FULL_BELL) {
                atomic_store_explicit(&mapping->armed[bell], 0, memory_order_relaxed);
                if (!bell_drain(arena, bell) && atomic_load(&mapping->remote))
                        /* Of a relay's end TCP says nothing. */
                        poller->late = poller->lost = true;
        }
        attend(poller, arena, bell);
}

/* What attend() has left: under both locks. */
static void answer_late(struct poller *poller)
{
        uint32_t high = atomic_load(&family->next_arena);

        bool lost;

        atomic_store(&poller->late, false);
        lost = atomic_exchange(&poller->lost, false);
        for (uint32_t i = 0; i < unused_from && lost; i++) {
                struct registration *r = &registrations[i];
                struct end *end = is_of(poller, r) && r->key ? end_of_registration(r) : NULL;

                if (end) {
                        look_over(poller, r, end, true);
                        arouse(poller, r, (uint32_t)r->key);
                }
        }
        for (uint32_t arena = 0; arena < high && arena < ARENAS; arena++) {
                int bell = bell_of(poller, arena);
                uint64_t dirty = bell < 0 ? 0 : atomic_exchange(dirty_slots(arena, bell), 0);

                for (; dirty; dirty &= dirty - 1) {
                        uint32_t number = atomic_load(&mapping_of(arena)->slots[__builtin_ctzll(dirty)]);
                        struct registration *r = NULL;

                        while (number && (r = next_of_end(&family->ends[number - 1], r)))
                                arouse(poller, r, number);
                }
        }
}

/* The kernel's word for the program, by our name. Returns events. */
static int translate(struct registration *r, uint32_t said, struct epoll_event *event)
{
        said &= r->events | EPOLLERR | EPOLLHUP;
        if (!said)
                return 0;
        r->fired = (r->events & EPOLLONESHOT) != 0;
        *event = (struct epoll_event){.events = said, .data.u64 = r->data};
        return 1;
}

/* Take our own descriptors' events out of what the kernel returned. Returns how many are left. Under the
 * lock. */
static int sort(struct poller *poller, struct epoll_event *events, int count)
{
        bool ours = false;
        int kept = 0;

        for (int i = 0; i < count; i++) {
                uint64_t data = events[i].data.u64;

                if ((data & OURS_MASK) == OURS_REGISTRATION) {
                        struct registration *r = named(poller, data);

                        if (!r || (r->state == STATE_KERNEL && r->fired))
                                continue;
                        if (r->state == STATE_KERNEL) {
                                kept += translate(r, events[i].events, &events[kept]);
                                continue;
                        }
                        r->kernel |= events[i].events;
                        r->edge = true;
                        if (r->state == STATE_ARMED)
                                activate(poller, r);
                        note_news(poller, r);
                        ours = true;
                } else if ((data & OURS_MASK) != OURS) {
                        events[kept++] = events[i];
                } else if (data == NUDGE) {
                        take_nudge(poller);
                } else {
                        answer(poller, (uint32_t)(data >> 8) & (ARENAS - 1), (int)(data & 0xff),
                               events[i].events);
                }
        }
        if (ours)
                atomic_fetch_add_explicit(&ready_news, 1, memory_order_relaxed);
        return kept;
}

/* What sort() couldn't do under one lock. */
static void settle(struct poller *poller)
{
        enum taken outer = lock_take(&table, self());
        enum taken taken = lock_take(&poller->lock, self());

        answer_late(poller);
        lock_release(&poller->lock, taken);
        lock_release(&table, outer);
}

/* Put more events behind some; what is among those already is named once. */
static int merge(struct epoll_event *events, int known, struct epoll_event *more, int count)
{
        int total = known;

        for (int i = 0; i < count; i++) {
                int k = 0;

                while (k < known && events[k].data.u64 != more[i].data.u64)
                        k++;
                if (k < known)
                        events[k].events |= more[i].events;
                else
                        events[total++] = more[i];
        }
        return total;
}

static int kernel_wait(int epfd, struct epoll_event *events, int size, int64_t timeout, const sigset_t *mask)
{
        struct timespec time = {.tv_sec = timeout / 1000000000, .tv_nsec = timeout % 1000000000};
        int64_t ms;

        if (timeout > 0 && real()->epoll_pwait2) {
                int got = real()->epoll_pwait2(epfd, events, size, &time, mask);

                if (got >= 0 || *__errno_location() != ENOSYS)
                        return got;
        }
        ms = timeout < 0 ? -1 : (timeout + 999999) / 1000000;
        return real()->epoll_pwait(epfd, events, size, ms > INT32_MAX ? INT32_MAX : (int)ms, mask);
}

/* Spinning pays if somebody we may hear from runs elsewhere. */
static bool may_spin(struct poller *poller)
{
        uint32_t here = core();
        int looks = 0;
        bool found = false;
        enum taken taken;

        if (!settings.spin)
                return false;
        taken = lock_take(&poller->lock, self());
        for (uint32_t i = poller->active; i != NONE && looks < BATCH && !found;
             i = registrations[i].next, looks++) {
                struct end *end = end_of_registration(&registrations[i]);
                uint32_t there;

                if (!end || !is_ring(end))
                        continue;
                there = atomic_load_explicit(&end_receives(end).ring->sender_cpu, memory_order_relaxed);
                found = there && there != here;
        }
        lock_release(&poller->lock, taken);
        return found;
}

/* Has an instance inside another one something? */
static bool has_nested(const struct registration *r)
{
        return r->events & EPOLLIN && !r->fired && poller_ready(r->fd);
}

bool poller_ready(int epfd)
{
        struct poller *poller = poller_of(epfd);
        bool found = false;
        enum taken taken;

        if (!poller)
                return false;
        taken = lock_take(&poller->lock, self());
        /* Otherwise the kernel would say that there is something. */
        if (poller->nudged)
                take_nudge(poller);
        for (uint32_t i = poller->active; i != NONE && !found; i = registrations[i].next) {
                struct end *end = end_of_registration(&registrations[i]);

                found = end && is_ring(end) && look(&registrations[i], end, false);
        }
        for (uint32_t i = poller->nested; i != NONE && !found; i = registrations[i].next_nested)
                found = has_nested(&registrations[i]);
        watch(poller);
        lock_release(&poller->lock, taken);
        return found;
}

bool poller_arm(int epfd)
{
        struct poller *poller = poller_of(epfd);
        bool adrift;
        enum taken taken;

        if (!poller)
                return false;
        taken = lock_take(&poller->lock, self());
        poller->watched = true;
        arm(poller);
        adrift = poller->adrift || poller->late;
        for (uint32_t i = poller->nested; i != NONE; i = registrations[i].next_nested)
                adrift = poller_arm(registrations[i].fd) || adrift;
        lock_release(&poller->lock, taken);
        return adrift;
}

/* Events of epoll instances inside this one. Under the lock. */
static int harvest_nested(struct poller *poller, struct epoll_event *events, int size)
{
        int count = 0;

        for (uint32_t i = poller->nested; i != NONE && count < size; i = registrations[i].next_nested) {
                struct registration *r = &registrations[i];
                struct epoll_event once = {.events = EPOLLONESHOT};

                if (!has_nested(r))
                        continue;
                events[count++] = (struct epoll_event){.events = EPOLLIN, .data.u64 = r->data};
                if (r->events & EPOLLONESHOT) {
                        /* The kernel isn't to say it again. */
                        rename_it(r);
                        once.data.u64 = name_of(r);
                        sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD, r->fd, &once);
                        r->fired = true;
                }
        }
        return count;
}

/* While rings were looked at one by one, one that had been passed may have got something before one that was
 * found. Under the lock. */
static void catch_up(struct poller *poller, struct list *list, int size, uint32_t turn)
{
        uint64_t latest = 0;

        for (int i = 0; i < list->count; i++)
                latest = list->stamps[i] > latest ? list->stamps[i] : latest;
        for (uint32_t i = poller->active, next; latest && i != NONE && list->count < size; i = next) {
                struct registration *r = &registrations[i];
                struct end *end = r->told == turn ? NULL : end_of_registration(r);
                uint32_t found;

                /* Before it is reported: then it may leave the list. */
                next = r->next;
                if (!end || !ready_bytes(end) ||
                    atomic_load_explicit(&end_receives(end).ring->stamp, memory_order_relaxed) > latest)
                        continue;
                found = look(r, end, true);
                if (found)
                        report(poller, r, end, found, list, turn);
        }
}

/* Connections that have left their rings: the kernel tells the program of them again, at once if there is
 * something. Under the lock. */
static bool hand_back(struct poller *poller)
{
        bool any = false;

        for (uint32_t i = 0; i < poller->news_count; i++) {
                struct registration *r = &registrations[poller->news[i]];
                struct end *end =
                    is_of(poller, r) && r->state == STATE_ACTIVE ? end_of_registration(r) : NULL;

                if (end && !is_ring(end)) {
                        to_kernel(poller, r, false);
                        any = true;
                }
        }
        return any;
}

/* What the kernel's news means for the program. Under the lock. */
static void look_at_news(struct poller *poller, struct list *list, int size, uint32_t turn)
{
        for (uint32_t i = 0; i < poller->news_count; i++) {
                struct registration *r = &registrations[poller->news[i]];
                struct end *end =
                    is_of(poller, r) && r->state == STATE_ACTIVE ? end_of_registration(r) : NULL;
                uint32_t found;

                if (!end || !is_ring(end) || (r->told != turn && list->count == size))
                        continue;
                found = look(r, end, true);
                if (found && r->told == turn)
                        list->events[r->place].events |= found;
                else if (found)
                        report(poller, r, end, found, list, turn);
        }
        poller->news_count = 0;
}

/* sort(), and what it couldn't do. Under the lock, which it lets go of for a moment. */
static int sort_all(struct poller *poller, struct epoll_event *events, int count, enum taken *taken)
{
        count = sort(poller, events, count);
        if (poller->late) {
                lock_release(&poller->lock, *taken);
                settle(poller);
                *taken = lock_take(&poller->lock, self());
        }
        return count;
}

/* What the kernel's events mean for the program, rings included; 0: the next look finds all. Not under the
 * lock. */
static int told_by_kernel(struct poller *poller, struct epoll_event *events, int count, int size)
{
        enum taken taken = lock_take(&poller->lock, self());
        /* Another thread may have the next one, while the lock is let go of. */
        uint32_t turn = ++poller->turn;
        struct list list;

        poller->news_count = 0;
        count = sort_all(poller, events, count, &taken);
        if (!count && poller->rings > 1) {
                /* Others may have something by now: the kernel is asked once more. */
                lock_release(&poller->lock, taken);
                return 0;
        }
        list.events = events + count;
        list.count = 0;
        look_at_news(poller, &list, size - count < LISTED ? size - count : LISTED, turn);
        catch_up(poller, &list, size - count < LISTED ? size - count : LISTED, turn);
        put_in_order(&list);
        count += list.count;
        if (count)
                watch(poller);
        lock_release(&poller->lock, taken);
        return count;
}

/* What there is now. Rings are looked at first, then the kernel is asked, then what it has news of is looked
 * at: whoever is told of something is told of all that was before it, on whichever connection. Without `ask`
 * the kernel is asked only if a ring has something. */
static int collect(struct poller *poller, struct epoll_event *events, int size, bool ask, bool spinning)
{
        struct epoll_event others[BATCH];
        struct list list;
        enum taken taken = lock_take(&poller->lock, self());
        /* There must be room for what the kernel has. */
        int limit = size - (size + 3) / 4, count = 0;
        uint32_t turn = ++poller->turn;

        if (size == 1)
                limit = !ask && turn % SHARE != 0;
        limit = limit < LISTED ? limit : LISTED;
        list.events = events;
        list.count = 0;
        harvest(poller, &list, limit, spinning);
        if (poller->nested != NONE)
                count = harvest_nested(poller, others, size - list.count < BATCH ? size - list.count : BATCH);
        if (ask || poller->watched || !limit ||
            (list.count + count && atomic_load_explicit(&poller->added, memory_order_relaxed) > 1)) {
                struct epoll_event of_kernel[BATCH];
                int room = size - list.count - count, kernel = 0;
                bool again = room > 0;

                if (room > BATCH - count)
                        room = BATCH - count;
                poller->news_count = 0;
                /* What was only for us has taken the place of what may be behind it. */
                for (int asked = 0; again && !kernel && asked < ASKED; asked++) {
                        int got = (int)sys_6(SYS_epoll_pwait, poller->epfd - 1, of_kernel, room, 0, 0, 8);

                        kernel = sort_all(poller, of_kernel, got > 0 ? got : 0, &taken);
                        again = got == room || hand_back(poller);
                }
                /* Only instances inside this one are known in both ways. */
                count = merge(others, count, of_kernel, kernel);
                look_at_news(poller, &list, size - count < LISTED ? size - count : LISTED, turn);
                if (!list.count && !count && !limit)
                        harvest(poller, &list, size, spinning);
        }
        catch_up(poller, &list, size - count < LISTED ? size - count : LISTED, turn);
        put_in_order(&list);
        if (count) {
                memmove(events + count, events, (size_t)list.count * sizeof *events);
                memcpy(events, others, (size_t)count * sizeof *events);
        }
        count += list.count;
        if (count)
                watch(poller);
        lock_release(&poller->lock, taken);
        return count;
}

/* Nobody has anything to look at here but the kernel. */
static bool is_plain(const struct poller *poller)
{
        return !poller->rings && poller->nested == NONE && !poller->late;
}

/* No ring is registered here: the kernel's word alone, without our own descriptors' events. 0: a timeout, or
 * look again. */
static int wait_plainly(struct poller *poller, int epfd, struct epoll_event *events, int size,
                        int64_t timeout, const sigset_t *mask)
{
        int64_t ms = timeout < 0 ? -1 : (timeout + 999999) / 1000000;
        int count = 0;

        atomic_fetch_add(&poller->sleepers, 1);
        /* Pairs with enter_ring(): either it sees the sleeper, or we see the ring. */
        if (is_plain(poller)) {
                if (timeout > 0 && timeout % 1000000)
                        count = kernel_wait(epfd, events, size, timeout, mask);
                else
                        count = real()->epoll_pwait(epfd, events, size, ms > INT32_MAX ? INT32_MAX : (int)ms,
                                                    mask);
        }
        atomic_fetch_sub(&poller->sleepers, 1);
        for (int i = 0; i < count; i++)
                if ((events[i].data.u64 & OURS_MASK) == OURS ||
                    (events[i].data.u64 & OURS_MASK) == OURS_REGISTRATION) {
                        count = told_by_kernel(poller, events, count, size);
                        break;
                }
        return count;
}

/* ns until the deadline, if there is one. */
static int64_t remaining(int64_t timeout, uint64_t deadline)
{
        uint64_t present = timeout > 0 ? now() : 0;

        if (timeout <= 0)
                return timeout;
        return present < deadline ? (int64_t)(deadline - present) : 0;
}

/* Looks for a while, if that pays. Returns events. */
static int spin(struct poller *poller, struct epoll_event *events, int size)
{
        uint64_t budget = may_spin(poller) ? spin_budget(&poller->spinner) : 0, begin;
        int count;

        if (!budget)
                return 0;
        /* What the kernel has doesn't wait until we have spun. */
        count = collect(poller, events, size, true, false);
        if (count)
                return count;
        begin = now();
        while (!count) {
                for (int i = 0; i < SPIN_LOOKS && !count; i++) {
                        relax();
                        count = collect(poller, events, size, false, true);
                }
                if (!count && now() - begin >= budget)
                        break;
        }
        spin_learn(&poller->spinner, count != 0, budget, now() - begin);
        if (count)
                statistics_count(&statistics.spins);
        return count;
}

/* All that is looked at is armed, and the thread counted as a sleeper. False: there is something to look at.
 * `*unknown`: something of which nobody tells. */
static bool fall_asleep(struct poller *poller, bool *unknown)
{
        enum taken taken = lock_take(&poller->lock, self());
        bool asleep = !arm(poller);

        *unknown = poller->unknown;
        for (uint32_t i = poller->nested; i != NONE; i = registrations[i].next_nested)
                *unknown = poller_arm(registrations[i].fd) || *unknown;
        for (uint32_t i = poller->nested; i != NONE && asleep; i = registrations[i].next_nested)
                asleep = !has_nested(&registrations[i]);
        if (asleep)
                atomic_fetch_add(&poller->sleepers, 1);
        lock_release(&poller->lock, taken);
        return asleep;
}

/* The thread leaves without an event. What it has taken from the kernel is the others' now. */
static int leave_without(struct poller *poller)
{
        enum taken taken;

        /* Who falls asleep from now on arms all by himself. */
        if (!is_slept_on(poller))
                return 0;
        taken = lock_take(&poller->lock, self());
        watch(poller);
        lock_release(&poller->lock, taken);
        return 0;
}

int poller_wait(int epfd, struct epoll_event *events, int size, int64_t timeout, const sigset_t *mask,
                bool *ours)
{
        struct poller *poller = poller_of(epfd);
        uint64_t deadline = 0, slept;
        int64_t nap = FIRST_NAP * INT64_C(1000000), left = timeout;

        *ours = poller && size > 0;
        if (!*ours)
                return 0;
        /* Also for a wait that begins in the kernel: rings may come meanwhile. */
        if (timeout > 0)
                deadline = now() + (uint64_t)timeout;
        for (;; left = remaining(timeout, deadline), timeout = left ? timeout : 0) {
                bool unknown;
                int count;

                if (is_plain(poller)) {
                        count = wait_plainly(poller, epfd, events, size, left, mask);
                        if (count || (timeout == 0 && is_plain(poller)))
                                return count;
                        continue;
                }
                if (poller->late)
                        settle(poller);
                count = collect(poller, events, size, timeout == 0, false);
                if (count)
                        return count;
                if (timeout == 0)
                        return leave_without(poller);
                count = spin(poller, events, size);
                if (count)
                        return count;
                if (!fall_asleep(poller, &unknown))
                        continue;
                left = remaining(timeout, deadline);
                if (unknown && (left < 0 || left > nap)) {
                        left = nap;
                        nap = nap * 2 < LONGEST_NAP * INT64_C(1000000) ? nap * 2
                                                                       : LONGEST_NAP * INT64_C(1000000);
                }
                left = reclaim_before_sleep(left);
                statistics_count(&statistics.sleeps);
                slept = now();
                count = kernel_wait(epfd, events, size, left, mask);
                spin_slept(&poller->spinner, now() - slept);
                atomic_fetch_sub(&poller->sleepers, 1);
                /* Nothing of which the kernel hasn't told: that may be later than what it has by now. */
                if (count > 0)
                        count = told_by_kernel(poller, events, count, size);
                if (count)
                        return count;
        }
}
