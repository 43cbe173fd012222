/* Everything in a record comes from another host. A record's head is checked before it is waited
 * for, its message is authenticated before it is read, and for every piece of its payload the
 * connection is looked up and its place is checked before a byte is written: a connection may go
 * while its bytes are half received. Bytes that have no place are read and thrown away.
 *
 * Payload that is sealed is decrypted into its place before its tag is checked. No process reads
 * there: the bytes count only when the message is handled, and a link whose tag is wrong goes down
 * before that.
 */
#include "tcp_receive.h"

#include "link.h"
#include "mirror.h"
#include "tcp_calls.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
        SHARE = 128 * 1024, /* bytes of one socket in one turn, after which others have theirs */
        VECS = 64,
        SINK = 64 * 1024,
        AHEAD = 2048, /* bytes that are read behind bulk: the next record's head, and little more */
        OF_BLOCK = sizeof(struct wire_block) + sizeof(uint32_t),
};

#define FORGED "a record of the peer's relay is not authentic"

/* Of a record: it has to wait for more bytes; it went on; the link is down. */
enum progress { WAITS, GOES_ON, DOWN };

/* What has no place goes here. */
static uint8_t sink[SINK];
static struct node ready = LIST(ready);

int tcp_receive_start(struct tcp_socket *s, bool wants_sealed)
{
        s->in.wants_sealed = wants_sealed;
        s->in.stage = malloc(STAGE);
        if (!s->in.stage)
                return ENOMEM;
        return seal_start(&s->in.seal, s->channel->key, s->lane, false) ? 0 : EIO;
}

void tcp_receive_end(struct tcp_socket *s)
{
        list_remove(&s->in.node);
        seal_end(&s->in.seal);
        free(s->in.stage);
}

void tcp_receive_ready(struct tcp_socket *s, bool ends)
{
        s->in.ends = s->in.ends || ends;
        list_add(&ready, &s->in.node);
}

/* --- where a block's bytes go --- */

static bool has_positions(const struct wire_block *block)
{
        return !(block->flags & (WIRE_BROKEN | WIRE_DROPPED | WIRE_GONE));
}

/* The connection that a block of this link is for. NULL: there is none, or it takes nothing. */
static struct mirror *mirror_of(const struct link *link, const struct wire_block *block)
{
        struct mirror *m = mirror_find(block->connection);

        if (!m || m->link != link || m->cookie != block->cookie || !m->registration || !m->shared ||
            (m->state != MIRROR_PAIRED && m->state != MIRROR_REGISTERED))
                return NULL;
        return m;
}

/* The block before this one in the record that is about the same connection. NULL: there is none.
 */
static const struct wire_block *prior(const struct incoming *in, unsigned block)
{
        const struct wire_block *blocks = in->record.message.blocks;

        for (unsigned i = block; i-- > 0;)
                if (blocks[i].connection == blocks[block].connection && has_positions(&blocks[i]))
                        return &blocks[i];
        return NULL;
}

/* May the block's bytes be written? They follow what has arrived, fit into what the process has
 * released, and have the ring's `base`, or a new one that is allowed (mirror_receive.c). */
static bool fits(const struct incoming *in, const struct mirror *m, unsigned block)
{
        const struct wire_block *b = &in->record.message.blocks[block], *before = prior(in, block);
        uint32_t size = in->record.sizes[block];
        uint64_t start = b->tail - size;

        if (m->in_ended || size > m->size || start - m->arrived > m->size || b->tail - m->reported > m->size)
                return false;
        if (before)
                return start == before->tail && b->base == before->base;
        return start == m->arrived &&
               (b->base == m->in_base || (b->base == m->arrived && m->reported == m->arrived));
}

/* Where byte `done` of the current block goes, and how many bytes behind it. */
static uint8_t *place(const struct tcp_socket *s, unsigned block, uint32_t done, size_t *run)
{
        const struct wire_block *b = &s->in.record.message.blocks[block];
        uint32_t size = s->in.record.sizes[block], left = size - done, offset;
        const struct mirror *m = mirror_of(s->channel->link, b);

        if (!m || !fits(&s->in, m, block)) {
                *run = left < SINK ? left : SINK;
                return sink;
        }
        offset = (uint32_t)(b->tail - left - b->base) & (m->size - 1);
        *run = (offset < SMALL_SIZE ? SMALL_SIZE : m->size) - offset;
        *run = *run < left ? *run : left;
        return (offset < SMALL_SIZE ? (uint8_t *)m->in + RING_HEADER : m->in_bulk) + offset;
}

