/* The transport `verbs`: RDMA on any device that libibverbs supports.
 *
 * A batch is a chain of unsignalled RDMA WRITEs and the SEND of its message, posted with one
 * doorbell. A SEND is signalled when a quarter of the send queue or of the message buffers has been
 * used since the last completion, or when its completion is waited for; so the queue never fills up
 * unnoticed. An error completes even an unsignalled request.
 *
 * This file posts and completes. verbs_device has the device, verbs_pair the queue pairs of links,
 * verbs_memory the registered memory of connections.
 */
#include "transports.h"
#include "verbs_memory.h"
#include "verbs_pair.h"

#include <errno.h>
#include <string.h>

enum {
        PIECE = 64 * 1024,
        POLLED = 32,
        ROUNDS = 4,
};

static int verbs_open(const struct relay_open *open, uint32_t *mtu, char *text)
{
        int error = verbs_load(text) ? verbs_start_jobs(text) : ENOSYS;

        return error ? error : verbs_open_device(open, mtu, text);
}

static bool verbs_has_room(struct link *link, UNUSED unsigned lane, unsigned writes)
{
        const struct verbs_channel *channel = link->channel;

        return channel->posted - channel->done + channel->count + writes + 1 <= QUEUE &&
               channel->sent - channel->sent_done < MESSAGES;
}

/* Adds a work request to the batch. */
static struct ibv_send_wr *add_request(struct verbs_channel *channel, uintptr_t from, uint32_t size,
                                       uint32_t key)
{
        struct ibv_send_wr *request = &channel->requests[channel->count];
        struct ibv_sge *piece = &channel->pieces[channel->count];

        if (channel->count)
                channel->requests[channel->count - 1].next = request;
        channel->count++;
        *piece = (struct ibv_sge){.addr = from, .length = size, .lkey = key};
        *request = (struct ibv_send_wr){
            .wr_id = (uint64_t)channel->number << ID_SHIFT,
            .sg_list = piece,
            .num_sge = 1,
            .send_flags = size <= channel->inline_most ? IBV_SEND_INLINE : 0,
        };
        return request;
}

static void verbs_write(struct link *link, struct mirror *m, uint32_t offset, uint32_t size)
{
        const struct target *target = m->target;
        const struct registration *registration = m->registration;
        bool small = offset < SMALL_SIZE;
        uintptr_t from = (small ? (uintptr_t)m->out + RING_HEADER : (uintptr_t)m->out_bulk) + offset;
        struct ibv_send_wr *request = add_request(
            link->channel, from, size, small ? registration->small->lkey : registration->bulk->lkey);

        request->opcode = IBV_WR_RDMA_WRITE;
        request->wr.rdma.remote_addr = (small ? target->small : target->bulk) + offset;
        request->wr.rdma.rkey = small ? target->small_key : target->bulk_key;
}

static void verbs_move(struct link *link, const struct lent_file *from, uint64_t from_offset, void *to,
                       uint64_t to_offset, uint32_t size)
{
        const struct file_registration *registration = from->registration;
        const struct reached_file *reached = to;
        struct ibv_send_wr *request =
            add_request(link->channel, (uintptr_t)from->base + from_offset, size, registration->region->lkey);

        request->opcode = IBV_WR_RDMA_WRITE;
        request->wr.rdma.remote_addr = reached->address + to_offset;
        request->wr.rdma.rkey = reached->key;
}

static void verbs_send(struct link *link, UNUSED unsigned lane, const void *message, uint32_t size,
                       uint64_t number, bool soon)
{
        struct verbs_channel *channel = link->channel;
        struct wire_message *place = verbs_buffer(channel, WINDOW + channel->sent % MESSAGES);
        struct ibv_send_wr *request, *bad;
        int error;

        memcpy(place, message, size);
        request = add_request(channel, (uintptr_t)place, size, channel->region->lkey);
        request->opcode = IBV_WR_SEND;
        request->wr_id |= number & ID_MASK;
        channel->posted += channel->count;
        channel->sent++;
        channel->marks[number % QUEUE].posted = channel->posted;
        channel->marks[number % QUEUE].sent = channel->sent;
        if (soon || channel->posted - channel->signalled_posted >= QUEUE / 4 ||
            channel->sent - channel->signalled_sent >= MESSAGES / 4) {
                request->send_flags |= IBV_SEND_SIGNALED;
                channel->signalled_posted = channel->posted;
                channel->signalled_sent = channel->sent;
        }
        channel->count = 0;
        count(COUNT_POSTS, 1);
        error = ibv_post_send(channel->pair, channel->requests, &bad);
        if (error)
                link_down(link, error, "posting work requests failed");
}

static void complete(const struct ibv_wc *completion)
{
        struct verbs_channel *channel = verbs_channel_numbered((uint32_t)(completion->wr_id >> ID_SHIFT));
        uint64_t what = completion->wr_id & ID_MASK;
        struct link *link;

        count(COUNT_COMPLETIONS, 1);
        if (!channel)
                return;
        link = channel->link;
        if (completion->status != IBV_WC_SUCCESS) {
                link_down(link, EIO, verbs.wc_status_str(completion->status));
        } else if (completion->wr_id & ID_RECEIVE) {
                if (!channel->connecting) {
                        verbs_receive(channel, what, completion->byte_len);
                } else if (channel->early_count < WINDOW) {
                        channel->early[channel->early_count].buffer = (uint32_t)what;
                        channel->early[channel->early_count++].size = completion->byte_len;
                }
        } else {
                channel->done = channel->marks[what % QUEUE].posted;
                channel->sent_done = channel->marks[what % QUEUE].sent;
                link_completed(link, 0, what);
        }
}

static bool verbs_poll(void)
{
        struct ibv_wc completions[POLLED];
        int got = POLLED;
        bool any = false;

        for (int round = 0; round < ROUNDS && got == POLLED && verbs_device && verbs_device->links; round++) {
                got = ibv_poll_cq(verbs_device->queue, POLLED, completions);
                count(COUNT_POLLS, 1);
                if (got < 0)
                        verbs_all_down(verbs_device, EIO, "polling the completion queue failed");
                for (int i = 0; i < got; i++)
                        complete(&completions[i]);
                any = any || got > 0;
        }
        return any;
}

static bool verbs_arm(void)
{
        if (verbs_device && !verbs_device->armed && verbs_device->links)
                verbs_device->armed = ibv_req_notify_cq(verbs_device->queue, 0) == 0;
        return !verbs_poll();
}

const struct transport verbs_transport = {
    .kind = RELAY_VERBS,
    .window = WINDOW,
    .piece = PIECE,
    .lanes = 1,
    .message_lanes = 1,
    .open = verbs_open,
    .close = verbs_close_device,
    .create_channel = verbs_create_channel,
    .connect_channel = verbs_connect_channel,
    .destroy_channel = verbs_destroy_channel,
    .register_rings = verbs_register_rings,
    .deregister = verbs_deregister,
    .attach = verbs_attach,
    .detach = verbs_detach,
    .has_room = verbs_has_room,
    .write = verbs_write,
    .register_file = verbs_register_file,
    .deregister_file = verbs_deregister_file,
    .place_file = verbs_place_file,
    .reach = verbs_reach,
    .unreach = verbs_unreach,
    .move = verbs_move,
    .send = verbs_send,
    .poll = verbs_poll,
    .arm = verbs_arm,
    .tick = verbs_tick,
};
