#include "wait.h"

#include "arena.h"
#include "clock.h"
#include "io_uring.h"
#include "raw.h"
#include "ready.h"
#include "reclaim.h"
#include "remote.h"
#include "signals.h"
#include "spin.h"
#include "statistics.h"
#include "sys.h"

#include <errno.h>
#include <poll.h>
#include <time.h>

enum {
        FIRST_NAP = 1,      /* ms, while nobody can ring: doubled each time */
        LONGEST_NAP = 1000, /* ms, when a bell is there and the other side hasn't fetched it */
        LONGEST_BLIND = 16, /* ms, when there is no bell */
};

static bool is_there(struct end *end, enum want want, const uint64_t *beyond)
{
        if (want == WANT_BYTES && beyond)
                return atomic_load_explicit(&end_receives(end).ring->tail, memory_order_acquire) != *beyond ||
                       ready_end(end) || ready_broken(end);
        if (want == WANT_BYTES)
                return ready_bytes(end) ||
                       (atomic_load_explicit(&end->low, memory_order_relaxed) && ready_end(end));
        /* Where there is no ring any more, TCP says whether there is room. */
        return atomic_load_explicit(&end->tx.phase, memory_order_relaxed) != PHASE_RING || ready_space(end);
}

/* On the peer's own core, spinning keeps it from what we wait for. */
static bool is_elsewhere(const struct end *end, enum want want)
{
        struct view view = want == WANT_BYTES ? end_receives(end) : end_sends(end);
        uint32_t peer = want == WANT_BYTES
                            ? atomic_load_explicit(&view.ring->sender_cpu, memory_order_relaxed)
                            : atomic_load_explicit(&view.ring->receiver_cpu, memory_order_relaxed);

        return peer && peer != core();
}

static bool spin(struct end *end, struct flow *flow, enum want want)
{
        uint64_t budget = is_elsewhere(end, want) ? spin_budget(&flow->spinner) : 0, start;
        bool found = false;

        if (!budget)
                return false;
        start = now();
        do
                for (int i = 0; i < SPIN_LOOKS && !found; i++) {
                        relax();
                        found = is_there(end, want, NULL);
                }
        while (!found && now() - start < budget);
        spin_learn(&flow->spinner, found, budget, now() - start);
        if (found)
                statistics_count(&statistics.spins);
        return found;
}

int wait_for(int fd, struct end *end, uint64_t key, enum want want, const uint64_t *beyond,
             uint64_t *deadline, bool *news)
{
        struct flow *flow = want == WANT_BYTES ? &end->rx : &end->tx;
        uint32_t timeout = atomic_load_explicit(&flow->timeout, memory_order_relaxed);
        uint32_t arena = atomic_load_explicit(&end->arena, memory_order_relaxed);
        uint32_t side = atomic_load_explicit(&end->side, memory_order_relaxed);
        int nap = FIRST_NAP, outcome = 0, saved = *__errno_location();
        struct waiters *waiters;
        struct pollfd polled[3] = {{.fd = fd}, {.fd = -1, .events = POLLIN}, {.fd = -1, .events = POLLIN}};
        struct signals signals;
        bool elsewhere = false;
        int bell;

        if (timeout && !*deadline)
                *deadline = now() + timeout * UINT64_C(1000000);
        if (!beyond && spin(end, flow, want))
                return 0;
        io_uring_check();
        if (!end_is(end, key))
                return 0;
        statistics_count(&statistics.sleeps);
        waiters = want == WANT_BYTES ? &end_receives(end).ring->receivers : &end_sends(end).ring->senders;
        polled[0].events = want == WANT_BYTES && !beyond ? POLLIN | POLLRDHUP : POLLRDHUP;
        bell = bell_take_or_order(arena);
        if (bell >= 0)
                polled[1].fd = bell_descriptor(arena, bell);
        signals_prepare(&signals);
        if (signals.mixed)
                polled[2].fd = signals.fd;
        for (;;) {
                int64_t left = -1; /* ns; -1: for ever */
                struct timespec time;
                uint64_t slept;
                bool withheld;
                int got;

                if (bell < 0) {
                        bell = bell_take(arena);
                        if (bell >= 0)
                                polled[1].fd = bell_descriptor(arena, bell);
                }
                if (bell < 0 && want == WANT_BYTES && !elsewhere && !bell_is_ordered(arena)) {
                        wait_elsewhere(end);
                        elsewhere = true;
                }
                if (want == WANT_SPACE)
                        ready_ask(end);
                if (bell >= 0)
                        wait_begin(waiters, bell);
                if (is_there(end, want, beyond) || !end_is(end, key))
                        break;
                if (*deadline) {
                        uint64_t time_now = now();

                        if (time_now >= *deadline) {
                                outcome = -EAGAIN;
                                break;
                        }
                        left = (int64_t)(*deadline - time_now);
                }
                withheld = want == WANT_BYTES && remote_defers(end);
                if (want == WANT_BYTES && !raw_tcp_is_empty(fd, end)) {
                        *news = true;
                        break;
                }
                polled[0].fd = withheld ? -1 : fd;
                if (withheld && (left < 0 || left > REMOTE_SLEEP * INT64_C(1000000)))
                        left = REMOTE_SLEEP * INT64_C(1000000);
                if (want == WANT_BYTES && ready_between(end) &&
                    (left < 0 || left > FIRST_NAP * INT64_C(1000000)))
                        left = FIRST_NAP * INT64_C(1000000);
                if (bell < 0 || !bell_is_known(arena, side, bell)) {
                        int longest = bell < 0 ? LONGEST_BLIND : LONGEST_NAP;

                        if (bell < 0)
                                arena_break_if_unreachable(arena);

                        if (left < 0 || left > nap * INT64_C(1000000))
                                left = nap * INT64_C(1000000);
                        nap = nap * 2 < longest ? nap * 2 : longest;
                }
                /* The kernel can't be asked for more than it has already. */
                if (beyond && (left < 0 || left > LONGEST_BLIND * INT64_C(1000000)))
                        left = LONGEST_BLIND * INT64_C(1000000);
                left = reclaim_before_sleep(left);
                time.tv_sec = left / 1000000000;
                time.tv_nsec = left % 1000000000;
                slept = now();
                got = real()->ppoll(polled, 3, left < 0 ? NULL : &time, signals.mixed ? &signals.mask : NULL);
                spin_slept(&flow->spinner, now() - slept);
                if (got < 0) {
                        if (*__errno_location() == EINTR && !*deadline && signals_restart(&signals))
                                continue;
                        outcome = -*__errno_location();
                        break;
                }
                if (got == 0 && beyond)
                        break;
                if (got == 0 && !withheld)
                        continue;
                if (polled[2].revents && !polled[0].revents && !polled[1].revents) {
                        outcome = -EINTR;
                        break;
                }
                if (polled[1].revents)
                        bell_drain(arena, bell);
                /* TCP isn't heard meanwhile, and may have been reset. */
                if (polled[0].revents || withheld)
                        *news = true;
                break;
        }
        if (bell >= 0) {
                wait_end(waiters, bell);
                bell_return(arena, bell);
        }
        *__errno_location() = saved;
        return outcome;
}
