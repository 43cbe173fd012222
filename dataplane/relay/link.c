#include "link.h"

#include "control.h"
#include "mirror.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A connection that the peer has dropped; it waits to hear that nothing is written there any more. */
struct orphan {
        uint32_t number;
        uint64_t cookie;
        struct orphan *next;
};

enum {
        ORPHANS = 4096,
        SILENCE = 10000, /* ms in which a peer that lives has said that it writes no more */
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

struct link *link_make(uint32_t number)
{
        struct link *link = calloc(1, sizeof *link);

        if (!link)
                relay_die("memory for a link", ENOMEM);
        link->number = number;
        list_init(&link->all);
        list_init(&link->mirrors);
        list_init(&link->ready);
        list_init(&link->ending);
        list_add(&links, &link->all);
        return link;
}

bool link_is_live(const struct link *link)
{
        return link->state == LINK_UP || link->state == LINK_STREAM;
}

static void forget_orphans(struct link *link)
{
        while (link->orphans) {
                struct orphan *orphan = link->orphans;

                link->orphans = orphan->next;
                free(orphan);
        }
        link->orphan_count = 0;
}

/* The one place where a state changes, with what it means for the connections. */
static void become(struct link *link, enum link_state state)
{
        bool was_live = link_is_live(link);

        link->state = state;
        if (was_live) {
                link->lost = true;
                forget_orphans(link);
                link->completed = link->batch;
                EACH(node, &link->mirrors)
                {
                        mirror_suspend(OF(node, struct mirror, of_link));
                }
        }
        if (!link_is_live(link))
                return;
        link->sent = link->arrived = 0;
        link->granted = link->told = link->transport->window;
        EACH(node, &link->mirrors)
        {
                mirror_resume(OF(node, struct mirror, of_link));
        }
}

static void unmake(struct link *link)
{
        if (link->connecting)
                link_connected(link, ECANCELED, "the link was given up before it was connected");
        if (link->end)
                link->transport->unmake(link);
        link->end = NULL;
}

int link_offer(struct link *link, struct wire_address *address, char *text)
{
        int error;

        if (link->state == LINK_STREAM) {
                snprintf(text, RELAY_TEXT, "the link goes over frames already");
                return EINVAL;
        }
        EACH(node, &link->mirrors)
        {
                if (mirror_is_lent(OF(node, struct mirror, of_link)))
                        continue;
                snprintf(text, RELAY_TEXT,
                         "connections of this link were a device's that is gone: go on over frames");
                return ENODEV;
        }
        unmake(link);
        become(link, LINK_NEW);
        link->transport = relay.transport;
        *address = (struct wire_address){
            .magic = WIRE_MAGIC,
            .version = WIRE_VERSION,
            .transport = (uint16_t)link->transport->kind,
        };
        error = link->transport->make(link, address, text);
        if (!error)
                become(link, LINK_MADE);
        else
                unmake(link);
        return error;
}

int link_connect(struct link *link, const struct wire_address *address, char *text)
{
        int error;

        if (link->state != LINK_MADE) {
                snprintf(text, RELAY_TEXT, "the link has no end that could be connected");
                return EINVAL;
        }
        if (address->magic != WIRE_MAGIC || address->version != WIRE_VERSION ||
            address->transport != link->transport->kind) {
                snprintf(text, RELAY_TEXT, "the peer's relay speaks another version or transport");
                return EPROTO;
        }
        if (link->connecting) {
                snprintf(text, RELAY_TEXT, "the link is being connected");
                return EALREADY;
        }
        error = link->transport->connect(link, address, text);
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
        control_outcome(R_CONNECTED, link->number, error, text);
}

void link_stream(struct link *link)
{
        if (link->state == LINK_STREAM)
                return;
        unmake(link);
        become(link, LINK_DOWN);
        link->transport = &stream_transport;
        become(link, LINK_STREAM);
}

void link_remove(struct link *link)
{
        unmake(link);
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
        unmake(link);
        become(link, LINK_DOWN);
        count(COUNT_DOWNS, 1);
        control_outcome(R_DOWN, link->number, error, text);
}

bool link_ready(struct link *link, struct mirror *mirror)
{
        if (!link_is_live(link))
                return false;
        list_add(&link->ready, &mirror->ready);
        return true;
}

/* --- out --- */

static bool owes_credit(const struct link *link)
{
        return link->arrived + link->transport->window - link->told >= link->transport->window / 2;
}

/* May a message go now? With news, the last one that is granted is left. */
static bool may_send(struct link *link, bool news)
{
        return link->granted - link->sent > (news ? 1 : 0) && link->transport->room(link, 0);
}

static void take_orphans(struct link *link, struct wire_message *message)
{
        while (link->orphans && message->header.blocks < BLOCKS) {
                struct orphan *orphan = link->orphans;

                message->blocks[message->header.blocks++] = (struct wire_block){
                    .connection = orphan->number,
                    .cookie = orphan->cookie,
                    .flags = WIRE_GONE,
                };
                link->orphans = orphan->next;
                link->orphan_count--;
                free(orphan);
        }
}

static void send_batch(struct link *link)
{
        struct wire_message message;
        /* Whoever lets memory go waits for completions, now or later. */
        bool soon = link->orphans || list_holds(&link->ending) || relay.stop_at;

        message.header = (struct wire_header){.magic = WIRE_MAGIC};
        link->batch++;
        take_orphans(link, &message);
        for (unsigned writes = WRITES; list_holds(&link->ready) && message.header.blocks < BLOCKS &&
                                       link->transport->room(link, writes);
             writes += WRITES) {
                struct mirror *mirror = OF(link->ready.after, struct mirror, ready);

                list_remove(&mirror->ready);
                if (!mirror_wants(mirror))
                        continue;
                mirror_say(mirror, &message.blocks[message.header.blocks++], link->batch);
                /* What is left comes after the others' turn. */
                if (mirror_wants(mirror))
                        list_add(&link->ready, &mirror->ready);
        }
        message.header.granted = link->told = link->arrived + link->transport->window;
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
                bool news = list_holds(&link->ready) || link->orphans;

                /* Not more than there is room for, nor with the last grant, but to grant the peer more. */
                if (!(news && may_send(link, true) && link->transport->room(link, WRITES)) &&
                    !(owes_credit(link) && may_send(link, false)))
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

                if (list_holds(&link->ready) || link->orphans || owes_credit(link))
                        any = flush(link) || any;
        }
        return any;
}

