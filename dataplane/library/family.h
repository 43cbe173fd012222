/* What the processes that share connections by fork share about them: the family's memory.
 *
 * A connection's end is a file description, which fork hands to children; so what an end has read and
 * written, and the locks that order it, live in memory that fork hands on as well: anonymous, shared, made by
 * the first process. Nothing in it is a pointer or a descriptor, and the other end of a connection never sees
 * it.
 *
 * Descriptors, mappings and epoll instances are a process's own: `struct process`.
 *
 * Life of an end: made by socket() or accept(); found through `process.fds`, which holds its number and
 * generation; held by any number of processes, which `holders` counts; freed by the last one's last close,
 * under both locks, with a new generation. Whoever waited in between looks at the generation again before he
 * touches anything.
 *
 * A process that is killed doesn't say that it holds an end no more. So each process has a number in the
 * family, and an end has a bit for each number: what a dead process held is taken from it. Processes beyond
 * MEMBERS have no number, and are counted alone: if one of those is killed, its ends are never freed.
 */
#ifndef FREEFLOW_FAMILY_H
#define FREEFLOW_FAMILY_H

#include "layout.h"
#include "lock.h"
#include "spin.h"

#include <stdbool.h>
#include <sys/types.h>

enum {
        ENDS = 65536,  /* connections of one family; more stay on TCP */
        MEMBERS = 256, /* processes of one family that have a number */
        MEMBER_WORDS = MEMBERS / 64,
        ARENAS = 16384,        /* process pairs of one family */
        DESCRIPTORS = 1 << 20, /* descriptors above are not looked at */
};

/* A direction's way through its life. A receiver: TCP -> READY -> RING -> OVER; a sender: TCP -> RING ->
 * OVER. */
enum phase {
        PHASE_TCP,   /* bytes go over TCP, and are counted */
        PHASE_READY, /* receiver: bytes still come over TCP; every wait looks at the ring too */
        PHASE_RING,  /* bytes go through the ring */
        PHASE_OVER,  /* the ring ended; bytes go over TCP again, for ever */
};

/* One direction, as the end that keeps it knows it. */
struct flow {
        struct lock lock;
        _Atomic uint32_t phase;
        _Atomic uint32_t kernel;   /* calls in the kernel that don't look at the ring */
        _Atomic uint32_t deferred; /* receiver: TCP has news that the program mustn't hear yet (remote.h) */
        _Atomic uint64_t position; /* bytes over TCP so far, while PHASE_TCP or PHASE_READY */
        _Atomic uint64_t edge;     /* sender: tail, receiver: head; the ring's words only publish it */
        _Atomic uint64_t base;     /* sender: where the ring began anew */
        _Atomic uint64_t limit;    /* receiver: position at which the ring begins, in PHASE_READY and later */
        _Atomic uint64_t reserved; /* sender: end of what is being put, 0: nothing is */
        /* sender: highest offset used since the bulk area was given back; receiver: highest one read by its
         * mapping */
        _Atomic uint64_t touched;
        _Atomic uint64_t seen;  /* sender: `edge` at the last scan of reclaim.c */
        _Atomic uint64_t clean; /* `edge` up to which, as we know, nothing went over TCP meanwhile (raw.h) */
        _Atomic uint64_t sent;  /* sender: what the kernel had to send when the ring began */
        _Atomic uint32_t stopped; /* sender: may not go on before the ring is empty */
        struct spinner spinner;
        _Atomic uint32_t checked; /* ready_stamp() at the last look at the kernel's state of the connection */
        _Atomic uint32_t full;    /* sender: times that there was no room */
        _Atomic uint32_t timeout; /* SO_RCVTIMEO or SO_SNDTIMEO in ms, 0: none */
};

enum stage {
        STAGE_CLOSED,    /* a socket without a connection yet, or none any more */
        STAGE_CANDIDATE, /* connected, counted */
        STAGE_REQUESTED, /* the router knows; no answer yet */
        STAGE_ANSWERING, /* a thread takes the answer: until it has done so, the end stays */
        STAGE_REFUSED,   /* it said no: the next call on the connection stops looking at it */
        STAGE_GRANTED,   /* there is a slot; the next call on the connection checks its counters */
        STAGE_ATTACHED,  /* the flows' phases say the rest */
};

struct end {
        _Atomic uint32_t generation; /* odd: in use */
        _Atomic uint32_t stage;
        _Atomic uint32_t holders; /* processes that have descriptors of it */
        _Atomic uint32_t operations;
        _Atomic uint32_t reason; /* of the last thing that stood in the way */
        _Atomic uint32_t nonblocking;
        _Atomic uint32_t active; /* opened by connect(): its SYN counts as a byte acknowledged */
        _Atomic uint32_t shut;   /* 1: SHUT_RD, 2: SHUT_WR was called; 4: SHUT_WR is being called */
        _Atomic uint32_t
            error; /* of the connection, which the kernel has said and the program hasn't heard */
        /* Options that are the kernel's, and ours for what was left in the ring when they were set. */
        _Atomic uint32_t low;    /* SO_RCVLOWAT; 0: the kernel knows it */
        _Atomic uint32_t peeked; /* 1 + SO_PEEK_OFF; 0: off */
        _Atomic uint32_t inq;    /* TCP_INQ */
        _Atomic uint32_t epoch;  /* router_epoch() when it was asked */
        _Atomic uint64_t opened; /* ns */
        _Atomic uint64_t
            asked; /* ns, when the router was asked first; 0: it wasn't, or that is accounted for */
        _Atomic uint64_t cookie;
        _Atomic uint64_t incarnation;
        _Atomic uint32_t kept; /* the kernel's keepalive isn't what the program has set: keep.h */
        _Atomic int32_t keep_on, keep_idle, keep_pause, keep_count;
        _Atomic uint32_t arena; /* index into family.arenas */
        _Atomic uint16_t side;
        _Atomic uint16_t slot;
        _Atomic uint64_t members[MEMBER_WORDS]; /* those of the holders that have a number */
        _Alignas(64) struct flow rx;
        _Alignas(64) struct flow tx;
};

