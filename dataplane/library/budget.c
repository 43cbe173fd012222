#include "budget.h"

#include "kernel_file.h"

enum {
        SHARE = 8, /* of the container's memory, for the rings */
        READ_MOST = 64 * 1024 * 1024,
};

uint64_t budget_limit = UINT64_MAX;

void budget_start(void)
{
        uint64_t limit = kernel_file_memory_limit();

        if (limit != UINT64_MAX)
                budget_limit = limit / SHARE;
}

void budget_forget_receiver(struct flow *flow)
{
        uint64_t touched = atomic_exchange(&flow->touched, 0);

        if (touched > SMALL_SIZE)
                atomic_fetch_sub(&family->read, touched - SMALL_SIZE);
}

bool budget_read_more(struct flow *flow, uint64_t end)
{
        uint64_t before = load_relaxed(&flow->touched), more;
        uint64_t most = budget_limit < READ_MOST ? budget_limit : READ_MOST;

        if (end <= SMALL_SIZE)
                return true;
        more = end - (before > SMALL_SIZE ? before : SMALL_SIZE);
        if (atomic_fetch_add_explicit(&family->read, more, memory_order_relaxed) + more > most) {
                atomic_fetch_sub_explicit(&family->read, more, memory_order_relaxed);
                return false;
        }
        store_relaxed(&flow->touched, end);
        return true;
}

void budget_reclaimed(struct flow *flow)
{
        uint64_t touched = load_relaxed(&flow->touched);

        if (touched > SMALL_SIZE)
                atomic_fetch_sub_explicit(&family->touched, touched - SMALL_SIZE, memory_order_relaxed);
        store_relaxed(&flow->touched, 0);
}

void budget_forget_sender(struct flow *flow)
{
        budget_reclaimed(flow);
        store_relaxed(&flow->stopped, 0);
}
