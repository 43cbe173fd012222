#include "family.h"

#include "clock.h"
#include "hooks.h"
#include "real.h"
#include "settings.h"
#include "sparse.h"
#include "sys.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/socket.h>

struct family *family;
struct process process;
__thread uint32_t thread_id __attribute__((tls_model("initial-exec")));

enum {
        NOBODY = 0,
        CHILD_TO_BE = -1, /* announced by a parent, hasn't run yet */
        FOR_EVER = -2,    /* it has a PID namespace of its own: its ID means nothing here */
        NO_NUMBER = -1,
        LATER = -2, /* taken with the first end: so the family's memory isn't touched before */
};

/* What the parent has given the child that it is about to make: 1 + its number, 0: NO_NUMBER. The
 * child's copy says that it has been counted. */
static __thread int32_t promised __attribute__((tls_model("initial-exec")));
static __thread bool announced __attribute__((tls_model("initial-exec")));

uint32_t thread_find_id(void)
{
        thread_id = (uint32_t)sys_0(SYS_gettid);
        return thread_id;
}

static _Atomic uint64_t *word_of(struct end *end, int32_t member)
{
        return &end->members[member / 64];
}

static uint64_t bit_of(int32_t member)
{
        return UINT64_C(1) << (member % 64);
}

static void hold(struct end *end, int32_t member)
{
        if (member >= 0 && atomic_fetch_or(word_of(end, member), bit_of(member)) & bit_of(member))
                return;
        atomic_fetch_add(&end->holders, 1);
}

/* One holder less; `last`: the value of `holders` when it was the last one. Returns whether it was.
 */
static bool drop_holder(struct end *end, int32_t member, uint32_t last)
{
        uint32_t holders = atomic_load(&end->holders);

        if (member >= 0 && !(atomic_fetch_and(word_of(end, member), ~bit_of(member)) & bit_of(member)))
                return false;
        while (holders && holders != END_FREEING)
                if (atomic_compare_exchange_weak(&end->holders, &holders, holders == 1 ? last : holders - 1))
                        return holders == 1;
        return false;
}

/* A number for one more process; NO_NUMBER. */
static int32_t take_number(int32_t pid)
{
        for (int32_t member = 0; member < MEMBERS; member++) {
                int32_t nobody = NOBODY;

                if (load_relaxed(&family->members[member]) == NOBODY &&
                    atomic_compare_exchange_strong(&family->members[member], &nobody, pid))
                        return member;
        }
        return NO_NUMBER;
}

static int32_t own_mark(void)
{
        return process.renamed ? FOR_EVER : atomic_load(&process.pid);
}

int end_next(int after, struct end **end, uint64_t *key)
{
        uint32_t high = process.on ? atomic_load(&process.high) : 0;

        for (uint32_t fd = (uint32_t)(after + 1); fd < high; fd++) {
                *end = end_of((int)fd, key);
                if (*end)
                        return (int)fd;
        }
        return -1;
}

int end_next_descriptor(const struct end *end, int after)
{
        uint32_t high = atomic_load(&process.high), number = end_number(end);

        if (load_relaxed(&process.local[number]) == 1) {
                int32_t only = load_relaxed(&process.fd_of[number]);

                /* Another thread may just have closed the one in the table. */
                if ((uint32_t)load_relaxed(&process.fds[only]) == number + 1)
                        return after < only ? only : -1;
        }
        for (uint32_t fd = (uint32_t)(after + 1); fd < high; fd++)
                if ((uint32_t)load_relaxed(&process.fds[fd]) == number + 1)
                        return (int)fd;
        return -1;
}

bool end_held_elsewhere(const struct end *end)
{
        return load_relaxed(&end->holders) > 1;
}

static bool is_first_alias(uint32_t fd, uint64_t key)
{
        if (atomic_load(&process.local[(uint32_t)key - 1]) < 2)
                return true;
        for (uint32_t i = 0; i < fd; i++)
                if (load_relaxed(&process.fds[i]) == key)
                        return false;
        return true;
}