/* An arena, as all processes of the family know it. */
struct arena_record {
        _Atomic uint64_t id; /* 0: free */
        _Atomic uint64_t token;
        _Atomic uint32_t side;
        _Atomic uint32_t bells;       /* next index of ours */
        _Atomic uint32_t connections; /* ends attached to it */
        _Atomic uint32_t unused;
};

struct family {
        struct lock arenas_lock; /* an arena with no connection goes, and none gets its first one meanwhile */
        _Atomic uint32_t next_end;
        _Atomic uint32_t next_arena;
        _Atomic uint64_t touched;         /* bytes of bulk areas in use by our senders */
        _Atomic uint64_t read;            /* bytes of them that our receivers have read by their mappings */
        _Atomic uint32_t unpaid;          /* how many of our last connections asked and soon ended */
        _Atomic int32_t members[MEMBERS]; /* process IDs, 0: the number is free */
        struct end ends[ENDS];
        struct arena_record arenas[ARENAS];
};

extern struct family *family;

/* A process's own. */
struct process {
        _Atomic uint64_t *fds;   /* DESCRIPTORS words, 0: not looked at; generation << 32 | what: see FD_* */
        _Atomic uint16_t *local; /* ENDS counters: descriptors of this process for an end */
        _Atomic int32_t *fd_of;  /* ENDS descriptors: the last one that an end got */
        _Atomic uint32_t *alive; /* a page that is empty in a child: how we learn of a fork */
        _Atomic uint32_t high;   /* descriptors tracked were all below */
        _Atomic int32_t pid;
        _Atomic int32_t own_high; /* the library's own descriptors were all below */
        _Atomic int32_t member;   /* its number in the family, negative: none */
        bool gone;                /* it ends, and is counted no more */
        bool renamed;             /* its ID is of another namespace than the family's */
        _Atomic bool touched;     /* bulk areas may have something to give back */
        bool on;
        bool loopback; /* loopback connections too, for tests */
        bool eager;    /* upgrade at the first operation, and wait for the router, for tests */
};

extern struct process process;

/* The lower half of a word of `process.fds`: 1 + number of an end, FD_POLLER + number of an epoll instance,
 * FD_OWN. */
#define FD_POLLER UINT32_C(0x80000000)
#define FD_OWN UINT32_C(0xffffffff)

static inline bool fd_is_end(uint64_t found)
{
        return (uint32_t)found - 1 < ENDS;
}

void fd_set_word(int fd, uint64_t word);

/* The thread's id, and what a child must not inherit. */
extern __thread uint32_t thread_id __attribute__((tls_model("initial-exec")));

uint32_t thread_find_id(void);

static inline uint32_t self(void)
{
        return __builtin_expect(thread_id != 0, 1) ? thread_id : thread_find_id();
}

void family_start(void);
void family_forked(void);
/* A child that will have copies of all descriptors is about to be made. Afterwards, in the parent: was it? */
void family_fork(void);
void family_fork_done(bool made);
/* The process is about to become another program, which holds nothing; and it didn't. */
void family_exec(void);
void family_unexec(void);
/* The process ends: others may be the last ones now. */
void family_exit(void);

/* The end behind a descriptor and its generation, or NULL. */
static inline struct end *end_of(int fd, uint64_t *key)
{
        if (!process.on || (unsigned)fd >= DESCRIPTORS)
                return NULL;
        uint64_t found = atomic_load_explicit(&process.fds[fd], memory_order_relaxed);

        if (__builtin_expect(!fd_is_end(found), 1))
                return NULL;
        if (__builtin_expect(!atomic_load_explicit(process.alive, memory_order_relaxed), 0))
                family_forked();
        *key = found;
        return &family->ends[(uint32_t)found - 1];
}

static inline uint32_t end_number(const struct end *end)
{
        return (uint32_t)(end - family->ends);
}

/* Is it still the same connection? */
static inline bool end_is(const struct end *end, uint64_t key)
{
        return atomic_load_explicit(&end->generation, memory_order_acquire) == (uint32_t)(key >> 32);
}

/* Is there still something to be read that the kernel doesn't have? */
static inline bool end_has_rest(const struct end *end)
{
        uint32_t phase = atomic_load_explicit(&end->rx.phase, memory_order_acquire);

        return atomic_load_explicit(&end->stage, memory_order_relaxed) == STAGE_ATTACHED &&
               (phase == PHASE_READY || phase == PHASE_RING);
}

/* By how many binary digits more operations a connection needs than the settings say. */
enum { UNPAID_STEP = 4, UNPAID_MOST = 20 };

static inline uint32_t family_restraint(void)
{
        return atomic_load_explicit(&family->unpaid, memory_order_relaxed) / UNPAID_STEP;
}

struct end *end_make(int fd, bool nonblocking);
void end_alias(int old, int new);
/* Before the descriptor is closed or replaced. */
void end_forget(int fd);
/* This connection stays on, or goes back to, TCP and is no longer looked at. Not for one that is attached. */
void end_leave(int fd, struct end *end, uint64_t key, uint32_t reason);
/* The descriptors of an end in this process, one after the other, from -1 on; -1: no more. */
int end_next_descriptor(const struct end *end, int after);
bool end_held_elsewhere(const struct end *end);
/* Ask the kernel whether those who seem to hold it are alive. */
void end_forget_dead(struct end *end);

#endif
