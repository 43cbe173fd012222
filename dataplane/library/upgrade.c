#include "upgrade.h"

#include "cork.h"
#include "fallback.h"
#include "flow.h"
#include "poller.h"
#include "raw.h"
#include "ready.h"
#include "statistics.h"

void upgrade_receiver(struct end *end)
{
        struct view view = end_receives(end);

        if (load_acquire(&end->rx.kernel) || end_held_elsewhere(end) || ready_broken(end))
                return;
        /* Pairs with poll_wait.c: either it sees the phase, or we see its call in `kernel`. */
        if (!flow_become(&end->rx, PHASE_READY))
                return;
        /* Threads that wait in epoll must see the ring before the sender may use it; and the phase
         * with it, or they would take it for a ring that has ended. */
        if (atomic_load(&end->rx.kernel) || !poller_attach(end)) {
                flow_become(&end->rx, PHASE_TCP);
                poller_sender_changed(end);
                return;
        }
        store_release(&view.ring->ready, 1);
        if (view_remote(&view))
                wake(&view.ring->senders, end);
        statistics_count(&statistics.receivers);
}

void upgrade_sender(int fd, struct end *end)
{
        struct view view = end_sends(end);
        uint32_t stop = load_relaxed(&view.ring->stop);

        if (stop) {
                /* The ring ends before it has begun: its reader doesn't wait for it any more. */
                if (stop == STOP_RAW)
                        atomic_store(&end->final, 1);
                fallback_end_ring(end);
                return;
        }
        if (load_acquire(&end->tx.kernel) || end_held_elsewhere(end) || !load_acquire(&view.ring->ready) ||
            load_relaxed(&end->shut) & SHUT_WRITE || ready_broken(end))
                return;
        if (!raw_begin(fd, end)) {
                /* Bytes have bypassed the library since the counters were compared. */
                fallback_report_bypass(end);
                flow_become(&end->tx, PHASE_OVER);
                return;
        }
        if (!flow_become(&end->tx, PHASE_RING))
                return;
        cork_begin(fd, end);
        if (!view_remote(&view))
                upgrade_start(end, &view);
        poller_sender_changed(end);
        statistics_count(&statistics.senders);
}

void upgrade_start(struct end *end, const struct view *view)
{
        store_release(&view->ring->start, atomic_load(&end->tx.position) + 1);
}
