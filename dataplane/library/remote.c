#include "remote.h"

#include "bells.h"
#include "sys.h"

#include <poll.h>
#include <sys/ioctl.h>

#define DEFERRABLE ((uint32_t)(POLLIN | POLLRDNORM | POLLRDBAND | POLLRDHUP | POLLHUP))

void request_stop(struct end *end)
{
        struct view view = end_receives(end);

        if (!atomic_exchange(&view.ring->stop, STOP_REQUESTED) && view_remote(&view))
                wake(&view.ring->senders, end);
}

void remote_defer(struct end *end)
{
        if (!atomic_exchange_explicit(&end->rx.deferred, 1, memory_order_relaxed))
                request_stop(end);
}

uint64_t remote_before(const struct end *end, uint64_t queued)
{
        struct view view = end_receives(end);
        uint64_t start = load_acquire(&view.ring->start);
        uint64_t position = load_acquire(&end->rx.position);
        uint64_t before;

        if (load_relaxed(&end->rx.phase) != PHASE_READY)
                return 0;
        before = !start ? UINT64_MAX : start - 1 > position ? start - 1 - position : 0;
        return queued < before ? queued : before;
}

uint32_t remote_visible(struct end *end, int fd, uint32_t bits)
{
        uint32_t shut = load_relaxed(&end->shut);

        /* What the program itself has shut down says nothing of the peer. A connection that is gone
         * without both sides' FIN was reset, whichever thread got the error. */
        if (!(bits & DEFERRABLE) || !remote_is_early(end) || shut & SHUT_READ || bits & POLLERR ||
            (bits & POLLHUP && !(shut & (SHUT_WRITE | SHUTTING_WRITE))))
                return bits;
        if (load_relaxed(&end->rx.deferred))
                return bits & ~DEFERRABLE;
        if (remote_before(end, (uint64_t)sys_number(fd, FIONREAD)))
                return bits & ~(uint32_t)(POLLRDHUP | POLLHUP);
        if (!remote_before(end, 1) || bits & (POLLRDHUP | POLLHUP)) {
                /* All that came before the ring has been taken. What is there now comes after it.
                 */
                if (sys_poll(fd, POLLIN | POLLRDHUP))
                        remote_defer(end);
                return bits & ~DEFERRABLE;
        }
        /* Another thread has just taken what was there. */
        return bits & ~(uint32_t)(POLLIN | POLLRDNORM | POLLRDBAND);
}
