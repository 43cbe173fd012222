#include "cm_command.h"

#include "cm_connect.h"
#include "cm_query.h"
#include "cm_resolve.h"
#include "cm_steps.h"
#include "cm_table.h"
#include "counter.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* One command: what was written, and how many bytes its answer may have. */
struct command {
        struct cm_file *file;
        int fd;
        const void *in;
        size_t in_size, out_size;
};

/* Read a command of this type, which programs of all releases write so, up to `least` bytes. */
#define READ_LEAST(command, to, least)                                                                       \
        ((command)->in_size < (least)                                                                        \
             ? -EINVAL                                                                                       \
             : (memcpy((to), (command)->in,                                                                  \
                       (command)->in_size < sizeof *(to) ? (command)->in_size : sizeof *(to)),               \
                0))
#define READ(command, to) READ_LEAST(command, to, sizeof *(to))

/* Where the program wants its answer, if it has that much room for it. */
static int answer(const struct command *command, uint64_t where, const void *from, size_t size)
{
        if (command->out_size < size)
                return -ENOSPC;
        if (!where)
                return -EFAULT;
        memcpy((void *)(uintptr_t)where, from, size);
        return 0;
}

static int find(const struct command *command, uint32_t place, struct cm_id **id)
{
        return cm_id_find(command->file, place, id);
}

/* Read a command, and find the id that it names. */
#define READ_ID_LEAST(command, to, least, found)                                                             \
        (READ_LEAST(command, to, least) ? -EINVAL : find(command, (to)->id, found))
#define READ_ID(command, to, found) READ_ID_LEAST(command, to, sizeof *(to), found)

/* --- ids */

static int type_of(uint32_t space, uint8_t asked, uint8_t *type)
{
        switch (space) {
        case RDMA_PS_TCP:
                *type = IBV_QPT_RC;
                return 0;
        case RDMA_PS_UDP:
        case RDMA_PS_IPOIB:
                *type = IBV_QPT_UD;
                return 0;
        case RDMA_PS_IB:
                *type = asked;
                return 0;
        default:
                return -EINVAL;
        }
}

static int create_id(struct command *command)
{
        struct rdma_ucm_create_id wanted = {0};
        struct rdma_ucm_create_id_resp created = {0};
        struct cm_id *id;
        uint8_t type;

        if (command->out_size < sizeof created)
                return -ENOSPC;
        if (READ(command, &wanted) || type_of(wanted.ps, wanted.qp_type, &type))
                return -EINVAL;
        if (!wanted.response)
                return -EFAULT;
        id = cm_id_new(command->file, wanted.ps, type);
        if (!id)
                return -ENOMEM;
        id->uid = wanted.uid;
        id->qkey = CM_UDP_QKEY;
        created.id = id->place;
        return answer(command, wanted.response, &created, sizeof created);
}

static int destroy_id(struct command *command)
{
        struct rdma_ucm_destroy_id wanted = {0};
        struct rdma_ucm_destroy_id_resp destroyed = {0};
        struct cm_id *id;
        int failed;

        if (command->out_size < sizeof destroyed)
                return -ENOSPC;
        failed = READ_ID(command, &wanted, &id);
        if (failed)
                return failed;
        destroyed.events_reported = id->events_reported;
        cm_end(id);
        return answer(command, wanted.response, &destroyed, sizeof destroyed);
}

/* The channel of another descriptor gives an id to this one. */
static int migrate_id(struct command *command)
{
        struct rdma_ucm_migrate_id wanted = {0};
        struct rdma_ucm_migrate_resp migrated = {0};
        struct cm_file *from;
        struct cm_id *id;
        int failed;

        if (READ(command, &wanted))
                return -EINVAL;
        if (command->out_size < sizeof migrated)
                return -ENOSPC;
        from = cm_file_of((int)wanted.fd);
        if (!from)
                return -ENOENT;
        failed = cm_id_find(from, wanted.id, &id);
        if (failed)
                return failed;
        if (from != command->file)
                cm_id_move(id, command->file);
        migrated.events_reported = id->events_reported;
        return answer(command, wanted.response, &migrated, sizeof migrated);
}

/* --- addresses */

