/* What the processes that share connections by fork share about them: the family's memory.
 *
 * A connection's end is a file description, which fork hands to children. So what an end has read
 * and written, and the locks that order it, live in memory that fork hands on as well: anonymous,
 * shared, made by the first process. Nothing in it is a pointer or a descriptor, and the other end
 * of a connection never sees it.
 *
 * Descriptors, mappings and epoll instances are a process's own: `struct process`.
 *
 * `holders` counts the processes that have descriptors of an end. A process that is killed doesn't
 * say that it holds an end no more. So each process has a number in the family, and an end has a
 * bit for each number: what a dead process held is taken from it. Processes beyond MEMBERS have no
 * number, and are only counted: if one of those is killed, its ends are never freed.
 *
 * ends.h makes and frees ends.
 */
#ifndef FREEFLOW_FAMILY_H
#define FREEFLOW_FAMILY_H

#include "end.h"
#include "layout.h"

#include <stdbool.h>
#include <sys/types.h>

enum {
        ENDS = 65536,          /* connections of one family; more stay on TCP */
        ARENAS = 16384,        /* process pairs of one family */
        DESCRIPTORS = 1 << 20, /* descriptors above aren't tracked */
};

/* An arena, as all processes of the family know it. */
struct arena_record {
        _Atomic uint64_t id; /* 0: free */
        _Atomic uint64_t token;
        _Atomic uint32_t side;
        _Atomic uint32_t bells;       /* next index of ours */
        _Atomic uint32_t connections; /* ends attached to it */
        _Atomic int32_t owner;        /* the process that has queue pairs in it, by its ID */
        _Atomic uint64_t queue_pairs; /* slots that those have, a bit for each */
};

struct family {
        struct lock
            arenas_lock; /* an arena that nothing is in goes, and none gets its first slot meanwhile */
        _Atomic uint32_t next_end;
        _Atomic uint32_t next_arena;
        _Atomic uint64_t touched;         /* bytes of bulk areas in use by our senders */
        _Atomic uint64_t read;            /* bytes of them that our receivers have read by their mappings */
        _Atomic uint32_t unpaid;          /* how many of our last connections requested and soon ended */
        _Atomic int32_t members[MEMBERS]; /* process IDs, 0: the number is free */
        struct end ends[ENDS];
        struct arena_record arenas[ARENAS];
};

extern struct family *family;

/* A process's own. */
struct process {
        _Atomic uint64_t *fds;   /* DESCRIPTORS words, 0: not tracked; generation << 32 | what: see FD_* */
        _Atomic uint16_t *local; /* ENDS counters: descriptors of this process for an end */
        _Atomic int32_t *fd_of;  /* ENDS descriptors: the last one that an end got */
        _Atomic uint32_t *alive; /* a page that is empty in a child: how we learn of a fork */
        _Atomic uint32_t high;   /* descriptors tracked were all below */
        _Atomic int32_t pid;
        _Atomic int32_t own_high; /* the library's own descriptors were all below */
        _Atomic int32_t member;   /* its number in the family, negative: none */
        _Atomic uint32_t
            retires;          /* a reason to retire at the next call on a connection (retire.h); 0: none */
        bool gone;            /* it ends, and is counted no more */
        bool renamed;         /* its ID is of another namespace than the family's */
        _Atomic bool touched; /* bulk areas may have something to reclaim */
        bool on;
        bool loopback; /* loopback connections too, for tests */
        bool restless; /* fall back at random, and request again at once, for tests */
};

extern struct process process;

/* The lower half of a word of `process.fds`: 1 + number of an end, FD_POLLER + number of an epoll
 * instance, FD_VERBS (services.h), FD_OWN. */
#define FD_POLLER UINT32_C(0x80000000)
#define FD_VERBS UINT32_C(0x40000000)
#define FD_OWN UINT32_C(0xffffffff)

static inline bool fd_is_end(uint64_t found)
{
        return (uint32_t)found - 1 < ENDS;
}

static inline bool fd_is_verbs(int fd)
{
        return process.on && (unsigned)fd < DESCRIPTORS &&
               (uint32_t)load_relaxed(&process.fds[fd]) == FD_VERBS;
}

