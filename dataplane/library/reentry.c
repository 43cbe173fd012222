#include "reentry.h"

#include "arena.h"
#include "attach.h"
#include "fallback.h"
#include "flow.h"
#include "keep.h"
#include "poller.h"
#include "remote.h"
#include "router.h"
#include "settings.h"
#include "statistics.h"

/* Options that are emulated on a ring, errors that wait for the program, and sides that are shut
 * down: such an end stays where it is. */
static bool is_plain(const struct end *end)
{
        return !atomic_load(&end->shut) && !atomic_load(&end->error) && !atomic_load(&end->low) &&
               !atomic_load(&end->peeked) && !atomic_load(&end->inq);
}

/* Nothing more goes through either ring. A receiver that never got ready has received nothing, and
 * a sender that was asked to leave before it began will send nothing. */
static bool has_ended(const struct end *end)
{
        uint32_t rx = atomic_load(&end->rx.phase), tx = atomic_load(&end->tx.phase);

        return (rx == PHASE_OVER || rx == PHASE_TCP) &&
               (tx == PHASE_OVER || (tx == PHASE_TCP && atomic_load(&end_sends(end).ring->stop)));
}

/* Has the peer's sender left the ring by itself? */
static bool peer_has_left(const struct end *end)
{
        struct view view = end_receives(end);
        uint64_t start = load_acquire(&view.ring->start);

        return !view_remote(&view) || !start || start - 1 < atomic_load(&end->rx.position) ||
               load_acquire(&view.ring->end) || load_acquire(&view.ring->over);
}

/* The peer's receiver may wait for a sender that never began, and its sender for a receiver that
 * never got ready. */
static void dismiss_peer(struct end *end)
{
        if (atomic_load(&end->tx.phase) == PHASE_TCP)
                fallback_end_ring(end);
        if (atomic_load(&end->rx.phase) == PHASE_TCP)
                request_stop(end);
}

static bool may_leave(const struct end *end)
{
        return atomic_load(&end->stage) == STAGE_ATTACHED && !atomic_load(&end->final) && settings.enabled &&
               !end_held_elsewhere(end) && is_plain(end) && has_ended(end);
}

/* Under both locks. `*pause`: if it can't be, ms until the next check. */
static bool leave_slot(int fd, struct end *end, uint64_t *pause)
{
        if (!may_leave(end) || !end_is_behind(fd, end) || !peer_has_left(end))
                return false;
        if (attach_compare(fd, end) == RAW) {
                atomic_store(&end->final, 1);
                return false;
        }
        if (!poller_detach(end))
                return false;
        dismiss_peer(end);
        *pause = BACKOFF_BUSY;
        if (!flow_leave_slot(end))
                return false;
        keep_end(fd, end);
        family_account(end);
        arena_release(end);
        flow_begin_again(end);
        atomic_store(&end->reason, 0);
        atomic_store(&end->operations, 0);
        atomic_store(&end->opened, now());
        atomic_store(&end->counted_from, atomic_load(&end->rx.position) + atomic_load(&end->tx.position));
        atomic_store(&end->due, 0);
        stage_become(end, STAGE_ATTACHED, STAGE_CANDIDATE);
        statistics_count(&statistics.returned);
        return true;
}

void reentry_leave_slot(int fd, struct end *end, uint64_t key)
{
        uint64_t pause = BACKOFF_CHECK;
        unsigned nested;

        /* Nobody else may take the message that acceleration is on again. */
        if (!settings.enabled)
                router_receive();
        nested = end_lock(end);
        if (end_is(end, key)) {
                if (end_held_elsewhere(end))
                        end_forget_dead(end);
                if (nested || !leave_slot(fd, end, &pause))
                        backoff_set(end, pause);
        }
        end_release(end, nested);
}
