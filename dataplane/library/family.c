#include "family.h"

#include "arena.h"
#include "clock.h"
#include "poller.h"
#include "real.h"
#include "router.h"
#include "sys.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

struct family *family;
struct process process;
__thread uint32_t thread_id __attribute__((tls_model("initial-exec")));

/* A child that was announced by fork's prepare handler and hasn't spoken yet. */
#define CHILD_TO_BE (-1)

uint32_t thread_find_id(void)
{
        thread_id = (uint32_t)sys_0(SYS_gettid);
        return thread_id;
}

static bool add_holder(struct end *end, int32_t pid)
{
        for (int i = 0; i < HOLDERS; i++) {
                int32_t nobody = 0;

                if (atomic_compare_exchange_strong(&end->holders[i], &nobody, pid))
                        return true;
        }
        return false;
}

/* Returns whether nobody holds it any more. */
static bool remove_holder(struct end *end, int32_t pid)
{
        bool last = true;

        for (int i = 0; i < HOLDERS; i++) {
                int32_t expected = pid;

                if (!atomic_compare_exchange_strong(&end->holders[i], &expected, 0) && expected != 0)
                        last = false;
        }
        return last;
}

int end_next_descriptor(const struct end *end, int after)
{
        uint32_t high = atomic_load(&process.high), number = end_number(end);

        if (atomic_load_explicit(&process.local[number], memory_order_relaxed) == 1) {
                int32_t only = atomic_load_explicit(&process.fd_of[number], memory_order_relaxed);

                /* Another thread may just have closed the one that was noted. */
                if ((uint32_t)atomic_load_explicit(&process.fds[only], memory_order_relaxed) == number + 1)
                        return after < only ? only : -1;
        }
        for (uint32_t fd = (uint32_t)(after + 1); fd < high; fd++)
                if ((uint32_t)atomic_load_explicit(&process.fds[fd], memory_order_relaxed) == number + 1)
                        return (int)fd;
        return -1;
}

uint32_t end_holders(const struct end *end)
{
        uint32_t count = 0;

        for (int i = 0; i < HOLDERS; i++)
                count += atomic_load_explicit(&end->holders[i], memory_order_relaxed) != 0;
        return count;
}

bool end_held_elsewhere(const struct end *end)
{
        return end_holders(end) > 1;
}

static bool is_first_alias(uint32_t fd, uint64_t key)
{
        if (atomic_load(&process.local[(uint32_t)key - 1]) < 2)
                return true;
        for (uint32_t i = 0; i < fd; i++)
                if (atomic_load_explicit(&process.fds[i], memory_order_relaxed) == key)
                        return false;
        return true;
}

/* fork is about to happen: what this process holds, the child will hold too. With all places taken, nobody
 * knows any more when the last one lets go: the end is never freed, which costs one of ENDS.
 */
static void before_fork(void)
{
        uint32_t high = atomic_load(&process.high);

        if (!process.on)
                return;
        for (uint32_t i = 0; i < high; i++) {
                uint64_t key = atomic_load_explicit(&process.fds[i], memory_order_relaxed);

                if (fd_is_end(key) && is_first_alias(i, key))
                        add_holder(&family->ends[(uint32_t)key - 1], CHILD_TO_BE);
        }
}

static void in_parent(void)
{
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
        atomic_store(&process.pid, pid);
        for (uint32_t i = 0; i < high; i++) {
                uint64_t key = atomic_load_explicit(&process.fds[i], memory_order_relaxed);

                if (!fd_is_end(key))
                        continue;
                struct end *end = &family->ends[(uint32_t)key - 1];

                if (!end_is(end, key)) {
                        atomic_store(&process.fds[i], 0);
                        continue;
                }
                for (int h = 0; h < HOLDERS; h++) {
                        int32_t announced = CHILD_TO_BE;

                        if (atomic_load(&end->holders[h]) == pid ||
                            atomic_compare_exchange_strong(&end->holders[h], &announced, pid))
                                break;
                }
        }
        arena_forked();
        poller_forked();
        router_forked();
}

