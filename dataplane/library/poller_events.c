/* What a registration has to report: of the ring, and of TCP. */
#include "poller_internal.h"

#include "ready.h"
#include "remote.h"
#include "sys.h"

/* TCP's events that the program may see, for a connection whose peer is on another host. */
static uint32_t remote_events(struct registration *r, struct end *end)
{
        uint32_t visible;

        if (ready_broken(end)) {
                if (!r->loss_reported)
                        r->loss_reported = r->kernel_edge = true;
                return remote_broken_events(r->events) | r->kernel_events;
        }
        visible = remote_visible(end, r->fd, r->kernel_events);
        if (visible != r->kernel_events && !load_relaxed(&end->rx.deferred))
                /* Bytes that have been read since. */
                r->kernel_events &= visible | EPOLLRDHUP | EPOLLHUP;
        if (visible != r->kernel_events) {
                r->deferred = true;
        } else if (r->deferred) {
                r->deferred = false;
                r->kernel_edge = true;
        }
        return visible;
}

/* TCP's events for a registration. Those that may have passed since the kernel reported them are
 * polled again. */
static uint32_t tcp_events(struct registration *r, struct end *end)
{
        const uint32_t lasting = EPOLLHUP | EPOLLERR | EPOLLRDHUP;
        bool in = load_relaxed(&end->rx.phase) != PHASE_RING;
        bool out = load_relaxed(&end->tx.phase) != PHASE_RING;
        uint32_t wanted = r->events | EPOLLERR | EPOLLHUP, passing, visible;

        if (__builtin_expect(ready_end(end), 0) && !(r->kernel_events & EPOLLRDHUP))
                r->kernel_events |= sys_poll(r->fd, POLLRDHUP); /* poll's bits are epoll's */
        if (__builtin_expect(!r->kernel_events, 1) && !(__builtin_expect(r->remote, 0) && ready_broken(end)))
                return 0;
        if (!out) {
                r->kernel_events &= ~(uint32_t)(EPOLLOUT | EPOLLWRNORM);
                /* When TCP's room counts again, the kernel has to report it again. */
                r->kernel_mask &= ~(uint32_t)EPOLLOUT;
        }
        passing = r->kernel_events & wanted & ~lasting & ~(uint32_t)(in ? 0 : EPOLLIN | EPOLLRDNORM);
        if (passing) {
                uint32_t current = sys_poll(r->fd, POLLIN | POLLOUT | POLLPRI);

                r->kernel_events &= current | lasting | (in ? 0u : EPOLLIN | EPOLLRDNORM);
        }
        visible = __builtin_expect(r->remote, 0) ? remote_events(r, end) : r->kernel_events;
        /* A peer that has closed its side may never read the ring. The next send falls back to TCP,
         * where there is room, or an error. */
        if (!out && r->kernel_events & EPOLLRDHUP)
                return (visible & wanted) | (r->events & (EPOLLOUT | EPOLLWRNORM));
        return visible & wanted;
}

uint32_t registration_events(struct registration *r, struct end *end, bool take)
{
        bool bytes = r->events & (EPOLLIN | EPOLLRDNORM) && ready_bytes(end);
        bool space = r->events & (EPOLLOUT | EPOLLWRNORM) && ready_space(end);
        uint32_t tcp = tcp_events(r, end);
        uint32_t events = (bytes ? r->events & (EPOLLIN | EPOLLRDNORM) : 0) |
                          (space ? r->events & (EPOLLOUT | EPOLLWRNORM) : 0) | tcp;

        if (events && r->events & EPOLLET) {
                uint64_t tail = end_uses_ring(end) ? load_relaxed(&end_receives(end).ring->tail) : 0;
                uint32_t full = load_relaxed(&end->tx.full);

                if (!r->unreported && !(bytes && tail != r->tail_reported) &&
                    !(space && full != r->full_reported) && !(tcp && r->kernel_edge))
                        return 0;
                if (take) {
                        if (bytes)
                                r->tail_reported = tail;
                        if (space)
                                r->full_reported = full;
                }
        }
        if (events && take) {
                r->unreported = 0;
                r->kernel_edge = false;
        }
        return events;
}
