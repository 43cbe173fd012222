#include "poller.h"

#include "arena.h"
#include "clock.h"
#include "lock.h"
#include "ready.h"
#include "real.h"
#include "remote.h"
#include "sparse.h"
#include "spin.h"
#include "statistics.h"
#include "sys.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

enum {
        POLLERS = 4096,
        REGISTRATIONS = 1 << 18,
        ASKED = 8,     /* times that the kernel is asked by one call */
        LISTED = 256,  /* ring events of one call */
        SHARE = 8,     /* calls with room for one event in which the rings come first */
        QUIET = 64,    /* looks without an event before a registration is armed */
        FIRST_NAP = 1, /* ms, while a bell isn't known to the other side: doubled each time */
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
#define OURS_REGISTRATION UINT64_C(0xf4ee5bae00000000)
#define NUDGE (OURS | 0xffffffff)

_Atomic uint32_t ready_news;

struct registration {
        uint64_t key; /* of the end, 0: of an epoll instance */
        uint64_t data;
        uint32_t events; /* as the program wants them */
        _Atomic uint32_t poller;
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
        uint32_t told;   /* poller.turn at the last report */
        uint32_t place;  /* in the program's list then */
        uint32_t next_nested;
};

struct poller {
        struct lock lock;
        int epfd;               /* 1 + descriptor, 0: free */
        uint32_t active;        /* first of the list, NONE */
        _Atomic uint32_t rings; /* registrations that aren't STATE_KERNEL */
        uint32_t nested;        /* chain of epoll instances inside */
        _Atomic uint32_t sleepers;
        bool watched;     /* it is in another instance, or in a poll(): no bell may be left in it */
        uint32_t aliases; /* descriptors for it, besides the first */
        uint32_t turn;
        struct spinner spinner;
        int nudge;            /* 1 + eventfd that wakes a sleeper of this process */
        bool unknown;         /* the other side of an active one can't ring yet */
        bool adrift;          /* the same, and TCP may not say anything either */
        bool late;            /* answer_late() is to be called */
        bool lost;            /* a bell is: all that are armed are to be looked at */
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
        struct poller *poller = poller_of(fd);

        return poller && (poller->rings || poller->nested != NONE);
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

                if (poller->epfd)
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

static struct registration *find(int epfd, int fd)
{
        uint32_t i = (unsigned)fd < DESCRIPTORS ? atomic_load_explicit(&of_fd[fd], memory_order_relaxed) : 0;
        uint32_t poller = (uint32_t)(poller_of(epfd) - pollers);

        for (i--; i != NONE; i = registrations[i].next_of_fd)
                if (registrations[i].poller == poller)
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
        memset(r, 0, sizeof *r);
        r->key = key;
        r->fd = fd;
        r->poller = (uint32_t)(poller - pollers);
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

static uint32_t number_of(const struct registration *r)
{
        return (uint32_t)(r - registrations);
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
        } else {
                uint32_t *link = &poller->nested;

                while (*link != NONE && *link != number)
                        link = &registrations[*link].next_nested;
                if (*link == number)
                        *link = r->next_nested;
        }
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
        bell_silence(arena, bell);
        sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_ADD, bell_descriptor(arena, bell), &event);
        poller->bells[arena] = id << 9 | (uint32_t)(bell + 1);
        return true;
}

static void nudge(struct poller *poller)
{
        uint64_t one = 1;

        if (!poller->nudge) {
                struct epoll_event event = {.events = EPOLLIN, .data.u64 = NUDGE};
                int fd = own_descriptor((int)sys_2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK));

                if (fd < 0 || sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_ADD, fd, &event) < 0)
                        return;
                poller->nudge = fd + 1;
        }
        sys_3(SYS_write, poller->nudge - 1, &one, sizeof one);
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
static bool tell_kernel(struct poller *poller, struct registration *r, struct end *end)
{
        bool room = r->events & (EPOLLOUT | EPOLLWRNORM) && atomic_load(&end->tx.phase) != PHASE_RING;
        struct epoll_event event = {.events =
                                        EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET | (room ? EPOLLOUT : 0u),
                                    .data.u64 = OURS_REGISTRATION | number_of(r)};

        if ((r->mask & event.events) == event.events)
                return true;
        r->mask = event.events;
        return sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD, r->fd, &event) >= 0;
}

