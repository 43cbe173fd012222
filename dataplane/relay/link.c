#include "link.h"

#include "answers.h"
#include "mirror.h"
#include "mirror_receive.h"
#include "mirror_send.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The peer has dropped this connection. We owe it WIRE_GONE: that we write there no more. */
struct reply {
        uint32_t number;
        uint64_t cookie;
        struct reply *next;
};

enum {
        REPLIES = 4096,
        SILENCE = 10000, /* ms: a peer that lives answers WIRE_DROPPED sooner */
};

static struct node links = LIST(links);

struct link *link_find(uint32_t number)
{
        EACH(node, &links)
        {
                struct link *link = OF(node, struct link, all);

                if (link->number == number)
                        return link;
        }
        return NULL;
}

struct link *link_add(uint32_t number)
{
        struct link *link = calloc(1, sizeof *link);

        if (!link)
                relay_die("memory for a link", ENOMEM);
        link->number = number;
        list_init(&link->all);
        list_init(&link->mirrors);
        list_init(&link->queue);
        list_init(&link->dropping);
        list_add(&links, &link->all);
        return link;
}

static void drop_replies(struct link *link)
{
        while (link->replies) {
                struct reply *reply = link->replies;

                link->replies = reply->next;
                free(reply);
        }
        link->reply_count = 0;
}

/* The one place where the state changes, with what that means for the link's connections. */
static void become(struct link *link, enum link_state state)
{
        bool was_live = link_is_live(link);

        link->state = state;
        if (was_live) {
                link->lost = true;
                drop_replies(link);
                link->completed = link->batch;
                EACH(node, &link->mirrors)
                {
                        mirror_suspend(OF(node, struct mirror, of_link));
                }
        }
        if (!link_is_live(link))
                return;
        link->sent = link->received = 0;
        link->allowed = link->granted = link->transport->window;
        EACH(node, &link->mirrors)
        {
                mirror_resume(OF(node, struct mirror, of_link));
        }
}

static void destroy_channel(struct link *link)
{
        if (link->connecting)
                link_connected(link, ECANCELED, "the link was replaced before it was connected");
        if (link->channel)
                link->transport->destroy_channel(link);
        link->channel = NULL;
}

int link_prepare(struct link *link, const struct transport *transport, struct wire_address *address,
                 char *text)
{
        int error;

        if (link->state == LINK_STREAM) {
                snprintf(text, RELAY_TEXT, "the link already goes over frames");
                return EINVAL;
        }
        EACH(node, &link->mirrors)
        {
                if (mirror_is_registered(OF(node, struct mirror, of_link), transport))
                        continue;
                snprintf(text, RELAY_TEXT,
                         "connections of this link use a device that is gone, or another transport");
                return ENODEV;
        }
        destroy_channel(link);
        become(link, LINK_NEW);
        link->named = link->transport = transport;
        *address = (struct wire_address){
            .magic = WIRE_MAGIC,
            .version = WIRE_VERSION,
            .transport = (uint16_t)link->transport->kind,
        };
        error = link->transport->create_channel(link, address, text);
        if (!error)
                become(link, LINK_MADE);
        else
                destroy_channel(link);
        return error;
}

bool link_add_socket(struct link *link, uint32_t index, int socket)
{
        if (!link || link->state != LINK_MADE || !link->transport->add_socket)
                return false;
        link->transport->add_socket(link, index, socket);
        return true;
}

int link_connect(struct link *link, const struct wire_address *address, char *text)
{
        int error;

        if (link->state != LINK_MADE) {
                snprintf(text, RELAY_TEXT, "the link has no channel to connect");
                return EINVAL;
        }
        if (address->magic != WIRE_MAGIC || address->version != WIRE_VERSION ||
            address->transport != link->transport->kind) {
                snprintf(text, RELAY_TEXT, "the peer's relay has another version or transport");
                return EPROTO;
        }
        if (link->connecting) {
                snprintf(text, RELAY_TEXT, "the link is already being connected");
                return EALREADY;
        }
        error = link->transport->connect_channel(link, address, text);
        link->connecting = error == EINPROGRESS;
        if (!error)
                become(link, LINK_UP);
        return error;
}

void link_connected(struct link *link, int error, const char *text)
{
        link->connecting = false;
        if (!error)
                become(link, LINK_UP);
        answer_outcome(R_CONNECTED, link->number, error, text);
}

void link_use_stream(struct link *link, const struct transport *stream)
{
        if (link->state == LINK_STREAM)
                return;
        destroy_channel(link);
        become(link, LINK_DOWN);
        link->transport = stream;
        become(link, LINK_STREAM);
}

void link_remove(struct link *link)
{
        destroy_channel(link);
        become(link, LINK_DOWN);
        EACH(node, &link->mirrors)
        {
                mirror_drop(OF(node, struct mirror, of_link), true);
        }
        list_remove(&link->all);
        free(link);
}

void link_down(struct link *link, int error, const char *text)
{
        if (link->state != LINK_UP && link->state != LINK_MADE)
                return;
        destroy_channel(link);
        become(link, LINK_DOWN);
        count(COUNT_DOWNS, 1);
        answer_outcome(R_DOWN, link->number, error, text);
}

/* --- sending --- */

/* The peer has used half of what we have granted: a message is due even if it only grants. */
static bool owes_grant(const struct link *link)
{
        return link->received + link->transport->window - link->granted >= link->transport->window / 2;
}

