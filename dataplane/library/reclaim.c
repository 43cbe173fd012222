#include "reclaim.h"

#include "budget.h"
#include "clock.h"
#include "mapping.h"
#include "sys.h"

#include <sys/mman.h>

#define SECOND UINT64_C(1000000000)

static _Atomic uint64_t next_scan; /* ns */

/* Reclaim the bulk area if the ring has been empty since the last scan. Returns whether there is
 * something to reclaim later. Under the sender's lock. */
static bool reclaim_ring(struct end *end)
{
        struct flow *flow = &end->tx;
        uint64_t edge = load_relaxed(&flow->edge);
        uint64_t touched = load_relaxed(&flow->touched);
        struct view view;

        if (load_relaxed(&flow->phase) != PHASE_RING || touched <= SMALL_SIZE ||
            load_relaxed(&flow->reserved))
                return false;
        view = end_sends(end);
        if (atomic_exchange_explicit(&flow->seen, edge, memory_order_relaxed) != edge ||
            load_acquire(&view.ring->head) != edge)
                return true;
        ring_restart(flow, &view, edge);
        sys_3(SYS_madvise, view_bulk(&view), (touched + PAGE - 1) / PAGE * PAGE, MADV_REMOVE);
        budget_reclaimed(flow);
        return false;
}

static void scan(void)
{
        uint32_t high = atomic_load(&process.high);
        bool more = false;

        store_relaxed(&process.touched, false);
        for (uint32_t fd = 0; fd < high; fd++) {
                uint64_t key;
                struct end *end = end_of((int)fd, &key);
                enum taken taken;

                if (!end || load_relaxed(&end->tx.touched) <= SMALL_SIZE)
                        continue;
                taken = lock_take(&end->tx.lock, self());
                if (taken == LOCK_NESTED)
                        more = true;
                else if (end_is(end, key))
                        more = reclaim_ring(end) || more;
                lock_release(&end->tx.lock, taken);
        }
        if (more)
                store_relaxed(&process.touched, true);
}

int64_t reclaim_before_sleep(int64_t left)
{
        uint64_t present, due;

        if (__builtin_expect(!load_relaxed(&process.touched), 1))
                return left;
        present = now();
        due = load_relaxed(&next_scan);
        if (present >= due &&
            atomic_compare_exchange_strong_explicit(&next_scan, &due, present + SECOND, memory_order_relaxed,
                                                    memory_order_relaxed)) {
                due = present + SECOND;
                scan();
                if (!load_relaxed(&process.touched))
                        return left;
        }
        /* All sleepers wake for it: it isn't known which of them will still be there. */
        if (due <= present)
                due = present + SECOND;
        return left < 0 || (uint64_t)left > due - present ? (int64_t)(due - present) : left;
}
