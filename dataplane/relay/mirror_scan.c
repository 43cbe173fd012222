#include "mirror_scan.h"

#include "moves.h"

enum {
        IDLE = 2000, /* turns without work after which a connection becomes idle though others are
                        busy */
        REPORT = 4,  /* a quarter of a ring taken is reported at once */
        TICK = 10,   /* ms after which what was taken is reported, doubled while nothing is taken */
        TICK_MOST = 1000,
        SCANS = 256, /* connections of one source in one turn */
};

#define MS UINT64_C(1000000)

static uint64_t tick_at, tick_gap = TICK;

bool mirror_scan_sent(struct mirror *m)
{
        uint64_t end, tail, base;

        if (m->stopped && m->end)
                return true;
        end = atomic_load_explicit(&m->out->end, memory_order_acquire);
        tail = atomic_load_explicit(&m->out->tail, memory_order_acquire);
        if (tail != m->tail) {
                /* The process may send nothing before `ready`, and nothing after it has stopped. */
                if (!(m->peer_flags & WIRE_READY) || m->stopped || tail - m->tail > m->size ||
                    tail - m->head > m->size)
                        return false;
                /* All bytes below `tail` that are not taken yet were written with this `base`. */
                base = atomic_load_explicit(&m->out->base, memory_order_relaxed);
                if (base != m->base && (base != m->tail || m->head != m->tail))
                        return false;
                m->base = base;
                m->tail = tail;
        }
        if (!m->start)
                m->start = atomic_load_explicit(&m->out->start, memory_order_acquire);
        if (end && end - 1 != tail)
                return false;
        if (end) {
                m->end = end;
                m->stopped = true;
        }
        return true;
}

/* What the process receives it has taken up to here. A process that has ended may have seen more
 * than it came to say (record.h of our libibverbs). */
static uint64_t position_taken(const struct mirror *m)
{
        uint64_t head = atomic_load_explicit(&m->in->head, memory_order_acquire), visible;

        if (!m->closed || !m->queue_pair)
                return head;
        visible = atomic_load_explicit(&m->in->visible, memory_order_acquire);
        return visible - head <= m->arrived - head ? visible : head;
}

/* Reads the ring that the process receives. False: it holds invalid values. */
static bool scan_taken(struct mirror *m)
{
        uint64_t head = position_taken(m);

        if (head - m->consumed > m->arrived - m->consumed)
                return false;
        m->consumed = head;
        if (head - m->reported >= m->size / REPORT)
                m->report_due = true;
        if (!m->process_ready)
                m->process_ready = atomic_load_explicit(&m->in->ready, memory_order_acquire) != 0;
        if (m->process_ready && m->moves && !m->knows_moves)
                m->knows_moves = atomic_load_explicit(&m->in->moves, memory_order_relaxed) != 0;
        if (!m->stop_requested)
                m->stop_requested = atomic_load_explicit(&m->in->stop, memory_order_relaxed) != 0;
        return true;
}

void mirror_scan(struct mirror *m)
{
        if (!mirror_scan_sent(m) || !scan_taken(m))
                mirror_corrupt(m);
        else if (m->moves)
                moves_scan(m);
}

static void request_bell(struct waiters *waiters)
{
        atomic_fetch_or_explicit(&waiters->bells[0], 1, memory_order_relaxed);
        atomic_store_explicit(&waiters->any, 1, memory_order_relaxed);
}

/* Makes it idle. False: it has something to send. */
static bool make_idle(struct mirror *m)
{
        uint64_t used = m->arrived - m->consumed, room = 0;

        if (!list_holds(&m->queued)) {
                /* As long as less than half of the ring is used in the peer's view, the peer needs
                 * no report.
                 */
                if (m->arrived - m->reported >= m->size / 2)
                        room = used > m->size / REPORT ? used - m->size / REPORT : 1;
                atomic_store_explicit(&m->in->room, (uint32_t)room, memory_order_relaxed);
                request_bell(&m->out->receivers);
                request_bell(&m->in->senders);
                /* Pairs with wake() of the library: either it sees `any`, or we see what it
                 * published. */
                atomic_thread_fence(memory_order_seq_cst);
                mirror_scan(m);
                if (m->state != MIRROR_PAIRED)
                        return true;
                if (mirror_has_work(m) && mirror_enqueue(m))
                        return false;
        }
        atomic_store_explicit(&m->out->receiver_cpu, 0, memory_order_relaxed);
        atomic_store_explicit(&m->in->sender_cpu, 0, memory_order_relaxed);
        list_remove(&m->active);
        if (m->arrived != m->reported && !list_holds(&m->lazy)) {
                list_add(&mirrors.lazy, &m->lazy);
                if (tick_gap != TICK)
                        tick_at = 0;
                tick_gap = TICK;
        }
        arena_becomes_idle(m->shared);
        return true;
}

/* True: one of its connections has something to send. */
static bool scan_source(struct source *source)
{
        unsigned scans = 0;
        bool any = false;

        EACH(node, &source->active) {
                struct mirror *m = OF(node, struct mirror, active);

                if (scans++ == SCANS) {
                        list_begin(&source->active, node);
                        break;
                }
                if (list_holds(&m->queued) || mirror_rests(m))
                        continue;
                mirror_scan(m);
                if (mirror_has_work(m) && mirror_enqueue(m)) {
                        m->idle_turns = 0;
                        any = true;
                } else if (m->state == MIRROR_PAIRED && ++m->idle_turns > IDLE) {
                        make_idle(m);
                }
        }
        return any;
}

bool mirrors_scan(void)
{
        bool any = false;

        EACH(node, &mirrors.active) {
                struct source *source = OF(node, struct source, scanned);

                any = scan_source(source) || any;
                if (!list_holds(&source->active))
                        list_remove(&source->scanned);
        }
        return any;
}

static bool make_source_idle(struct source *source)
{
        bool all = true;

        EACH(node, &source->active) {
                struct mirror *m = OF(node, struct mirror, active);

                all = (mirror_rests(m) || make_idle(m)) && all;
        }
        return all;
}

bool mirrors_make_idle(void)
{
        bool all = true;

        EACH(node, &mirrors.active)
                all = make_source_idle(OF(node, struct source, scanned)) && all;
        return all;
}

bool mirrors_are_active(void)
{
        return list_holds(&mirrors.active);
}

/* True: a process has taken something. */
static bool scan_lazy(void)
{
        bool any = false;

        EACH(node, &mirrors.lazy) {
                struct mirror *m = OF(node, struct mirror, lazy);

                if (!scan_taken(m)) {
                        mirror_corrupt(m);
                } else if (m->consumed != m->reported) {
                        m->report_due = any = true;
                        mirror_activate(m);
                } else if (m->arrived == m->reported) {
                        list_remove(node);
                }
        }
        return any;
}

/* When lazy connections are to be looked at again; 0: there are none. */
static uint64_t lazy_tick(uint64_t present)
{
        if (!list_holds(&mirrors.lazy) && !arenas_need_polls()) {
                tick_at = 0;
                tick_gap = TICK;
                return 0;
        }
        if (tick_at && present >= tick_at) {
                bool any = scan_lazy();

                tick_at = 0;
                any = arenas_poll() || any;
                tick_gap = any ? TICK : tick_gap * 2 < TICK_MOST ? tick_gap * 2 : TICK_MOST;
        }
        if (!tick_at)
                tick_at = present + tick_gap * MS;
        return tick_at;
}

uint64_t mirrors_scan_tick(uint64_t present)
{
        uint64_t lazy = lazy_tick(present), resume = arenas_resume_at(present);

        return !lazy || (resume && resume < lazy) ? resume : lazy;
}
