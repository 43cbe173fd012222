#include "link.h"

#include "answers.h"
#include "mirror.h"
#include "mirror_end.h"
#include "mirror_receive.h"
#include "mirror_send.h"
#include "moves.h"

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
        /* ms in which a peer that owes an answer says nothing, and in which it doesn't confirm
         * WIRE_DROPPED whatever it says: bulk may be before that, and before the reply. */
        SILENCE = 10000,
        PATIENCE = 120000,
        /* in bytes, and for each block what it costs besides */
        BLOCK_COST = 1024,
        CREDIT = 64 * 1024, /* of a source, before the next one's turn */
        TURN = 1024 * 1024, /* of a lane in one turn of the relay */
        /* ms: between two looks at what is on the way; and without progress, after which a lane is
         * stalled: what was lost was sent a second time, in vain. */
        CHECK = 100,
        STALL = 300,
};

static struct node links = LIST(links);

struct link *link_find(uint32_t number)
{
        EACH(node, &links) {
                struct link *link = OF(node, struct link, all);

                if (link->number == number)
                        return link;
        }
        return NULL;
}

struct link *link_add(uint32_t number)
{
        struct link *link = relay_memory(sizeof *link, "memory for a link");

        link->number = number;
        usage_start(&link->usage, 0, number);
        list_init(&link->all);
        list_init(&link->mirrors);
        list_init(&link->sources);
        list_init(&link->dropping);
        list_init(&link->movers);
        list_init(&link->revoked);
        list_init(&link->farewells);
        list_init(&link->said);
        for (int i = 0; i < LANES; i++) {
                link->lanes[i].link = link;
                list_init(&link->lanes[i].round);
                list_init(&link->lanes[i].moving);
        }
        list_add(&links, &link->all);
        return link;
}

static void drop_replies(struct lane *lane)
{
        while (lane->replies) {
                struct reply *reply = lane->replies;

                lane->replies = reply->next;
                free(reply);
        }
        lane->reply_count = 0;
}

