#include "verbs_pair.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum {
        TIMEOUT = 16,
        RETRIES = 6,     /* rdma_rxe retries without end at 7 */
        RNR_RETRIES = 7, /* without end */
        RNR_TIMER = 12,  /* 0.64 ms */
        HOPS = 64,
};

/* Connecting resolves the route to the peer in the kernel, which takes seconds if there is none. A
 * thread of its own does that; until it reports through `jobs`, the relay's thread does not use the
 * queue pair. */
struct job {
        struct verbs_channel *channel;
        struct ibv_qp_attr ready, sends;
        int error;
        const char *failed;
};

static uint32_t next_channel;
static int jobs[2] = {-1, -1};
static struct watch job_done;

struct verbs_channel *verbs_channel_numbered(uint32_t number)
{
        struct verbs_channel *channel = verbs_channels[number % CHANNELS];

        return channel && channel->number == number ? channel : NULL;
}

struct wire_message *verbs_buffer(struct verbs_channel *channel, uint64_t number)
{
        return &channel->buffers[number];
}

static bool post_receive(struct verbs_channel *channel, uint64_t number)
{
        struct ibv_sge piece = {
            .addr = (uintptr_t)verbs_buffer(channel, number),
            .length = sizeof *channel->buffers,
            .lkey = channel->region->lkey,
        };
        struct ibv_recv_wr request =
                               {
                                   .wr_id = (uint64_t)channel->number << ID_SHIFT | ID_RECEIVE | number,
                                   .sg_list = &piece,
                                   .num_sge = 1,
                               },
                           *bad;

        return ibv_post_recv(channel->pair, &request, &bad) == 0;
}

/* Tries large sizes of inline data first. */
static bool make_pair(struct verbs_channel *channel)
{
        static const uint32_t inlines[] = {512, 220, 128, 60, 0};

        for (size_t i = 0; i < sizeof inlines / sizeof *inlines && !channel->pair; i++) {
                struct ibv_qp_init_attr wanted = {
                    .send_cq = channel->device->queue,
                    .recv_cq = channel->device->queue,
                    .cap = {.max_send_wr = QUEUE,
                            .max_recv_wr = WINDOW,
                            .max_send_sge = 1,
                            .max_recv_sge = 1,
                            .max_inline_data = inlines[i]},
                    .qp_type = IBV_QPT_RC,
                };

                channel->pair = verbs.create_qp(channel->device->domain, &wanted);
                channel->inline_most = inlines[i];
        }
        return channel->pair;
}

static bool start_pair(struct verbs_channel *channel)
{
        struct ibv_qp_attr attributes = {
            .qp_state = IBV_QPS_INIT,
            .port_num = channel->device->port_number,
            .qp_access_flags = IBV_ACCESS_REMOTE_WRITE,
        };
        size_t size = (WINDOW + MESSAGES) * sizeof *channel->buffers;

        channel->buffers = aligned_alloc(64, (size + 63) / 64 * 64);
        if (!channel->buffers)
                return false;
        memset(channel->buffers, 0, size);
        channel->region =
            verbs.reg_mr(channel->device->domain, channel->buffers, size, IBV_ACCESS_LOCAL_WRITE);
        if (!channel->region ||
            (errno = verbs.modify_qp(channel->pair, &attributes,
                                     IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)))
                return false;
        for (uint64_t i = 0; i < WINDOW; i++)
                if (!post_receive(channel, i))
                        return false;
        return true;
}

static bool has_completions(struct verbs_device *d)
{
        unsigned wanted = d->capacity * 2, most = (unsigned)d->most / PER_LINK;

        if (d->links < d->capacity)
                return true;
        if (most > CHANNELS)
                most = CHANNELS;
        if (wanted > most)
                wanted = most;
        if (wanted <= d->capacity || verbs.resize_cq(d->queue, (int)wanted * PER_LINK))
                return false;
        d->capacity = wanted;
        return true;
}

int verbs_create_channel(struct link *link, struct wire_address *address, char *text)
{
        struct verbs_channel *channel;
        int tries = 0;

        if (!verbs_device)
                return relay_refuse(text, ENODEV, "the RDMA device is gone");
        while (tries++ < CHANNELS && verbs_channels[next_channel % CHANNELS])
                next_channel++;
        if (verbs_channels[next_channel % CHANNELS] || !has_completions(verbs_device))
                return relay_refuse(text, ENOSPC,
                                    "the RDMA device has no room for more links in a completion queue");
        channel = relay_memory(sizeof *channel, "memory for a link");
        /* A work request ID has 24 bits for it. */
        next_channel &= 0xffffff;
        channel->number = next_channel++;
        channel->device = verbs_device;
        channel->link = link;
        channel->sequence = (uint32_t)relay_random() & 0xffffff;
        verbs_device->users++;
        verbs_device->links++;
        verbs_channels[channel->number % CHANNELS] = channel;
        link->channel = channel;
        errno = 0;
        if (!make_pair(channel))
                return verbs_fail(text, "creating a queue pair");
        if (!start_pair(channel))
                return verbs_fail(text, "starting a queue pair");
        address->to.verbs.queue_pair = channel->pair->qp_num;
        address->to.verbs.sequence = channel->sequence;
        address->to.verbs.mtu = (uint32_t)verbs_device->port.active_mtu;
        address->to.verbs.lid = verbs_device->port.lid;
        address->to.verbs.routed = verbs_device->port.link_layer == IBV_LINK_LAYER_ETHERNET;
        memcpy(address->to.verbs.gid, verbs_device->gid.raw, sizeof address->to.verbs.gid);
        return 0;
}