/* May a message be sent now? The last granted one only if it has no blocks. */
static bool may_send(struct link *link, bool with_blocks)
{
        return link->allowed - link->sent > (with_blocks ? 1 : 0) && link->transport->has_room(link, 0);
}

static void add_replies(struct link *link, struct wire_message *message)
{
        while (link->replies && message->header.blocks < BLOCKS) {
                struct reply *reply = link->replies;

                message->blocks[message->header.blocks++] = (struct wire_block){
                    .connection = reply->number,
                    .cookie = reply->cookie,
                    .flags = WIRE_GONE,
                };
                link->replies = reply->next;
                link->reply_count--;
                free(reply);
        }
}

static void send_batch(struct link *link)
{
        struct wire_message message;
        /* Memory is released after a completion, by us or by the peer. */
        bool soon = link->replies || list_holds(&link->dropping) || relay.stop_at;

        message.header = (struct wire_header){.magic = WIRE_MAGIC};
        link->batch++;
        add_replies(link, &message);
        for (unsigned writes = WRITES; list_holds(&link->queue) && message.header.blocks < BLOCKS &&
                                       link->transport->has_room(link, writes);
             writes += WRITES) {
                struct mirror *mirror = OF(link->queue.after, struct mirror, queued);

                list_remove(&mirror->queued);
                if (!mirror_has_work(mirror))
                        continue;
                mirror_send(mirror, &message.blocks[message.header.blocks++], link->batch);
                /* The rest waits until the others had their turn. */
                if (mirror_has_work(mirror))
                        list_add(&link->queue, &mirror->queued);
        }
        message.header.granted = link->granted = link->received + link->transport->window;
        link->sent++;
        count(COUNT_MESSAGES_OUT, 1);
        count(COUNT_BLOCKS_OUT, message.header.blocks);
        link->transport->send(
            link, &message,
            (uint32_t)(sizeof message.header + message.header.blocks * sizeof *message.blocks), link->batch,
            soon);
}

static bool flush(struct link *link)
{
        bool any = false;

        while (link_is_live(link)) {
                bool work = list_holds(&link->queue) || link->replies;

                if (!(work && may_send(link, true) && link->transport->has_room(link, WRITES)) &&
                    !(owes_grant(link) && may_send(link, false)))
                        break;
                send_batch(link);
                any = true;
        }
        return any;
}

bool links_flush(void)
{
        bool any = false;

        EACH(node, &links)
        {
                struct link *link = OF(node, struct link, all);

                if (list_holds(&link->queue) || link->replies || owes_grant(link))
                        any = flush(link) || any;
        }
        return any;
}

bool links_have_channels(const struct transport *transport)
{
        EACH(node, &links)
        {
                const struct link *link = OF(node, struct link, all);

                if (link->channel && link->transport == transport)
                        return true;
        }
        return false;
}

bool links_are_idle(void)
{
        EACH(node, &links)
        {
                struct link *link = OF(node, struct link, all);

                if (link_is_live(link) &&
                    (link->completed != link->batch || list_holds(&link->queue) || link->replies))
                        return false;
        }
        return true;
}

uint64_t links_tick(uint64_t present)
{
        uint64_t due = 0;

        EACH(node, &links)
        {
                struct link *link = OF(node, struct link, all);
                uint64_t last;

                if (link->state != LINK_UP || !list_holds(&link->dropping))
                        continue;
                last = OF(link->dropping.after, struct mirror, dropping)->dropped_at +
                       SILENCE * UINT64_C(1000000);
                if (present >= last)
                        link_down(link, ETIMEDOUT, "the peer's relay does not answer");
                else if (!due || last < due)
                        due = last;
        }
        return due;
}

/* --- receiving --- */

static void owe_reply(struct link *link, uint64_t number, uint64_t cookie)
{
        struct reply *reply;

        /* Without a reply the peer keeps the memory until the link goes down. */
        if (link->reply_count >= REPLIES || !(reply = malloc(sizeof *reply)))
                return;
        *reply = (struct reply){.number = (uint32_t)number, .cookie = cookie, .next = link->replies};
        link->replies = reply;
        link->reply_count++;
}

void link_receive(struct link *link, const void *data, size_t size)
{
        struct wire_message message;

        if (size < sizeof message.header || size > sizeof message) {
                link_down(link, EPROTO, "the peer sent a message of an invalid size");
                return;
        }
        memcpy(&message, data, size);
        if (message.header.magic != WIRE_MAGIC || message.header.blocks > BLOCKS ||
            size != sizeof message.header + message.header.blocks * sizeof *message.blocks ||
            message.header.granted - link->allowed > link->transport->window) {
                link_down(link, EPROTO, "the peer sent a message that is invalid");
                return;
        }
        link->allowed = message.header.granted;
        link->received++;
        count(COUNT_MESSAGES_IN, 1);
        count(COUNT_BLOCKS_IN, message.header.blocks);
        for (int i = 0; i < message.header.blocks; i++) {
                const struct wire_block *block = &message.blocks[i];
                struct mirror *mirror = mirror_find(block->connection);

                if (mirror && mirror->link == link && mirror->cookie == block->cookie)
                        mirror_receive(mirror, block);
                /* Whether we know the connection or not: nothing is written there from now on. */
                if (block->flags & WIRE_DROPPED)
                        owe_reply(link, block->start, block->end);
        }
}

void link_completed(struct link *link, uint64_t batch)
{
        link->completed = batch;
        EACH(node, &link->dropping)
        {
                mirror_try_release(OF(node, struct mirror, dropping));
        }
}