bool links_have_ends(void)
{
        EACH(node, &links)
        {
                if (OF(node, struct link, all)->end)
                        return true;
        }
        return false;
}

bool links_quiet(void)
{
        EACH(node, &links)
        {
                struct link *link = OF(node, struct link, all);

                if (link_is_live(link) &&
                    (link->completed != link->batch || list_holds(&link->ready) || link->orphans))
                        return false;
        }
        return true;
}

uint64_t links_beat(uint64_t present)
{
        uint64_t due = 0;

        EACH(node, &links)
        {
                struct link *link = OF(node, struct link, all);
                uint64_t last;

                if (link->state != LINK_UP || !list_holds(&link->ending))
                        continue;
                last =
                    OF(link->ending.after, struct mirror, ending)->dropped_at + SILENCE * UINT64_C(1000000);
                if (present >= last)
                        link_down(link, ETIMEDOUT, "the peer's relay doesn't answer");
                else if (!due || last < due)
                        due = last;
        }
        return due;
}

/* --- in --- */

static void remember_orphan(struct link *link, uint64_t number, uint64_t cookie)
{
        struct orphan *orphan;

        /* Its relay waits then until the link goes. */
        if (link->orphan_count >= ORPHANS || !(orphan = malloc(sizeof *orphan)))
                return;
        *orphan = (struct orphan){.number = (uint32_t)number, .cookie = cookie, .next = link->orphans};
        link->orphans = orphan;
        link->orphan_count++;
}

void link_message(struct link *link, const void *data, size_t size)
{
        struct wire_message message;

        if (size < sizeof message.header || size > sizeof message) {
                link_down(link, EPROTO, "the peer sent a message of an impossible size");
                return;
        }
        memcpy(&message, data, size);
        if (message.header.magic != WIRE_MAGIC || message.header.blocks > BLOCKS ||
            size != sizeof message.header + message.header.blocks * sizeof *message.blocks ||
            message.header.granted - link->granted > link->transport->window) {
                link_down(link, EPROTO, "the peer sent a message that isn't one");
                return;
        }
        link->granted = message.header.granted;
        link->arrived++;
        count(COUNT_MESSAGES_IN, 1);
        count(COUNT_BLOCKS_IN, message.header.blocks);
        for (int i = 0; i < message.header.blocks; i++) {
                const struct wire_block *block = &message.blocks[i];
                struct mirror *mirror = mirror_find(block->connection);

                if (mirror && mirror->link == link && mirror->cookie == block->cookie)
                        mirror_heard(mirror, block);
                /* Known or not: nothing is written there from now on. */
                if (block->flags & WIRE_DROPPED)
                        remember_orphan(link, block->start, block->end);
        }
}

void link_completed(struct link *link, uint64_t batch)
{
        link->completed = batch;
        EACH(node, &link->ending)
        {
                mirror_completed(OF(node, struct mirror, ending));
        }
}
