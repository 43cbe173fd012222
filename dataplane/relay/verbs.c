/* The transport `verbs`: one reliable connected queue pair per link, on any device that libibverbs
 * supports.
 *
 * A batch is a chain of unsignalled RDMA WRITEs and the SEND of its message, posted with one
 * doorbell. A SEND is signalled when a quarter of the send queue or of the message buffers has been
 * used since the last completion, or when its completion is waited for; so the queue never fills up
 * unnoticed. An error completes even an unsignalled request.
 *
 * All links share one completion queue, with room for everything that their queue pairs can hold,
 * so it cannot overrun. Work request IDs name a channel by a number that is used once: completions
 * of a destroyed channel are recognised and ignored.
 *
 * The peer may write behind the first ring's header in a slot's two pages, and into both bulk
 * areas. All of that belongs to its own connection; the header of direction 1 is in it, and is
 * untrusted anyway.
 *
 * A link is lost after RETRIES times 4.096 us << TIMEOUT without an acknowledgement: two seconds,
 * and up to four times as long on devices that round up. Receiver-not-ready cannot happen, since
 * messages are granted.
 */
#include "link.h"
#include "mirror.h"
#include "transports.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum {
        CHANNELS = 1024,
        QUEUE = 256,   /* work requests in a send queue */
        MESSAGES = 64, /* buffers for SENDs */
        PER_LINK = QUEUE + WINDOW,
        LINKS_FIRST = 32, /* that the completion queue has room for; doubled when needed */
        PIECE = 64 * 1024,
        TIMEOUT = 16,
        RETRIES = 6,     /* rdma_rxe retries without end at 7 */
        RNR_RETRIES = 7, /* without end */
        RNR_TIMER = 12,  /* 0.64 ms */
        HOPS = 64,
        POLLED = 32,
        ROUNDS = 4,
        CHECK = 2000, /* ms between checks that the device is still there */
};

/* The functions of libibverbs that are used; the others are inline and call the device's own
 * functions. */
#define FUNCTIONS(X)                                                                                         \
        X(struct ibv_device **, get_device_list, (int *))                                                    \
        X(void, free_device_list, (struct ibv_device **))                                                    \
        X(const char *, get_device_name, (struct ibv_device *))                                              \
        X(struct ibv_context *, open_device, (struct ibv_device *))                                          \
        X(int, close_device, (struct ibv_context *))                                                         \
        X(int, get_async_event, (struct ibv_context *, struct ibv_async_event *))                            \
        X(void, ack_async_event, (struct ibv_async_event *))                                                 \
        X(int, query_device, (struct ibv_context *, struct ibv_device_attr *))                               \
        X(int, query_port, (struct ibv_context *, uint8_t, void *))                                          \
        X(int, query_gid, (struct ibv_context *, uint8_t, int, union ibv_gid *))                             \
        X(struct ibv_pd *, alloc_pd, (struct ibv_context *))                                                 \
        X(int, dealloc_pd, (struct ibv_pd *))                                                                \
        X(struct ibv_mr *, reg_mr, (struct ibv_pd *, void *, size_t, int))                                   \
        X(int, dereg_mr, (struct ibv_mr *))                                                                  \
        X(struct ibv_comp_channel *, create_comp_channel, (struct ibv_context *))                            \
        X(int, destroy_comp_channel, (struct ibv_comp_channel *))                                            \
        X(struct ibv_cq *, create_cq, (struct ibv_context *, int, void *, struct ibv_comp_channel *, int))   \
        X(int, resize_cq, (struct ibv_cq *, int))                                                            \
        X(int, destroy_cq, (struct ibv_cq *))                                                                \
        X(int, get_cq_event, (struct ibv_comp_channel *, struct ibv_cq **, void **))                         \
        X(void, ack_cq_events, (struct ibv_cq *, unsigned))                                                  \
        X(struct ibv_qp *, create_qp, (struct ibv_pd *, struct ibv_qp_init_attr *))                          \
        X(int, modify_qp, (struct ibv_qp *, struct ibv_qp_attr *, int))                                      \
        X(int, destroy_qp, (struct ibv_qp *))                                                                \
        X(const char *, wc_status_str, (enum ibv_wc_status))                                                 \
        X(const char *, event_type_str, (enum ibv_event_type))