/* The ends that this process holds, each once. */
static void each_end(void (*visit)(struct end *end, int32_t member), int32_t member)
{
        uint32_t high = atomic_load(&process.high);

        for (uint32_t i = 0; i < high; i++) {
                uint64_t key = load_relaxed(&process.fds[i]);

                if (fd_is_end(key) && end_is(&family->ends[(uint32_t)key - 1], key) && is_first_alias(i, key))
                        visit(&family->ends[(uint32_t)key - 1], member);
        }
}

/* An upgrade costs as much as some dozens of operations on TCP. A connection that ends soon after
 * its request, within the age of the rule, hasn't paid for it. Programs that make such connections
 * make more of them, so the next ones wait for more operations, which long connections have soon.
 * The counter is a guess: processes that change it at the same time may lose a step. */
void family_account(struct end *end)
{
        uint64_t asked = atomic_exchange_explicit(&end->requested_at, 0, memory_order_relaxed);
        uint32_t unpaid = load_relaxed(&family->unpaid);

        if (!asked)
                return;
        if (now() - asked >= settings.age * UINT64_C(1000))
                unpaid /= 2;
        else if (unpaid < UNPAID_MOST)
                unpaid++;
        store_relaxed(&family->unpaid, unpaid);
}

static void drop_holder_for_good(struct end *end, int32_t member)
{
        if (drop_holder(end, member, 0))
                family_account(end);
}

/* The child will hold what this process holds: it is counted before it can close anything. */
void family_fork(void)
{
        if (!process.on || announced)
                return;
        announced = true;
        promised = LATER + 1;
        if (atomic_load(&process.high)) {
                promised = take_number(CHILD_TO_BE) + 1;
                each_end(hold, promised - 1);
        }
        hooks.forks();
}

static void fork_is_done(bool made)
{
        if (!announced)
                return;
        announced = false;
        hooks.fork_done(made);
}

static void in_parent(void)
{
        fork_is_done(true);
}

void family_fork_done(bool made)
{
        fork_is_done(made);
        if (made || !process.on)
                return;
        each_end(drop_holder_for_good, promised - 1);
        if (promised > 0)
                atomic_store(&family->members[promised - 1], NOBODY);
}

static void in_child(void)
{
        if (process.on)
                family_forked();
}

/* In a child, however it was made. */
void family_forked(void)
{
        int32_t pid = (int32_t)sys_0(SYS_getpid);
        uint32_t high = atomic_load(&process.high);

        if (atomic_exchange(process.alive, 1))
                return;
        thread_id = 0;
        /* A parent that can't be seen is in another PID namespace. */
        process.renamed = process.renamed || sys_0(SYS_getppid) == 0;
        atomic_store(&process.pid, pid);
        process.member = announced ? promised - 1 : high ? take_number(own_mark()) : LATER;
        if (announced && process.member >= 0)
                atomic_store(&family->members[process.member], own_mark());
        for (uint32_t i = 0; i < high; i++) {
                uint64_t key = load_relaxed(&process.fds[i]);

                if (fd_is_end(key) && !end_is(&family->ends[(uint32_t)key - 1], key))
                        atomic_store(&process.fds[i], 0);
        }
        if (!announced)
                each_end(hold, process.member);
        announced = false;
        hooks.forked();
}

static void drop_shared_holder(struct end *end, int32_t member)
{
        if (end_held_elsewhere(end))
                drop_holder(end, member, 0);
}

/* The new program is no part of the family. An end that only this process holds ends with it, and
 * the peer's kernel says so. */
void family_exec(void)
{
        if (process.on && process.member >= 0)
                each_end(drop_shared_holder, process.member);
}

void family_unexec(void)
{
        if (process.on && process.member >= 0)
                each_end(hold, process.member);
}

void family_exit(void)
{
        if (process.gone)
                return;
        process.gone = true;
        each_end(drop_holder_for_good, process.member);
        if (process.member >= 0)
                atomic_store(&family->members[process.member], NOBODY);
}

