/* The transport `stream`: what RDMA would have done, as records in frames that the two routers carry over
 * their session, in order. A record of bytes is put into the ring by the processor of the peer's host, where
 * WIRE says; a message is what it is on any link.
 *
 * It isn't meant to be fast: connections leave for TCP while it lasts.
 */
#include "stream.h"

#include "control.h"
#include "mirror.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 32 * 1024, STREAM_WINDOW = 8 };

/* What isn't full yet; one for all links: a batch is ended before another link's begins. */
static struct relay_frame *frame;
static uint32_t filled;

static void end_frame(void)
{
        if (frame)
                control_frame(frame, filled);
        frame = NULL;
        filled = 0;
}

static uint32_t rounded(uint32_t size)
{
        return (size + 7) & ~UINT32_C(7);
}

/* Where `size` bytes of a record go that has its header. */
static uint8_t *add_record(const struct link *link, const struct wire_record *record)
{
        uint32_t whole = (uint32_t)sizeof *record + rounded(record->size);
        uint8_t *place;

        if (frame && filled + whole > RELAY_FRAME)
                end_frame();
        if (!frame) {
                frame = calloc(1, sizeof *frame + RELAY_FRAME);
                if (!frame)
                        relay_die("memory for a frame", ENOMEM);
                frame->link = link->number;
        }
        place = frame->data + filled;
        memcpy(place, record, sizeof *record);
        filled += whole;
        return place + sizeof *record;
}

static void stream_write(struct link *link, struct mirror *m, uint32_t offset, uint32_t size)
{
        const struct wire_record record = {
            .size = size,
            .connection = m->peer,
            .cookie = m->peer_cookie,
            .offset = offset,
        };
        const uint8_t *from = offset < SMALL_SIZE ? (const uint8_t *)m->out + RING_HEADER : m->out_bulk;

        memcpy(add_record(link, &record), from + offset, size);
        count(COUNT_COPIED, size);
}

static void stream_send(struct link *link, const void *message, uint32_t size, uint64_t number, bool soon)
{
        const struct wire_record record = {.size = size};

        (void)soon;
        memcpy(add_record(link, &record), message, size);
        end_frame();
        count(COUNT_POSTS, 1);
        link_completed(link, number);
}

static bool stream_room(struct link *link, unsigned writes)
{
        (void)link;
        /* One batch at a time waits for the router. */
        return writes <= WRITES ? control_has_room() : false;
}

static void put_bytes(struct link *link, const struct wire_record *record, const uint8_t *bytes)
{
        struct mirror *m = mirror_find(record->connection);
        uint32_t limit;

        if (!m || m->link != link || m->cookie != record->cookie ||
            (m->state != MIRROR_PAIRED && m->state != MIRROR_LENT))
                return;
        limit = record->offset < SMALL_SIZE ? SMALL_SIZE : m->size;
        if (record->offset >= m->size || record->size > limit - record->offset)
                return;
        memcpy((record->offset < SMALL_SIZE ? (uint8_t *)m->in + RING_HEADER : m->in_bulk) + record->offset,
               bytes, record->size);
        count(COUNT_COPIED, record->size);
}

void stream_frame(struct link *link, const uint8_t *data, size_t size)
{
        size_t at = 0;

        while (link->state == LINK_STREAM && size - at >= sizeof(struct wire_record)) {
                struct wire_record record;

                memcpy(&record, data + at, sizeof record);
                at += sizeof record;
                /* Not one of a relay: the connections wait until the routers give the link up. */
                if (record.size > size - at)
                        return;
                if (record.connection)
                        put_bytes(link, &record, data + at);
                else
                        link_message(link, data + at, record.size);
                at += rounded(record.size) < size - at ? rounded(record.size) : size - at;
        }
}

static void stream_unmake(struct link *link)
{
        (void)link;
}

const struct transport stream_transport = {
    .window = STREAM_WINDOW,
    .piece = PIECE,
    .unmake = stream_unmake,
    .room = stream_room,
    .write = stream_write,
    .send = stream_send,
};