void family_start(void)
{
        struct real *functions = real();

        if (!functions->read || !functions->clock_gettime)
                return;
        family = reserve(sizeof *family, MAP_SHARED);
        process.fds = reserve(DESCRIPTORS * sizeof *process.fds, MAP_PRIVATE);
        process.local = reserve(ENDS * sizeof *process.local, MAP_PRIVATE);
        process.fd_of = reserve(ENDS * sizeof *process.fd_of, MAP_PRIVATE);
        process.alive = reserve(PAGE, MAP_PRIVATE);
        if (!family || !process.fds || !process.local || !process.fd_of || !process.alive || !poller_start())
                return;
        /* Linux 4.14 and later; without it a child by raw clone isn't noticed, one by fork is. */
        sys_3(SYS_madvise, process.alive, PAGE, MADV_WIPEONFORK);
        sys_3(SYS_madvise, family, sizeof *family, MADV_DONTDUMP);
        atomic_store(process.alive, 1);
        atomic_store(&process.pid, (int32_t)sys_0(SYS_getpid));
        if (functions->__register_atfork)
                functions->__register_atfork(before_fork, in_parent, in_child, NULL);
        else if (functions->pthread_atfork)
                functions->pthread_atfork(before_fork, in_parent, in_child);
        process.on = true;
}

static void forget_holder_that_died(struct end *end)
{
        for (int i = 0; i < HOLDERS; i++) {
                int32_t pid = atomic_load(&end->holders[i]);

                if (pid > 0 && sys_2(SYS_kill, pid, 0) == -ESRCH)
                        atomic_compare_exchange_strong(&end->holders[i], &pid, 0);
        }
}

void fd_set_word(int fd, uint64_t word)
{
        uint32_t high = atomic_load_explicit(&process.high, memory_order_relaxed);

        if (fd_is_end(word))
                atomic_store_explicit(&process.fd_of[(uint32_t)word - 1], fd, memory_order_relaxed);
        while (fd_is_end(word) && (uint32_t)fd >= high &&
               !atomic_compare_exchange_weak(&process.high, &high, (uint32_t)fd + 1))
                ;
        atomic_store_explicit(&process.fds[fd], word, memory_order_release);
}

/* A free end, made ours: its generation is odd afterwards. */
static struct end *take_end(uint32_t *generation)
{
        /* The one freed last is still in the cache. */
        uint32_t start = atomic_load_explicit(&family->next_end, memory_order_relaxed);

        for (uint32_t i = 0; i < ENDS; i++) {
                struct end *end = &family->ends[(start + i) % ENDS];
                uint32_t seen = atomic_load_explicit(&end->generation, memory_order_relaxed);

                if (seen & 1) {
                        /* Left by processes that ended without closing. */
                        if (i >= 64)
                                forget_holder_that_died(end);
                        if (i >= 64 && !end_holders(end)) {
                                arena_release(end);
                                atomic_compare_exchange_strong(&end->generation, &seen, seen + 1);
                        }
                        continue;
                }
                if (atomic_compare_exchange_strong(&end->generation, &seen, seen + 1)) {
                        atomic_store_explicit(&family->next_end, end_number(end) + 1, memory_order_relaxed);
                        *generation = seen + 1;
                        return end;
                }
        }
        return NULL;
}

static void reset_flow(struct flow *flow)
{
        /* Not the lock: somebody may hold it for a moment and then see the new generation. */
        atomic_store_explicit(&flow->phase, PHASE_TCP, memory_order_relaxed);
        atomic_store_explicit(&flow->kernel, 0, memory_order_relaxed);
        atomic_store_explicit(&flow->withheld, 0, memory_order_relaxed);
        atomic_store_explicit(&flow->position, 0, memory_order_relaxed);
        atomic_store_explicit(&flow->edge, 0, memory_order_relaxed);
        atomic_store_explicit(&flow->base, 0, memory_order_relaxed);
        atomic_store_explicit(&flow->limit, UINT64_MAX, memory_order_relaxed);
        atomic_store_explicit(&flow->touched, 0, memory_order_relaxed);
        atomic_store_explicit(&flow->seen, 0, memory_order_relaxed);
        atomic_store_explicit(&flow->stopped, 0, memory_order_relaxed);
        atomic_store_explicit(&flow->reserved, 0, memory_order_relaxed);
        flow->spinner = (struct spinner){0};
        atomic_store_explicit(&flow->checked, 0, memory_order_relaxed);
        atomic_store_explicit(&flow->full, 0, memory_order_relaxed);
        atomic_store_explicit(&flow->timeout, 0, memory_order_relaxed);
}

struct end *end_make(int fd, bool nonblocking)
{
        uint32_t generation;
        struct end *end;

