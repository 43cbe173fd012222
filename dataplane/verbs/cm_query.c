#include "cm_query.h"

#include "port.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

enum {
        IB_FAMILY = 27, /* AF_IB */
        PARTITION = 0xffff,
        EXACTLY = 2, /* what follows is no limit */
        RATE = IBV_RATE_100_GBPS,
        LIFE_TIME = 16, /* 4.096 us << 16: as of RoCE in the kernel */
        HOPS = 64,
        DEVICE_INDEX = 0, /* ibv_get_device_index() */
        SPACE_SHIFT = 16, /* of a port space, in the number of a service */
};

static size_t size_of(const union cm_address *address)
{
        return cm_address_size(address->any.sa_family);
}

/* --- RDMA_USER_CM_CMD_QUERY_ROUTE */

static void describe_path(const struct cm_id *id, struct ib_user_path_rec *to)
{
        to->pkey = htobe16(PARTITION);
        if (id->state < CM_ROUTE_RESOLVED || id->state == CM_LISTEN)
                return;
        to->reversible = 1;
        to->mtu_selector = to->rate_selector = to->packet_life_time_selector = EXACTLY;
        to->mtu = IBV_MTU_4096;
        to->rate = RATE;
        to->packet_life_time = LIFE_TIME;
        to->hop_limit = HOPS;
        to->traffic_class = id->type_of_service;
        to->numb_path = 1;
}

static bool has_path(const struct cm_id *id)
{
        return id->gid >= 0 && id->state >= CM_ROUTE_RESOLVED && id->state != CM_LISTEN;
}

void cm_query_route(const struct cm_id *id, struct rdma_ucm_query_route_resp *to)
{
        union ibv_gid own = cm_address_gid(&id->source), peer = cm_address_gid(&id->target);

        memset(to, 0, sizeof *to);
        memcpy(&to->src_addr, &id->source, size_of(&id->source));
        memcpy(&to->dst_addr, &id->target, size_of(&id->target));
        to->ibdev_index = DEVICE_INDEX;
        if (id->gid < 0)
                return;
        to->node_guid = port_guid();
        to->port_num = PORT_NUMBER;
        to->num_paths = has_path(id);
        memcpy(to->ib_route[0].sgid, own.raw, sizeof own.raw);
        memcpy(to->ib_route[0].dgid, peer.raw, sizeof peer.raw);
        describe_path(id, &to->ib_route[0]);
}

/* --- RDMA_USER_CM_CMD_QUERY */

/* Old programs know fewer fields at the end. */
static int put(void *to, size_t room, const struct rdma_ucm_query_addr_resp *answer)
{
        size_t size = room < sizeof *answer ? room : sizeof *answer;

        if (room < offsetof(struct rdma_ucm_query_addr_resp, ibdev_index))
                return -ENOSPC;
        memcpy(to, answer, size);
        return (int)size;
}

static struct rdma_ucm_query_addr_resp describe_device(const struct cm_id *id)
{
        struct rdma_ucm_query_addr_resp answer = {.ibdev_index = DEVICE_INDEX};

        if (id->gid >= 0) {
                answer.node_guid = port_guid();
                answer.port_num = PORT_NUMBER;
                answer.pkey = htobe16(PARTITION);
        }
        return answer;
}

int cm_query_address(const struct cm_id *id, void *to, size_t room)
{
        struct rdma_ucm_query_addr_resp answer = describe_device(id);

        answer.src_size = (uint16_t)size_of(&id->source);
        memcpy(&answer.src_addr, &id->source, answer.src_size);
        answer.dst_size = (uint16_t)size_of(&id->target);
        memcpy(&answer.dst_addr, &id->target, answer.dst_size);
        return put(to, room, &answer);
}

/* struct sockaddr_ib of librdmacm. */
struct ib_address {
        uint16_t family;
        uint16_t pkey;
        uint32_t flow;
        uint8_t gid[16];
        uint64_t service, service_mask, scope;
};

static void describe_gid(const struct cm_id *id, const union cm_address *address, void *to)
{
        struct ib_address found = {.family = IB_FAMILY, .pkey = htobe16(PARTITION)};
        union ibv_gid gid = cm_address_gid(address);
        uint64_t port = address->any.sa_family ? cm_address_port(address) : 0;

        memcpy(found.gid, gid.raw, sizeof found.gid);
        found.service = htobe64((uint64_t)id->space << SPACE_SHIFT | port);
        memcpy(to, &found, sizeof found);
}

int cm_query_gid(const struct cm_id *id, void *to, size_t room)
{
        struct rdma_ucm_query_addr_resp answer = describe_device(id);

        answer.src_size = answer.dst_size = sizeof(struct ib_address);
        describe_gid(id, &id->source, &answer.src_addr);
        describe_gid(id, &id->target, &answer.dst_addr);
        return put(to, room, &answer);
}

/* A PathRecord of subnet administration, as InfiniBand sends it. */
struct path_record {
        uint64_t service;
        uint8_t dgid[16], sgid[16];
        uint16_t dlid, slid;
        uint32_t flow_and_hops;
        uint8_t traffic_class, reversible_and_number;
        uint16_t pkey, class_and_level;
        uint8_t mtu, rate, life_time, preference;
        uint8_t unused[6];
};

int cm_query_path(const struct cm_id *id, void *to, size_t room)
{
        enum { SELECT = EXACTLY << 6, REVERSIBLE = 0x80 };
        union ibv_gid own = cm_address_gid(&id->source), peer = cm_address_gid(&id->target);
        struct rdma_ucm_query_path_resp head = {.num_paths = has_path(id)};
        struct ib_path_rec_data data = {.flags = IB_PATH_GMP | IB_PATH_PRIMARY | IB_PATH_BIDIRECTIONAL};
        struct path_record path = {
            .flow_and_hops = htobe32(HOPS),
            .traffic_class = id->type_of_service,
            .reversible_and_number = REVERSIBLE | 1,
            .pkey = htobe16(PARTITION),
            .mtu = SELECT | IBV_MTU_4096,
            .rate = SELECT | RATE,
            .life_time = SELECT | LIFE_TIME,
        };
        _Static_assert(sizeof path == sizeof data.path_rec, "64 bytes");

        if (room < sizeof head)
                return -ENOSPC;
        memcpy(to, &head, sizeof head);
        if (!head.num_paths || room - sizeof head < sizeof data)
                return sizeof head;
        memcpy(path.sgid, own.raw, sizeof path.sgid);
        memcpy(path.dgid, peer.raw, sizeof path.dgid);
        memcpy(data.path_rec, &path, sizeof path);
        memcpy((char *)to + sizeof head, &data, sizeof data);
        return sizeof head + sizeof data;
}