#define DECLARE(type, name, arguments) type(*name) arguments;
static struct {
        FUNCTIONS(DECLARE)
} verbs;

/* Exists as long as links or registrations use it. After another one was opened, or the device was
 * removed, the last user frees it. */
struct device {
        struct watch completions, events;
        unsigned users;
        bool armed, named; /* the completion queue is armed; the device's sysfs entry is visible */
        struct ibv_context *context;
        struct ibv_pd *domain;
        struct ibv_comp_channel *channel;
        struct ibv_cq *queue;
        struct ibv_port_attr port;
        union ibv_gid gid;
        uint8_t port_number;
        uint16_t gid_index;
        unsigned links, capacity; /* of the completion queue, in links */
        int most;                 /* entries that the device allows in it */
};

struct channel {
        struct device *device;
        struct link *link; /* NULL: destroyed, but a thread still connects it */
        bool connecting;
        /* messages that arrived before connecting was known to be complete */
        unsigned early_count;
        struct {
                uint32_t buffer, size;
        } early[WINDOW];
        uint32_t number; /* in work request ids */
        struct ibv_qp *pair;
        uint32_t inline_most;
        uint32_t sequence;
        /* WINDOW to receive, MESSAGES to send */
        struct wire_message *buffers;
        struct ibv_mr *region;
        /* Counts of work requests and messages: posted, complete, and posted up to the last
         * signalled one. */
        uint64_t posted, done, sent, sent_done, signalled_posted, signalled_sent;
        /* at batch % QUEUE: `posted` and `sent` after that batch */
        struct {
                uint64_t posted, sent;
        } marks[QUEUE];
        /* the batch that is being made */
        unsigned count;
        struct ibv_send_wr requests[BLOCKS * WRITES + 1];
        struct ibv_sge pieces[BLOCKS * WRITES + 1];
};

struct registration {
        struct device *device;
        struct ibv_mr *small, *bulk;
};

struct target {
        uint64_t small, bulk;
        uint32_t small_key, bulk_key;
};

/* Connecting resolves the route to the peer in the kernel, which takes seconds if there is none. A
 * thread of its own does that; until it reports through `jobs`, the relay's thread does not use the
 * queue pair. */
struct job {
        struct channel *channel;
        struct ibv_qp_attr ready, sends;
        int error;
        const char *failed;
};

/* Work request IDs: the channel's number, a bit for receives, and the number of the buffer or
 * batch. */
enum { ID_SHIFT = 40 };
#define ID_RECEIVE (UINT64_C(1) << 39)
#define ID_MASK (ID_RECEIVE - 1)

static struct device *device;
static struct channel *channels[CHANNELS];
static uint32_t next_channel;
static int jobs[2] = {-1, -1};
static struct watch job_done;

static bool load(char *text)
{
        static void *library;

        if (library)
                return true;
        library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library) {
                snprintf(text, RELAY_TEXT, "no libibverbs: %s", dlerror());
                return false;
        }
