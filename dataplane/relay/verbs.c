/* The transport `verbs`: one reliable connected queue pair per link, over whatever libibverbs has a device
 * for.
 *
 * A batch is a chain of RDMA WRITEs, unsignalled, and the SEND of its message behind them, given with one
 * doorbell. A SEND is signalled when a quarter of the queue or of the message buffers hasn't been heard of,
 * or when its completion is waited for, so the queue never runs full unnoticed. Every failure completes with
 * an error, signalled or not.
 *
 * All links share one completion queue, with a place for everything that their queues can hold at one time:
 * it can't overrun. Completions name their queue pair by a number that is used once, so those of one that is
 * gone mean nothing.
 *
 * What the peer may write: of a slot's two pages what lies behind the first ring's header, and both bulk
 * areas. That is its own connection's; headers there are words of a stranger in any case.
 *
 * A connection is lost after RETRIES times 4.096 us << TIMEOUT without an answer: two seconds, and up to four
 * times as long with devices that round up. Receivers that aren't ready can't happen, for messages are
 * granted.
 */
#include "link.h"
#include "mirror.h"

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
        ENDS = 1024,
        QUEUE = 256,   /* work requests of a link */
        MESSAGES = 64, /* of them SENDs whose buffers are in use */
        PER_LINK = QUEUE + WINDOW,
        LINKS_FIRST = 32, /* the completion queue has room for so many; doubled when needed */
        PIECE = 64 * 1024,
        TIMEOUT = 16,
        RETRIES = 6,     /* rdma_rxe takes 7 for "for ever" */
        RNR_RETRIES = 7, /* for ever */
        RNR_TIMER = 12,  /* 0.64 ms */
        HOPS = 64,
        POLLED = 32,
        ROUNDS = 4,
        LOOK = 2000, /* ms between looks at whether the device is still there */
};

/* What is taken from libibverbs; the rest of its interface is inline, through the device's own functions. */
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

/* Lives as long as links or lent memory need it: a device that was opened anew, or is gone, is let go last.
 */
struct device {
        struct watch completions, events;
        unsigned users;
        bool armed, named; /* the completion queue is armed; its name can be seen */
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

struct verbs_end {
        struct device *device;
        struct link *link; /* NULL: it goes as soon as it isn't being connected any more */
        bool connecting;
        /* messages that came before the end knew that it is connected */
        unsigned early_count;
        struct {
                uint32_t buffer, size;
        } early[WINDOW];
        uint32_t number; /* in work request ids */
        struct ibv_qp *pair;
        uint32_t inline_most;
        uint32_t sequence;
        /* WINDOW messages that come, MESSAGES that go */
        struct wire_message *buffers;
        struct ibv_mr *region;
        /* work requests and messages given, and those that are complete; at batch % QUEUE what was given then
         */
        uint64_t given, done, said, heard, signalled_given, signalled_said;
        struct {
                uint64_t given, said;
        } marks[QUEUE];
        /* the batch that is being made */
        unsigned count;
        struct ibv_send_wr requests[BLOCKS * WRITES + 1];
        struct ibv_sge pieces[BLOCKS * WRITES + 1];
};

struct lent {
        struct device *device;
        struct ibv_mr *small, *bulk;
};

struct reached {
        uint64_t small, bulk;
        uint32_t small_key, bulk_key;
};

/* Connecting asks the kernel for the way to the peer, which takes seconds if there is none: a thread of its
 * own waits for that. Until it says so by `jobs`, nobody else touches the queue pair. */
struct job {
        struct verbs_end *end;
        struct ibv_qp_attr ready, sends;
        int error;
        const char *failed;
};

/* Work request ids: the end's number, what it is, and its buffer or batch. */
enum { ID_SHIFT = 40 };
#define ID_RECEIVE (UINT64_C(1) << 39)
#define ID_MASK (ID_RECEIVE - 1)

static struct device *device;
static struct verbs_end *ends[ENDS];
static uint32_t next_end;
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

static void let_go(struct device *d)
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
        for (int i = 0; i < ENDS; i++)
                if (ends[i] && ends[i]->device == d)
                        link_down(ends[i]->link, error, text);
}

/* The kernel waits until nobody uses a device that is removed: everything of it is let go now. Connections
 * that have lent it memory can only go on over frames. */