static int bind_ip(struct command *command)
{
        struct rdma_ucm_bind_ip wanted = {0};
        union cm_address address;
        struct cm_id *id;
        int failed;

        failed = READ_ID(command, &wanted, &id);
        if (failed)
                return failed;
        if (!cm_address_read(&address, &wanted.addr, sizeof wanted.addr))
                return -EINVAL;
        return cm_bind(id, &address);
}

/* Does the program say the size that an address of this family has? */
static int check_size(const struct __kernel_sockaddr_storage *address, uint16_t size)
{
        return size && size == cm_address_size(address->ss_family) ? 0 : -EINVAL;
}

static int bind_any(struct command *command)
{
        struct rdma_ucm_bind wanted = {0};
        union cm_address address;
        struct cm_id *id;
        int failed;

        if (READ(command, &wanted) || wanted.reserved || check_size(&wanted.addr, wanted.addr_size))
                return -EINVAL;
        failed = find(command, wanted.id, &id);
        if (failed)
                return failed;
        /* An address of InfiniBand: librdmacm tries whether there are any. */
        if (!cm_address_read(&address, &wanted.addr, sizeof wanted.addr))
                return -EAFNOSUPPORT;
        return cm_bind(id, &address);
}

static int resolve(struct command *command, uint32_t place, const void *from, const void *to, size_t room)
{
        union cm_address source, target;
        struct cm_id *id;
        int failed = find(command, place, &id);

        if (failed)
                return failed;
        cm_address_read(&source, from, room);
        if (!cm_address_read(&target, to, room))
                return -EINVAL;
        return cm_resolve(id, &source, &target);
}

static int resolve_ip(struct command *command)
{
        struct rdma_ucm_resolve_ip wanted = {0};

        if (READ(command, &wanted))
                return -EINVAL;
        return resolve(command, wanted.id, &wanted.src_addr, &wanted.dst_addr, sizeof wanted.src_addr);
}

static int resolve_any(struct command *command)
{
        struct rdma_ucm_resolve_addr wanted = {0};

        if (READ(command, &wanted) || wanted.reserved || check_size(&wanted.dst_addr, wanted.dst_size) ||
            (wanted.src_size && check_size(&wanted.src_addr, wanted.src_size)))
                return -EINVAL;
        return resolve(command, wanted.id, &wanted.src_addr, &wanted.dst_addr, sizeof wanted.src_addr);
}

static int resolve_route(struct command *command)
{
        struct rdma_ucm_resolve_route wanted = {0};
        struct cm_id *id;
        int failed;

        failed = READ_ID(command, &wanted, &id);
        return failed ? failed : cm_resolve_route(id);
}

static int query_route(struct command *command)
{
        enum { LEAST = offsetof(struct rdma_ucm_query_route_resp, ibdev_index) };
        struct rdma_ucm_query wanted = {0};
        struct rdma_ucm_query_route_resp found;
        struct cm_id *id;
        int failed;

        if (command->out_size < LEAST)
                return -ENOSPC;
        failed = READ_ID(command, &wanted, &id);
        if (failed)
                return failed;
        cm_query_route(id, &found);
        return answer(command, wanted.response, &found,
                      command->out_size < sizeof found ? command->out_size : sizeof found);
}

static int query(struct command *command)
{
        struct rdma_ucm_query wanted = {0};
        struct cm_id *id;
        void *to;
        int got;

        got = READ_ID(command, &wanted, &id);
        if (got)
                return got;
        to = (void *)(uintptr_t)wanted.response;
        if (!to)
                return -EFAULT;
        switch (wanted.option) {
        case RDMA_USER_CM_QUERY_ADDR:
                got = cm_query_address(id, to, command->out_size);
                break;
        case RDMA_USER_CM_QUERY_PATH:
                got = cm_query_path(id, to, command->out_size);
                break;
        case RDMA_USER_CM_QUERY_GID:
                got = cm_query_gid(id, to, command->out_size);
                break;
        default:
                return -ENOSYS;
        }
        return got < 0 ? got : 0;
}

static int set_option(struct command *command)
{
        enum { MOST = 4096 /* bytes, as in the kernel */ };
        struct rdma_ucm_set_option wanted = {0};
        struct cm_id *id;
        int failed;

        if (READ(command, &wanted))
                return -EINVAL;
        if (wanted.optlen > MOST)
                return -EINVAL;
        failed = find(command, wanted.id, &id);
        if (failed)
                return failed;
        if (!wanted.optval)
                return -EFAULT;
        return cm_set_option(id, wanted.level, wanted.optname, (const void *)(uintptr_t)wanted.optval,
                             wanted.optlen);
}