#define FIND(type, name, arguments)                                                                          \
        *(void **)&verbs.name = dlsym(library, "ibv_" #name);                                                \
        if (!verbs.name) {                                                                                   \
                snprintf(text, RELAY_TEXT, "libibverbs has no ibv_" #name);                                  \
                dlclose(library);                                                                            \
                library = NULL;                                                                              \
                return false;                                                                                \
        }
        FUNCTIONS(FIND)
        return true;
}

/* errno as the call left it, never 0. */
static int fail(char *text, const char *what)
{
        int error = errno ? errno : EIO;

        snprintf(text, RELAY_TEXT, "%s: %s", what, strerror(error));
        return error;
}

/* --- the device --- */

static void put_device(struct device *d)
{
        if (--d->users)
                return;
        watch_remove(&d->completions);
        watch_remove(&d->events);
        if (d->queue)
                verbs.destroy_cq(d->queue);
        if (d->channel)
                verbs.destroy_comp_channel(d->channel);
        if (d->domain)
                verbs.dealloc_pd(d->domain);
        if (d->context)
                verbs.close_device(d->context);
        free(d);
}

static void all_down(const struct device *d, int error, const char *text)
{
        for (int i = 0; i < CHANNELS; i++)
                if (channels[i] && channels[i]->device == d)
                        link_down(channels[i]->link, error, text);
}

/* The device is being removed. The kernel waits for all its users, so everything of it is freed
 * now. Links whose connections are registered with it can only go on over frames. */
static void lose(struct device *d, const char *text)
{
        all_down(d, ENODEV, text);
        if (d != device)
                return;
        mirrors_deregister(&verbs_transport);
        device = NULL;
        put_device(d);
}

static void on_completion(struct watch *watch, uint32_t events)
{
        struct device *d = OF(watch, struct device, completions);
        struct ibv_cq *queue;
        void *unused;

        (void)events;
        count(COUNT_CALLS, 1);
        if (verbs.get_cq_event(d->channel, &queue, &unused))
                return;
        d->armed = false;
        verbs.ack_cq_events(queue, 1);
}

static void on_event(struct watch *watch, uint32_t events)
{
        struct device *d = OF(watch, struct device, events);
        struct ibv_async_event event;

        (void)events;
        d->users++;
        while (!verbs.get_async_event(d->context, &event)) {
                const struct ibv_qp *pair = event.element.qp;
                const char *name = verbs.event_type_str(event.event_type);

                /* Before the queue pair is destroyed: that waits for it. */
                verbs.ack_async_event(&event);
                switch (event.event_type) {
                case IBV_EVENT_QP_FATAL:
                case IBV_EVENT_QP_REQ_ERR:
                case IBV_EVENT_QP_ACCESS_ERR:
                        for (int i = 0; i < CHANNELS; i++)
                                if (channels[i] && channels[i]->pair == pair)
                                        link_down(channels[i]->link, EIO, name);
                        break;
                case IBV_EVENT_DEVICE_FATAL:
                        lose(d, name);
                        put_device(d);
                        return;
                case IBV_EVENT_CQ_ERR:
                case IBV_EVENT_PORT_ERR:
                        all_down(d, ENETDOWN, name);
                        break;
                default:
                        break;
                }
        }
        put_device(d);
}

static bool nonblocking(int fd)
{
        int flags = fcntl(fd, F_GETFL);

        return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

static struct ibv_context *open_by_name(const char *name, char *text)
{
        struct ibv_device **list = verbs.get_device_list(NULL);
        struct ibv_context *context = NULL;

        errno = ENODEV;
        for (int i = 0; list && list[i] && !context; i++)
                if (!strcmp(verbs.get_device_name(list[i]), name))
                        context = verbs.open_device(list[i]);
        if (!context)
                fail(text, "opening the RDMA device");
        if (list)
                verbs.free_device_list(list);
        return context;
}

static bool has_name(const struct device *d)
{
        return !access(d->context->device->dev_path, F_OK) || errno != ENOENT;
}

/* Makes what links need of an opened device. */
static int set_up(struct device *d, const struct relay_open *open, char *text)
{
        struct ibv_device_attr attributes;

        memset(&d->port, 0, sizeof d->port);
        if (verbs.query_device(d->context, &attributes) || verbs.query_port(d->context, open->port, &d->port))
                return fail(text, "querying the RDMA device's port");
        if (d->port.state != IBV_PORT_ACTIVE) {
                snprintf(text, RELAY_TEXT, "the RDMA device's port is not active");
                return ENETDOWN;
        }
        if (verbs.query_gid(d->context, open->port, open->gid_index, &d->gid))
                return fail(text, "querying the RDMA device's GID");
        d->named = has_name(d);
        d->port_number = open->port;
        d->gid_index = open->gid_index;
        d->most = attributes.max_cqe;
        d->capacity = LINKS_FIRST;
        if (d->most < LINKS_FIRST * PER_LINK)
                d->capacity = (unsigned)d->most / PER_LINK;
        d->domain = verbs.alloc_pd(d->context);
        d->channel = d->domain ? verbs.create_comp_channel(d->context) : NULL;
        d->queue =
            d->channel ? verbs.create_cq(d->context, (int)d->capacity * PER_LINK, NULL, d->channel, 0) : NULL;
        if (!d->queue || !d->capacity)
                return fail(text, "creating a completion queue");
        d->completions = (struct watch){.fd = d->channel->fd, .call = on_completion};
        d->events = (struct watch){.fd = d->context->async_fd, .call = on_event};
        if (!nonblocking(d->channel->fd) || !nonblocking(d->context->async_fd) ||
            !watch_add(&d->completions, EPOLLIN) || !watch_add(&d->events, EPOLLIN))
                return fail(text, "waiting for the RDMA device");
        return 0;
}

static void on_job(struct watch *watch, uint32_t events);

static int verbs_open(const struct relay_open *open, uint32_t *mtu, char *text)
{
        struct device *d;
        int error;

        if (!load(text))
                return ENOSYS;
        if (jobs[0] < 0) {
                if (pipe2(jobs, O_CLOEXEC) < 0)
                        return fail(text, "creating a pipe");
                job_done = (struct watch){.fd = jobs[0], .call = on_job};
                if (!watch_add(&job_done, EPOLLIN))
                        return fail(text, "waiting for threads");
        }
        d = calloc(1, sizeof *d);
        if (!d)
                relay_die("memory for a device", ENOMEM);
        d->users = 1;
        d->completions.fd = d->events.fd = -1;
        d->context = open_by_name(open->device, text);
        error = d->context ? set_up(d, open, text) : ENODEV;
        if (error) {
                put_device(d);
                return error;
        }
        device = d;
        *mtu = 128u << d->port.active_mtu;
        return 0;
}

static void verbs_close(void)
{
        if (device)
                put_device(device);
        device = NULL;
}

/* A device whose users the kernel cannot disconnect, such as rdma_rxe's, is removed without an
 * event: only its name disappears. */
static uint64_t verbs_tick(uint64_t present)
{
        static uint64_t checked_at;

        if (!device)
                return 0;
        if (present - checked_at >= CHECK * UINT64_C(1000000)) {
                checked_at = present;
                count(COUNT_CALLS, 1);
                if (device->named && !has_name(device)) {
                        lose(device, "the RDMA device was removed");
                        return 0;
                }
        }
        return checked_at + CHECK * UINT64_C(1000000);
}

/* --- links --- */

static struct channel *channel_numbered(uint32_t number)
{
        struct channel *channel = channels[number % CHANNELS];

        return channel && channel->number == number ? channel : NULL;
}

static struct wire_message *buffer(struct channel *channel, uint64_t number)
{
        return &channel->buffers[number];
}

static bool post_receive(struct channel *channel, uint64_t number)
{
        struct ibv_sge piece = {
            .addr = (uintptr_t)buffer(channel, number),
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
static bool make_pair(struct channel *channel)
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

static bool start_pair(struct channel *channel)
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

static bool has_completions(struct device *d)
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

static int verbs_create_channel(struct link *link, struct wire_address *address, char *text)
{
        struct channel *channel;
        int tries = 0;

        if (!device) {
                snprintf(text, RELAY_TEXT, "the RDMA device is gone");
                return ENODEV;
        }
        while (tries++ < CHANNELS && channels[next_channel % CHANNELS])
                next_channel++;
        if (channels[next_channel % CHANNELS] || !has_completions(device)) {
                snprintf(text, RELAY_TEXT,
                         "the RDMA device has no room for more links in a completion queue");
                return ENOSPC;
        }
        channel = calloc(1, sizeof *channel);
        if (!channel)
                relay_die("memory for a link", ENOMEM);
        /* A work request ID has 24 bits for it. */
        next_channel &= 0xffffff;
        channel->number = next_channel++;
        channel->device = device;
        channel->link = link;
        channel->sequence = (uint32_t)relay_random() & 0xffffff;
        device->users++;
        device->links++;
        channels[channel->number % CHANNELS] = channel;
        link->channel = channel;
        errno = 0;
        if (!make_pair(channel))
                return fail(text, "creating a queue pair");
        if (!start_pair(channel))
                return fail(text, "starting a queue pair");
        address->to.verbs.queue_pair = channel->pair->qp_num;
        address->to.verbs.sequence = channel->sequence;
        address->to.verbs.mtu = (uint32_t)device->port.active_mtu;
        address->to.verbs.lid = device->port.lid;
        address->to.verbs.routed = device->port.link_layer == IBV_LINK_LAYER_ETHERNET;
        memcpy(address->to.verbs.gid, device->gid.raw, sizeof address->to.verbs.gid);
        return 0;
}

static void destroy(struct channel *channel)
{
        if (channel->pair)
                verbs.destroy_qp(channel->pair);
        if (channel->region)
                verbs.dereg_mr(channel->region);
        free(channel->buffers);
        put_device(channel->device);
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

static void receive_message(struct channel *channel, uint64_t number, uint32_t size)
{
        struct link *link = channel->link;

        link_receive(link, 0, buffer(channel, number), size);
        if (link->channel == channel && !post_receive(channel, number))
                link_down(link, EIO, "posting a receive buffer failed");
}

static void on_job(struct watch *watch, uint32_t events)
{
        struct channel *channel;
        struct job *job;
        char text[RELAY_TEXT] = "";

        (void)events;
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
                        receive_message(channel, channel->early[i].buffer, channel->early[i].size);
        } else {
                destroy(channel);
        }
        free(job);
}

static bool start_job(struct channel *channel, const struct ibv_qp_attr *ready,
                      const struct ibv_qp_attr *sends)
{
        struct job *job = malloc(sizeof *job);
        pthread_attr_t attributes;
        pthread_t thread;

        if (!job)
                relay_die("memory to connect a link", ENOMEM);
        *job = (struct job){.channel = channel, .ready = *ready, .sends = *sends};
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        errno = pthread_create(&thread, &attributes, connect_pair, job);
        pthread_attr_destroy(&attributes);
        if (errno)
                free(job);
        return !errno;
}

static int verbs_connect_channel(struct link *link, const struct wire_address *address, char *text)
{
        struct channel *channel = link->channel;
        struct device *d = channel->device;
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

        if (mtu < IBV_MTU_256 || mtu > IBV_MTU_4096 || ethernet != (address->to.verbs.routed == 1)) {
                snprintf(text, RELAY_TEXT,
                         "the peer's RDMA device has another link layer, or its address is invalid");
                return EPROTO;
        }
        ready.path_mtu = mtu < (uint32_t)d->port.active_mtu ? (enum ibv_mtu)mtu : d->port.active_mtu;
        memcpy(ready.ah_attr.grh.dgid.raw, address->to.verbs.gid, sizeof address->to.verbs.gid);
        channel->connecting = start_job(channel, &ready, &sends);
        if (!channel->connecting)
                return fail(text, "starting a thread that connects the queue pair");
        return EINPROGRESS;
}

static void verbs_destroy_channel(struct link *link)
{
        struct channel *channel = link->channel;

        channels[channel->number % CHANNELS] = NULL;
        channel->device->links--;
        channel->link = NULL;
        if (!channel->connecting)
                destroy(channel);
}

/* --- memory registration --- */

static void deregister(struct registration *registration)
{
        if (registration->small) {
                relay.counters[COUNT_REGISTERED] -= registration->small->length;
                verbs.dereg_mr(registration->small);
        }
        if (registration->bulk) {
                relay.counters[COUNT_REGISTERED] -= registration->bulk->length;
                verbs.dereg_mr(registration->bulk);
        }
        put_device(registration->device);
        free(registration);
}

static void verbs_deregister(struct mirror *m)
{
        deregister(m->registration);
        m->registration = NULL;
}

static struct ibv_mr *register_memory(void *from, size_t size)
{
        struct ibv_mr *region =
            verbs.reg_mr(device->domain, from, size, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);

        count(COUNT_CALLS, 1);
        if (region)
                count(COUNT_REGISTERED, size);
        return region;
}

static int verbs_register_rings(struct mirror *m, struct wire_place *place, char *text)
{
        struct registration *registration = calloc(1, sizeof *registration);

        if (!registration)
                relay_die("memory for a connection", ENOMEM);
        if (!device) {
                free(registration);
                snprintf(text, RELAY_TEXT, "the RDMA device is gone");
                return ENODEV;
        }
        registration->device = device;
        device->users++;
        errno = 0;
        registration->small = register_memory((char *)m->out + RING_HEADER, SIDES * PAGE - RING_HEADER);
        if (registration->small)
                registration->bulk = register_memory(m->out_bulk, (size_t)SIDES * m->size);
        if (!registration->bulk) {
                int error = fail(text, "registering the rings' memory (RLIMIT_MEMLOCK, CAP_IPC_LOCK?)");

                deregister(registration);
                return error;
        }
        place->to.verbs.small = (uintptr_t)m->in + RING_HEADER;
        place->to.verbs.bulk = (uintptr_t)m->in_bulk;
        place->to.verbs.small_key = registration->small->rkey;
        place->to.verbs.bulk_key = registration->bulk->rkey;
        m->registration = registration;
        return 0;
}

static int verbs_attach(struct mirror *m, const struct wire_place *place, char *text)
{
        struct target *target = malloc(sizeof *target);

        (void)text;
        if (!target)
                relay_die("memory for a connection", ENOMEM);
        *target = (struct target){
            .small = place->to.verbs.small,
            .bulk = place->to.verbs.bulk,
            .small_key = place->to.verbs.small_key,
            .bulk_key = place->to.verbs.bulk_key,
        };
        m->target = target;
        return 0;
}

static void verbs_detach(struct mirror *m)
{
        free(m->target);
        m->target = NULL;
}

/* --- writes, messages and completions --- */

static bool verbs_has_room(struct link *link, unsigned lane, unsigned writes)
{
        const struct channel *channel = link->channel;

        (void)lane;
        return channel->posted - channel->done + channel->count + writes + 1 <= QUEUE &&
               channel->sent - channel->sent_done < MESSAGES;
}

/* Adds a work request to the batch. */
static struct ibv_send_wr *add_request(struct channel *channel, uintptr_t from, uint32_t size, uint32_t key)
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

static void verbs_send(struct link *link, unsigned lane, const void *message, uint32_t size, uint64_t number,
                       bool soon)
{
        struct channel *channel = link->channel;
        struct wire_message *place = buffer(channel, WINDOW + channel->sent % MESSAGES);
        struct ibv_send_wr *request, *bad;
        int error;

        (void)lane;
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
        struct channel *channel = channel_numbered((uint32_t)(completion->wr_id >> ID_SHIFT));
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
                        receive_message(channel, what, completion->byte_len);
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

        for (int round = 0; round < ROUNDS && got == POLLED && device && device->links; round++) {
                got = ibv_poll_cq(device->queue, POLLED, completions);
                count(COUNT_POLLS, 1);
                if (got < 0)
                        all_down(device, EIO, "polling the completion queue failed");
                for (int i = 0; i < got; i++)
                        complete(&completions[i]);
                any = any || got > 0;
        }
        return any;
}

static bool verbs_arm(void)
{
        if (device && !device->armed && device->links)
                device->armed = ibv_req_notify_cq(device->queue, 0) == 0;
        return !verbs_poll();
}

const struct transport verbs_transport = {
    .kind = RELAY_VERBS,
    .window = WINDOW,
    .piece = PIECE,
    .lanes = 1,
    .open = verbs_open,
    .close = verbs_close,
    .create_channel = verbs_create_channel,
    .connect_channel = verbs_connect_channel,
    .destroy_channel = verbs_destroy_channel,
    .register_rings = verbs_register_rings,
    .deregister = verbs_deregister,
    .attach = verbs_attach,
    .detach = verbs_detach,
    .has_room = verbs_has_room,
    .write = verbs_write,
    .send = verbs_send,
    .poll = verbs_poll,
    .arm = verbs_arm,
    .tick = verbs_tick,
};