static void lose(struct device *d, const char *text)
{
        all_down(d, ENODEV, text);
        if (d != device)
                return;
        mirrors_take_back(&verbs_transport);
        device = NULL;
        let_go(d);
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

                /* Before the queue pair goes: that would wait for it. */
                verbs.ack_async_event(&event);
                switch (event.event_type) {
                case IBV_EVENT_QP_FATAL:
                case IBV_EVENT_QP_REQ_ERR:
                case IBV_EVENT_QP_ACCESS_ERR:
                        for (int i = 0; i < ENDS; i++)
                                if (ends[i] && ends[i]->pair == pair)
                                        link_down(ends[i]->link, EIO, name);
                        break;
                case IBV_EVENT_DEVICE_FATAL:
                        lose(d, name);
                        let_go(d);
                        return;
                case IBV_EVENT_CQ_ERR:
                case IBV_EVENT_PORT_ERR:
                        all_down(d, ENETDOWN, name);
                        break;
                default:
                        break;
                }
        }
        let_go(d);
}

static bool nonblocking(int fd)
{
        int flags = fcntl(fd, F_GETFL);

        return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

static struct ibv_context *open_named(const char *name, char *text)
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

/* The device is there; what links need of it. */
static int set_up(struct device *d, const struct relay_open *open, char *text)
{
        struct ibv_device_attr attributes;

        memset(&d->port, 0, sizeof d->port);
        if (verbs.query_device(d->context, &attributes) || verbs.query_port(d->context, open->port, &d->port))
                return fail(text, "asking the RDMA device for its port");
        if (d->port.state != IBV_PORT_ACTIVE) {
                snprintf(text, RELAY_TEXT, "the RDMA device's port isn't active");
                return ENETDOWN;
        }
        if (verbs.query_gid(d->context, open->port, open->gid_index, &d->gid))
                return fail(text, "asking the RDMA device for its GID");
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
                return fail(text, "a completion queue");
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
                        return fail(text, "a pipe");
                job_done = (struct watch){.fd = jobs[0], .call = on_job};
                if (!watch_add(&job_done, EPOLLIN))
                        return fail(text, "waiting for threads");
        }
        d = calloc(1, sizeof *d);
        if (!d)
                relay_die("memory for a device", ENOMEM);
        d->users = 1;
        d->completions.fd = d->events.fd = -1;
        d->context = open_named(open->device, text);
        error = d->context ? set_up(d, open, text) : ENODEV;
        if (error) {
                let_go(d);
                return error;
        }
        device = d;
        *mtu = 128u << d->port.active_mtu;
        return 0;
}

static void verbs_close(void)
{
        if (device)
                let_go(device);
        device = NULL;
}

/* Devices that can't be taken from their users, as rdma_rxe's, are removed without an event: the name goes.
 */
static uint64_t verbs_beat(uint64_t present)
{
        static uint64_t looked_at;

        if (!device)
                return 0;
        if (present - looked_at >= LOOK * UINT64_C(1000000)) {
                looked_at = present;
                count(COUNT_CALLS, 1);
                if (device->named && !has_name(device)) {
                        lose(device, "the RDMA device was removed");
                        return 0;
                }
        }
        return looked_at + LOOK * UINT64_C(1000000);
}

/* --- links --- */

static struct verbs_end *end_numbered(uint32_t number)
{
        struct verbs_end *end = ends[number % ENDS];

        return end && end->number == number ? end : NULL;
}

static struct wire_message *buffer(struct verbs_end *end, uint64_t number)
{
        return &end->buffers[number];
}

static bool post_receive(struct verbs_end *end, uint64_t number)
{
        struct ibv_sge piece = {
            .addr = (uintptr_t)buffer(end, number),
            .length = sizeof *end->buffers,
            .lkey = end->region->lkey,
        };
        struct ibv_recv_wr request =
                               {
                                   .wr_id = (uint64_t)end->number << ID_SHIFT | ID_RECEIVE | number,
                                   .sg_list = &piece,
                                   .num_sge = 1,
                               },
                           *bad;

        return ibv_post_recv(end->pair, &request, &bad) == 0;
}

/* With as much room for inline bytes as the device has. */
static bool make_pair(struct verbs_end *end)
{
        static const uint32_t inlines[] = {512, 220, 128, 60, 0};

        for (size_t i = 0; i < sizeof inlines / sizeof *inlines && !end->pair; i++) {
                struct ibv_qp_init_attr wanted = {
                    .send_cq = end->device->queue,
                    .recv_cq = end->device->queue,
                    .cap = {.max_send_wr = QUEUE,
                            .max_recv_wr = WINDOW,
                            .max_send_sge = 1,
                            .max_recv_sge = 1,
                            .max_inline_data = inlines[i]},
                    .qp_type = IBV_QPT_RC,
                };

                end->pair = verbs.create_qp(end->device->domain, &wanted);
                end->inline_most = inlines[i];
        }
        return end->pair;
}

