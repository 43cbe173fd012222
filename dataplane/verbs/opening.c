/* Opening and closing the device. */
#include "opening.h"

#include "attributes.h"
#include "cq.h"
#include "memory.h"
#include "opened.h"
#include "parent_domain.h"
#include "post.h"
#include "qp.h"
#include "srq.h"

#include <errno.h>
#include <stdlib.h>

static struct mutex mutex;
static struct opened *all;

/* What programs call through a context. Whatever is missing is not supported. */
static void set_operations(struct verbs_context *extended)
{
        *extended = (struct verbs_context){
            .query_port = attributes_port,
            .modify_cq = cq_modify,
            .create_cq_ex = cq_create_extended,
            .create_qp_ex = qp_create_extended,
            .create_srq_ex = srq_create_extended,
            .query_device_ex = attributes_device,
            .alloc_td = thread_domain_make,
            .dealloc_td = thread_domain_end,
            .alloc_parent_domain = parent_domain_make,
            .sz = sizeof *extended,
        };
        extended->context.ops = (struct ibv_context_ops){
            .poll_cq = cq_poll,
            .req_notify_cq = cq_request,
            .alloc_mw = memory_add_window,
            .dealloc_mw = memory_remove_window,
            .bind_mw = post_bind,
            .post_send = post_send,
            .post_recv = post_receive,
            .post_srq_recv = srq_post,
        };
        extended->context.abi_compat = __VERBS_ABI_IS_EXTENDED;
}

static struct ibv_async_event of_port(enum ibv_event_type type)
{
        return (struct ibv_async_event){.element.port_num = PORT_NUMBER, .event_type = type};
}

VERB struct ibv_context *ibv_open_device(struct ibv_device *device)
{
        struct opened *opened = calloc(1, sizeof *opened);

        if (!opened) {
                errno = ENOMEM;
                return NULL;
        }
        if (!events_start(&opened->events)) {
                free(opened);
                return NULL;
        }
        set_operations(&opened->extended);
        opened->extended.context.device = device;
        opened->extended.context.async_fd = opened->events.fd;
        /* There is no command to send. Programs that ask what it is find an open descriptor. */
        opened->extended.context.cmd_fd = opened->events.fd;
        opened->extended.context.num_comp_vectors = 1;
        opened->gids_changed.what = of_port(IBV_EVENT_GID_CHANGE);
        opened->port_up.what = of_port(IBV_EVENT_PORT_ACTIVE);
        opened->port_down.what = of_port(IBV_EVENT_PORT_ERR);
        mutex_take(&mutex);
        opened->next = all;
        all = opened;
        mutex_release(&mutex);
        return &opened->extended.context;
}

VERB int ibv_close_device(struct ibv_context *context)
{
        struct opened *opened = opened_of(context), **at = &all;

        if (!opened_is_lost(context)) {
                mutex_take(&mutex);
                while (*at != opened)
                        at = &(*at)->next;
                *at = opened->next;
                mutex_release(&mutex);
        }
        events_end(&opened->events);
        free(opened);
        return 0;
}

void opening_forget(void)
{
        mutex = (struct mutex){0};
        all = NULL;
}

void opening_tell_gids_changed(void)
{
        mutex_take(&mutex);
        for (struct opened *opened = all; opened; opened = opened->next)
                events_put(&opened->events, &opened->gids_changed);
        mutex_release(&mutex);
}

void opening_tell_port(bool active)
{
        mutex_take(&mutex);
        for (struct opened *opened = all; opened; opened = opened->next) {
                events_drop(&opened->events, active ? &opened->port_down : &opened->port_up);
                events_put(&opened->events, active ? &opened->port_up : &opened->port_down);
        }
        mutex_release(&mutex);
}

VERB int ibv_get_async_event(struct ibv_context *context, struct ibv_async_event *event)
{
        /* What the router says of the port is an event, too. */
        queue_watch();
        return events_get(&opened_of(context)->events, event) ? 0 : -1;
}