/* From now on the ring is looked at for this registration. The kernel tells us, not the program, and each
 * thing once: then what the program changes about it, often with each request, needs no call. Under the
 * poller's lock. */
static bool to_ring(struct poller *poller, struct registration *r, struct end *end)
{
        if (r->state == STATE_KERNEL) {
                r->mask = 0;
                if (!tell_kernel(poller, r, end))
                        return false;
                poller->rings++;
                r->kernel = 0;
                r->edge = r->withheld = r->broken = false;
                r->remote = end_is_remote(end);
                r->seen = atomic_load(&end->rx.edge);
                r->full = atomic_load(&end->tx.full);
        }
        if (r->state != STATE_OFF && !r->ghost)
                activate(poller, r);
        else if (r->state == STATE_KERNEL)
                r->state = STATE_OFF;
        if (poller->sleepers)
                nudge(poller);
        return true;
}

/* Both rings have ended: the kernel tells the program again. */
static void to_kernel(struct poller *poller, struct registration *r)
{
        struct epoll_event event = {.events = r->events, .data.u64 = r->data};

        if (r->state == STATE_OFF)
                event.events &= EPOLLONESHOT;
        deactivate(poller, r, STATE_KERNEL);
        poller->rings--;
        if (r->ghost)
                sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_DEL, r->fd, &event);
        else
                sys_4(SYS_epoll_ctl, poller->epfd - 1, EPOLL_CTL_MOD, r->fd, &event);
}

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
        r->ghost = false;
        r->events = event->events;
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

int poller_control(int epfd, int operation, int fd, struct epoll_event *event)
{
        struct poller *poller = poller_of(epfd);
        struct poller *inner = poller ? poller_of(fd) : NULL;
        struct registration *r;
        enum taken outer, taken;
        struct end *end;
        uint64_t key = 0;
        int outcome;

        end = poller ? end_of(fd, &key) : NULL;
        if (poller && operation == EPOLL_CTL_ADD)
                atomic_fetch_add_explicit(&poller->added, 1, memory_order_relaxed);
        if (!poller || (!end && !inner))
                return real()->epoll_ctl(epfd, operation, fd, event);
        outer = lock_take(&table, self());
        taken = lock_take(&poller->lock, self());
        r = find(epfd, fd);
        if (r && r->key != key) {
                /* Left by a descriptor of this number that was closed behind our back. */
                drop(poller, r);
                r = NULL;
        }
        if (r && r->state != STATE_KERNEL && end && is_ring(end)) {
                outcome = change(poller, r, end, operation, event);
                lock_release(&poller->lock, taken);
                lock_release(&table, outer);
                return outcome;
        }
        if (r && r->state != STATE_KERNEL)
                to_kernel(poller, r);
        if (r && r->ghost) {
                drop(poller, r);
                r = NULL;
        }
        if (operation == EPOLL_CTL_ADD && !r)
                r = add(poller, fd, key);
        if (operation == EPOLL_CTL_ADD && end && event && event->events & EPOLLEXCLUSIVE && !listens(fd)) {
                /* Such a registration can't be changed, so not to_ring() either. All of a connection's
                 * waiters wake then, instead of one at least. */
                struct epoll_event plain = *event;

                plain.events &= ~(uint32_t)EPOLLEXCLUSIVE;
                outcome = real()->epoll_ctl(epfd, operation, fd, &plain);
        } else {
                outcome = real()->epoll_ctl(epfd, operation, fd, event);
        }
        if (outcome < 0) {
                /* What was there before is still there. */
                if (operation == EPOLL_CTL_ADD && r && !r->events)
                        drop(poller, r);
        } else if (r && operation == EPOLL_CTL_DEL) {
                drop(poller, r);
        } else if (r) {
                r->events = (event->events & ~(uint32_t)EPOLLEXCLUSIVE) | EPOLLERR | EPOLLHUP;
                r->data = event->data.u64;
                r->first = 1;
                if (inner)
                        inner->watched = true;
                if (operation == EPOLL_CTL_ADD && inner) {
                        r->next_nested = poller->nested;
                        poller->nested = number_of(r);
                }
                if (end && is_ring(end))
                        to_ring(poller, r, end);
        }
        lock_release(&poller->lock, taken);
        lock_release(&table, outer);
        return outcome;
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

                all = give_bell(poller, atomic_load(&end->arena)) && to_ring(poller, r, end);
                lock_release(&poller->lock, taken);
        }
        lock_release(&table, outer);
        return all;
}