static bool start_pair(struct verbs_end *end)
{
        struct ibv_qp_attr attributes = {
            .qp_state = IBV_QPS_INIT,
            .port_num = end->device->port_number,
            .qp_access_flags = IBV_ACCESS_REMOTE_WRITE,
        };
        size_t size = (WINDOW + MESSAGES) * sizeof *end->buffers;

        end->buffers = aligned_alloc(64, (size + 63) / 64 * 64);
        if (!end->buffers)
                return false;
        memset(end->buffers, 0, size);
        end->region = verbs.reg_mr(end->device->domain, end->buffers, size, IBV_ACCESS_LOCAL_WRITE);
        if (!end->region ||
            (errno = verbs.modify_qp(end->pair, &attributes,
                                     IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)))
                return false;
        for (uint64_t i = 0; i < WINDOW; i++)
                if (!post_receive(end, i))
                        return false;
        return true;
}

static bool has_completions(struct device *d)
{
        unsigned wanted = d->capacity * 2, most = (unsigned)d->most / PER_LINK;

        if (d->links < d->capacity)
                return true;
        if (most > ENDS)
                most = ENDS;
        if (wanted > most)
                wanted = most;
        if (wanted <= d->capacity || verbs.resize_cq(d->queue, (int)wanted * PER_LINK))
                return false;
        d->capacity = wanted;
        return true;
}

static int verbs_make(struct link *link, struct wire_address *address, char *text)
{
        struct verbs_end *end;
        int tries = 0;

        if (!device) {
                snprintf(text, RELAY_TEXT, "the RDMA device is gone");
                return ENODEV;
        }
        while (tries++ < ENDS && ends[next_end % ENDS])
                next_end++;
        if (ends[next_end % ENDS] || !has_completions(device)) {
                snprintf(text, RELAY_TEXT, "the RDMA device has no completion queue for more links");
                return ENOSPC;
        }
        end = calloc(1, sizeof *end);
        if (!end)
                relay_die("memory for a link", ENOMEM);
        /* 24 bits of it are used. */
        next_end &= 0xffffff;
        end->number = next_end++;
        end->device = device;
        end->link = link;
        end->sequence = (uint32_t)relay_random() & 0xffffff;
        device->users++;
        device->links++;
        ends[end->number % ENDS] = end;
        link->end = end;
        errno = 0;
        if (!make_pair(end))
                return fail(text, "a queue pair");
        if (!start_pair(end))
                return fail(text, "starting a queue pair");
        address->to.verbs.queue_pair = end->pair->qp_num;
        address->to.verbs.sequence = end->sequence;
        address->to.verbs.mtu = (uint32_t)device->port.active_mtu;
        address->to.verbs.lid = device->port.lid;
        address->to.verbs.routed = device->port.link_layer == IBV_LINK_LAYER_ETHERNET;
        memcpy(address->to.verbs.gid, device->gid.raw, sizeof address->to.verbs.gid);
        return 0;
}

static void destroy(struct verbs_end *end)
{
        if (end->pair)
                verbs.destroy_qp(end->pair);
        if (end->region)
                verbs.dereg_mr(end->region);
        free(end->buffers);
        let_go(end->device);
        free(end);
}

