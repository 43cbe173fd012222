#include "mirror_send.h"

#include "mirror_scan.h"
#include "moves.h"

enum {
        BULK_BYTES = 16 * 1024, /* in one batch */
        BULK_BATCHES = 64,      /* of which so many more than small ones make a connection bulk */
};

/* A connection in bulk is one that fills its batches for some MiB, and goes on to do so. */
static void learn_bulk(struct mirror *m, uint64_t bytes)
{
        if (bytes >= BULK_BYTES && m->bulk_batches < BULK_BATCHES)
                m->bulk_batches++;
        else if (bytes < BULK_BYTES && m->bulk_batches)
                m->bulk_batches--;
        if (m->bulk_batches == BULK_BATCHES || !m->bulk_batches)
                m->bulk = m->bulk_batches;
}

static void write_bytes(struct mirror *m, uint64_t batch)
{
        uint64_t budget = m->link->transport->piece;

        for (int i = 0; i < RING_WRITES && budget && m->sent != m->tail; i++) {
                uint32_t offset = (uint32_t)(m->sent - m->base) & (m->size - 1);
                uint64_t run = (offset < SMALL_SIZE ? SMALL_SIZE : m->size) - offset;

                run = run < budget ? run : budget;
                run = run < m->tail - m->sent ? run : m->tail - m->sent;
                m->link->transport->write(m->link, m, offset, (uint32_t)run);
                count(COUNT_WRITES, 1);
                count(COUNT_BYTES_OUT, run);
                m->sent += run;
                m->last_batch = batch;
                budget -= run;
        }
        if (budget == m->link->transport->piece)
                return;
        learn_bulk(m, m->link->transport->piece - budget);
        mirror_use(m, USAGE_BYTES_OUT, m->link->transport->piece - budget);
}

void mirror_send(struct mirror *m, struct wire_block *block, uint64_t batch)
{
        if (m->state == MIRROR_PAIRED)
                mirror_scan(m);
        if (m->moves && moves_say(m, block)) {
                mirror_use(m, USAGE_BLOCKS_OUT, 1);
                return;
        }
        if (mirror_may_write(m))
                write_bytes(m, batch);
        if (m->moves)
                moves_write(m, batch);
        *block =
            (struct wire_block){.connection = m->peer, .flags = mirror_flags(m), .cookie = m->peer_cookie};
        m->sent_flags = block->flags;
        if (block->flags & WIRE_DROPPED) {
                /* The peer confirms to this number even if it does not know the connection any
                 * more. */
                block->start = m->number;
                block->end = m->cookie;
                m->last_batch = batch;
        } else if (!m->broken) {
                block->tail = m->resync ? m->acked : m->sent;
                block->base = m->base;
                block->start = m->start;
                block->end = m->end;
                block->head = m->reported = m->consumed;
                block->received = m->arrived;
                m->end_sent = m->end != 0;
                m->block_due = m->report_due = false;
        }
        mirror_use(m, USAGE_BLOCKS_OUT, 1);
        mirror_activate(m);
}
