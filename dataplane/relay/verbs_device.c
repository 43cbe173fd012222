#include "verbs_device.h"

#include "lent_files.h"
#include "mirror.h"
#include "transports.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum {
        LINKS_FIRST = 32, /* that the completion queue has room for; doubled when needed */
        CHECK = 2000,     /* ms between checks that the device is still there */
};

struct verbs_functions verbs;
struct verbs_device *verbs_device;
struct verbs_channel *verbs_channels[CHANNELS];

bool verbs_load(char *text)
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

int verbs_fail(char *text, const char *what)
{
        int error = errno ? errno : EIO;

        return relay_refuse(text, error, "%s: %s", what, strerror(error));
}

void verbs_put_device(struct verbs_device *d)
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

void verbs_all_down(const struct verbs_device *d, int error, const char *text)
{
        for (int i = 0; i < CHANNELS; i++)
                if (verbs_channels[i] && verbs_channels[i]->device == d)
                        link_down(verbs_channels[i]->link, error, text);
}

/* The device is being removed. The kernel waits for all its users, so everything of it is freed
 * now. Links whose connections are registered with it can only go on over frames. */
static void lose(struct verbs_device *d, const char *text)
{
        verbs_all_down(d, ENODEV, text);
        if (d != verbs_device)
                return;
        mirrors_deregister(&verbs_transport);
        lent_files_deregister(&verbs_transport);
        verbs_device = NULL;
        verbs_put_device(d);
}

static void on_completion(struct watch *watch, UNUSED uint32_t events)
{
        struct verbs_device *d = OF(watch, struct verbs_device, completions);
        struct ibv_cq *queue;
        void *unused;

        count(COUNT_CALLS, 1);
        if (verbs.get_cq_event(d->channel, &queue, &unused))
                return;
        d->armed = false;
        verbs.ack_cq_events(queue, 1);
}

static void on_event(struct watch *watch, UNUSED uint32_t events)
{
        struct verbs_device *d = OF(watch, struct verbs_device, events);
        struct ibv_async_event event;

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
                                if (verbs_channels[i] && verbs_channels[i]->pair == pair)
                                        link_down(verbs_channels[i]->link, EIO, name);
                        break;
                case IBV_EVENT_DEVICE_FATAL:
                        lose(d, name);
                        verbs_put_device(d);
                        return;
                case IBV_EVENT_CQ_ERR:
                case IBV_EVENT_PORT_ERR:
                        verbs_all_down(d, ENETDOWN, name);
                        break;
                default:
                        break;
                }
        }
        verbs_put_device(d);
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
                verbs_fail(text, "opening the RDMA device");
        if (list)
                verbs.free_device_list(list);
        return context;
}

static bool has_name(const struct verbs_device *d)
{
        return !access(d->context->device->dev_path, F_OK) || errno != ENOENT;
}

/* Makes what links need of an opened device. */
static int set_up(struct verbs_device *d, const struct relay_open *open, char *text)
{
        struct ibv_device_attr attributes;

        memset(&d->port, 0, sizeof d->port);
        if (verbs.query_device(d->context, &attributes) || verbs.query_port(d->context, open->port, &d->port))
                return verbs_fail(text, "querying the RDMA device's port");
        if (d->port.state != IBV_PORT_ACTIVE)
                return relay_refuse(text, ENETDOWN, "the RDMA device's port is not active");
        if (verbs.query_gid(d->context, open->port, open->gid_index, &d->gid))
                return verbs_fail(text, "querying the RDMA device's GID");
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
                return verbs_fail(text, "creating a completion queue");
        d->completions = (struct watch){.fd = d->channel->fd, .call = on_completion};
        d->events = (struct watch){.fd = d->context->async_fd, .call = on_event};
        if (!nonblocking(d->channel->fd) || !nonblocking(d->context->async_fd) ||
            !watch_add(&d->completions, EPOLLIN) || !watch_add(&d->events, EPOLLIN))
                return verbs_fail(text, "waiting for the RDMA device");
        return 0;
}

int verbs_open_device(const struct relay_open *open, uint32_t *mtu, char *text)
{
        struct verbs_device *d = relay_memory(sizeof *d, "memory for a device");
        int error;

        d->users = 1;
        d->completions.fd = d->events.fd = -1;
        d->context = open_by_name(open->device, text);
        error = d->context ? set_up(d, open, text) : ENODEV;
        if (error) {
                verbs_put_device(d);
                return error;
        }
        verbs_device = d;
        *mtu = 128u << d->port.active_mtu;
        return 0;
}

void verbs_close_device(void)
{
        lent_files_deregister(&verbs_transport);
        if (verbs_device)
                verbs_put_device(verbs_device);
        verbs_device = NULL;
}

/* A device whose users the kernel cannot disconnect, such as rdma_rxe's, is removed without an
 * event: only its name disappears. */
uint64_t verbs_tick(uint64_t present)
{
        static uint64_t checked_at;

        if (!verbs_device)
                return 0;
        if (present - checked_at >= CHECK * UINT64_C(1000000)) {
                checked_at = present;
                count(COUNT_CALLS, 1);
                if (verbs_device->named && !has_name(verbs_device)) {
                        lose(verbs_device, "the RDMA device was removed");
                        return 0;
                }
        }
        return checked_at + CHECK * UINT64_C(1000000);
}