/* The one place where the state changes, with what that means for the link's connections. */
static void become(struct link *link, enum link_state state)
{
        bool was_live = link_is_live(link);

        link->state = state;
        if (was_live) {
                link->lost = true;
                for (int i = 0; i < LANES; i++) {
                        drop_replies(&link->lanes[i]);
                        link->lanes[i].completed = link->lanes[i].batch;
                }
                EACH(node, &link->mirrors)
                        mirror_suspend(OF(node, struct mirror, of_link));
        }
        if (!link_is_live(link))
                return;
        for (int i = 0; i < LANES; i++) {
                struct lane *lane = &link->lanes[i];

                lane->sent = lane->received = 0;
                lane->allowed = lane->granted = link->transport->window;
                lane->asks = lane->answers = lane->moves = false;
        }
        link->message_lane = 0;
        link->check_at = link->checked = link->progress_at = link->asked_at = 0;
        list_take(&link->farewells, &link->said);
        EACH(node, &link->mirrors)
                mirror_resume(OF(node, struct mirror, of_link));
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

        if (link->state == LINK_STREAM)
                return relay_refuse(text, EINVAL, "the link already goes over frames");
        EACH(node, &link->mirrors) {
                if (mirror_is_registered(OF(node, struct mirror, of_link), transport))
                        continue;
                return relay_refuse(
                    text, ENODEV, "connections of this link use a device that is gone, or another transport");
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

        if (link->state != LINK_MADE)
                return relay_refuse(text, EINVAL, "the link has no channel to connect");
        if (address->magic != WIRE_MAGIC || address->version != WIRE_VERSION ||
            address->transport != link->transport->kind)
                return relay_refuse(text, EPROTO, "the peer's relay has another version or transport");
        if (link->connecting)
                return relay_refuse(text, EALREADY, "the link is already being connected");
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

/* Has the peer send something. While nothing is on the way, nothing else says that its host is
 * gone. */
static void ask(struct link *link)
{
        link->lanes[link->message_lane].asks = true;
        if (!link->asked_at)
                link->asked_at = now();
}

void link_expire(struct link *link, enum relay_user user, uint32_t most)
{
        if (link->state == LINK_UP)
                ask(link);
        if (link_is_live(link))
                return;
        EACH(node, &link->mirrors)
                mirror_expire(OF(node, struct mirror, of_link), user, most);
}

static void forget_farewells(struct node *list)
{
        EACH(node, list)
                farewell_forget(OF(node, struct farewell, of_link));
}

void link_remove(struct link *link)
{
        destroy_channel(link);
        become(link, LINK_DOWN);
        EACH(node, &link->mirrors)
                mirror_drop(OF(node, struct mirror, of_link), true);
        forget_farewells(&link->farewells);
        forget_farewells(&link->said);
        list_remove(&link->all);
        usage_end(&link->usage);
        free(link);
}

void link_down(struct link *link, int error, const char *text)
{
        struct relay_outcome message = {.number = link->number, .error = error};

        if (link->state != LINK_UP && link->state != LINK_MADE)
                return;
        for (int i = 0; i < LANES && link->state == LINK_UP; i++)
                message.received += (uint32_t)link->lanes[i].received;
        destroy_channel(link);
        become(link, LINK_DOWN);
        count(COUNT_DOWNS, 1);
        snprintf(message.text, sizeof message.text, "%s", text);
        answer(&message, sizeof message, R_DOWN);
}

/* --- sending --- */

static unsigned index_of(const struct lane *lane)
{
        return (unsigned)(lane - lane->link->lanes);
}

/* A message is due even if it has no blocks: the peer has used half of what we have granted, one
 * of both waits for the other's grant, or messages use another lane. */
static bool owes_message(const struct lane *lane)
{
        uint32_t window = lane->link->transport->window;

        return lane->asks || lane->answers || lane->moves ||
               lane->received + window - lane->granted >= window / 2;
}

/* May a message be sent now? The last granted one only if it has no blocks. */
static bool may_send(const struct lane *lane, bool with_blocks)
{
        return lane->allowed - lane->sent > (with_blocks ? 1 : 0) &&
               lane->link->transport->has_room(lane->link, index_of(lane), 0);
}

static void add_replies(struct lane *lane, struct wire_message *message)
{
        while (lane->replies && message->header.blocks < BLOCKS) {
                struct reply *reply = lane->replies;

                message->blocks[message->header.blocks++] = (struct wire_block){
                    .connection = reply->number,
                    .cookie = reply->cookie,
                    .flags = WIRE_GONE,
                };
                lane->replies = reply->next;
                lane->reply_count--;
                free(reply);
        }
}

/* Has the lane a farewell to say? All are said on the lane of messages. */
static bool has_farewells(const struct lane *lane)
{
        return list_holds(&lane->link->farewells) && index_of(lane) == lane->link->message_lane;
}

static void add_farewells(struct lane *lane, struct wire_message *message)
{
        while (has_farewells(lane) && message->header.blocks < BLOCKS) {
                struct node *node = lane->link->farewells.after;

                message->blocks[message->header.blocks++] = OF(node, struct farewell, of_link)->block;
                list_remove(node);
                list_add(&lane->link->said, node);
        }
}

/* The part whose turn it is, with credit and a connection in its queue; NULL: there is none. */
static struct part *next_part(struct lane *lane)
{
        while (list_holds(&lane->round)) {
                struct part *part = OF(lane->round.after, struct part, turn);
                bool empty = !list_holds(&part->queue);

                if (!empty && part->credit > 0)
                        return part;
                part->credit = empty ? 0 : part->credit + CREDIT;
                list_remove(&part->turn);
                if (!empty)
                        list_add(&lane->round, &part->turn);
        }
        return NULL;
}

/* Has the peer received all that was sent about the connection? Then it may go over. */
static bool has_arrived(const struct lane *lane, const struct mirror *mirror)
{
        return lane->allowed - lane->link->transport->window >= mirror->last_message;
}

/* True: the connection belongs to another lane now, or waits to do so. */
static bool moves(struct lane *lane, struct mirror *mirror)
{
        unsigned wanted = mirror_wants_lane(mirror);

        if (wanted == index_of(lane))
                return false;
        if (has_arrived(lane, mirror)) {
                mirror_set_lane(mirror, wanted);
                mirror_enqueue(mirror);
        } else {
                list_add(&lane->moving, &mirror->queued);
                lane->asks = true;
        }
        return true;
}

/* The peer has received more. */
static void move_on(struct lane *lane)
{
        EACH(node, &lane->moving) {
                struct mirror *mirror = OF(node, struct mirror, queued);

                if (!has_arrived(lane, mirror))
                        continue;
                list_remove(node);
                if (!moves(lane, mirror))
                        mirror_enqueue(mirror);
        }
}

/* No connection uses this lane any more: all go over that may, and the others wait for that. */
static void vacate(struct lane *lane)
{
        while (list_holds(&lane->round)) {
                struct part *part = OF(lane->round.after, struct part, turn);

                list_remove(&part->turn);
                while (list_holds(&part->queue)) {
                        struct mirror *mirror = OF(part->queue.after, struct mirror, queued);

                        list_remove(&mirror->queued);
                        if (mirror_has_work(mirror))
                                moves(lane, mirror);
                }
        }
}

/* Returns what it has cost. */
static uint64_t add_blocks(struct lane *lane, struct wire_message *message)
{
        struct link *link = lane->link;
        unsigned writes = WRITES;
        uint64_t cost = 0;
        struct part *part;

        while (message->header.blocks < BLOCKS && link->transport->has_room(link, index_of(lane), writes) &&
               (part = next_part(lane))) {
                struct mirror *mirror = OF(part->queue.after, struct mirror, queued);
                uint64_t before = mirror->sent + mirror->moved, more;

                list_remove(&mirror->queued);
                if (!mirror_has_work(mirror) || moves(lane, mirror))
                        continue;
                mirror_send(mirror, &message->blocks[message->header.blocks++], lane->batch);
                mirror->last_message = lane->sent + 1;
                writes += WRITES;
                more = mirror->sent + mirror->moved - before + BLOCK_COST;
                part->credit -= (int64_t)more;
                cost += more;
                /* The rest waits until the process's other connections had their turn. */
                if (mirror_has_work(mirror) && !mirror_rests(mirror))
                        list_add(&part->queue, &mirror->queued);
        }
        return cost;
}

/* Returns what it has cost. */
static uint64_t send_batch(struct lane *lane)
{
        struct link *link = lane->link;
        struct wire_message message;
        /* Memory is released after a completion, by us or by the peer; a move ends after one. */
        bool soon = lane->replies || list_holds(&link->dropping) || relay.stop_at;
        uint64_t cost;

        message.header = (struct wire_header){.magic = WIRE_MAGIC};
        lane->batch++;
        add_replies(lane, &message);
        add_farewells(lane, &message);
        cost = add_blocks(lane, &message);
        message.header.flags = (lane->asks ? WIRE_ASKS : 0) | (lane->moves ? WIRE_MOVES : 0);
        message.header.granted = lane->granted = lane->received + link->transport->window;
        lane->asks = lane->answers = lane->moves = false;
        lane->sent++;
        count(COUNT_MESSAGES_OUT, 1);
        usage_add(&link->usage, USAGE_MESSAGES_OUT, 1);
        count(COUNT_BLOCKS_OUT, message.header.blocks);
        link->transport->send(
            link, index_of(lane), &message,
            (uint32_t)(sizeof message.header + message.header.blocks * sizeof *message.blocks), lane->batch,
            soon || list_holds(&link->movers));
        return cost;
}

static bool has_work(struct lane *lane)
{
        return next_part(lane) || lane->replies || has_farewells(lane);
}

static bool flush(struct lane *lane)
{
        struct link *link = lane->link;
        uint64_t cost = 0;
        bool any = false;

        /* Other lanes, and what has come meanwhile, wait no longer than this. */
        while (link_is_live(link) && cost < TURN) {
                if (!(has_work(lane) && may_send(lane, true) &&
                      link->transport->has_room(link, index_of(lane), WRITES)) &&
                    !(owes_message(lane) && may_send(lane, false)))
                        break;
                cost += send_batch(lane);
                any = true;
        }
        return any;
}

bool links_flush(void)
{
        bool any = false;

        EACH(node, &links) {
                struct link *link = OF(node, struct link, all);

                for (unsigned i = 0; link_is_live(link) && i < link->transport->message_lanes; i++)
                        if (i != link->message_lane)
                                vacate(&link->lanes[i]);
                for (unsigned i = 0; link_is_live(link) && i < link->transport->lanes; i++)
                        if (has_work(&link->lanes[i]) || owes_message(&link->lanes[i]))
                                any = flush(&link->lanes[i]) || any;
        }
        return any;
}

bool links_have_channels(const struct transport *transport)
{
        EACH(node, &links) {
                const struct link *link = OF(node, struct link, all);

                if (link->channel && link->transport == transport)
                        return true;
        }
        return false;
}

/* Has the peer's host all that was sent? */
static bool has_all(struct link *link)
{
        bool all = true;

        if (link->state == LINK_UP && link->transport->acknowledged)
                for (unsigned i = 0; i < link->transport->lanes && all; i++)
                        link->transport->acknowledged(link, i, &all);
        return all;
}

bool links_are_idle(void)
{
        EACH(node, &links) {
                struct link *link = OF(node, struct link, all);

                for (int i = 0; link_is_live(link) && i < LANES; i++)
                        if (link->lanes[i].completed != link->lanes[i].batch || has_work(&link->lanes[i]) ||
                            list_holds(&link->lanes[i].moving))
                                return false;
                if (!has_all(link))
                        return false;
        }
        return true;
}

/* Messages use another lane, if there is one on which nothing is stuck. */
static void use_free_lane(struct link *link)
{
        link->progress_at = 0;
        for (unsigned i = 0; i < link->transport->message_lanes; i++) {
                bool all = false;

                if (i != link->message_lane)
                        link->transport->acknowledged(link, i, &all);
                if (!all)
                        continue;
                link->message_lane = i;
                link->lanes[i].moves = true;
                return;
        }
}

/* Uses another lane for messages if theirs is stalled. Returns when to look again; 0: not before
 * something is sent. */
static uint64_t check_lane(struct link *link, uint64_t present)
{
        const struct lane *lane = &link->lanes[link->message_lane];
        uint64_t acknowledged;
        bool all = false;

        if (link->transport->message_lanes == 1 || (!link->check_at && lane->sent == link->checked))
                return 0;
        if (present < link->check_at)
                return link->check_at;
        if (link->check_at) {
                link->checked = lane->sent;
                acknowledged = link->transport->acknowledged(link, link->message_lane, &all);
                if (!link->progress_at || acknowledged != link->acknowledged) {
                        link->acknowledged = acknowledged;
                        link->progress_at = present;
                }
                if (present - link->progress_at >= STALL * UINT64_C(1000000))
                        use_free_lane(link);
        }
        if (all)
                link->progress_at = 0;
        link->check_at = all ? 0 : present + CHECK * UINT64_C(1000000);
        return link->check_at;
}

static void due_first(uint64_t *due, uint64_t when)
{
        if (when && (!*due || when < *due))
                *due = when;
}

/* When the peer has to have confirmed that it writes no more to what was taken from it then. */
static uint64_t reply_due(const struct link *link, uint64_t taken_at)
{
        uint64_t heard = link->heard_at > taken_at ? link->heard_at : taken_at;
        uint64_t due = heard + SILENCE * UINT64_C(1000000);
        uint64_t last = taken_at + PATIENCE * UINT64_C(1000000);

        return due < last ? due : last;
}

/* When the peer's relay has to have answered; 0: it owes nothing. */
static uint64_t answer_due(const struct link *link)
{
        uint64_t due = 0;

        if (link->asked_at)
                due = link->asked_at + SILENCE * UINT64_C(1000000);
        if (list_holds(&link->dropping))
                due_first(&due,
                          reply_due(link, OF(link->dropping.after, struct mirror, dropping)->dropped_at));
        if (list_holds(&link->revoked))
                due_first(&due, reply_due(link, moves_revoked_at(link)));
        return due;
}

uint64_t links_tick(uint64_t present)
{
        uint64_t due = 0;

        EACH(node, &links) {
                struct link *link = OF(node, struct link, all);
                uint64_t last;

                if (link->state != LINK_UP)
                        continue;
                due_first(&due, check_lane(link, present));
                last = answer_due(link);
                /* Not ETIMEDOUT: the path may work. */
                if (last && present >= last)
                        link_down(link, ECONNABORTED, "the peer's relay does not answer");
                else
                        due_first(&due, last);
        }
        return due;
}

/* --- receiving --- */

static void owe_reply(struct lane *lane, uint64_t number, uint64_t cookie)
{
        struct reply *reply;

        /* Without a reply the peer keeps the memory until the link goes down. */
        if (lane->reply_count >= RELAY_LINK_CONNECTIONS || !(reply = malloc(sizeof *reply)))
                return;
        *reply = (struct reply){.number = (uint32_t)number, .cookie = cookie, .next = lane->replies};
        lane->replies = reply;
        lane->reply_count++;
}

/* False: the header is invalid. */
static bool receive_header(struct lane *lane, const struct wire_message *message, size_t size)
{
        const struct wire_header *header = &message->header;
        uint32_t window = lane->link->transport->window;

        if (header->magic != WIRE_MAGIC || header->blocks > BLOCKS ||
            size != sizeof *header + header->blocks * sizeof *message->blocks ||
            header->granted - lane->allowed > window || header->granted - lane->sent > window)
                return false;
        lane->allowed = header->granted;
        lane->answers = lane->answers || header->flags & WIRE_ASKS;
        /* A lane is stalled in both directions: acknowledgements are lost too. */
        if (header->flags & WIRE_MOVES && index_of(lane) < lane->link->transport->message_lanes)
                lane->link->message_lane = index_of(lane);
        lane->received++;
        count(COUNT_MESSAGES_IN, 1);
        usage_add(&lane->link->usage, USAGE_MESSAGES_IN, 1);
        count(COUNT_BLOCKS_IN, header->blocks);
        return true;
}

void link_receive(struct link *link, unsigned index, const void *data, size_t size)
{
        struct lane *lane = &link->lanes[index];
        struct wire_message message;

        if (size < sizeof message.header || size > sizeof message) {
                link_down(link, EPROTO, "the peer sent a message of an invalid size");
                return;
        }
        memcpy(&message, data, size);
        if (!receive_header(lane, &message, size)) {
                link_down(link, EPROTO, "the peer sent a message that is invalid");
                return;
        }
        link->asked_at = 0;
        if (list_holds(&link->dropping) || list_holds(&link->revoked))
                link->heard_at = now();
        move_on(lane);
        for (int i = 0; i < message.header.blocks; i++) {
                const struct wire_block *block = &message.blocks[i];
                struct mirror *mirror = mirror_find(block->connection);

                if (mirror && mirror->link == link && mirror->cookie == block->cookie)
                        mirror_receive(mirror, block);
                else if (block->flags & WIRE_GONE)
                        mirror_confirm_farewell(link, block->connection, block->cookie);
                /* Whether we know the connection or not: nothing is written there from now on. */
                if (block->flags & WIRE_DROPPED)
                        owe_reply(lane, block->start, block->end);
        }
}

void link_completed(struct link *link, unsigned lane, uint64_t batch)
{
        link->lanes[lane].completed = batch;
        moves_completed(link);
        EACH(node, &link->dropping)
                mirror_try_release(OF(node, struct mirror, dropping));
}
