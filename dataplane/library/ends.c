#include "ends.h"

#include "arena.h"
#include "flow.h"
#include "poller.h"
#include "router.h"

/* Take a free end, or one that was left by processes that ended without closing. Its generation is
 * odd afterwards. */
static struct end *take_end(uint32_t *generation)
{
        /* The one freed last is still in the cache. */
        uint32_t start = load_relaxed(&family->next_end);

        for (uint32_t i = 0; i < ENDS; i++) {
                struct end *end = &family->ends[(start + i) % ENDS];
                uint32_t seen = load_acquire(&end->generation), nobody = 0;

                if (seen & 1 && i >= 64)
                        end_forget_dead(end);
                if (!atomic_compare_exchange_strong(&end->holders, &nobody, END_FREEING))
                        continue;
                if (seen & 1)
                        arena_release(end);
                *generation = seen + 1 + (seen & 1);
                if (atomic_compare_exchange_strong(&end->generation, &seen, *generation)) {
                        store_relaxed(&family->next_end, end_number(end) + 1);
                        return end;
                }
                /* It was taken and freed meanwhile. */
                atomic_store(&end->holders, 0);
        }
        return NULL;
}

struct end *end_make(int fd, bool nonblocking)
{
        uint32_t generation;
        struct end *end;

        if (!process.on || (unsigned)fd >= DESCRIPTORS)
                return NULL;
        if (!load_relaxed(process.alive))
                family_forked();
        end = take_end(&generation);
        if (!end)
                return NULL;
        flow_begin(end);
        store_relaxed(&end->operations, 0);
        store_relaxed(&end->reason, 0);
        store_relaxed(&end->nonblocking, nonblocking);
        store_relaxed(&end->active, 0);
        store_relaxed(&end->shut, 0);
        store_relaxed(&end->error, 0);
        store_relaxed(&end->low, 0);
        store_relaxed(&end->peeked, 0);
        store_relaxed(&end->inq, 0);
        store_relaxed(&end->delays, 0);
        store_relaxed(&end->cookie, 0);
        store_relaxed(&end->opened, 0);
        store_relaxed(&end->requested_at, 0);
        store_relaxed(&end->kept, 0);
        store_relaxed(&end->counted_from, 0);
        store_relaxed(&end->due, 0);
        store_relaxed(&end->setbacks, 0);
        store_relaxed(&end->final, 0);
        store_relaxed(&end->waits, 0);
        poller_forget_end(end_number(end));
        end_hold_first(end);
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

/* No process holds the end any more. A thread that is inside a lock finishes first; a later one
 * finds the new generation. */
static void end_free(struct end *end)
{
        unsigned nested = end_lock(end);

        stage_close(end);
        family_account(end);
        arena_release(end);
        atomic_fetch_add(&end->generation, 1);
        store_release(&end->holders, 0);
        store_relaxed(&family->next_end, end_number(end));
        end_release(end, nested);
}

static void drop_descriptor(struct end *end)
{
        if (atomic_fetch_sub(&process.local[end_number(end)], 1) == 1 && !process.gone && end_drop(end))
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
        drop_descriptor(end);
}

void end_leave(int fd, struct end *end, uint64_t key, uint32_t reason)
{
        store_relaxed(&end->reason, reason);
        router_note(end, reason);
        while (fd >= 0) {
                uint64_t expected = key;

                if (atomic_compare_exchange_strong(&process.fds[fd], &expected, 0))
                        drop_descriptor(end);
                fd = end_is(end, key) ? end_next_descriptor(end, -1) : -1;
        }
}
