#include "wait.h"

#include "bells.h"
#include "flow.h"
#include "raw.h"
#include "ready.h"
#include "remote.h"
#include "retire.h"
#include "signals.h"
#include "sleep.h"
#include "statistics.h"

#include <errno.h>
#include <poll.h>

enum { ON_TCP, ON_BELL, ON_SIGNAL, POLLED };

enum { SLEEP_AGAIN = 1 };

struct wait {
        int fd;
        struct end *end;
        uint64_t key;
        enum want want;
        const uint64_t *beyond;
        struct flow *flow;
        uint32_t arena, side;
        struct waiters *waiters; /* of the first ring: the end may be another connection later */
        int bell;                /* -1: none yet */
        bool without;            /* sleep_without_bell() was called */
        struct sleep sleep;
        struct signals signals;
        struct pollfd polled[POLLED];
};

static int is_there(struct end *end, enum want want, const uint64_t *beyond)
{
        if (want == WANT_BYTES && beyond)
                return load_acquire(&end_receives(end).ring->tail) != *beyond || ready_end(end) ||
                       ready_broken(end);
        if (want == WANT_BYTES)
                return ready_bytes(end) || (load_relaxed(&end->low) && ready_end(end));
        /* Without a ring, TCP says whether there is room. */
        return load_relaxed(&end->tx.phase) != PHASE_RING || ready_space(end);
}

static int are_bytes_there(void *end)
{
        return is_there(end, WANT_BYTES, NULL);
}

static int is_space_there(void *end)
{
        return is_there(end, WANT_SPACE, NULL);
}

/* On the peer's own core, spinning would keep the peer from doing what we wait for. */
static bool peer_is_on_another_core(const struct end *end, enum want want)
{
        struct view view = want == WANT_BYTES ? end_receives(end) : end_sends(end);
        uint32_t peer = want == WANT_BYTES ? load_relaxed(&view.ring->sender_cpu)
                                           : load_relaxed(&view.ring->receiver_cpu);

        return peer && peer != core();
}

static bool spin(struct end *end, struct flow *flow, enum want want)
{
        uint64_t budget = peer_is_on_another_core(end, want) ? spin_budget(&flow->spinner) : 0;
        bool found = want == WANT_BYTES ? spin_until(&flow->spinner, budget, are_bytes_there, end)
                                        : spin_until(&flow->spinner, budget, is_space_there, end);

        if (found)
                statistics_count(&statistics.spins);
        return found;
}

static void use_bell(struct wait *w, int bell)
{
        w->bell = bell;
        if (bell >= 0)
                w->polled[ON_BELL].fd = bell_descriptor(w->arena, bell);
}

static void prepare(struct wait *w, uint64_t deadline)
{
        bool bytes = w->want == WANT_BYTES;

        w->arena = load_relaxed(&w->end->place.arena);
        w->side = load_relaxed(&w->end->place.side);
        w->waiters = bytes ? &end_receives(w->end).ring->receivers : &end_sends(w->end).ring->senders;
        w->without = false;
        w->polled[ON_TCP] =
            (struct pollfd){.fd = w->fd, .events = bytes && !w->beyond ? POLLIN | POLLRDHUP : POLLRDHUP};
        w->polled[ON_BELL] = w->polled[ON_SIGNAL] = (struct pollfd){.fd = -1, .events = POLLIN};
        use_bell(w, bell_take(w->arena, true));
        signals_prepare(&w->signals);
        if (w->signals.mixed)
                w->polled[ON_SIGNAL].fd = w->signals.fd;
        sleep_start(&w->sleep, deadline);
}

static void arm(struct wait *w)
{
        if (w->bell < 0)
                use_bell(w, bell_take(w->arena, false));
        if (w->bell < 0 && w->want == WANT_BYTES && !w->without)
                w->without = sleep_without_bell(w->end, w->arena);
        if (w->want == WANT_SPACE)
                ready_set_threshold(w->end);
        if (w->bell >= 0)
                wait_begin(w->waiters, w->bell);
}

static unsigned short_sleep_reasons(const struct wait *w, bool deferred)
{
        unsigned reasons = deferred ? SLEEP_DEFERRED : 0;

        if (w->want == WANT_BYTES && ready_between(w->end))
                reasons |= SLEEP_BETWEEN;
        if (w->bell < 0)
                reasons |= SLEEP_NO_BELL;
        else if (!bell_is_known(w->arena, w->side, w->bell))
                reasons |= SLEEP_UNRINGABLE;
        return w->beyond ? reasons | SLEEP_BEYOND : reasons;
}

/* One sleep, unless it is there by now. Returns as wait_for(), or SLEEP_AGAIN. */
static int sleep_once(struct wait *w, bool *tcp_event)
{
        int64_t left;
        bool deferred;
        int got;

        arm(w);
        if (is_there(w->end, w->want, w->beyond) || !end_is(w->end, w->key))
                return 0;
        left = sleep_left(&w->sleep);
        if (!left)
                return -EAGAIN;
        deferred = w->want == WANT_BYTES && remote_defers(w->end);
        if (w->want == WANT_BYTES && !raw_tcp_is_empty(w->fd, w->end)) {
                *tcp_event = true;
                return 0;
        }
        w->polled[ON_TCP].fd = deferred ? -1 : w->fd;
        left = sleep_duration(&w->sleep, left, short_sleep_reasons(w, deferred));
        got = sleep_in_poll(w->polled, POLLED, left, w->signals.mixed ? &w->signals.mask : NULL,
                            &w->flow->spinner);
        if (got < 0) {
                int error = *__errno_location();

                return error == EINTR && !w->sleep.deadline && signals_restart(&w->signals) ? SLEEP_AGAIN
                                                                                            : -error;
        }
        if (got == 0 && w->beyond)
                return 0;
        if (got == 0 && !deferred)
                return SLEEP_AGAIN;
        if (w->polled[ON_SIGNAL].revents && !w->polled[ON_TCP].revents && !w->polled[ON_BELL].revents)
                return -EINTR;
        if (w->polled[ON_BELL].revents)
                bell_drain(w->arena, w->bell);
        /* TCP isn't polled while its events are deferred, and may have been reset. */
        if (w->polled[ON_TCP].revents || deferred)
                *tcp_event = true;
        return 0;
}

int wait_for(int fd, struct end *end, uint64_t key, enum want want, const uint64_t *beyond,
             uint64_t *deadline, bool *tcp_event)
{
        struct flow *flow = want == WANT_BYTES ? &end->rx : &end->tx;
        uint32_t timeout = load_relaxed(&flow->timeout);
        struct wait w;
        int outcome, saved = *__errno_location();

        if (timeout && !*deadline)
                *deadline = sleep_deadline(timeout * INT64_C(1000000));
        if (!beyond && spin(end, flow, want))
                return 0;
        retire_if_io_uring();
        if (!end_is(end, key))
                return 0;
        if (!flow_begin_wait(end, flow))
                return 0;
        w.fd = fd;
        w.end = end;
        w.key = key;
        w.want = want;
        w.beyond = beyond;
        w.flow = flow;
        prepare(&w, *deadline);
        do
                outcome = sleep_once(&w, tcp_event);
        while (outcome == SLEEP_AGAIN);
        if (w.bell >= 0) {
                wait_end(w.waiters, w.bell);
                bell_return(w.arena, w.bell);
        }
        if (end_is(end, key))
                flow_end_wait(end);
        *__errno_location() = saved;
        return outcome;
}