/* --- connections */

static int listen_for(struct command *command)
{
        struct rdma_ucm_listen wanted = {0};
        struct cm_id *id;
        int failed;

        failed = READ_ID(command, &wanted, &id);
        return failed ? failed : cm_listen(id, (int)wanted.backlog > 0 ? wanted.backlog : 0);
}

static int connect_to(struct command *command)
{
        struct rdma_ucm_connect wanted = {0};
        struct cm_id *id;
        int failed;

        if (READ_LEAST(command, &wanted, offsetof(struct rdma_ucm_connect, ece)) || !wanted.conn_param.valid)
                return -EINVAL;
        failed = find(command, wanted.id, &id);
        return failed ? failed : cm_connect(id, &wanted.conn_param);
}

static int accept_it(struct command *command)
{
        struct rdma_ucm_accept wanted = {0};
        struct cm_id *id;
        int failed;

        failed = READ_ID_LEAST(command, &wanted, offsetof(struct rdma_ucm_accept, ece), &id);
        if (failed)
                return failed;
        failed = cm_accept(id, &wanted.conn_param);
        if (!failed && wanted.conn_param.valid)
                id->uid = wanted.uid;
        return failed;
}

static int reject(struct command *command)
{
        struct rdma_ucm_reject wanted = {0};
        struct cm_id *id;
        int failed;

        failed = READ_ID(command, &wanted, &id);
        return failed ? failed
                      : cm_reject(id, wanted.private_data, wanted.private_data_len,
                                  wanted.reason ? wanted.reason : CM_REJECT_BY_PROGRAM);
}

static int disconnect(struct command *command)
{
        struct rdma_ucm_disconnect wanted = {0};
        struct cm_id *id;
        int failed;

        failed = READ_ID(command, &wanted, &id);
        return failed ? failed : cm_disconnect(id);
}

static int notify(struct command *command)
{
        struct rdma_ucm_notify wanted = {0};
        struct cm_id *id;
        int failed;

        failed = READ_ID(command, &wanted, &id);
        return failed ? failed : cm_notify(id, wanted.event);
}

static int attributes(struct command *command)
{
        struct rdma_ucm_init_qp_attr wanted = {0};
        struct ib_uverbs_qp_attr found;
        struct cm_id *id;
        int failed;

        if (command->out_size < sizeof found)
                return -ENOSPC;
        failed = READ_ID(command, &wanted, &id);
        if (!failed)
                failed = cm_attributes(id, wanted.qp_state, &found);
        return failed ? failed : answer(command, wanted.response, &found, sizeof found);
}

/* --- groups */

static int join(struct command *command, uint32_t place, const void *from, size_t room, uint64_t uid,
                uint64_t response)
{
        struct rdma_ucm_create_id_resp joined = {0};
        union cm_address address;
        struct cm_id *id;
        int failed;

        if (command->out_size < sizeof joined)
                return -ENOSPC;
        failed = find(command, place, &id);
        if (failed)
                return failed;
        if (!cm_address_read(&address, from, room))
                return -EINVAL;
        if (!response)
                return -EFAULT;
        failed = cm_join(id, &address, uid, &joined.id);
        return failed ? failed : answer(command, response, &joined, sizeof joined);
}

static int join_ip(struct command *command)
{
        struct rdma_ucm_join_ip_mcast wanted = {0};

        if (READ(command, &wanted))
                return -EINVAL;
        return join(command, wanted.id, &wanted.addr, sizeof wanted.addr, wanted.uid, wanted.response);
}

static int join_any(struct command *command)
{
        struct rdma_ucm_join_mcast wanted = {0};

        if (READ(command, &wanted) || check_size(&wanted.addr, wanted.addr_size) ||
            wanted.join_flags >= RDMA_MC_JOIN_FLAG_RESERVED)
                return -EINVAL;
        return join(command, wanted.id, &wanted.addr, sizeof wanted.addr, wanted.uid, wanted.response);
}

