#include "cm_resolve.h"

#include "agent.h"
#include "client.h"
#include "cm_events.h"
#include "cm_send.h"
#include "cm_steps.h"
#include "cm_table.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

enum {
        PATIENCE = 2000, /* ms: the router takes a few */
        FIRST_PORT = 32768,
        LAST_PORT = 60999,
        PATH_SIZE = 72, /* of struct ib_path_rec_data */
        PATH_FLAGS = IB_PATH_GMP | IB_PATH_PRIMARY | IB_PATH_BIDIRECTIONAL,
};

/* --- the router's ports */

/* Wait until the router has answered something to some thread, but not long: nobody may be there to
 * take it. */
static void wait_for_answer(uint32_t before)
{
        const struct timespec pause = {.tv_nsec = 10000000};

        sys_4(SYS_futex, &cm_answers, FUTEX_WAIT_PRIVATE, before, &pause);
}

/* Have the id's port, or any if it is 0, for the process. */
static int reserve(struct cm_id *id)
{
        uint64_t until = cm_now() + PATIENCE;
        uint32_t number = id->number, answers;
        bool there;

        agent_start();
        mutex_release(&cm_mutex);
        there = client_open(PATIENCE);
        mutex_take(&cm_mutex);
        id = cm_id_of(number);
        if (!id)
                return -EINVAL;
        id->asks = there && cm_send_listen(id);
        id->refused = id->asks ? 0 : -ENODEV;
        while (id->asks && cm_now() < until) {
                answers = atomic_load(&cm_answers);
                mutex_release(&cm_mutex);
                client_receive();
                wait_for_answer(answers);
                mutex_take(&cm_mutex);
                id = cm_id_of(number);
                if (!id)
                        return -EINVAL;
        }
        if (!id->asks)
                return id->refused;
        id->asks = false;
        if (!id->registered)
                cm_send_listen_end(id);
        return -ETIMEDOUT;
}

/* A port for a connection: nobody else has to know of it. */
static uint16_t some_port(void)
{
        static uint32_t next;

        if (!next)
                sys_3(SYS_getrandom, &next, sizeof next, 0);
        return (uint16_t)(FIRST_PORT + next++ % (LAST_PORT - FIRST_PORT + 1));
}

/* --- addresses */

/* The device's place of the address, if it isn't "any". */
static int find_device(struct cm_id *id)
{
        id->gid = cm_address_is_any(&id->source) ? -1 : cm_address_place(&id->source);
        if (id->gid >= 0 || cm_address_is_any(&id->source))
                return 0;
        return -EADDRNOTAVAIL;
}

static int take_address(struct cm_id *id, const union cm_address *address)
{
        int failed;

        if (id->state != CM_IDLE)
                return -EINVAL;
        id->source = *address;
        failed = find_device(id);
        if (failed) {
                id->source = (union cm_address){.any.sa_family = 0};
                return failed;
        }
        if (address->any.sa_family == AF_INET)
                id->only_family = true;
        id->state = CM_BOUND;
        return 0;
}

/* Of an id that goes back to where it was. */
static int unbind(struct cm_id *id, int failed)
{
        id->state = CM_IDLE;
        id->gid = -1;
        id->source = (union cm_address){.any.sa_family = 0};
        return failed;
}

int cm_bind(struct cm_id *id, const union cm_address *address)
{
        uint32_t number = id->number;
        int failed = take_address(id, address);

        if (failed)
                return failed;
        failed = reserve(id);
        id = cm_id_of(number);
        return failed && id ? unbind(id, failed) : failed;
}

/* The address that packets to the target come from. The route to groups leads to one network, often
 * to one without a device; then it is any address of the device. */
static int find_route(struct cm_id *id)
{
        uint16_t port = cm_address_port(&id->source);
        int failed = cm_address_source(&id->source, &id->target);

        if (!cm_address_is_multicast(&id->target) || (!failed && cm_address_place(&id->source) >= 0))
                return failed;
        if (!cm_address_own(&id->source, id->target.any.sa_family))
                return failed;
        cm_address_set_port(&id->source, port);
        return 0;
}

static int find_source(struct cm_id *id)
{
        uint16_t port = cm_address_port(&id->source);
        int failed;

        if (cm_address_is_any(&id->target)) {
                /* Oneself. */
                if (cm_address_is_any(&id->source) && !cm_address_own(&id->source, id->target.any.sa_family))
                        return -ENODEV;
                cm_address_set_port(&id->source, port);
                port = cm_address_port(&id->target);
                id->target = id->source;
                cm_address_set_port(&id->target, port);
        } else if (cm_address_is_any(&id->source)) {
                failed = find_route(id);
                if (failed)
                        return failed;
        }
        id->gid = cm_address_place(&id->source);
        return id->gid < 0 ? -ENODEV : 0;
}

