/* What the poller_*.c files share: the tables of epoll instances and registrations. See poller.h.
 *
 * Locks: the table's lock guards the chains of registrations per descriptor and per end, and the
 * free list. A poller's lock guards the poller and its registrations. The table's lock is taken
 * first.
 */
#ifndef FREEFLOW_POLLER_INTERNAL_H
#define FREEFLOW_POLLER_INTERNAL_H

#include "arena.h"
#include "family.h"
#include "lock.h"
#include "spin.h"

#include <sys/epoll.h>

enum {
        POLLERS = 4096,
        REGISTRATIONS = 1 << 18,
        BATCH = 64, /* events that one call takes from the kernel */
};

#define NONE UINT32_MAX
#define SEVERAL UINT32_MAX

/* The epoll data of our own registrations in the kernel: values that neither a program's pointers
 * nor its numbers look like. TAG_BELL | arena << 8 | bell; TAG_WAKE, the eventfd; TAG_REGISTRATION
 * | generation and number of a registration. */
#define TAG_MASK UINT64_C(0xffffffff00000000)
#define TAG_BELL UINT64_C(0xf4ee5bad00000000)
#define TAG_WAKE (TAG_BELL | 0xffffffff)
#define TAG_REGISTRATION UINT64_C(0xf4ee5bae00000000)

/* KERNEL: neither direction uses a ring, the kernel reports to the program. The others: see
 * poller.h. */
enum state { STATE_KERNEL, STATE_ACTIVE, STATE_ARMED, STATE_OFF };

struct registration {
        /* These two are read without the lock of the poller that the registration belongs to. */
        _Atomic uint32_t poller;     /* POLLERS: free */
        _Atomic uint32_t generation; /* changes whenever the kernel's registration does */
        uint64_t key;                /* of the end; 0: of an epoll instance */
        uint64_t data;
        uint32_t events; /* as the program wants them */
        int32_t fd;
        uint32_t state;
        uint32_t next_of_fd;     /* chain per descriptor; also of free registrations */
        uint32_t next, previous; /* the poller's active list */
        uint32_t empty_checks;   /* in a row, while ACTIVE */
        uint64_t tail_reported;  /* edge-triggered: tail at the last report */
        uint32_t full_reported;  /* edge-triggered: flow.full at the last report */
        uint32_t unreported;     /* edge-triggered: nothing reported since it was made or changed */
        uint32_t kernel_mask;    /* what the kernel reports to us */
        uint32_t kernel_events;  /* what the kernel has reported, as far as it still holds */
        bool kernel_edge;        /* the kernel has reported something that the program hasn't got */
        bool remote;             /* the peer is on another host */
        bool deferred;           /* an event of the kernel is too early (remote.h) */
        bool loss_reported;      /* the path through the relays is lost, and the program knows */
        bool deleted;            /* by the program, which may add it again; the kernel's part stays */
        bool tagged;             /* STATE_KERNEL: the kernel has our tag, not the program's data */
        bool fired;              /* the same: EPOLLONESHOT has fired */
        uint32_t turn;           /* poller.turn at the last report */
        uint32_t position;       /* in the list of events of that turn */
        uint32_t next_nested;
};

struct poller {
        struct lock lock;
        int epfd;                    /* 1 + descriptor; 0: free */
        uint32_t active;             /* first of the list of ACTIVE registrations, or NONE */
        _Atomic uint32_t ring_count; /* registrations that aren't STATE_KERNEL */
        _Atomic uint32_t nested;     /* chain of registrations of epoll instances */
        _Atomic uint32_t sleepers;   /* threads that sleep in it, or are about to */
        _Atomic bool polled;         /* from another instance or by poll(): no bell may stay unread */
        uint32_t aliases;            /* descriptors for it besides the first */
        uint32_t turn;               /* counts the calls that report events */
        struct spinner spinner;
        int wake_fd;             /* 1 + eventfd that wakes a sleeper of this process; 0: none */
        bool wake_pending;       /* the eventfd is readable, and no thread has taken the wake-up */
        bool unringable;         /* the peer of an ACTIVE registration can't ring our bell yet */
        bool silent;             /* the same, and TCP may not report anything either */
        _Atomic bool settle_due; /* poller_settle() has work, which needs both locks */
        _Atomic bool rescan_due; /* all must be checked: a bell is lost, or a signal came */
        uint32_t pending[BATCH]; /* registrations of which the kernel or a bell has just reported */
        uint32_t pending_count;
        _Atomic uint32_t added; /* descriptors ever added: with one, no event can be out of order */
        uint64_t *bells;        /* per arena: id << 9 | 1 + bell */
};

/* poller_table.c */
extern struct poller *pollers;
extern struct registration *registrations;
extern _Atomic uint32_t *poller_of_fd; /* per descriptor: 1 + first registration */
extern _Atomic uint32_t *poller_only;  /* per end: 1 + its only registration, or SEVERAL */
extern struct lock poller_table;
extern uint32_t registrations_used; /* numbers below were ever in use */
extern uint32_t pollers_used;

struct poller *poller_of(int epfd);

static inline uint32_t registration_number(const struct registration *r)
{
        return (uint32_t)(r - registrations);
}

