/* What is different when the ring's other side is this host's relay, and the peer is on another
 * host.
 *
 * The TCP connection lies underneath as ever, but its packets go another way, so its events may
 * overtake what comes through the ring. A FIN, or bytes that the peer sent over TCP after it had
 * fallen back, may be here while the ring still has, or still gets, earlier bytes. So such events
 * are deferred: the program doesn't see them until the ring has ended (`end`, `over` or `stopped`).
 * It sees a reset at once, as bytes in flight are lost with one on TCP too.
 *
 * No receiver waits for an `end` that nobody writes. One that defers an event requests the peer's
 * fallback, which the relays answer (`stopped`) once all that was put in has come, whatever the
 * peer's program does. If the relays can't any more, the ring is `broken`.
 */
#ifndef FREEFLOW_REMOTE_H
#define FREEFLOW_REMOTE_H

#include "ready.h"

enum { REMOTE_SLEEP = 10 }; /* ms, while TCP's descriptor is left out of a sleep */

/* A receiver for which an event of TCP may be too early. */
static inline bool remote_is_early(struct end *end)
{
        uint32_t phase = load_relaxed(&end->rx.phase);
        struct view view;

        if (phase != PHASE_READY && phase != PHASE_RING)
                return false;
        view = end_receives(end);
        return view_remote(&view) && !ready_over(&view) && !ready_broken(end);
}

/* Is an event deferred now? Then TCP's descriptor is left out of sleeps, which last REMOTE_SLEEP at
 * most. */
static inline bool remote_defers(struct end *end)
{
        return __builtin_expect(load_relaxed(&end->rx.deferred), 0) && remote_is_early(end);
}

/* Request that the sender falls back to TCP. On another host, its relay has to be woken for it. */
void request_stop(struct end *end);
/* Defer the events of TCP from now on. */
void remote_defer(struct end *end);
/* Of the events that the kernel has just reported, those that the program may see, in poll's bits.
 * POLLRDHUP must have been polled for. */
uint32_t remote_visible(struct end *end, int fd, uint32_t bits);
/* What the program sees when the path is broken: the events of a connection that was reset. */
static inline uint32_t remote_broken_events(uint32_t wanted)
{
        return (wanted & (POLLIN | POLLRDNORM | POLLOUT | POLLWRNORM | POLLRDHUP)) | POLLERR | POLLHUP;
}

/* Bytes of those queued in TCP that come before all that comes through the ring. */
uint64_t remote_before(const struct end *end, uint64_t queued);

#endif
