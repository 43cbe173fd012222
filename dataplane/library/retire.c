#include "retire.h"

#include "arena.h"
#include "clock.h"
#include "ends.h"
#include "fallback.h"
#include "handover.h"
#include "io_uring.h"
#include "poller.h"
#include "protocol.h"
#include "router.h"
#include "settings.h"
#include "statistics.h"
#include "verbs_client.h"

#define SECOND UINT64_C(1000000000)

static _Atomic bool began; /* for good */
static _Atomic bool rests; /* its connections only */

/* A connection that isn't on a ring any more. The table's other entries of it go too. */
static void give_up(int fd, struct end *end, uint64_t key, uint32_t reason)
{
        hand_over(fd, end, key, reason);
        /* A pump has taken its place otherwise. */
        if (end_of(fd, &key) == end) {
                for (int other = end_next_descriptor(end, -1); other >= 0 && end_is(end, key);
                     other = end_next_descriptor(end, other))
                        poller_leave(other, key);
                end_leave(fd, end, key, reason);
        }
}

/* Its own descriptors: an instance of epoll forgets those with them. The process has retired, and
 * none counts as its own any more. */
static void close_all_own(void)
{
        for (int fd = 0; fd < DESCRIPTORS && fd < process.own_high; fd++)
                if ((uint32_t)atomic_load(&process.fds[fd]) == FD_OWN)
                        close_own(fd);
}

void retire(uint32_t reason)
{
        int saved = *__errno_location();
        bool stays = reason == REASON_RAW && verbs_are_used();
        struct end *end;
        uint64_t key;

        if (!process.on || !in_this_process() || atomic_exchange(stays ? &rests : &began, true))
                return;
        settings.off = true;
        settings.enabled = 0;
        for (int fd = -1; (fd = end_next(fd, &end, &key)) >= 0;)
                fallback_announce(end);
        for (int fd = -1; (fd = end_next(fd, &end, &key)) >= 0;)
                give_up(fd, end, key, reason);
        if (stays) {
                atomic_store(&process.retires, 0);
                *__errno_location() = saved;
                return;
        }
        statistics_report();
        verbs_retired();
        process.on = false;
        atomic_thread_fence(memory_order_seq_cst);
        arena_close_bells();
        router_disconnect();
        close_all_own();
        *__errno_location() = saved;
}

void retire_if_io_uring(void)
{
        static _Atomic uint32_t next; /* ticks() */
        uint32_t tick;

        /* Without a connection that has moved there is nothing to fear. */
        if (__builtin_expect(!io_uring_matters(), 1))
                return;
        tick = ticks();
        if ((int32_t)(tick - load_relaxed(&next)) < 0)
                return;
        store_relaxed(&next, tick + 1000);
        if (io_uring_is_there(SECOND))
                retire_if_due();
}

void retire_heirs(void)
{
        static char off[] = "FREEFLOW=off";
        int (*put)(char *) = real_named("putenv");

        if (put && process.on && in_this_process())
                put(off);
}
