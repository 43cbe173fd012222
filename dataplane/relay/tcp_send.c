#include "tcp_send.h"

#include "link.h"
#include "mirror.h"
#include "tcp_calls.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum {
        CIRCLE = 1024 * 1024,
};

/* What waits, a batch, and the end of the circle that is skipped because a batch does not fit. */
_Static_assert(TCP_UNSENT + 2 * (TCP_BATCH + 4096) <= CIRCLE, "the circle never overtakes itself");

static struct node dirty = LIST(dirty);

int tcp_send_start(struct tcp_socket *s, const uint8_t key[RECORD_KEY], bool encrypts)
{
        s->out.encrypts = encrypts;
        s->out.circle = malloc(CIRCLE);
        if (!s->out.circle)
                return ENOMEM;
        return seal_start(&s->out.seal, key, s->lane, true) ? 0 : EIO;
}

void tcp_send_end(struct tcp_socket *s)
{
        list_remove(&s->out.node);
        seal_end(&s->out.seal);
        free(s->out.circle);
}

void tcp_send_ready(struct tcp_socket *s)
{
        s->out.full = false;
        if (s->out.first != s->out.last)
                list_add(&dirty, &s->out.node);
}

/* --- making a batch --- */

static struct outgoing *out_of(const struct link *link, unsigned lane)
{
        return &((struct tcp_channel *)link->channel)->sockets[lane].out;
}

static struct piece *piece_at(struct outgoing *out, uint64_t number)
{
        return &out->pieces[number % PIECES];
}

/* `size` bytes of the circle, in one piece. */
static uint8_t *reserve(struct outgoing *out, size_t size)
{
        size_t at = out->end % CIRCLE;

        if (at + size > CIRCLE) {
                out->end += CIRCLE - at;
                at = 0;
        }
        out->end += size;
        return out->circle + at;
}

bool tcp_has_room(struct link *link, unsigned lane, unsigned writes)
{
        const struct outgoing *out = out_of(link, lane);

        /* One piece for the head, one for a sealed payload. */
        return !out->full && out->queued < out->most &&
               out->last - out->first + out->parts + writes + 2 <= PIECES &&
               out->bytes + (writes ? TCP_PIECE : 0) <= TCP_BATCH;
}

void tcp_write(struct link *link, struct mirror *m, uint32_t offset, uint32_t size)
{
        struct outgoing *out = out_of(link, m->lane);
        struct run *run = out->runs ? &out->run[out->runs - 1] : NULL;

        if (!run || run->connection != m->peer || run->cookie != m->peer_cookie || run->end != m->sent) {
                run = &out->run[out->runs++];
                *run = (struct run){m->peer, m->peer_cookie, m->sent, m->sent};
        }
        run->end += size;
        out->bytes += size;
        *piece_at(out, out->last + 1 + out->parts++) = (struct piece){
            .at = (offset < SMALL_SIZE ? (const uint8_t *)m->out + RING_HEADER : m->out_bulk) + offset,
            .size = size,
        };
}

/* Encrypts the pieces of the batch into one. The processes may change their bytes meanwhile: each
 * is read once. */
static bool seal_payload(struct outgoing *out)
{
        uint8_t *sealed = reserve(out, out->bytes + RECORD_TAG), *to = sealed;
        bool works = seal_begin(&out->seal, NULL, 0);

        for (unsigned i = 0; i < out->parts; i++) {
                const struct piece *piece = piece_at(out, out->last + 1 + i);

                works = works && seal_update(&out->seal, piece->at, to, piece->size);
                to += piece->size;
        }
        count(COUNT_COPIED, out->bytes);
        out->parts = 1;
        *piece_at(out, out->last + 1) = (struct piece){.at = sealed, .size = out->bytes + RECORD_TAG};
        return works && seal_finish(&out->seal, to);
}

/* How many of the batch's bytes come with each block: those up to its `tail`. A connection may have
 * several blocks in a row, and one run. */
static void find_sizes(struct outgoing *out, const struct wire_message *message, uint32_t *sizes)
{
        struct run *run = out->run, *end = run + out->runs;

        for (unsigned i = 0; i < message->header.blocks && run < end; i++) {
                const struct wire_block *block = &message->blocks[i];

                if (block->connection != run->connection || block->cookie != run->cookie ||
                    block->flags & (WIRE_BROKEN | WIRE_DROPPED | WIRE_GONE))
                        continue;
                sizes[i] = (uint32_t)(block->tail - run->at);
                run->at = block->tail;
                if (run->at == run->end)
                        run++;
        }
}