static void destroy(struct verbs_channel *channel)
{
        if (channel->pair)
                verbs.destroy_qp(channel->pair);
        if (channel->region)
                verbs.dereg_mr(channel->region);
        free(channel->buffers);
        verbs_put_device(channel->device);
        free(channel);
}

static void *connect_pair(void *given)
{
        struct job *job = given;

        job->failed = "connecting the queue pair (can this host reach the peer's GID?)";
        job->error = verbs.modify_qp(job->channel->pair, &job->ready,
                                     IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                                         IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
        if (!job->error) {
                job->failed = "starting to send on the queue pair";
                job->error = verbs.modify_qp(job->channel->pair, &job->sends,
                                             IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                                                 IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
        }
        /* A pointer is written to a pipe atomically. */
        if (write(jobs[1], &job, sizeof job) != (ssize_t)sizeof job)
                abort();
        return NULL;
}

void verbs_receive(struct verbs_channel *channel, uint64_t number, uint32_t size)
{
        struct link *link = channel->link;

        link_receive(link, 0, verbs_buffer(channel, number), size);
        if (link->channel == channel && !post_receive(channel, number))
                link_down(link, EIO, "posting a receive buffer failed");
}

static void on_job(struct watch *watch, UNUSED uint32_t events)
{
        struct verbs_channel *channel;
        struct job *job;
        char text[RELAY_TEXT] = "";

        count(COUNT_CALLS, 1);
        if (read(watch->fd, &job, sizeof job) != (ssize_t)sizeof job)
                return;
        channel = job->channel;
        channel->connecting = false;
        if (channel->link) {
                struct link *link = channel->link;

                if (job->error)
                        snprintf(text, sizeof text, "%s: %s", job->failed, strerror(job->error));
                link_connected(link, job->error, text);
                for (unsigned i = 0; i < WINDOW && link->channel == channel && i < channel->early_count; i++)
                        verbs_receive(channel, channel->early[i].buffer, channel->early[i].size);
        } else {
                destroy(channel);
        }
        free(job);
}

int verbs_start_jobs(char *text)
{
        if (jobs[0] >= 0)
                return 0;
        if (pipe2(jobs, O_CLOEXEC) < 0)
                return verbs_fail(text, "creating a pipe");
        job_done = (struct watch){.fd = jobs[0], .call = on_job};
        if (!watch_add(&job_done, EPOLLIN))
                return verbs_fail(text, "waiting for threads");
        return 0;
}

static bool start_job(struct verbs_channel *channel, const struct ibv_qp_attr *ready,
                      const struct ibv_qp_attr *sends)
{
        struct job *job = relay_memory(sizeof *job, "memory to connect a link");
        pthread_attr_t attributes;
        pthread_t thread;

        *job = (struct job){.channel = channel, .ready = *ready, .sends = *sends};
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        errno = pthread_create(&thread, &attributes, connect_pair, job);
        pthread_attr_destroy(&attributes);
        if (errno)
                free(job);
        return !errno;
}

int verbs_connect_channel(struct link *link, const struct wire_address *address, char *text)
{
        struct verbs_channel *channel = link->channel;
        struct verbs_device *d = channel->device;
        bool ethernet = d->port.link_layer == IBV_LINK_LAYER_ETHERNET;
        uint32_t mtu = address->to.verbs.mtu;
        struct ibv_qp_attr ready = {
            .qp_state = IBV_QPS_RTR,
            .dest_qp_num = address->to.verbs.queue_pair & 0xffffff,
            .rq_psn = address->to.verbs.sequence & 0xffffff,
            .max_dest_rd_atomic = 1,
            .min_rnr_timer = RNR_TIMER,
            .ah_attr = {.dlid = address->to.verbs.lid,
                        .port_num = d->port_number,
                        .is_global = ethernet,
                        .grh = {.sgid_index = (uint8_t)d->gid_index, .hop_limit = HOPS}},
        };
        struct ibv_qp_attr sends = {
            .qp_state = IBV_QPS_RTS,
            .sq_psn = channel->sequence,
            .timeout = TIMEOUT,
            .retry_cnt = RETRIES,
            .rnr_retry = RNR_RETRIES,
            .max_rd_atomic = 1,
        };

        if (mtu < IBV_MTU_256 || mtu > IBV_MTU_4096 || ethernet != (address->to.verbs.routed == 1))
                return relay_refuse(
                    text, EPROTO, "the peer's RDMA device has another link layer, or its address is invalid");
        ready.path_mtu = mtu < (uint32_t)d->port.active_mtu ? (enum ibv_mtu)mtu : d->port.active_mtu;
        memcpy(ready.ah_attr.grh.dgid.raw, address->to.verbs.gid, sizeof address->to.verbs.gid);
        channel->connecting = start_job(channel, &ready, &sends);
        if (!channel->connecting)
                return verbs_fail(text, "starting a thread that connects the queue pair");
        return EINPROGRESS;
}

void verbs_destroy_channel(struct link *link)
{
        struct verbs_channel *channel = link->channel;

        verbs_channels[channel->number % CHANNELS] = NULL;
        channel->device->links--;
        channel->link = NULL;
        if (!channel->connecting)
                destroy(channel);
}
