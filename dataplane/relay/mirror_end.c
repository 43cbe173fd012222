#include "mirror_end.h"

#include "answers.h"
#include "mirror_scan.h"

enum {
        /* ms: after such a time every core has done what it had begun, which stands for a barrier
         * (fallback.c of the library) */
        SETTLE = 20,
        AGAIN = 5, /* ms between checks of a process that is in the middle of a send */
};

#define MS UINT64_C(1000000)

void mirror_close(struct mirror *m)
{
        m->closed = true;
        if (m->state == MIRROR_PAIRED && !m->peer_dropped) {
                if (!mirror_scan_sent(m)) {
                        mirror_corrupt(m);
                        return;
                }
                mirror_activate(m);
        } else {
                mirror_tell_finished(m, m->broken ? RELAY_BROKEN : RELAY_WHOLE);
        }
}

void mirror_stop_process(struct mirror *m)
{
        if (m->stopped || list_holds(&m->stopping))
                return;
        if (m->queue_pair) {
                mirror_break(m);
                return;
        }
        atomic_store(&m->out->stop, STOP_REQUESTED);
        /* A sender that waits for room may get none any more: the peer's relay soon reports
         * nothing. */
        arena_wake(m->shared, &m->out->senders, m->slot);
        m->stop_due = now() + SETTLE * MS;
        list_add(&mirrors.stopping, &m->stopping);
}

void mirror_leave(struct mirror *m)
{
        if (m->state != MIRROR_PAIRED && m->state != MIRROR_REGISTERED)
                return;
        m->leaves = !m->queue_pair;
        mirror_stop_process(m);
        mirror_activate(m);
}

/* Does it wait for the peer? Not if the peer's process has taken all that was sent, and the peer
 * knows if it ends. A process may wait for room in its ring although all bytes have arrived. */
static bool waits_for_peer(const struct mirror *m)
{
        bool ends = m->closed || m->stopped, ended = m->peer_flags & (WIRE_HAS_LEFT | WIRE_HAS_OVER);

        if (mirror_is_through(m) || m->peer_dropped)
                return false;
        /* A peer that has all of it still owes the answer. */
        if (m->queue_pair)
                return atomic_load_explicit(&m->out->busy, memory_order_relaxed) || (ends && !ended);
        return m->head != m->tail || (ends && !ended) || m->leaves || m->stop_requested;
}

void mirror_expire(struct mirror *m, enum relay_user user, uint32_t most)
{
        if (m->state != MIRROR_PAIRED || m->queue_pair != (user == RELAY_QUEUE_PAIR))
                return;
        mirror_scan(m);
        m->expired = waits_for_peer(m) ? m->expired + 1 : 0;
        if (m->expired >= most)
                mirror_break(m);
}

uint64_t mirrors_end_tick(uint64_t present)
{
        EACH(node, &mirrors.stopping) {
                struct mirror *m = OF(node, struct mirror, stopping);

                if (present < m->stop_due)
                        continue;
                if (atomic_load_explicit(&m->out->busy, memory_order_acquire) && !m->closed) {
                        m->stop_due = present + AGAIN * MS;
                        continue;
                }
                list_remove(node);
                if (!mirror_scan_sent(m)) {
                        mirror_corrupt(m);
                        continue;
                }
                m->stopped = true;
                mirror_activate(m);
        }
        return list_holds(&mirrors.stopping) ? present + AGAIN * MS : 0;
}

static bool leave(struct mirror *m)
{
        mirror_leave(m);
        return true;
}

static bool has_left(struct mirror *m)
{
        return mirror_is_through(m) || !link_is_live(m->link) ||
               (m->link->state == LINK_STREAM && !router_is_connected());
}

static bool break_unless_through(struct mirror *m)
{
        if (!mirror_is_through(m))
                mirror_break(m);
        return true;
}

void mirrors_leave(void)
{
        mirrors_visit_paired(leave);
}

bool mirrors_have_left(void)
{
        return mirrors_visit_paired(has_left);
}

void mirrors_break(void)
{
        mirrors_visit_paired(break_unless_through);
}