/* Goes on behind `size` bytes of the payload. */
static void advance(struct incoming *in, size_t size)
{
        in->left -= (uint32_t)size;
        while (in->block < in->blocks) {
                uint32_t left = in->record.sizes[in->block] - in->done;

                if (size < left) {
                        in->done += (uint32_t)size;
                        return;
                }
                size -= left;
                in->done = 0;
                in->block++;
        }
}

/* --- records --- */

static enum progress refuse(struct tcp_socket *s, int error, const char *text)
{
        link_down(s->channel->link, error, text);
        return DOWN;
}

/* A connection is corrupt if a block of it brings bytes that have no place, or reports bytes that
 * it does not bring. */
static void check_blocks(const struct tcp_socket *s)
{
        const struct incoming *in = &s->in;

        for (unsigned i = 0; i < in->blocks; i++) {
                const struct wire_block *b = &in->record.message.blocks[i], *before = prior(in, i);
                struct mirror *m = mirror_of(s->channel->link, b);

                if (!m || !has_positions(b))
                        continue;
                if (in->record.sizes[i] ? !fits(in, m, i)
                                        : (int64_t)(b->tail - (before ? before->tail : m->arrived)) > 0)
                        mirror_corrupt(m);
        }
}

/* Reads a message that is authenticated. False: it is invalid. */
static bool read_record(struct incoming *in, const uint8_t *plain, uint32_t size, bool sealed)
{
        uint32_t message = (uint32_t)sizeof(struct wire_header);

        in->blocks = (size - message) / OF_BLOCK;
        message += in->blocks * (uint32_t)sizeof(struct wire_block);
        memcpy(&in->record.message, plain, message);
        memcpy(in->record.sizes, plain + message, in->blocks * sizeof *in->record.sizes);
        in->left = in->block = in->done = 0;
        for (unsigned i = 0; i < in->blocks; i++) {
                if (in->record.sizes[i] > TCP_BATCH - in->left ||
                    (in->record.sizes[i] && !has_positions(&in->record.message.blocks[i])))
                        return false;
                in->left += in->record.sizes[i];
        }
        in->sealed = sealed;
        in->in_payload = in->left;
        in->large = in->left >= STAGE / 4;
        return !in->left || sealed || !in->wants_sealed;
}

/* The record is complete. False: the link is down. */
static bool deliver(struct tcp_socket *s)
{
        struct incoming *in = &s->in;
        struct tcp_channel *channel = s->channel;
        struct link *link = channel->link;

        in->in_payload = false;
        link_receive(link, s->lane, &in->record.message,
                     sizeof(struct wire_header) + in->blocks * sizeof(struct wire_block));
        return link->channel == channel;
}

/* Takes a head and a message from what is staged. */
static enum progress take_message(struct tcp_socket *s)
{
        struct incoming *in = &s->in;
        uint8_t plain[sizeof(struct record)];
        const uint8_t *from = in->stage + in->begin;
        uint32_t head, size;

        if (in->end - in->begin < sizeof head)
                return WAITS;
        memcpy(&head, from, sizeof head);
        size = head & ~RECORD_SEALED;
        if (size < sizeof(struct wire_header) || size > sizeof plain ||
            (size - sizeof(struct wire_header)) % OF_BLOCK)
                return refuse(s, EPROTO, "the peer sent a record of an invalid size");
        if (in->end - in->begin < sizeof head + size + RECORD_TAG)
                return WAITS;
        from += sizeof head;
        if (!seal_begin(&in->seal, &head, sizeof head) || !seal_update(&in->seal, from, plain, size) ||
            !seal_check(&in->seal, from + size))
                return refuse(s, EBADMSG, FORGED);
        in->begin += sizeof head + size + RECORD_TAG;
        if (!read_record(in, plain, size, head & RECORD_SEALED))
                return refuse(s, EPROTO, "the peer sent a record that is invalid");
        check_blocks(s);
        if (in->in_payload && in->sealed && !seal_begin(&in->seal, NULL, 0))
                return refuse(s, EIO, "libcrypto cannot open a record");
        return in->in_payload || deliver(s) ? GOES_ON : DOWN;
}

/* Takes payload from what is staged. */
static enum progress take_payload(struct tcp_socket *s)
{
        struct incoming *in = &s->in;