        if (!process.on || (unsigned)fd >= DESCRIPTORS)
                return NULL;
        if (!atomic_load_explicit(process.alive, memory_order_relaxed))
                family_forked();
        end = take_end(&generation);
        if (!end)
                return NULL;
        atomic_store(&end->stage, STAGE_CLOSED);
        for (int i = 0; i < HOLDERS; i++)
                atomic_store_explicit(&end->holders[i], 0, memory_order_relaxed);
        atomic_store_explicit(&end->holders[0], atomic_load(&process.pid), memory_order_relaxed);
        atomic_store_explicit(&end->operations, 0, memory_order_relaxed);
        atomic_store_explicit(&end->reason, 0, memory_order_relaxed);
        atomic_store_explicit(&end->nonblocking, nonblocking, memory_order_relaxed);
        atomic_store_explicit(&end->active, 0, memory_order_relaxed);
        atomic_store_explicit(&end->shut, 0, memory_order_relaxed);
        atomic_store_explicit(&end->error, 0, memory_order_relaxed);
        atomic_store_explicit(&end->cookie, 0, memory_order_relaxed);
        atomic_store_explicit(&end->opened, 0, memory_order_relaxed);
        reset_flow(&end->rx);
        reset_flow(&end->tx);
        poller_forget_end(end_number(end));
        atomic_store(&process.local[end_number(end)], 1);
        fd_set_word(fd, (uint64_t)generation << 32 | (end_number(end) + 1));
        return end;
}

void end_alias(int old, int new)
{
        uint64_t key;
        struct end *end = end_of(old, &key);

        if (!end || (unsigned)new >= DESCRIPTORS)
                return;
        atomic_fetch_add(&process.local[end_number(end)], 1);
        fd_set_word(new, key);
}

/* From now on no answer of the router is for this end. One that is just being taken is waited for, unless its
 * thread has been killed, or is the one that a signal handler interrupted which closes the connection. */
static void close_stage(struct end *end)
{
        enum { LOOKS = 1000, NAPS = 100 };
        static const struct timespec nap = {.tv_nsec = 1000 * 1000};

        for (int i = 0; i < LOOKS + NAPS; i++) {
                uint32_t stage = atomic_load(&end->stage);

                if (stage != STAGE_ANSWERED) {
                        if (atomic_compare_exchange_strong(&end->stage, &stage, STAGE_CLOSED))
                                return;
                } else if (i < LOOKS) {
                        relax();
                } else {
                        sys_2(SYS_nanosleep, &nap, 0);
                }
        }
        atomic_store(&end->stage, STAGE_CLOSED);
}

/* Nobody holds the end any more. Whoever is inside a lock finishes first; whoever comes later sees the
 * generation. */
static void end_free(struct end *end)
{
        uint32_t me = self();
        enum taken rx = lock_take(&end->rx.lock, me);
        enum taken tx = lock_take(&end->tx.lock, me);

        close_stage(end);
        arena_release(end);
        atomic_fetch_add(&end->generation, 1);
        atomic_store_explicit(&family->next_end, end_number(end), memory_order_relaxed);
        lock_release(&end->tx.lock, tx);
        lock_release(&end->rx.lock, rx);
}

static void let_go(struct end *end)
{
        if (atomic_fetch_sub(&process.local[end_number(end)], 1) == 1 &&
            remove_holder(end, atomic_load(&process.pid)))
                end_free(end);
}

void end_forget(int fd)
{
        uint64_t key;
        struct end *end = end_of(fd, &key);

        if (!end || !atomic_compare_exchange_strong(&process.fds[fd], &key, 0))
                return;
        if (atomic_load(&process.local[end_number(end)]) > 1 &&
            atomic_load(&process.fd_of[end_number(end)]) == fd) {
                int other = end_next_descriptor(end, -1);

                if (other >= 0)
                        atomic_store(&process.fd_of[end_number(end)], other);
        }
        let_go(end);
}

void end_leave(int fd, struct end *end, uint64_t key, uint32_t reason)
{
        atomic_store_explicit(&end->reason, reason, memory_order_relaxed);
        router_note(end, reason);
        while (fd >= 0) {
                uint64_t expected = key;

                if (atomic_compare_exchange_strong(&process.fds[fd], &expected, 0))
                        let_go(end);
                fd = end_is(end, key) ? end_next_descriptor(end, -1) : -1;
        }
}