static void *connect_pair(void *given)
{
        struct job *job = given;

        job->failed = "connecting the queue pair (is the peer's GID reached?)";
        job->error = verbs.modify_qp(job->end->pair, &job->ready,
                                     IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                                         IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
        if (!job->error) {
                job->failed = "starting to send on the queue pair";
                job->error = verbs.modify_qp(job->end->pair, &job->sends,
                                             IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                                                 IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
        }
        /* A pointer goes through a pipe whole. */
        if (write(jobs[1], &job, sizeof job) != (ssize_t)sizeof job)
                abort();
        return NULL;
}

static void hear_message(struct verbs_end *end, uint64_t number, uint32_t size)
{
        struct link *link = end->link;

        link_message(link, buffer(end, number), size);
        if (link->end == end && !post_receive(end, number))
                link_down(link, EIO, "the queue pair takes no buffer");
}

static void on_job(struct watch *watch, uint32_t events)
{
        struct verbs_end *end;
        struct job *job;
        char text[RELAY_TEXT] = "";

        (void)events;
        count(COUNT_CALLS, 1);
        if (read(watch->fd, &job, sizeof job) != (ssize_t)sizeof job)
                return;
        end = job->end;
        end->connecting = false;
        if (end->link) {
                struct link *link = end->link;

                if (job->error)
                        snprintf(text, sizeof text, "%s: %s", job->failed, strerror(job->error));
                link_connected(link, job->error, text);
                for (unsigned i = 0; i < WINDOW && link->end == end && i < end->early_count; i++)
                        hear_message(end, end->early[i].buffer, end->early[i].size);
        } else {
                destroy(end);
        }
        free(job);
}

static bool start_job(struct verbs_end *end, const struct ibv_qp_attr *ready, const struct ibv_qp_attr *sends)
{
        struct job *job = malloc(sizeof *job);
        pthread_attr_t attributes;
        pthread_t thread;

        if (!job)
                relay_die("memory to connect a link", ENOMEM);
        *job = (struct job){.end = end, .ready = *ready, .sends = *sends};
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        errno = pthread_create(&thread, &attributes, connect_pair, job);
        pthread_attr_destroy(&attributes);
        if (errno)
                free(job);
        return !errno;
}

static int verbs_connect(struct link *link, const struct wire_address *address, char *text)
{
        struct verbs_end *end = link->end;
        struct device *d = end->device;
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
            .sq_psn = end->sequence,
            .timeout = TIMEOUT,
            .retry_cnt = RETRIES,
            .rnr_retry = RNR_RETRIES,
            .max_rd_atomic = 1,
        };

        if (mtu < IBV_MTU_256 || mtu > IBV_MTU_4096 || ethernet != (address->to.verbs.routed == 1)) {
                snprintf(text, RELAY_TEXT, "the peer's RDMA device is of another kind, or says nonsense");
                return EPROTO;
        }
        ready.path_mtu = mtu < (uint32_t)d->port.active_mtu ? (enum ibv_mtu)mtu : d->port.active_mtu;
        memcpy(ready.ah_attr.grh.dgid.raw, address->to.verbs.gid, sizeof address->to.verbs.gid);
        end->connecting = start_job(end, &ready, &sends);
        if (!end->connecting)
                return fail(text, "a thread to connect the queue pair");
        return EINPROGRESS;
}

static void verbs_unmake(struct link *link)
{
        struct verbs_end *end = link->end;

        ends[end->number % ENDS] = NULL;
        end->device->links--;
        end->link = NULL;
        if (!end->connecting)
                destroy(end);
}

/* --- memory --- */

static void take_back(struct lent *lent)
{
        if (lent->small) {
                relay.counters[COUNT_REGISTERED] -= lent->small->length;
                verbs.dereg_mr(lent->small);
        }
        if (lent->bulk) {
                relay.counters[COUNT_REGISTERED] -= lent->bulk->length;
                verbs.dereg_mr(lent->bulk);
        }
        let_go(lent->device);
        free(lent);
}

static void verbs_take_back(struct mirror *m)
{
        take_back(m->lent);
        m->lent = NULL;
}

static struct ibv_mr *lend(void *from, size_t size)
{
        struct ibv_mr *region =
            verbs.reg_mr(device->domain, from, size, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);

        count(COUNT_CALLS, 1);
        if (region)
                count(COUNT_REGISTERED, size);
        return region;
}

static int verbs_lend(struct mirror *m, struct wire_place *place, char *text)
{
        struct lent *lent = calloc(1, sizeof *lent);

        if (!lent)
                relay_die("memory for a place", ENOMEM);
        if (!device) {
                free(lent);
                snprintf(text, RELAY_TEXT, "the RDMA device is gone");
                return ENODEV;
        }
        lent->device = device;
        device->users++;
        errno = 0;
        lent->small = lend((char *)m->out + RING_HEADER, SIDES * PAGE - RING_HEADER);
        if (lent->small)
                lent->bulk = lend(m->out_bulk, (size_t)SIDES * m->size);
        if (!lent->bulk) {
                int error = fail(text, "registering the rings' memory (RLIMIT_MEMLOCK, CAP_IPC_LOCK?)");

                take_back(lent);
                return error;
        }
        place->to.verbs.small = (uintptr_t)m->in + RING_HEADER;
        place->to.verbs.bulk = (uintptr_t)m->in_bulk;
        place->to.verbs.small_key = lent->small->rkey;
        place->to.verbs.bulk_key = lent->bulk->rkey;
        m->lent = lent;
        return 0;
}

static int verbs_reach(struct mirror *m, const struct wire_place *place, char *text)
{
        struct reached *reached = malloc(sizeof *reached);

        (void)text;
        if (!reached)
                relay_die("memory for a place", ENOMEM);
        *reached = (struct reached){
            .small = place->to.verbs.small,
            .bulk = place->to.verbs.bulk,
            .small_key = place->to.verbs.small_key,
            .bulk_key = place->to.verbs.bulk_key,
        };
        m->reached = reached;
        return 0;
}

static void verbs_forget(struct mirror *m)
{
        free(m->reached);
        m->reached = NULL;
}

/* --- bytes --- */

static bool verbs_room(struct link *link, unsigned writes)
{
        const struct verbs_end *end = link->end;

        return end->given - end->done + end->count + writes + 1 <= QUEUE && end->said - end->heard < MESSAGES;
}

/* A work request of the batch, behind the others. */
static struct ibv_send_wr *add(struct verbs_end *end, uintptr_t from, uint32_t size, uint32_t key)
{
        struct ibv_send_wr *request = &end->requests[end->count];
        struct ibv_sge *piece = &end->pieces[end->count];

        if (end->count)
                end->requests[end->count - 1].next = request;
        end->count++;
        *piece = (struct ibv_sge){.addr = from, .length = size, .lkey = key};
        *request = (struct ibv_send_wr){
            .wr_id = (uint64_t)end->number << ID_SHIFT,
            .sg_list = piece,
            .num_sge = 1,
            .send_flags = size <= end->inline_most ? IBV_SEND_INLINE : 0,
        };
        return request;
}

static void verbs_write(struct link *link, struct mirror *m, uint32_t offset, uint32_t size)
{
        const struct reached *reached = m->reached;
        const struct lent *lent = m->lent;
        bool small = offset < SMALL_SIZE;
        uintptr_t from = (small ? (uintptr_t)m->out + RING_HEADER : (uintptr_t)m->out_bulk) + offset;
        struct ibv_send_wr *request =
            add(link->end, from, size, small ? lent->small->lkey : lent->bulk->lkey);

        request->opcode = IBV_WR_RDMA_WRITE;
        request->wr.rdma.remote_addr = (small ? reached->small : reached->bulk) + offset;
        request->wr.rdma.rkey = small ? reached->small_key : reached->bulk_key;
}

static void verbs_send(struct link *link, const void *message, uint32_t size, uint64_t number, bool soon)
{
        struct verbs_end *end = link->end;
        struct wire_message *place = buffer(end, WINDOW + end->said % MESSAGES);
        struct ibv_send_wr *request, *bad;
        int error;

        memcpy(place, message, size);
        request = add(end, (uintptr_t)place, size, end->region->lkey);
        request->opcode = IBV_WR_SEND;
        request->wr_id |= number & ID_MASK;
        end->given += end->count;
        end->said++;
        end->marks[number % QUEUE].given = end->given;
        end->marks[number % QUEUE].said = end->said;
        if (soon || end->given - end->signalled_given >= QUEUE / 4 ||
            end->said - end->signalled_said >= MESSAGES / 4) {
                request->send_flags |= IBV_SEND_SIGNALED;
                end->signalled_given = end->given;
                end->signalled_said = end->said;
        }
        end->count = 0;
        count(COUNT_POSTS, 1);
        error = ibv_post_send(end->pair, end->requests, &bad);
        if (error)
                link_down(link, error, "the queue pair takes no work");
}

static void complete(const struct ibv_wc *completion)
{
        struct verbs_end *end = end_numbered((uint32_t)(completion->wr_id >> ID_SHIFT));
        uint64_t what = completion->wr_id & ID_MASK;
        struct link *link;

        count(COUNT_COMPLETIONS, 1);
        if (!end)
                return;
        link = end->link;
        if (completion->status != IBV_WC_SUCCESS) {
                link_down(link, EIO, verbs.wc_status_str(completion->status));
        } else if (completion->wr_id & ID_RECEIVE) {
                if (!end->connecting) {
                        hear_message(end, what, completion->byte_len);
                } else if (end->early_count < WINDOW) {
                        end->early[end->early_count].buffer = (uint32_t)what;
                        end->early[end->early_count++].size = completion->byte_len;
                }
        } else {
                end->done = end->marks[what % QUEUE].given;
                end->heard = end->marks[what % QUEUE].said;
                link_completed(link, what);
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
                        all_down(device, EIO, "the completion queue can't be read");
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
    .open = verbs_open,
    .close = verbs_close,
    .make = verbs_make,
    .connect = verbs_connect,
    .unmake = verbs_unmake,
    .lend = verbs_lend,
    .take_back = verbs_take_back,
    .reach = verbs_reach,
    .forget = verbs_forget,
    .room = verbs_room,
    .write = verbs_write,
    .send = verbs_send,
    .poll = verbs_poll,
    .arm = verbs_arm,
    .beat = verbs_beat,
};