static bool is_dead(int32_t member)
{
        int32_t pid = atomic_load(&family->members[member]);

        return pid > 0 && !process.renamed && sys_2(SYS_kill, pid, 0) == -ESRCH;
}

void end_forget_dead(struct end *end)
{
        for (int word = 0; word < MEMBER_WORDS; word++)
                for (uint64_t left = atomic_load(&end->members[word]); left; left &= left - 1) {
                        int32_t member = word * 64 + __builtin_ctzll(left);

                        if (member != process.member && is_dead(member))
                                drop_holder(end, member, 0);
                }
}

void fd_set_word(int fd, uint64_t word)
{
        uint32_t high = load_relaxed(&process.high);

        if (fd_is_end(word))
                store_relaxed(&process.fd_of[(uint32_t)word - 1], fd);
        while (fd_is_end(word) && (uint32_t)fd >= high &&
               !atomic_compare_exchange_weak(&process.high, &high, (uint32_t)fd + 1))
                ;
        store_release(&process.fds[fd], word);
}

static void number_oneself(void)
{
        int32_t later = LATER, number;

        if (load_relaxed(&process.member) != LATER)
                return;
        number = take_number(own_mark());
        /* Another thread may have come first. */
        if (!atomic_compare_exchange_strong(&process.member, &later, number) && number >= 0)
                atomic_store(&family->members[number], NOBODY);
}

void end_hold_first(struct end *end)
{
        number_oneself();
        for (int i = 0; i < MEMBER_WORDS; i++)
                store_relaxed(&end->members[i], 0);
        if (process.member >= 0)
                store_relaxed(word_of(end, process.member), bit_of(process.member));
        store_relaxed(&end->holders, 1);
}

bool end_drop(struct end *end)
{
        return drop_holder(end, process.member, END_FREEING);
}

bool end_is_behind(int fd, const struct end *end)
{
        uint64_t cookie = 0;
        uint32_t size = sizeof cookie;

        return sys_5(SYS_getsockopt, fd, SOL_SOCKET, SO_COOKIE, &cookie, &size) == 0 &&
               cookie == load_relaxed(&end->cookie);
}

/* What every process touches comes first, within the 2 MiB that one page table maps: fork copies
 * page tables.
 */
char *family_reserve(size_t more)
{
        struct real *functions = real();
        char *place;

        if (!functions->read || !functions->clock_gettime)
                return NULL;
        family = reserve_for_good(sizeof *family, MAP_SHARED);
        place = reserve_for_good(PAGE + DESCRIPTORS * sizeof *process.fds + ENDS * sizeof *process.local +
                                     ENDS * sizeof *process.fd_of + 4 * (size_t)PAGE + more,
                                 MAP_PRIVATE);
        if (!family || !place)
                return NULL;
        process.alive = take_part(&place, PAGE);
        process.local = take_part(&place, ENDS * sizeof *process.local);
        process.fd_of = take_part(&place, ENDS * sizeof *process.fd_of);
        return place;
}

void family_start(char **place)
{
        struct real *functions = real();

        process.fds = take_part(place, DESCRIPTORS * sizeof *process.fds);
        /* Linux 4.14 and later; without it a child by raw clone isn't noticed, one by fork is. */
        sys_3(SYS_madvise, process.alive, PAGE, MADV_WIPEONFORK);
        sys_3(SYS_madvise, family, sizeof *family, MADV_DONTDUMP);
        atomic_store(process.alive, 1);
        atomic_store(&process.pid, (int32_t)sys_0(SYS_getpid));
        process.member = LATER;
        if (functions->__register_atfork)
                functions->__register_atfork(family_fork, in_parent, in_child, NULL);
        else if (functions->pthread_atfork)
                functions->pthread_atfork(family_fork, in_parent, in_child);
}

bool in_this_process(void)
{
        return process.on && (int32_t)sys_0(SYS_getpid) == load_relaxed(&process.pid);
}