static inline bool registration_is_of(const struct poller *poller, const struct registration *r)
{
        return load_relaxed(&r->poller) == (uint32_t)(poller - pollers);
}

static inline struct end *registration_end(const struct registration *r)
{
        struct end *end = &family->ends[(uint32_t)r->key - 1];

        return end_is(end, r->key) ? end : NULL;
}

/* Does one of the end's directions use a ring? */
static inline bool end_uses_ring(struct end *end)
{
        uint32_t rx = load_relaxed(&end->rx.phase);

        return rx == PHASE_READY || rx == PHASE_RING || load_relaxed(&end->tx.phase) == PHASE_RING;
}

struct registration *registration_find(const struct poller *poller, int fd);
struct registration *registration_add(struct poller *poller, int fd, uint64_t key);
/* Under both locks. */
void registration_drop(struct poller *poller, struct registration *r);
/* Put it under another descriptor. Under the table's lock. */
void registration_move(struct registration *r, int fd);
/* All registrations of an end, whichever of its descriptors they were made with: the first one, or
 * the one after `r`. Under the table's lock. */
struct registration *registration_of_end(const struct end *end, const struct registration *r);
void registration_activate(struct poller *poller, struct registration *r);
void registration_deactivate(struct poller *poller, struct registration *r, enum state state);

uint64_t registration_tag(const struct registration *r);
/* The registration that a tag means, under the lock of its poller. NULL: it has been changed since
 * a thread fetched the event. The change made the kernel check again, so it reports what still
 * holds. */
struct registration *registration_of_tag(const struct poller *poller, uint64_t tag);
/* Give it another tag: what the kernel has reported under the old one is void. */
void registration_retag(struct registration *r);

/* Have the kernel report at least what registration_mask() says. */
uint32_t registration_mask(const struct registration *r, struct end *end);
bool registration_update_kernel(struct poller *poller, struct registration *r, struct end *end);
/* Check the ring for this registration from now on; the kernel has registration_mask() already.
 * Under the poller's lock. */
void registration_enter_ring(struct poller *poller, struct registration *r, struct end *end);
/* The same for a registration of which the kernel has reported to the program so far. */
bool registration_to_ring(struct poller *poller, struct registration *r, struct end *end);
/* What to tell the kernel when it reports to the program again. `last`: the registration is to be
 * dropped. */
struct epoll_event registration_for_program(struct registration *r, bool last);
/* Neither direction uses a ring any more: the kernel reports to the program again. */
void registration_to_kernel(struct poller *poller, struct registration *r, bool last);
/* The events of this registration may have changed. `again`: report also those that were reported
 * before. Under both locks. */
void registration_refresh(struct poller *poller, struct registration *r, struct end *end, bool again);

/* poller_events.c */
/* The events to report for a registration; 0: none. `take`: they are reported, so an edge-triggered
 * one reports them once. */
uint32_t registration_events(struct registration *r, struct end *end, bool take);

/* poller_arm.c */
/* The instance's bell for an arena, or -1. */
int poller_bell(const struct poller *poller, uint32_t arena);
bool poller_give_bell(struct poller *poller, uint32_t arena);
void poller_forget_bells(struct poller *poller);
/* Wake one of the threads that sleep in the instance, or elsewhere because of it. Under the
 * poller's lock. */
void poller_wake_one(struct poller *poller);
/* The same from a signal handler that has interrupted work under one of the locks. */
void poller_wake_interrupted(struct poller *poller);
/* Take the pending wake-up. The thread that does so has to do the work, or to pass it on:
 * poller_pass_on().
 */
void poller_take_wakeup(struct poller *poller);
/* Arm one registration. Returns whether the peer can ring the bell. */
bool registration_arm(struct poller *poller, struct registration *r, struct end *end);
/* Before a sleep: arm all ACTIVE registrations. Returns whether there is something to report by
 * now. */
bool poller_arm_all(struct poller *poller);
/* Has an epoll instance inside this one something to report? */
bool registration_nested_ready(const struct registration *r);

static inline bool poller_is_slept_on(const struct poller *poller)
{
        return poller->sleepers || poller->polled;
}

void poller_pass_on_active(struct poller *poller);

/* For a thread that has made a registration ACTIVE, or leaves with one, while others sleep: arm
 * them all, or wake a sleeper. */
static inline void poller_pass_on(struct poller *poller)
{
        if (__builtin_expect(poller->active != NONE, 0) && poller_is_slept_on(poller))
                poller_pass_on_active(poller);
}

/* poller_harvest.c */
/* All events that there are now. Rings are checked first, then the kernel is polled, then what the
 * kernel reported is checked: so a program that hears of an event also hears of all that came
 * before it, on any connection. Without `with_kernel`, the kernel is polled only if a ring has
 * something. */
int poller_collect(struct poller *poller, struct epoll_event *events, int size, bool with_kernel,
                   bool spinning);
/* The events to report after a sleep in the kernel returned these `count`. 0: poller_collect()
 * finds all. */
int poller_translate(struct poller *poller, struct epoll_event *events, int count, int size);
/* Do what needs both locks. */
void poller_settle(struct poller *poller);

#endif
