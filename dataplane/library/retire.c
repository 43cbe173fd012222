#include "retire.h"

#include "arena.h"
#include "calls.h"
#include "poller.h"
#include "router.h"
#include "settings.h"
#include "statistics.h"
#include "upgrade.h"

static _Atomic bool began;
static _Atomic uint32_t due; /* a reason */

/* A connection that isn't on a ring any more. The table's other entries of it go too. */
static void give_up(int fd, struct end *end, uint64_t key, uint32_t reason)
{
        hand_over(fd, end, key, reason);
        /* A pump has taken its place otherwise. */
        if (end_of(fd, &key) == end) {
                for (int each = end_next_descriptor(end, -1); each >= 0 && end_is(end, key);
                     each = end_next_descriptor(end, each))
                        poller_leave(each, key);
                end_leave(fd, end, key, reason);
        }
}

/* Its own descriptors: an instance of epoll forgets those with them. */
static void close_all_own(void)
{
        for (int fd = 0; fd < DESCRIPTORS && fd < process.own_high; fd++)
                if (is_own_descriptor(fd))
                        close_own(fd);
}

void retire(uint32_t reason)
{
        int saved = *__errno_location();
        uint32_t high;

        if (!process.on || !in_this_process() || atomic_exchange(&began, true))
                return;
        settings.enabled = 0;
        high = atomic_load(&process.high);
        for (int pass = 0; pass < 2; pass++)
                for (uint32_t fd = 0; fd < high; fd++) {
                        uint64_t key;
                        struct end *end = end_of((int)fd, &key);

                        if (end && pass == 0)
                                fallback_announce(end);
                        else if (end)
                                give_up((int)fd, end, key, reason);
                }
        statistics_report();
        process.on = false;
        atomic_thread_fence(memory_order_seq_cst);
        arena_retire();
        router_retire();
        close_all_own();
        *__errno_location() = saved;
}

void retire_soon(uint32_t reason)
{
        atomic_store_explicit(&due, reason, memory_order_relaxed);
}

void retire_now_if_due(void)
{
        if (__builtin_expect(atomic_load_explicit(&due, memory_order_relaxed) != 0, 0))
                retire(atomic_load(&due));
}

void retire_heirs(void)
{
        static char off[] = "FREEFLOW=off";
        int (*put)(char *) = real_named("putenv");

        if (put && process.on && in_this_process())
                put(off);
}