void fd_set_word(int fd, uint64_t word);

/* The thread's id, and what a child must not inherit. */
extern __thread uint32_t thread_id __attribute__((tls_model("initial-exec")));

uint32_t thread_find_id(void);

static inline uint32_t self(void)
{
        return __builtin_expect(thread_id != 0, 1) ? thread_id : thread_find_id();
}

/* At the start: reserve memory, with `more` bytes for others. Returns where the next part is to be
 * taken from (take_part() of sparse.h), or NULL. The first parts are those that every process
 * touches. */
char *family_reserve(size_t more);
/* Take the rest. Afterwards `process.on` may be set. */
void family_start(char **place);
/* False in a child of vfork: it runs in our memory, but its descriptors are its own. */
bool in_this_process(void);
void family_forked(void);
/* A child that will have copies of all descriptors is about to be made. Afterwards, in the parent:
 * was it? */
void family_fork(void);
void family_fork_done(bool made);
/* The process is about to become another program, which holds nothing; and it didn't. */
void family_exec(void);
void family_unexec(void);
/* The process ends: it holds nothing any more. */
void family_exit(void);

/* The end behind a descriptor, or NULL; `key` is the table's word of it in any case. */
static inline struct end *end_of(int fd, uint64_t *key)
{
        uint64_t found;

        *key = 0;
        if (!process.on || (unsigned)fd >= DESCRIPTORS)
                return NULL;
        *key = found = load_relaxed(&process.fds[fd]);
        if (__builtin_expect(!fd_is_end(found), 1))
                return NULL;
        if (__builtin_expect(!load_relaxed(process.alive), 0))
                family_forked();
        return &family->ends[(uint32_t)found - 1];
}

static inline uint32_t end_number(const struct end *end)
{
        return (uint32_t)(end - family->ends);
}

/* Both flows' locks, the receiver's first. Returns which of the two this thread had already, as
 * bits; 0: none. */
static inline unsigned end_lock(struct end *end)
{
        unsigned rx = lock_take(&end->rx.lock, self());

        return rx | (unsigned)lock_take(&end->tx.lock, self()) << 1;
}

static inline void end_release(struct end *end, unsigned nested)
{
        lock_release(&end->tx.lock, nested >> 1);
        lock_release(&end->rx.lock, nested & 1);
}

/* Is it still the same connection? */
static inline bool end_is(const struct end *end, uint64_t key)
{
        return load_acquire(&end->generation) == (uint32_t)(key >> 32);
}

/* Is there still something to be read that the kernel doesn't have? */
static inline bool end_has_rest(const struct end *end)
{
        uint32_t phase = load_acquire(&end->rx.phase);

        return load_relaxed(&end->stage) == STAGE_ATTACHED && (phase == PHASE_READY || phase == PHASE_RING);
}

/* By how many binary digits more operations a connection needs than the settings say. */
enum { UNPAID_STEP = 4, UNPAID_MOST = 20 };

static inline uint32_t family_restraint(void)
{
        return load_relaxed(&family->unpaid) / UNPAID_STEP;
}

/* The connection ends, or stays on TCP: did its upgrade pay? */
void family_account(struct end *end);

/* `holders` of an end that is being made or freed. */
#define END_FREEING UINT32_MAX
/* This process becomes the first holder of an end that is being made. */
void end_hold_first(struct end *end);
/* This process holds it no more. True: it was the last one, and the end is END_FREEING. */
bool end_drop(struct end *end);
bool end_held_elsewhere(const struct end *end);
/* Ask the kernel whether the processes that seem to hold it are alive. */
void end_forget_dead(struct end *end);
/* The tracked connections of this process: the first descriptor after this one that is an end's,
 * and that end. From -1 on; -1: no more. */
int end_next(int after, struct end **end, uint64_t *key);
/* The descriptors of an end in this process, one after the other, from -1 on; -1: no more. */
int end_next_descriptor(const struct end *end, int after);
/* Is the descriptor, of this process or of a child in its memory, one of this end? The kernel is
 * asked for the socket's cookie. */
bool end_is_behind(int fd, const struct end *end);

#endif