void poller_sender_changed(struct end *end)
{
        enum taken outer = lock_take(&table, self());

        for (struct registration *r = next_of_end(end, NULL); r; r = next_of_end(end, r)) {
                struct poller *poller = &pollers[r->poller];
                enum taken taken = lock_take(&poller->lock, self());

                if (is_ring(end)) {
                        to_ring(poller, r, end);
                        tell_kernel(poller, r, end);
                } else if (r->state != STATE_KERNEL) {
                        to_kernel(poller, r);
                }
                lock_release(&poller->lock, taken);
        }
        lock_release(&table, outer);
}

void poller_sender_full(struct end *end)
{
        atomic_fetch_add_explicit(&end->tx.full, 1, memory_order_relaxed);
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
                /* The kernel keeps a registration as long as anybody has the file open; ours would come under
                 * a number that means another one by then. */
                if (r->state != STATE_KERNEL && fd_is_end(r->key)) {
                        struct end *end = end_of_registration(r);

                        if (key || !end || end_held_elsewhere(end) ||
                            atomic_load(&process.local[end_number(end)]) > 1)
                                to_kernel(poller, r);
                }
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
                if (r->state == STATE_OFF)
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
                if (&pollers[registrations[i].poller] == poller &&
                    find(fd, registrations[i].fd) == &registrations[i])
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
        told = remote_true(end, r->fd, r->kernel);
        if (told != r->kernel && !atomic_load_explicit(&end->rx.withheld, memory_order_relaxed))
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
        if (!out)
                r->kernel &= ~(uint32_t)(EPOLLOUT | EPOLLWRNORM);
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

static bool arm_one(struct poller *poller, struct registration *r, struct end *end);

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
        if (&pollers[atomic_load_explicit(&r->poller, memory_order_relaxed)] == poller &&
            (uint32_t)r->key == number && r->state == STATE_ARMED) {
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
                        to_kernel(poller, r);
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

/* Let the bell ring for a registration. False: the other side can't ring it yet. */
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
        if (r->events & (EPOLLOUT | EPOLLWRNORM) && atomic_load(&end->tx.phase) == PHASE_RING &&
            !ready_space(end)) {
                ready_ask(end);
                wait_begin(&end_sends(end).ring->senders, bell);
        }
        return bell_is_known(arena, atomic_load(&end->side), bell);
}

/* Before sleeping: all active registrations are armed. True: something is there by now. */
static bool arm(struct poller *poller)
{
        bool found = false;

        poller->unknown = poller->adrift = false;
        for (uint32_t i = poller->active; i != NONE;) {
                struct registration *r = &registrations[i];
                struct end *end = end_of_registration(r);
                bool ring = end && is_ring(end), known = !ring || arm_one(poller, r, end);

                i = r->next;
                if (ring && look(r, end, false)) {
                        found = true;
                        continue;
                }
                /* Nobody will ring: it stays on the list, and the sleep is a nap. */
                if (!known) {
                        poller->unknown = true;
                        poller->adrift |= r->remote;
                } else {
                        deactivate(poller, r, STATE_ARMED);
                }
        }
        return found;
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
                if (!bell_silence(arena, bell) && atomic_load(&mapping->remote))
                        /* Of a relay's end TCP says nothing. */
                        poller->late = poller->lost = true;
        }
        attend(poller, arena, bell);
}

