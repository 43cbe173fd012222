#include "fallback.h"

#include "clock.h"
#include "cork.h"
#include "ends.h"
#include "flow.h"
#include "keep.h"
#include "poller.h"
#include "protocol.h"
#include "raw.h"
#include "ready.h"
#include "remote.h"
#include "router.h"
#include "statistics.h"
#include "sys.h"

#include <errno.h>
#include <linux/membarrier.h>
#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

/* Receivers in these phases may still find bytes in the ring. */
static bool reads_ring(struct end *end)
{
        uint32_t phase = atomic_load(&end->rx.phase);

        return phase == PHASE_READY || phase == PHASE_RING;
}

int64_t fallback_left(struct end *end)
{
        struct view view = end_receives(end);

        return ring_ready(&end->rx, &view);
}

/* --- the reset of a connection --- */

static void reset(int fd, struct end *end, uint32_t reason)
{
        struct sockaddr nowhere = {.sa_family = AF_UNSPEC};

        atomic_store(&end->final, 1);
        atomic_store(&end->reason, reason);
        flow_become(&end->tx, PHASE_OVER);
        flow_become(&end->rx, PHASE_OVER);
        /* The kernel sends a reset at the next close, or for what it gets from now on. */
        sys_3(SYS_connect, fd, &nowhere, sizeof nowhere);
        cork_end(fd, end);
        statistics_reason(reason);
}

void reset_corrupt(int fd, struct end *end)
{
        reset(fd, end, REASON_CORRUPT);
        statistics_count(&statistics.corrupt);
}

/* Is there something that a reader gets before the reset? */
static bool is_unread(int fd, struct end *end)
{
        return reads_ring(end) &&
               (fallback_left(end) > 0 || remote_before(end, (uint64_t)sys_number(fd, SIOCINQ)));
}

void reset_broken(int fd, struct end *end, bool receiver)
{
        atomic_store(&end->final, 1);
        if (atomic_exchange(&end->reason, REASON_BROKEN) != REASON_BROKEN)
                statistics_count(&statistics.broken);
        if (!receiver && is_unread(fd, end)) {
                flow_become(&end->tx, PHASE_OVER);
                sys_2(SYS_shutdown, fd, SHUT_WR);
        } else {
                reset(fd, end, REASON_BROKEN);
                /* What follows the error is what follows one on TCP: the end, and EPIPE. A reader
                 * reports the error itself. */
                sys_2(SYS_shutdown, fd, SHUT_RDWR);
                if (receiver)
                        sys_option(fd, SOL_SOCKET, SO_ERROR);
        }
        poller_sender_changed(end);
}

/* --- the sender --- */

bool fallback_may_end_ring(struct end *end)
{
        uint32_t phase = load_relaxed(&end->tx.phase);

        if (load_relaxed(&end->stage) != STAGE_ATTACHED)
                return false;
        return phase == PHASE_RING || (phase == PHASE_TCP && end_is_remote(end));
}

void fallback_end_ring(struct end *end)
{
        struct view view = end_sends(end);

        flow_become(&end->tx, PHASE_OVER);
        ring_stamp(&view, atomic_load(&end->tx.edge), clock_stamp());
        store_release(&view.ring->end, atomic_load(&end->tx.edge) + 1);
        wake(&view.ring->receivers, end);
}

bool fallback_await_start(struct end *end)
{
        enum { PATIENCE = 1000 * 1000 * 1000 }; /* ns */
        struct view view = end_sends(end);
        uint64_t begin = now();

        if (!view_remote(&view) || !atomic_load(&end->tx.edge))
                return true;
        while (!load_acquire(&view.ring->received) && !load_acquire(&view.ring->head)) {
                if (ready_broken(end) || now() - begin > PATIENCE)
                        return false;
                sys_sleep(100 * 1000);
        }
        return true;
}

void fallback_sender(int fd, struct end *end, uint32_t reason)
{
        if (reason != REASON_PEER_CLOSED)
                atomic_store(&end->final, 1);
        cork_end(fd, end);
        fallback_end_ring(end);
        if (!fallback_await_start(end)) {
                reset_broken(fd, end, false);
                return;
        }
        atomic_store(&end->reason, reason);
        poller_sender_changed(end);
        statistics_count(&statistics.retreats);
        statistics_reason(reason);
}

bool fallback_at_random(struct end *end)
{
        enum { ONE_OF = 4 };
        struct view view = end_receives(end);

        if (clock_stamp() * UINT64_C(0x9e3779b97f4a7c15) >> 32 & (ONE_OF - 1))
                return false;
        if (!atomic_exchange(&view.ring->stop, STOP_REQUESTED))
                wake(&view.ring->senders, end);
        return true;
}

/* --- bytes that bypassed the ring (raw.h) --- */

void fallback_report_bypass(struct end *end)
{
        struct view view = end_receives(end);

        atomic_store(&end->final, 1);
        statistics_count(&statistics.past);
        if (view_remote(&view) && reads_ring(end))
                request_stop(end);
        else if (!view_remote(&view))
                atomic_store(&view.ring->stop, STOP_RAW);
        router_note(end, REASON_RAW);
}