        while (in->left && in->begin < in->end) {
                size_t run, staged = in->end - in->begin;
                uint8_t *to = place(s, in->block, in->done, &run);

                run = run < staged ? run : staged;
                if (!in->sealed)
                        memcpy(to, in->stage + in->begin, run);
                else if (!seal_update(&in->seal, in->stage + in->begin, to, run))
                        return refuse(s, EIO, "libcrypto cannot open a record");
                count(COUNT_COPIED, run);
                in->begin += run;
                advance(in, run);
        }
        if (in->left || (in->sealed && in->end - in->begin < RECORD_TAG))
                return WAITS;
        if (in->sealed && !seal_check(&in->seal, in->stage + in->begin))
                return refuse(s, EBADMSG, FORGED);
        in->begin += in->sealed ? RECORD_TAG : 0;
        return deliver(s) ? GOES_ON : DOWN;
}

/* --- reading --- */

/* What is staged and not complete moves to the front. */
static bool take_staged(struct tcp_socket *s)
{
        struct incoming *in = &s->in;
        enum progress progress;

        do
                progress = in->in_payload ? take_payload(s) : take_message(s);
        while (progress == GOES_ON);
        if (progress == DOWN)
                return false;
        memmove(in->stage, in->stage + in->begin, in->end - in->begin);
        in->end -= in->begin;
        in->begin = 0;
        return true;
}

/* Where the next bytes go: payload that is not sealed into its place, all else to the stage.
 * Returns how many bytes of payload that is. */
static size_t aim(struct tcp_socket *s, struct iovec *vecs, size_t *count_of, size_t *all)
{
        struct incoming *in = &s->in;
        size_t payload = 0, room = STAGE - in->end, n = 0;

        if (in->in_payload && !in->sealed)
                for (unsigned block = in->block; block < in->blocks; block++)
                        for (uint32_t done = block == in->block ? in->done : 0;
                             done < in->record.sizes[block] && n < VECS - 1;) {
                                size_t run;

                                vecs[n].iov_base = place(s, block, done, &run);
                                vecs[n++].iov_len = run;
                                payload += run;
                                done += (uint32_t)run;
                        }
        if (in->large && !in->sealed && room > AHEAD)
                room = AHEAD;
        /* The stage follows the whole payload, or there is none. */
        if (payload == (in->in_payload && !in->sealed ? in->left : 0))
                vecs[n++] = (struct iovec){in->stage + in->end, room};
        else
                room = 0;
        *count_of = n;
        *all = payload + room;
        return payload;
}

/* One read, of `bytes`. False: there is no more for now, or the link is down. */
static bool receive(struct tcp_socket *s, size_t *bytes)
{
        struct incoming *in = &s->in;
        struct iovec vecs[VECS];
        struct msghdr header = {.msg_iov = vecs};
        size_t all, payload = aim(s, vecs, &header.msg_iovlen, &all), direct;
        ssize_t got = tcp_recvmsg(s->watch.fd, &header);

        count(COUNT_CALLS, 1);
        count(COUNT_POLLS, 1);
        if (got < 0 && errno == EINTR)
                return true;
        if (got < 0 && errno == EAGAIN) {
                list_remove(&in->node);
                return false;
        }
        if (got <= 0) {
                char text[RELAY_TEXT];

                snprintf(text, sizeof text, "the connection to the peer's relay is gone: %s",
                         got ? strerror(errno) : "it was closed");
                refuse(s, got ? errno : ECONNRESET, text);
                return false;
        }
        *bytes += (size_t)got;
        direct = (size_t)got < payload ? (size_t)got : payload;
        advance(in, direct);
        in->end += (size_t)got - direct;
        /* The kernel had no more; an end or an error is still to be read. */
        if ((size_t)got < all && !in->ends)
                list_remove(&in->node);
        return take_staged(s) && list_holds(&in->node);
}

bool tcp_poll(void)
{
        struct node round = LIST(round);
        bool any = list_holds(&ready);

        /* A link that goes down takes its sockets from whatever list they are in. */
        list_take(&round, &ready);
        while (list_holds(&round)) {
                struct tcp_socket *s = OF(round.after, struct tcp_socket, in.node);

                list_remove(&s->in.node);
                list_add(&ready, &s->in.node);
                for (size_t bytes = 0; bytes < SHARE && receive(s, &bytes);)
                        ;
        }
        return any;
}

bool tcp_is_read(void)
{
        return !list_holds(&ready);
}
