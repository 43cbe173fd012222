#include "shared_receives.h"

#include "opened.h"

void shared_join(struct shared_receives *shared, struct shared_member *member, struct queue_pair *queue)
{
        member->queue = queue;
        mutex_take(&shared->mutex);
        member->next = shared->first;
        shared->first = member;
        mutex_release(&shared->mutex);
}

void shared_leave(struct shared_receives *shared, struct shared_member *member)
{
        struct shared_member **at = &shared->first;

        mutex_take(&shared->mutex);
        while (*at && *at != member)
                at = &(*at)->next;
        if (*at)
                *at = member->next;
        mutex_release(&shared->mutex);
}

/* The event comes once. */
static void check_limit(struct shared_receives *shared)
{
        uint32_t limit = atomic_load_explicit(&shared->limit, memory_order_relaxed);

        if (limit && receives_in(&shared->receives) < limit &&
            atomic_exchange_explicit(&shared->limit, 0, memory_order_relaxed))
                events_put(&opened_of(shared->plain.context)->events, &shared->limit_reached);
}

void shared_set_limit(struct shared_receives *shared, uint32_t limit)
{
        atomic_store_explicit(&shared->limit, limit, memory_order_relaxed);
        check_limit(shared);
}

bool shared_take(struct shared_receives *shared, struct receive_work *work)
{
        if (!receive_queue_take(&shared->receives, work))
                return false;
        check_limit(shared);
        return true;
}

void shared_hunger(struct shared_receives *shared, struct shared_member *member)
{
        atomic_store_explicit(&member->hungry, true, memory_order_relaxed);
        atomic_store_explicit(&shared->hungry, true, memory_order_release);
        /* Pairs with shared_feed(): one of the two sees what the other has written. */
        atomic_thread_fence(memory_order_seq_cst);
}

void shared_feed(struct shared_receives *shared, void (*feed)(struct queue_pair *queue))
{
        atomic_thread_fence(memory_order_seq_cst);
        if (!atomic_load_explicit(&shared->hungry, memory_order_relaxed) ||
            !atomic_exchange_explicit(&shared->hungry, false, memory_order_acquire))
                return;
        mutex_take(&shared->mutex);
        for (struct shared_member *at = shared->first; at; at = at->next)
                if (atomic_exchange_explicit(&at->hungry, false, memory_order_relaxed))
                        feed(at->queue);
        mutex_release(&shared->mutex);
}