void fallback_check_order(int fd, struct end *end)
{
        if (load_relaxed(&end->tx.phase) != PHASE_RING || raw_check(fd, end) != RAW_BYPASSED ||
            raw_is_clean(&end->tx))
                return;
        fallback_report_bypass(end);
        reset(fd, end, REASON_RAW);
}

void fallback_bypassed(int fd, struct end *end)
{
        fallback_report_bypass(end);
        if (raw_is_clean(&end->tx))
                fallback_sender(fd, end, REASON_RAW);
        else
                reset(fd, end, REASON_RAW);
}

/* --- the receiver: stop the other side's sender --- */

/* The relays answer when all has come that the sender put in before it stopped. */
static bool stop_remote_sender(struct end *end, const struct view *view)
{
        enum { PATIENCE = 1000 * 1000 * 1000 }; /* ns: the peer's relay itself takes 20 ms */
        uint64_t begin = now();

        request_stop(end);
        while (!ready_over(view)) {
                if (ready_broken(end) || now() - begin > PATIENCE)
                        return false;
                sys_sleep(500 * 1000);
        }
        return true;
}

/* Ask the other side to end its ring. False: it may still put bytes there. */
static bool stop_sender(struct end *end, uint32_t why)
{
        enum { PATIENCE = 100 * 1000 * 1000 }; /* ns: a copy of a piece, and being preempted in it */
        struct view view = end_receives(end);
        uint64_t begin;

        if (view_remote(&view))
                return stop_remote_sender(end, &view);
        atomic_store(&view.ring->stop, why);
        /* After this, a sender that isn't `busy` will see `stop` before it puts anything. Where
         * the kernel has no such barrier, what every core has done in the meantime must do. */
        if (sys_2(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0) < 0)
                sys_sleep(20 * 1000 * 1000);
        begin = now();
        while (load_acquire(&view.ring->busy))
                if (now() - begin > PATIENCE)
                        return false;
        return true;
}

bool fallback_sender_stopped(struct end *end)
{
        struct view view = end_receives(end);

        if (view_remote(&view))
                return ready_over(&view);
        return atomic_load(&view.ring->stop) && !load_acquire(&view.ring->busy);
}

long fallback_unannounced(int fd, struct end *end)
{
        struct view view = end_receives(end);
        uint64_t head = atomic_load(&end->rx.edge);
        enum taken taken;
        bool known = atomic_load(&end->rx.clean) == head || atomic_load(&view.ring->clean) == head;

        /* What a thread puts at the same moment may come first. */
        if (known && stop_sender(end, STOP_RAW)) {
                int64_t ready = fallback_left(end);

                if (ready && atomic_load(&view.ring->clean) == head + (uint64_t)ready)
                        return -EINPROGRESS;
                known = !ready;
        } else {
                known = false;
        }
        fallback_report_bypass(end);
        if (!known) {
                reset(fd, end, REASON_RAW);
                return -EBADE;
        }
        flow_become(&end->rx, PHASE_OVER);
        taken = lock_take(&end->tx.lock, self());
        if (taken == LOCK_TAKEN && fallback_may_end_ring(end))
                fallback_sender(fd, end, REASON_RAW);
        lock_release(&end->tx.lock, taken);
        poller_sender_changed(end);
        return -EINPROGRESS;
}

/* --- both ways --- */

bool fallback_both(int fd, struct end *end, uint32_t reason)
{
        bool reads = reads_ring(end);

        atomic_store(&end->final, 1);
        fallback_check_order(fd, end);
        if (fallback_may_end_ring(end))
                fallback_sender(fd, end, reason);
        keep_end(fd, end);
        flow_become(&end->tx, PHASE_OVER);
        if (reads && (!stop_sender(end, STOP_REQUESTED) || fallback_left(end) != 0))
                return false;
        flow_become(&end->rx, PHASE_OVER);
        return true;
}

static bool is_attached(const struct end *end)
{
        return atomic_load(&end->stage) == STAGE_ATTACHED;
}

void fall_back(int fd, struct end *end, uint64_t key, uint32_t reason)
{
        enum { SLEEPS = 50 };
        bool attached = is_attached(end);

        if (attached) {
                unsigned nested = end_lock(end);

                /* It may have left its slot meanwhile. */
                attached = !end_is(end, key) || is_attached(end);
                if (attached && end_is(end, key))
                        fallback_both(fd, end, reason);
                end_release(end, nested);
        }
        if (!attached) {
                poller_leave(fd, key);
                end_leave(fd, end, key, reason);
                return;
        }
        /* For a sender that was preempted in the middle of a piece: the caller relies on it that no
         * byte follows. */
        for (int i = 0; i < SLEEPS && end_is(end, key) && end_has_rest(end) && !fallback_sender_stopped(end);
             i++)
                sys_sleep(10 * 1000 * 1000);
}

void fallback_announce(struct end *end)
{
        if (atomic_load(&end->stage) == STAGE_ATTACHED && reads_ring(end) && end_is_remote(end))
                request_stop(end);
}