static int leave(struct command *command)
{
        struct rdma_ucm_destroy_id wanted = {0};
        struct rdma_ucm_destroy_id_resp left = {0};
        struct cm_group *group;
        struct cm_event *event;
        int failed;

        if (command->out_size < sizeof left)
                return -ENOSPC;
        if (READ(command, &wanted))
                return -EINVAL;
        failed = cm_group_find(command->file, wanted.id, &group);
        if (failed)
                return failed;
        while ((event = cm_event_withdraw(group->id, group)))
                free(event);
        left.events_reported = group->events_reported;
        cm_group_free(group);
        return answer(command, wanted.response, &left, sizeof left);
}

/* --- events */

/* Waits without cm_mutex, as the program has chosen: read() may block, be interrupted by a signal,
 * or cancelled. */
static int get_event(struct command *command)
{
        enum { LEAST = sizeof(struct rdma_ucm_event_resp) - sizeof(struct rdma_ucm_ece) - sizeof(uint32_t) };
        struct rdma_ucm_get_event wanted = {0};
        struct cm_event *event;
        bool got;
        int failed;

        if (command->out_size < LEAST)
                return -ENOSPC;
        if (READ(command, &wanted))
                return -EINVAL;
        do {
                mutex_release(&cm_mutex);
                got = counter_wait(command->fd);
                mutex_take(&cm_mutex);
                if (!got)
                        return -errno;
                command->file = cm_file_of(command->fd);
                if (!command->file)
                        return -EBADF;
                event = cm_event_first(command->file);
        } while (!event);
        failed = answer(command, wanted.response, &event->said,
                        command->out_size < sizeof event->said ? command->out_size : sizeof event->said);
        if (failed)
                counter_add(command->fd);
        else
                cm_event_take(event);
        return failed;
}

/* --- all of them */

static int (*const commands[])(struct command *) = {
    [RDMA_USER_CM_CMD_CREATE_ID] = create_id,
    [RDMA_USER_CM_CMD_DESTROY_ID] = destroy_id,
    [RDMA_USER_CM_CMD_BIND_IP] = bind_ip,
    [RDMA_USER_CM_CMD_RESOLVE_IP] = resolve_ip,
    [RDMA_USER_CM_CMD_RESOLVE_ROUTE] = resolve_route,
    [RDMA_USER_CM_CMD_QUERY_ROUTE] = query_route,
    [RDMA_USER_CM_CMD_CONNECT] = connect_to,
    [RDMA_USER_CM_CMD_LISTEN] = listen_for,
    [RDMA_USER_CM_CMD_ACCEPT] = accept_it,
    [RDMA_USER_CM_CMD_REJECT] = reject,
    [RDMA_USER_CM_CMD_DISCONNECT] = disconnect,
    [RDMA_USER_CM_CMD_INIT_QP_ATTR] = attributes,
    [RDMA_USER_CM_CMD_GET_EVENT] = get_event,
    [RDMA_USER_CM_CMD_GET_OPTION] = NULL, /* the kernel has none either */
    [RDMA_USER_CM_CMD_SET_OPTION] = set_option,
    [RDMA_USER_CM_CMD_NOTIFY] = notify,
    [RDMA_USER_CM_CMD_JOIN_IP_MCAST] = join_ip,
    [RDMA_USER_CM_CMD_LEAVE_MCAST] = leave,
    [RDMA_USER_CM_CMD_MIGRATE_ID] = migrate_id,
    [RDMA_USER_CM_CMD_QUERY] = query,
    [RDMA_USER_CM_CMD_BIND] = bind_any,
    [RDMA_USER_CM_CMD_RESOLVE_ADDR] = resolve_any,
    [RDMA_USER_CM_CMD_JOIN_MCAST] = join_any,
};

ssize_t cm_write(int fd, const void *buffer, size_t size)
{
        struct command command = {.fd = fd};
        struct rdma_ucm_cmd_hdr header;
        int failed;

        if (size < sizeof header)
                return -EINVAL;
        if (!buffer)
                return -EFAULT;
        memcpy(&header, buffer, sizeof header);
        if (header.cmd >= sizeof commands / sizeof *commands || header.in + sizeof header > size)
                return -EINVAL;
        if (!commands[header.cmd])
                return -ENOSYS;
        command.in = (const char *)buffer + sizeof header;
        command.in_size = header.in;
        command.out_size = header.out;
        mutex_take(&cm_mutex);
        command.file = cm_file_of(fd);
        failed = command.file ? commands[header.cmd](&command) : -EIO;
        mutex_release(&cm_mutex);
        return failed ? failed : (ssize_t)size;
}
