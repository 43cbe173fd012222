#include "memory.h"

#include "arena.h"
#include "clock.h"
#include "raw.h"
#include "sys.h"

#include <fcntl.h>
#include <sys/mman.h>

#define SECOND UINT64_C(1000000000)

enum { SHARE = 8 };

uint64_t memory_budget = UINT64_MAX;

static _Atomic uint64_t next_look; /* ns */

uint64_t memory_number_in(const char *path)
{
        char text[32];
        uint64_t number = 0;
        long fd = sys_4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0), size;

        if (fd < 0)
                return UINT64_MAX;
        size = sys_3(SYS_read, fd, text, sizeof text);
        sys_1(SYS_close, fd);
        if (size <= 0 || text[0] < '0' || text[0] > '9')
                return UINT64_MAX;
        for (long i = 0; i < size && text[i] >= '0' && text[i] <= '9'; i++)
                number = number * 10 + (uint64_t)(text[i] - '0');
        return number;
}

void memory_start(void)
{
        uint64_t limit = memory_number_in("/sys/fs/cgroup/memory.max");

        if (limit == UINT64_MAX)
                limit = memory_number_in("/sys/fs/cgroup/memory/memory.limit_in_bytes");
        if (limit != UINT64_MAX)
                memory_budget = limit / SHARE;
}

/* Under the sender's lock. */
static void count_out(struct flow *flow)
{
        uint64_t touched = atomic_load_explicit(&flow->touched, memory_order_relaxed);

        if (touched > SMALL_SIZE)
                atomic_fetch_sub_explicit(&family->touched, touched - SMALL_SIZE, memory_order_relaxed);
        atomic_store_explicit(&flow->touched, 0, memory_order_relaxed);
}

void memory_forget(struct flow *flow)
{
        count_out(flow);
        atomic_store_explicit(&flow->stopped, 0, memory_order_relaxed);
}

/* Returns whether the ring still has something to give back later. Under the sender's lock. */
static bool give_back(struct end *end)
{
        struct flow *flow = &end->tx;
        uint64_t edge = atomic_load_explicit(&flow->edge, memory_order_relaxed);
        uint64_t touched = atomic_load_explicit(&flow->touched, memory_order_relaxed);
        struct view view;

        if (atomic_load_explicit(&flow->phase, memory_order_relaxed) != PHASE_RING || touched <= SMALL_SIZE ||
            atomic_load_explicit(&flow->reserved, memory_order_relaxed))
                return false;
        view = end_sends(end);
        if (atomic_exchange_explicit(&flow->seen, edge, memory_order_relaxed) != edge ||
            atomic_load_explicit(&view.ring->head, memory_order_acquire) != edge)
                return true;
        ring_restart(flow, &view, edge);
        sys_3(SYS_madvise, view_bulk(&view), (touched + PAGE - 1) / PAGE * PAGE, MADV_REMOVE);
        count_out(flow);
        return false;
}

static void look(void)
{
        uint32_t high = atomic_load(&process.high);
        bool more = false;

        atomic_store_explicit(&process.touched, false, memory_order_relaxed);
        for (uint32_t fd = 0; fd < high; fd++) {
                uint64_t key;
                struct end *end = end_of((int)fd, &key);
                enum taken taken;

                if (!end || atomic_load_explicit(&end->tx.touched, memory_order_relaxed) <= SMALL_SIZE)
                        continue;
                taken = lock_take(&end->tx.lock, self());
                if (taken == LOCK_NESTED)
                        more = true;
                else if (end_is(end, key))
                        more = give_back(end) || more;
                lock_release(&end->tx.lock, taken);
        }
        if (more)
                atomic_store_explicit(&process.touched, true, memory_order_relaxed);
}

int64_t memory_sleep(int64_t left)
{
        uint64_t present, due;

        raw_settle();
        if (__builtin_expect(!atomic_load_explicit(&process.touched, memory_order_relaxed), 1))
                return left;
        present = now();
        due = atomic_load_explicit(&next_look, memory_order_relaxed);
        if (present >= due &&
            atomic_compare_exchange_strong_explicit(&next_look, &due, present + SECOND, memory_order_relaxed,
                                                    memory_order_relaxed)) {
                due = present + SECOND;
                look();
                if (!atomic_load_explicit(&process.touched, memory_order_relaxed))
                        return left;
        }
        /* All sleepers wake for it: which of them will still be there isn't known. */
        if (due <= present)
                due = present + SECOND;
        return left < 0 || (uint64_t)left > due - present ? (int64_t)(due - present) : left;
}