int cm_resolve(struct cm_id *id, const union cm_address *from, const union cm_address *to)
{
        union cm_address source = *from;
        uint32_t number = id->number;
        int failed;

        if (!source.any.sa_family)
                source.any.sa_family = to->any.sa_family;
        if (id->state == CM_IDLE) {
                failed = cm_address_port(&source) ? cm_bind(id, &source) : take_address(id, &source);
                if (failed)
                        return failed;
        }
        id = cm_id_of(number);
        if (!id || id->state != CM_BOUND || id->source.any.sa_family != to->any.sa_family)
                return -EINVAL;
        if (!cm_address_port(&id->source))
                cm_address_set_port(&id->source, some_port());
        id->target = *to;
        failed = cm_address_is_multicast(to) && id->type != IBV_QPT_UD ? -EINVAL : find_source(id);
        if (!failed) {
                id->state = CM_ADDRESS_RESOLVED;
                id->peer.gid = cm_address_gid(&id->target);
        }
        cm_event_tell(id, failed ? CM_EVENT_ADDRESS_ERROR : CM_EVENT_ADDRESS_RESOLVED, failed);
        return 0;
}

int cm_resolve_route(struct cm_id *id)
{
        if (id->state != CM_ADDRESS_RESOLVED)
                return -EINVAL;
        id->state = CM_ROUTE_RESOLVED;
        cm_event_tell(id, CM_EVENT_ROUTE_RESOLVED, 0);
        return 0;
}

int cm_listen(struct cm_id *id, uint32_t backlog)
{
        static const union cm_address any = {.any.sa_family = AF_INET};
        uint32_t number = id->number;
        int failed = 0;

        if (id->state == CM_IDLE)
                failed = cm_bind(id, &any);
        id = cm_id_of(number);
        if (failed || !id || id->state != CM_BOUND)
                return failed ? failed : -EINVAL;
        /* Requests may come together with the router's answer. */
        id->backlog = backlog && backlog < CM_BACKLOG ? backlog : CM_BACKLOG;
        id->state = CM_LISTEN;
        /* Nobody else can have a port that one doesn't share. */
        if (id->registered && !id->reuse && cm_send_listen(id))
                return 0;
        failed = reserve(id);
        id = cm_id_of(number);
        if (failed && id)
                id->state = CM_BOUND;
        return failed;
}

/* --- options */

/* A path that the program has from elsewhere is the only one that there is. */
static int set_path(struct cm_id *id, const uint8_t *value, uint32_t size)
{
        uint32_t flags;

        if (size % PATH_SIZE)
                return -EINVAL;
        for (; size; size -= PATH_SIZE, value += PATH_SIZE) {
                memcpy(&flags, value, sizeof flags);
                if (flags == PATH_FLAGS)
                        return cm_resolve_route(id);
        }
        return -EINVAL;
}

/* Of RDMA_OPTION_ID_REUSEADDR and RDMA_OPTION_ID_AFONLY. */
static int set_flag(bool *flag, const void *value, uint32_t size)
{
        int on;

        if (size != sizeof on)
                return -EINVAL;
        memcpy(&on, value, sizeof on);
        *flag = on != 0;
        return 0;
}

static int set_reuse(struct cm_id *id, const void *value, uint32_t size)
{
        bool reuse;
        int failed = set_flag(&reuse, value, size);

        if (failed)
                return failed;
        if (id->state != CM_IDLE && (!reuse || id->state == CM_LISTEN))
                return -EINVAL;
        id->reuse = reuse;
        return 0;
}

static int set_id_option(struct cm_id *id, uint32_t name, const void *value, uint32_t size)
{
        const uint8_t *byte = value;

        switch (name) {
        case RDMA_OPTION_ID_TOS:
                if (size != sizeof *byte)
                        return -EINVAL;
                id->type_of_service = *byte;
                return 0;
        case RDMA_OPTION_ID_REUSEADDR:
                return set_reuse(id, value, size);
        case RDMA_OPTION_ID_AFONLY:
                if (id->state != CM_IDLE && id->state != CM_BOUND)
                        return -EINVAL;
                return set_flag(&id->only_family, value, size);
        case RDMA_OPTION_ID_ACK_TIMEOUT:
                if (size != sizeof *byte)
                        return -EINVAL;
                id->timeout = *byte;
                id->timeout_set = true;
                return 0;
        default:
                return -ENOSYS;
        }
}

int cm_set_option(struct cm_id *id, uint32_t level, uint32_t name, const void *value, uint32_t size)
{
        if (level == RDMA_OPTION_ID)
                return set_id_option(id, name, value, size);
        if (level == RDMA_OPTION_IB && name == RDMA_OPTION_IB_PATH)
                return set_path(id, value, size);
        return -ENOSYS;
}

/* --- groups */

int cm_join(struct cm_id *id, const union cm_address *address, uint64_t uid, uint32_t *place)
{
        struct cm_group *group;
        struct cm_event *event;

        if (id->gid < 0 || id->type != IBV_QPT_UD ||
            (id->state != CM_BOUND && id->state < CM_ADDRESS_RESOLVED))
                return -EINVAL;
        group = cm_group_new(id);
        if (!group)
                return -ENOMEM;
        group->uid = uid;
        group->address = *address;
        *place = group->place;
        event = cm_event_new(id, CM_EVENT_JOINED, 0);
        if (!event) {
                cm_group_free(group);
                return -ENOMEM;
        }
        cm_event_joined(event, group);
        cm_event_put(event);
        return 0;
}
