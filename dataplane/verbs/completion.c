#include "completion.h"

#include <errno.h>
#include <stdlib.h>

static uint32_t count(const struct completions *queue)
{
        return atomic_load_explicit(&queue->tail, memory_order_relaxed) -
               atomic_load_explicit(&queue->head, memory_order_relaxed);
}

/* Entries for `limit` completions, a power of two. */
static struct ibv_wc *make_entries(uint32_t limit, uint32_t *mask)
{
        uint32_t size = 1;

        while (size < limit)
                size *= 2;
        *mask = size - 1;
        return calloc(size, sizeof(struct ibv_wc));
}

bool completions_start(struct completions *queue, uint32_t limit)
{
        *queue = (struct completions){.limit = limit};
        queue->entries = make_entries(limit, &queue->mask);
        return queue->entries;
}

void completions_end(struct completions *queue)
{
        free(queue->entries);
        queue->entries = NULL;
}

int completions_resize(struct completions *queue, uint32_t limit)
{
        struct ibv_wc *entries, *before;
        uint32_t mask, head;

        entries = make_entries(limit, &mask);
        if (!entries)
                return ENOMEM;
        mutex_take(&queue->mutex);
        before = queue->entries;
        if (count(queue) > limit) {
                mutex_release(&queue->mutex);
                free(entries);
                return EINVAL;
        }
        head = atomic_load_explicit(&queue->head, memory_order_relaxed);
        for (uint32_t i = 0; i < count(queue); i++)
                entries[(head + i) & mask] = before[(head + i) & queue->mask];
        queue->entries = entries;
        queue->mask = mask;
        queue->limit = limit;
        mutex_release(&queue->mutex);
        free(before);
        return 0;
}

/* Under the mutex: is an event due for this completion? */
static bool is_awaited(const struct completions *queue, const struct ibv_wc *completion, bool solicited)
{
        return queue->armed == ARMED ||
               (queue->armed == ARMED_SOLICITED && (solicited || completion->status != IBV_WC_SUCCESS));
}

enum completion_outcome completions_put(struct completions *queue, const struct ibv_wc *completion,
                                        bool solicited, bool polling)
{
        enum completion_outcome outcome = COMPLETION_QUIET;
        uint32_t tail;

        mutex_take(&queue->mutex);
        tail = atomic_load_explicit(&queue->tail, memory_order_relaxed);
        if (queue->overrun || count(queue) >= queue->limit) {
                outcome = queue->overrun ? COMPLETION_QUIET : COMPLETION_OVERRUN;
                queue->overrun = true;
        } else {
                queue->entries[tail & queue->mask] = *completion;
                atomic_store_explicit(&queue->tail, tail + 1, memory_order_relaxed);
                if (!is_awaited(queue, completion, solicited)) {
                        outcome = COMPLETION_QUIET;
                } else if (polling) {
                        atomic_store_explicit(&queue->due, true, memory_order_relaxed);
                } else {
                        queue->armed = DISARMED;
                        atomic_store_explicit(&queue->due, false, memory_order_relaxed);
                        outcome = COMPLETION_EVENT;
                }
        }
        mutex_release(&queue->mutex);
        return outcome;
}

uint32_t completions_take(struct completions *queue, uint32_t most, struct ibv_wc *completions)
{
        uint32_t head, taken;

        if (!completions_are_there(queue))
                return 0;
        mutex_take(&queue->mutex);
        head = atomic_load_explicit(&queue->head, memory_order_relaxed);
        taken = count(queue) < most ? count(queue) : most;
        for (uint32_t i = 0; i < taken; i++)
                completions[i] = queue->entries[(head + i) & queue->mask];
        atomic_store_explicit(&queue->head, head + taken, memory_order_relaxed);
        mutex_release(&queue->mutex);
        return taken;
}

void completions_drop(struct completions *queue, uint32_t number)
{
        uint32_t head, tail, kept;

        mutex_take(&queue->mutex);
        head = kept = atomic_load_explicit(&queue->head, memory_order_relaxed);
        tail = atomic_load_explicit(&queue->tail, memory_order_relaxed);
        for (; head != tail; head++)
                if (queue->entries[head & queue->mask].qp_num != number)
                        queue->entries[kept++ & queue->mask] = queue->entries[head & queue->mask];
        atomic_store_explicit(&queue->tail, kept, memory_order_relaxed);
        mutex_release(&queue->mutex);
}

enum completion_outcome completions_settle(struct completions *queue)
{
        bool event;

        /* What this thread has put in it sees; others settle for themselves. */
        if (!atomic_load_explicit(&queue->due, memory_order_relaxed))
                return COMPLETION_QUIET;
        mutex_take(&queue->mutex);
        event = atomic_load_explicit(&queue->due, memory_order_relaxed) && count(queue);
        atomic_store_explicit(&queue->due, false, memory_order_relaxed);
        if (event)
                queue->armed = DISARMED;
        mutex_release(&queue->mutex);
        return event ? COMPLETION_EVENT : COMPLETION_QUIET;
}

void completions_arm(struct completions *queue, bool solicited)
{
        mutex_take(&queue->mutex);
        if (!solicited)
                queue->armed = ARMED;
        else if (!queue->armed)
                queue->armed = ARMED_SOLICITED;
        mutex_release(&queue->mutex);
}
