/* The transport `stream`: writes and messages become records (wire.h) in frames, which the two
 * routers carry over their session, in order. The receiving relay copies a record's bytes into the
 * ring, where RDMA would have written them; a message is handled as on any link.
 *
 * It has no channel and is not meant to be fast: connections fall back to TCP while it is in use.
 */
#include "stream.h"

#include "answers.h"
#include "link.h"
#include "mirror.h"

#include <string.h>

enum { PIECE = 32 * 1024, STREAM_WINDOW = 8 };

/* The frame that is being filled. One for all links: a batch ends before one of another link
 * begins. */
static struct relay_frame *frame;
static uint32_t filled;

static void end_frame(void)
{
        if (frame)
                answer_frame(frame, filled);
        frame = NULL;
        filled = 0;
}

static uint32_t rounded(uint32_t size)
{
        return (size + 7) & ~UINT32_C(7);
}

/* Adds a record's header. Returns where its `size` bytes go. */
static uint8_t *add_record(const struct link *link, const struct wire_record *record)
{
        uint32_t whole = (uint32_t)sizeof *record + rounded(record->size);
        uint8_t *at;

        if (frame && filled + whole > RELAY_FRAME)
                end_frame();
        if (!frame) {
                frame = relay_memory(sizeof *frame + RELAY_FRAME, "memory for a frame");
                frame->link = link->number;
        }
        at = frame->data + filled;
        memcpy(at, record, sizeof *record);
        filled += whole;
        return at + sizeof *record;
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

static void stream_send(struct link *link, UNUSED unsigned lane, const void *message, uint32_t size,
                        uint64_t number, UNUSED bool soon)
{
        const struct wire_record record = {.size = size};

        memcpy(add_record(link, &record), message, size);
        end_frame();
        count(COUNT_POSTS, 1);
        link_completed(link, 0, number);
}

static bool stream_has_room(UNUSED struct link *link, UNUSED unsigned lane, unsigned writes)
{
        /* Not more than one batch waits for the router. */
        return writes <= WRITES ? answers_have_room() : false;
}

static void receive_bytes(struct link *link, const struct wire_record *record, const uint8_t *bytes)
{
        struct mirror *m = mirror_find(record->connection);
        uint32_t limit;

        if (!m || m->link != link || m->cookie != record->cookie ||
            (m->state != MIRROR_PAIRED && m->state != MIRROR_REGISTERED))
                return;
        limit = record->offset < SMALL_SIZE ? SMALL_SIZE : m->size;
        if (record->offset >= m->size || record->size > limit - record->offset)
                return;
        memcpy((record->offset < SMALL_SIZE ? (uint8_t *)m->in + RING_HEADER : m->in_bulk) + record->offset,
               bytes, record->size);
        count(COUNT_COPIED, record->size);
}

void stream_receive(struct link *link, const uint8_t *data, size_t size)
{
        size_t at = 0;

        while (link->state == LINK_STREAM && size - at >= sizeof(struct wire_record)) {
                struct wire_record record;

                memcpy(&record, data + at, sizeof record);
                at += sizeof record;
                /* Invalid: the link's connections wait until the routers remove it. */
                if (record.size > size - at)
                        return;
                if (record.connection)
                        receive_bytes(link, &record, data + at);
                else
                        link_receive(link, 0, data + at, record.size);
                at += rounded(record.size) < size - at ? rounded(record.size) : size - at;
        }
}

const struct transport stream_transport = {
    .window = STREAM_WINDOW,
    .piece = PIECE,
    .lanes = 1,
    .message_lanes = 1,
    .has_room = stream_has_room,
    .write = stream_write,
    .send = stream_send,
};