/* The message and the sizes of its blocks' bytes, as one piece. */
static bool seal_message(struct outgoing *out, const void *message, uint32_t size)
{
        const struct wire_message *whole = message;
        uint8_t plain[sizeof(struct record)];
        uint32_t sizes[BLOCKS] = {0}, head, body;
        uint8_t *to;

        find_sizes(out, whole, sizes);
        memcpy(plain, message, size);
        memcpy(plain + size, sizes, whole->header.blocks * sizeof *sizes);
        body = size + whole->header.blocks * (uint32_t)sizeof *sizes;
        head = body | (out->encrypts && out->bytes ? RECORD_SEALED : 0);
        to = reserve(out, sizeof head + body + RECORD_TAG);
        memcpy(to, &head, sizeof head);
        *piece_at(out, out->last) =
            (struct piece){.at = to, .size = (uint32_t)sizeof head + body + RECORD_TAG};
        to += sizeof head;
        return seal_begin(&out->seal, &head, sizeof head) && seal_update(&out->seal, plain, to, body) &&
               seal_finish(&out->seal, to + body);
}

void tcp_send(struct link *link, unsigned lane, const void *message, uint32_t size, uint64_t number,
              UNUSED bool soon)
{
        struct outgoing *out = out_of(link, lane);

        if (!seal_message(out, message, size) || (out->encrypts && out->bytes && !seal_payload(out))) {
                link_down(link, EIO, "libcrypto cannot seal a record");
                return;
        }
        for (unsigned i = 0; i <= out->parts; i++)
                out->queued += piece_at(out, out->last + i)->size;
        out->last += out->parts + 1;
        piece_at(out, out->last - 1)->batch = number;
        out->runs = out->parts = 0;
        out->bytes = 0;
        if (!out->full)
                list_add(&dirty, &out->node);
}

/* --- sending --- */

/* The kernel has copied this many bytes more. Returns the last batch that is complete; 0: none. */
static uint64_t advance(struct outgoing *out, size_t sent)
{
        uint64_t batch = 0;

        out->queued -= sent;
        out->given += sent;
        while (sent) {
                struct piece *piece = piece_at(out, out->first);

                if (sent < piece->size) {
                        piece->at += sent;
                        piece->size -= (uint32_t)sent;
                        break;
                }
                sent -= piece->size;
                batch = piece->batch ? piece->batch : batch;
                out->first++;
        }
        if (out->first == out->last)
                out->end = 0;
        return batch;
}

static void push(struct tcp_socket *s)
{
        struct outgoing *out = &s->out;
        struct link *link = s->channel->link;
        struct iovec vecs[PIECES];
        struct msghdr header = {.msg_iov = vecs};
        uint64_t batch;
        ssize_t sent;

        for (uint64_t i = out->first; i != out->last; i++) {
                const struct piece *piece = piece_at(out, i);

                vecs[header.msg_iovlen++] = (struct iovec){(void *)(uintptr_t)piece->at, piece->size};
        }
        sent = tcp_sendmsg(s->watch.fd, &header);
        count(COUNT_CALLS, 1);
        count(COUNT_POSTS, 1);
        if (sent < 0 && errno == EINTR) {
                list_add(&dirty, &out->node);
                return;
        }
        if (sent < 0 && errno != EAGAIN) {
                char text[RELAY_TEXT];

                snprintf(text, sizeof text, "sending to the peer's relay: %s", strerror(errno));
                link_down(link, errno, text);
                return;
        }
        batch = sent > 0 ? advance(out, (size_t)sent) : 0;
        /* What is left goes with the event that the kernel takes more. */
        out->full = out->first != out->last;
        if (batch)
                link_completed(link, s->lane, batch);
}

bool tcp_flush(void)
{
        struct node round = LIST(round);

        /* A link that goes down takes its sockets from whatever list they are in. */
        list_take(&round, &dirty);
        if (!list_holds(&round))
                return false;
        while (list_holds(&round)) {
                struct node *node = round.after;

                list_remove(node);
                push(OF(node, struct tcp_socket, out.node));
        }
        return true;
}

bool tcp_is_flushed(void)
{
        return !list_holds(&dirty);
}
