#include "channel.h"

#include "counter.h"
#include "port.h"

#include <errno.h>
#include <stdlib.h>

/* --- the eventfd */

static int make_counter(void)
{
        int fd = counter_make();

        if (fd >= 0)
                return fd;
        errno = -fd;
        return -1;
}

static bool wait_for_one(int fd, uint32_t generation)
{
        if (generation == port_generation())
                return counter_wait(fd);
        errno = EIO;
        return false;
}

/* --- acknowledgements */

/* Somebody waits until there are none left. */
#define WAITED_FOR UINT32_C(0x80000000)

static void owe(uint32_t *unacknowledged)
{
        __atomic_fetch_add(unacknowledged, 1, __ATOMIC_RELAXED);
}

static void acknowledge(uint32_t *unacknowledged, uint32_t many)
{
        /* The object may be gone after this: futex() only uses its address. */
        if (__atomic_sub_fetch(unacknowledged, many, __ATOMIC_RELEASE) == WAITED_FOR)
                sys_3(SYS_futex, unacknowledged, FUTEX_WAKE_PRIVATE, 1);
}

void events_wait(uint32_t *unacknowledged)
{
        uint32_t now = __atomic_or_fetch(unacknowledged, WAITED_FOR, __ATOMIC_ACQUIRE);

        while (now != WAITED_FOR) {
                sys_4(SYS_futex, unacknowledged, FUTEX_WAIT_PRIVATE, now, 0);
                now = __atomic_load_n(unacknowledged, __ATOMIC_ACQUIRE);
        }
}

/* --- completion channels */

VERB struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
        struct channel *channel = calloc(1, sizeof *channel);

        if (!channel) {
                errno = ENOMEM;
                return NULL;
        }
        channel->generation = port_generation();
        channel->plain.context = context;
        channel->plain.fd = make_counter();
        channel->last = &channel->first;
        if (channel->plain.fd >= 0)
                return &channel->plain;
        free(channel);
        return NULL;
}

VERB int ibv_destroy_comp_channel(struct ibv_comp_channel *plain)
{
        struct channel *channel = channel_of(plain);
        bool used;

        if (channel->generation == port_generation()) {
                mutex_take(&channel->mutex);
                used = plain->refcnt;
                mutex_release(&channel->mutex);
                if (used)
                        return EBUSY;
        }
        close(plain->fd);
        free(channel);
        return 0;
}

void channel_join(struct channel *channel)
{
        mutex_take(&channel->mutex);
        channel->plain.refcnt++;
        mutex_release(&channel->mutex);
}

static void append(struct channel *channel, struct channel_member *member)
{
        member->next = NULL;
        *channel->last = member;
        channel->last = &member->next;
}

static void remove_member(struct channel *channel, struct channel_member *member)
{
        struct channel_member **at = &channel->first;

        while (*at != member)
                at = &(*at)->next;
        *at = member->next;
        if (!*at)
                channel->last = at;
}

void channel_put(struct channel *channel, struct channel_member *member)
{
        mutex_take(&channel->mutex);
        if (!member->unread++)
                append(channel, member);
        counter_add(channel->plain.fd);
        mutex_release(&channel->mutex);
}

void channel_leave(struct channel *channel, struct channel_member *member)
{
        mutex_take(&channel->mutex);
        if (member->unread)
                remove_member(channel, member);
        for (; member->unread; member->unread--)
                counter_drop(channel->plain.fd);
        channel->plain.refcnt--;
        mutex_release(&channel->mutex);
        events_wait(&member->queue->comp_events_completed);
}

/* The queue of the oldest event, which is taken. */
static struct ibv_cq *take_event(struct channel *channel)
{
        struct channel_member *member;
        struct ibv_cq *queue = NULL;

        mutex_take(&channel->mutex);
        member = channel->first;
        if (member) {
                queue = member->queue;
                remove_member(channel, member);
                if (--member->unread)
                        append(channel, member);
                owe(&queue->comp_events_completed);
        }
        mutex_release(&channel->mutex);
        return queue;
}

VERB int ibv_get_cq_event(struct ibv_comp_channel *plain, struct ibv_cq **queue, void **of_program)
{
        struct ibv_cq *found;

        do {
                if (!wait_for_one(plain->fd, channel_of(plain)->generation))
                        return -1;
                found = take_event(channel_of(plain));
        } while (!found);
        *queue = found;
        *of_program = found->cq_context;
        return 0;
}

VERB void ibv_ack_cq_events(struct ibv_cq *queue, unsigned int many)
{
        acknowledge(&queue->comp_events_completed, many);
}

/* --- asynchronous events */

/* Where the acknowledgements of an event are counted; NULL: it is of no object. */
static uint32_t *owed_for(const struct ibv_async_event *event)
{
        switch (event->event_type) {
        case IBV_EVENT_CQ_ERR:
                return &event->element.cq->async_events_completed;
        case IBV_EVENT_QP_FATAL:
        case IBV_EVENT_QP_REQ_ERR:
        case IBV_EVENT_QP_ACCESS_ERR:
        case IBV_EVENT_COMM_EST:
        case IBV_EVENT_SQ_DRAINED:
        case IBV_EVENT_PATH_MIG:
        case IBV_EVENT_PATH_MIG_ERR:
        case IBV_EVENT_QP_LAST_WQE_REACHED:
                return &event->element.qp->events_completed;
        case IBV_EVENT_SRQ_ERR:
        case IBV_EVENT_SRQ_LIMIT_REACHED:
                return &event->element.srq->events_completed;
        default:
                return NULL;
        }
}

bool events_start(struct events *events)
{
        *events = (struct events){.generation = port_generation(), .fd = make_counter()};
        events->last = &events->first;
        return events->fd >= 0;
}

void events_end(struct events *events)
{
        close(events->fd);
}

void events_put(struct events *events, struct event *event)
{
        mutex_take(&events->mutex);
        if (!event->unread) {
                event->unread = true;
                event->next = NULL;
                *events->last = event;
                events->last = &event->next;
                counter_add(events->fd);
        }
        mutex_release(&events->mutex);
}

/* Under the mutex. */
static void remove_event(struct events *events, struct event *event)
{
        struct event **at = &events->first;

        while (*at != event)
                at = &(*at)->next;
        *at = event->next;
        if (!*at)
                events->last = at;
        event->unread = false;
}

void events_drop(struct events *events, struct event *event)
{
        mutex_take(&events->mutex);
        if (event->unread) {
                remove_event(events, event);
                counter_drop(events->fd);
        }
        mutex_release(&events->mutex);
}

bool events_get(struct events *events, struct ibv_async_event *event)
{
        struct event *oldest;
        uint32_t *owed;

        do {
                if (!wait_for_one(events->fd, events->generation))
                        return false;
                mutex_take(&events->mutex);
                oldest = events->first;
                if (oldest) {
                        remove_event(events, oldest);
                        *event = oldest->what;
                        owed = owed_for(event);
                        if (owed)
                                owe(owed);
                }
                mutex_release(&events->mutex);
        } while (!oldest);
        return true;
}

VERB void ibv_ack_async_event(struct ibv_async_event *event)
{
        uint32_t *owed = owed_for(event);

        if (owed)
                acknowledge(owed, 1);
}
