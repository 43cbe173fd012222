/* epoll_wait(): see sleep.h. Rules that keep poller.h's invariant:
 *
 *      - A thread that is about to sleep arms all ACTIVE registrations, checks each of them again,
 *        and counts itself as a sleeper before it releases the poller's lock.
 *      - A thread that found no ring at all counts itself first, then checks whether there is a
 *        ring. Both sides use sequentially consistent operations: registration_enter_ring() raises
 *        `ring_count` and then reads `sleepers` (poller_pass_on()), the thread raises `sleepers`
 *        and then reads `ring_count`.
 *      - A thread that leaves without an event passes on what it has taken from the kernel.
 */
#include "poller.h"
#include "poller_internal.h"

#include "sleep.h"
#include "statistics.h"

#include <errno.h>
#include <limits.h>

/* epoll_pwait(), or epoll_pwait2() for a time that isn't whole milliseconds, which is rounded up
 * where the kernel or the C library lacks that. */
static int kernel_wait(int epfd, struct epoll_event *events, int size, int64_t timeout, const sigset_t *mask)
{
        struct timespec time = {.tv_sec = timeout / 1000000000, .tv_nsec = timeout % 1000000000};
        int64_t ms;

        if (timeout > 0 && timeout % 1000000 && real()->epoll_pwait2) {
                int got = real()->epoll_pwait2(epfd, events, size, &time, mask);

                if (got >= 0 || *__errno_location() != ENOSYS)
                        return got;
        }
        ms = timeout < 0 ? -1 : (timeout + 999999) / 1000000;
        return real()->epoll_pwait(epfd, events, size, ms > INT_MAX ? INT_MAX : (int)ms, mask);
}

/* --- spinning --- */

/* Spinning pays if a peer that may send runs on another core. */
static bool may_spin(struct poller *poller)
{
        uint32_t here = core();
        bool found = false;
        enum taken taken;
        int checks = 0;

        if (!settings.spin)
                return false;
        taken = lock_take(&poller->lock, self());
        for (uint32_t i = poller->active; i != NONE && checks < BATCH && !found;
             i = registrations[i].next, checks++) {
                struct end *end = registration_end(&registrations[i]);
                uint32_t there;

                if (!end || !end_uses_ring(end))
                        continue;
                there = load_relaxed(&end_receives(end).ring->sender_cpu);
                found = there && there != here;
        }
        lock_release(&poller->lock, taken);
        return found;
}

struct collection {
        struct poller *poller;
        struct epoll_event *events;
        int size;
};

static int collect_while_spinning(void *context)
{
        const struct collection *c = context;

        return poller_collect(c->poller, c->events, c->size, false, true);
}

/* Returns the number of events. */
static int spin(struct poller *poller, struct epoll_event *events, int size)
{
        uint64_t budget = may_spin(poller) ? spin_budget(&poller->spinner) : 0;
        struct collection collection = {poller, events, size};
        int count;

        if (!budget)
                return 0;
        /* The kernel's events don't wait until we have spun. */
        count = poller_collect(poller, events, size, true, false);
        if (count)
                return count;
        count = spin_until(&poller->spinner, budget, collect_while_spinning, &collection);
        if (count)
                statistics_count(&statistics.spins);
        return count;
}

/* --- sleeping --- */

/* Only the kernel has anything to report here. */
static bool is_plain(const struct poller *poller)
{
        return !poller->ring_count && poller->nested == NONE && !poller->settle_due;
}

/* No ring is registered here: the kernel's events, without those of our own descriptors. Returns 0
 * after the timeout, or if the caller has to check again. */
static int wait_plainly(struct poller *poller, int epfd, struct epoll_event *events, int size,
                        int64_t timeout, const sigset_t *mask)
{
        int count = 0;

        atomic_fetch_add(&poller->sleepers, 1);
        /* Pairs with registration_enter_ring(): either it sees the sleeper, or we see the ring. */
        if (is_plain(poller))
                count = kernel_wait(epfd, events, size, timeout, mask);
        atomic_fetch_sub(&poller->sleepers, 1);
        for (int i = 0; i < count; i++)
                if ((events[i].data.u64 & TAG_MASK) == TAG_BELL ||
                    (events[i].data.u64 & TAG_MASK) == TAG_REGISTRATION) {
                        count = poller_translate(poller, events, count, size);
                        break;
                }
        return count;
}

/* Arm all registrations, and count the thread as a sleeper. Returns false if there is something to
 * report.
 * `*reasons`: for a short sleep. */
static bool fall_asleep(struct poller *poller, unsigned *reasons)
{
        enum taken taken = lock_take(&poller->lock, self());
        bool asleep = !poller_arm_all(poller);

        *reasons = poller->unringable ? SLEEP_UNRINGABLE : 0;
        for (uint32_t i = poller->nested; i != NONE; i = registrations[i].next_nested)
                if (poller_arm(registrations[i].fd))
                        *reasons = SLEEP_UNRINGABLE;
        for (uint32_t i = poller->nested; i != NONE && asleep; i = registrations[i].next_nested)
                asleep = !registration_nested_ready(&registrations[i]);
        if (asleep)
                atomic_fetch_add(&poller->sleepers, 1);
        lock_release(&poller->lock, taken);
        return asleep;
}

/* One sleep. Returns the number of events, 0: the caller has to check again. */
static int sleep_once(struct poller *poller, int epfd, struct epoll_event *events, int size,
                      struct sleep *sleep, const sigset_t *mask)
{
        unsigned reasons;
        int64_t duration;
        uint64_t begin;
        int count;

        if (!fall_asleep(poller, &reasons))
                return 0;
        duration = sleep_duration(sleep, sleep_left(sleep), reasons);
        statistics_count(&statistics.sleeps);
        begin = now();
        count = kernel_wait(epfd, events, size, duration, mask);
        spin_slept(&poller->spinner, now() - begin);
        atomic_fetch_sub(&poller->sleepers, 1);
        /* Only what the kernel has reported: an event of a ring may be later than what the kernel
         * has now. */
        return count > 0 ? poller_translate(poller, events, count, size) : count;
}

/* The thread leaves without an event. */
static int leave_without(struct poller *poller)
{
        enum taken taken;

        /* A thread that falls asleep from now on arms everything itself. */
        if (!poller_is_slept_on(poller))
                return 0;
        taken = lock_take(&poller->lock, self());
        poller_pass_on(poller);
        lock_release(&poller->lock, taken);
        return 0;
}

int poller_wait(int epfd, struct epoll_event *events, int size, int64_t timeout, const sigset_t *mask,
                bool *ours)
{
        struct poller *poller = poller_of(epfd);
        int64_t left = timeout;
        struct sleep sleep;

        *ours = poller && size > 0;
        if (!*ours)
                return 0;
        /* Also for a wait that begins in the kernel: rings may come meanwhile. */
        sleep_start(&sleep, sleep_deadline(timeout));
        for (;; left = left ? sleep_left(&sleep) : 0) {
                int count;

                if (is_plain(poller)) {
                        count = wait_plainly(poller, epfd, events, size, left, mask);
                        if (count || (left == 0 && is_plain(poller)))
                                return count;
                        continue;
                }
                if (poller->settle_due)
                        poller_settle(poller);
                count = poller_collect(poller, events, size, left == 0, false);
                if (count)
                        return count;
                if (left == 0)
                        return leave_without(poller);
                count = spin(poller, events, size);
                if (!count)
                        count = sleep_once(poller, epfd, events, size, &sleep, mask);
                if (count)
                        return count;
        }
}