/* What attend() has left: under both locks. */
static void answer_late(struct poller *poller)
{
        uint32_t high = atomic_load(&family->next_arena);

        poller->late = false;
        for (uint32_t i = 0; i < unused_from && poller->lost; i++)
                if (fd_is_end(registrations[i].key))
                        arouse(poller, &registrations[i], (uint32_t)registrations[i].key);
        poller->lost = false;
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

/* Take our own descriptors' events out of what the kernel returned. Returns how many are left. Under the
 * lock. */
static int sort(struct poller *poller, struct epoll_event *events, int count)
{
        bool ours = false;
        int kept = 0;

        for (int i = 0; i < count; i++) {
                uint64_t data = events[i].data.u64;

                if ((data & OURS_MASK) == OURS_REGISTRATION) {
                        struct registration *r = &registrations[(uint32_t)data % REGISTRATIONS];

                        if (&pollers[r->poller] != poller || r->state == STATE_KERNEL)
                                continue;
                        r->kernel |= events[i].events;
                        r->edge = true;
                        if (r->state == STATE_ARMED)
                                activate(poller, r);
                        note_news(poller, r);
                        ours = true;
                } else if ((data & OURS_MASK) != OURS) {
                        events[kept++] = events[i];
                } else if (data == NUDGE) {
                        uint64_t drained;

                        sys_3(SYS_read, poller->nudge - 1, &drained, sizeof drained);
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

bool poller_ready(int epfd)
{
        struct poller *poller = poller_of(epfd);
        bool found = false;
        enum taken taken;

        if (!poller)
                return false;
        taken = lock_take(&poller->lock, self());
        for (uint32_t i = poller->active; i != NONE && !found; i = registrations[i].next) {
                struct end *end = end_of_registration(&registrations[i]);

                found = end && is_ring(end) && look(&registrations[i], end, false);
        }
        for (uint32_t i = poller->nested; i != NONE && !found; i = registrations[i].next_nested)
                found = registrations[i].events & EPOLLIN && poller_ready(registrations[i].fd);
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
        adrift = poller->adrift;
        for (uint32_t i = poller->nested; i != NONE; i = registrations[i].next_nested)
                adrift = poller_arm(registrations[i].fd) || adrift;
        lock_release(&poller->lock, taken);
        return adrift;
}

/* Events of epoll instances inside this one. Under the lock. */
static int harvest_nested(struct poller *poller, struct epoll_event *events, int size)
{
        int count = 0;

        for (uint32_t i = poller->nested; i != NONE && count < size; i = registrations[i].next_nested)
                if (registrations[i].events & EPOLLIN && poller_ready(registrations[i].fd))
                        events[count++] =
                            (struct epoll_event){.events = EPOLLIN, .data.u64 = registrations[i].data};
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

/* What the kernel's news means for the program. Under the lock. */
static void look_at_news(struct poller *poller, struct list *list, int size, uint32_t turn)
{
        for (uint32_t i = 0; i < poller->news_count; i++) {
                struct registration *r = &registrations[poller->news[i]];
                struct end *end = end_of_registration(r);
                uint32_t found;

                if (r->state != STATE_ACTIVE || !end || !is_ring(end) ||
                    (r->told != turn && list->count == size))
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

/* What the kernel's events mean for the program, rings included. Not under the lock. */
static int told_by_kernel(struct poller *poller, struct epoll_event *events, int count, int size)
{
        enum taken taken = lock_take(&poller->lock, self());
        /* Another thread may have the next one, while the lock is let go of. */
        uint32_t turn = ++poller->turn;
        struct list list;

        poller->news_count = 0;
        count = sort_all(poller, events, count, &taken);
        if (!count && poller->rings > 1) {
                /* Others may have something by now: the next look, which asks the kernel once more, finds
                 * all. */
                lock_release(&poller->lock, taken);
                return 0;
        }
        list.events = events + count;
        list.count = 0;
        look_at_news(poller, &list, size - count < LISTED ? size - count : LISTED, turn);
        catch_up(poller, &list, size - count < LISTED ? size - count : LISTED, turn);
        put_in_order(&list);
        /* What lasts is for all who wait; the kernel has woken one. */
        if (list.count && poller->sleepers && poller->active != NONE)
                nudge(poller);
        lock_release(&poller->lock, taken);
        return count + list.count;
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

                if (room > BATCH - count)
                        room = BATCH - count;
                poller->news_count = 0;
                /* What was only for us has taken the place of what may be behind it. */
                for (int asked = 0, got = room; got == room && room > 0 && !kernel && asked < ASKED;
                     asked++) {
                        got = (int)sys_6(SYS_epoll_pwait, poller->epfd - 1, of_kernel, room, 0, 0, 8);
                        kernel = sort_all(poller, of_kernel, got > 0 ? got : 0, &taken);
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
        if (count && poller->sleepers && poller->active != NONE)
                nudge(poller);
        lock_release(&poller->lock, taken);
        return count;
}

/* No ring is registered here: the kernel's word alone, without our own descriptors' events. 0: a timeout, or
 * look again. */
static int wait_plainly(struct poller *poller, int epfd, struct epoll_event *events, int size,
                        int64_t timeout, const sigset_t *mask)
{
        int64_t ms = timeout < 0 ? -1 : (timeout + 999999) / 1000000;
        int count;

        atomic_fetch_add_explicit(&poller->sleepers, 1, memory_order_relaxed);
        if (timeout > 0 && timeout % 1000000)
                count = kernel_wait(epfd, events, size, timeout, mask);
        else
                count = real()->epoll_pwait(epfd, events, size, ms > INT32_MAX ? INT32_MAX : (int)ms, mask);
        atomic_fetch_sub_explicit(&poller->sleepers, 1, memory_order_relaxed);
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

int poller_wait(int epfd, struct epoll_event *events, int size, int64_t timeout, const sigset_t *mask,
                bool *ours)
{
        struct poller *poller = poller_of(epfd);
        uint64_t deadline = 0;
        int64_t nap = FIRST_NAP * INT64_C(1000000), left = timeout;

        *ours = poller && size > 0;
        if (!*ours)
                return 0;
        /* Also for a wait that begins in the kernel: rings may come meanwhile. */
        if (timeout > 0)
                deadline = now() + (uint64_t)timeout;
        for (;;) {
                int count;
                uint64_t slept;
                bool unknown, again;
                enum taken taken;

                if (!poller->rings && poller->nested == NONE) {
                        count = wait_plainly(poller, epfd, events, size, left, mask);
                        if (count || timeout == 0)
                                return count;
                        left = remaining(timeout, deadline);
                        if (!left)
                                timeout = 0;
                        continue;
                }
                count = collect(poller, events, size, timeout == 0, false);

                if (count || timeout == 0)
                        return count;
                if (may_spin(poller)) {
                        uint64_t budget = spin_budget(&poller->spinner), begin = 0;

                        if (budget) {
                                /* What the kernel has doesn't wait until we have spun. */
                                count = collect(poller, events, size, true, false);
                                if (count)
                                        return count;
                                begin = now();
                        }
                        while (budget && !count) {
                                for (int i = 0; i < SPIN_LOOKS && !count; i++) {
                                        relax();
                                        count = collect(poller, events, size, false, true);
                                }
                                if (!count && now() - begin >= budget)
                                        break;
                        }
                        if (budget)
                                spin_learn(&poller->spinner, count != 0, budget, now() - begin);
                        if (count) {
                                statistics_count(&statistics.spins);
                                return count;
                        }
                }
                taken = lock_take(&poller->lock, self());
                again = arm(poller);
                unknown = poller->unknown;
                for (uint32_t i = poller->nested; i != NONE; i = registrations[i].next_nested)
                        unknown = poller_arm(registrations[i].fd) || unknown;
                if (!again)
                        atomic_fetch_add(&poller->sleepers, 1);
                lock_release(&poller->lock, taken);
                if (again)
                        continue;
                if (poller->nested != NONE && poller_ready(epfd)) {
                        atomic_fetch_sub(&poller->sleepers, 1);
                        continue;
                }
                left = remaining(timeout, deadline);
                if (unknown && (left < 0 || left > nap)) {
                        left = nap;
                        nap = nap * 2 < LONGEST_NAP * INT64_C(1000000) ? nap * 2
                                                                       : LONGEST_NAP * INT64_C(1000000);
                }
                left = memory_sleep(left);
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
                left = remaining(timeout, deadline);
                if (!left)
                        timeout = 0;
        }
}
