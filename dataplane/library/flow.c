#include "flow.h"

#include "sys.h"

#define TO(state) (1u << (state))

/* STAGE_CLOSED follows all of them: a program may close a socket at any time. */
static const uint8_t next_stages[] = {
    [STAGE_CLOSED] = TO(STAGE_CLOSED) | TO(STAGE_CANDIDATE),
    /* Refused: the peer's address isn't one of ours, or the descriptor was passed to another
     * program. */
    [STAGE_CANDIDATE] = TO(STAGE_CLOSED) | TO(STAGE_REQUESTED) | TO(STAGE_REFUSED),
    /* A candidate again: the request wasn't sent, or the router has gone. */
    [STAGE_REQUESTED] = TO(STAGE_CLOSED) | TO(STAGE_CANDIDATE) | TO(STAGE_ANSWERING) | TO(STAGE_REFUSED),
    /* Requested again: the answer was for an earlier connection with this number. */
    /* A candidate: refused for now. */
    [STAGE_ANSWERING] =
        TO(STAGE_CLOSED) | TO(STAGE_CANDIDATE) | TO(STAGE_REQUESTED) | TO(STAGE_REFUSED) | TO(STAGE_GRANTED),
    [STAGE_REFUSED] = TO(STAGE_CLOSED),
    [STAGE_GRANTED] = TO(STAGE_CLOSED) | TO(STAGE_REFUSED) | TO(STAGE_ATTACHED),
    /* A candidate: both directions have ended (reentry.h). */
    [STAGE_ATTACHED] = TO(STAGE_CLOSED) | TO(STAGE_CANDIDATE),
};

static const uint8_t next_phases[] = {
    /* READY: a receiver. RING: a sender. */
    [PHASE_TCP] = TO(PHASE_READY) | TO(PHASE_RING) | TO(PHASE_OVER),
    /* TCP again: an epoll instance can't poll the ring, or a call that can't see it came at the
     * same time. */
    [PHASE_READY] = TO(PHASE_TCP) | TO(PHASE_RING) | TO(PHASE_OVER),
    [PHASE_RING] = TO(PHASE_OVER),
    [PHASE_OVER] = TO(PHASE_OVER),
};

bool stage_become(struct end *end, enum stage from, enum stage to)
{
        uint32_t expected = from;

        return next_stages[from] & TO(to) && atomic_compare_exchange_strong(&end->stage, &expected, to);
}

void stage_close(struct end *end)
{
        enum { SPINS = 1000, SLEEPS = 100 };

        /* An answer that a thread is just taking is waited for, unless that thread was killed, or
         * is the one that is interrupted by the signal handler which closes the connection. */
        for (int i = 0; i < SPINS + SLEEPS; i++) {
                uint32_t stage = atomic_load(&end->stage);

                if (stage != STAGE_ANSWERING) {
                        if (stage_become(end, stage, STAGE_CLOSED))
                                return;
                } else if (i < SPINS) {
                        relax();
                } else {
                        sys_sleep(1000 * 1000);
                }
        }
        atomic_store(&end->stage, STAGE_CLOSED);
}

bool flow_become(struct flow *flow, enum phase to)
{
        uint32_t phase = atomic_load(&flow->phase);

        /* Sequentially consistent: READY pairs with the count of blind calls in poll_wait.c. */
        do
                if (!(next_phases[phase] & TO(to)))
                        return false;
        while (!atomic_compare_exchange_weak(&flow->phase, &phase, to));
        return true;
}

static void forget_ring(struct flow *flow)
{
        store_relaxed(&flow->deferred, 0);
        store_relaxed(&flow->edge, 0);
        store_relaxed(&flow->base, 0);
        store_relaxed(&flow->limit, UINT64_MAX);
        store_relaxed(&flow->touched, 0);
        store_relaxed(&flow->seen, 0);
        store_relaxed(&flow->clean, 0);
        store_relaxed(&flow->sent, 0);
        store_relaxed(&flow->stopped, 0);
        store_relaxed(&flow->reserved, 0);
        spin_forget(&flow->spinner);
        store_relaxed(&flow->checked, 0);
        store_relaxed(&flow->full, 0);
}

static void begin(struct flow *flow)
{
        store_relaxed(&flow->phase, PHASE_TCP);
        store_relaxed(&flow->kernel, 0);
        store_relaxed(&flow->timeout, 0);
        store_relaxed(&flow->position, 0);
        forget_ring(flow);
}

void flow_begin(struct end *end)
{
        atomic_store(&end->stage, STAGE_CLOSED);
        begin(&end->rx);
        begin(&end->tx);
}

bool flow_leave_slot(struct end *end)
{
        uint32_t rx = atomic_load(&end->rx.phase), tx = atomic_load(&end->tx.phase);

        atomic_store(&end->rx.phase, PHASE_TCP);
        atomic_store(&end->tx.phase, PHASE_TCP);
        /* Pairs with flow_begin_wait(): either it sees the phase, or we see the wait. */
        if (!atomic_load(&end->waits))
                return true;
        atomic_store(&end->tx.phase, tx);
        atomic_store(&end->rx.phase, rx);
        return false;
}

void flow_begin_again(struct end *end)
{
        forget_ring(&end->rx);
        forget_ring(&end->tx);
}
