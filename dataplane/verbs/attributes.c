#include "attributes.h"

#include "interfaces.h"
#include "opened.h"

#include <endian.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

enum {
        PARTITION = 0xffff, /* the default one, as a full member */
        NO_VENDOR = 0xffffff,
        WIDTH_4X = 2,
        SPEED_EDR = 32, /* 25 Gbit/s for each of four lanes */
        SPEED = 1000,   /* in 100 Mbit/s: of all four */
        LINK_UP = 5,
        ACK_DELAY = 15,
        SYSFS_ROCE_V2 = 1, /* the type of a GID, as drivers name it */
        OTHERS = 65536,    /* protection domains, address handles */
        GROUPS = 1024,     /* of datagrams */
};

static void describe_device(struct ibv_device_attr *to)
{
        *to = (struct ibv_device_attr){
            .fw_ver = "1.0",
            .node_guid = port_guid(),
            .sys_image_guid = port_guid(),
            .max_mr_size = UINT64_C(1) << 40,
            .page_size_cap = 0xfffff000,
            .vendor_id = NO_VENDOR,
            .max_qp = (int)port_most_queue_pairs(),
            .max_qp_wr = MOST_REQUESTS,
            .device_cap_flags = IBV_DEVICE_RESIZE_MAX_WR | IBV_DEVICE_CURR_QP_STATE_MOD |
                                IBV_DEVICE_PORT_ACTIVE_EVENT | IBV_DEVICE_SYS_IMAGE_GUID |
                                IBV_DEVICE_RC_RNR_NAK_GEN | IBV_DEVICE_SRQ_RESIZE,
            .max_sge = MOST_PIECES,
            .max_sge_rd = MOST_PIECES,
            .max_cq = MOST_QUEUES,
            .max_cqe = MOST_COMPLETIONS,
            .max_mr = (int)port_most_regions(),
            .max_pd = OTHERS,
            .max_qp_rd_atom = MOST_READS,
            .max_res_rd_atom = MOST_READS * (int)port_most_queue_pairs(),
            .max_qp_init_rd_atom = MOST_READS,
            /* They are so towards processors, too (IBV_ATOMIC_GLOB), but of devices that say that
             * UCX uses none. */
            .atomic_cap = IBV_ATOMIC_HCA,
            .max_ah = OTHERS,
            .max_mcast_grp = GROUPS,
            .max_mcast_qp_attach = GROUPS,
            .max_total_mcast_qp_attach = GROUPS * GROUPS,
            .max_srq = MOST_RECEIVE_QUEUES,
            .max_srq_wr = MOST_REQUESTS,
            .max_srq_sge = MOST_PIECES,
            .max_pkeys = 1,
            .local_ca_ack_delay = ACK_DELAY,
            .phys_port_cnt = 1,
        };
}

int attributes_device(struct ibv_context *context, const struct ibv_query_device_ex_input *wanted,
                      struct ibv_device_attr_ex *to, size_t size)
{
        struct ibv_device_attr_ex found = {.phys_port_cnt_ex = 1};

        if ((wanted && wanted->comp_mask) || size < sizeof to->orig_attr)
                return EINVAL;
        if (opened_is_lost(context))
                return EIO;
        describe_device(&found.orig_attr);
        found.device_cap_flags_ex = found.orig_attr.device_cap_flags;
        found.cq_mod_caps.max_cq_count = UINT16_MAX;
        found.cq_mod_caps.max_cq_period = UINT16_MAX;
        /* A program may know more fields than this library does. */
        memset(to, 0, size);
        memcpy(to, &found, size < sizeof found ? size : sizeof found);
        return 0;
}

VERB int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *to)
{
        if (opened_is_lost(context))
                return EIO;
        describe_device(to);
        return 0;
}

int attributes_port(struct ibv_context *context, uint8_t number, struct ibv_port_attr *to, size_t size)
{
        bool active = port_is_active();
        struct ibv_port_attr found = {
            .state = active ? IBV_PORT_ACTIVE : IBV_PORT_DOWN,
            .max_mtu = IBV_MTU_4096,
            .active_mtu = IBV_MTU_4096,
            .gid_tbl_len = PORT_GIDS,
            .port_cap_flags = IBV_PORT_CM_SUP | IBV_PORT_IP_BASED_GIDS,
            .max_msg_sz = MOST_MESSAGE,
            .pkey_tbl_len = 1,
            .max_vl_num = 1,
            .active_width = WIDTH_4X,
            .active_speed = SPEED_EDR,
            .phys_state = LINK_UP,
            .link_layer = IBV_LINK_LAYER_ETHERNET,
            .flags = IBV_QPF_GRH_REQUIRED,
        };

        if (number != PORT_NUMBER)
                return EINVAL;
        if (opened_is_lost(context))
                return EIO;
        memset(to, 0, size);
        memcpy(to, &found, size < sizeof found ? size : sizeof found);
        return 0;
}

/* Called where the program's header is older than the context's own operation: what came into the
 * structure after that is not written. */
#undef ibv_query_port
VERB int ibv_query_port(struct ibv_context *context, uint8_t number, struct _compat_ibv_port_attr *to)
{
        return attributes_port(context, number, (struct ibv_port_attr *)to,
                               offsetof(struct ibv_port_attr, port_cap_flags2));
}

VERB int ibv_query_port_speed(struct ibv_context *context, uint32_t number, uint64_t *speed);
VERB int ibv_query_port_speed(struct ibv_context *context, uint32_t number, uint64_t *speed)
{
        if (number != PORT_NUMBER)
                return EINVAL;
        if (opened_is_lost(context))
                return EIO;
        *speed = SPEED;
        return 0;
}

/* --- GIDs */

/* 0, ENODATA if none is in this place, EINVAL, EIO. */
static int find_gid(struct ibv_context *context, uint32_t number, uint32_t index, union ibv_gid *gid)
{
        if (number != PORT_NUMBER || index >= PORT_GIDS)
                return EINVAL;
        if (opened_is_lost(context))
                return EIO;
        return port_gid(index, gid) ? 0 : ENODATA;
}

static int minus_one(int refused)
{
        if (!refused)
                return 0;
        errno = refused;
        return -1;
}

VERB int ibv_query_gid(struct ibv_context *context, uint8_t number, int index, union ibv_gid *gid)
{
        int refused = find_gid(context, number, (uint32_t)index, gid);

        if (refused != ENODATA)
                return minus_one(refused);
        memset(gid, 0, sizeof *gid);
        return 0;
}

/* `found` has its index. 0 or as find_gid(). */
static int describe_gid(struct ibv_context *context, uint32_t number, struct ibv_gid_entry *found)
{
        int refused = find_gid(context, number, found->gid_index, &found->gid);

        found->port_num = PORT_NUMBER;
        found->gid_type = IBV_GID_TYPE_ROCE_V2;
        if (!refused)
                found->ndev_ifindex = interface_of(&found->gid);
        return refused;
}

static void copy_gid(void *to, const struct ibv_gid_entry *found, size_t size)
{
        memset(to, 0, size);
        memcpy(to, found, size < sizeof *found ? size : sizeof *found);
}

VERB int _ibv_query_gid_ex(struct ibv_context *context, uint32_t number, uint32_t index,
                           struct ibv_gid_entry *entry, uint32_t flags, size_t size)
{
        struct ibv_gid_entry found = {.gid_index = index};
        int refused = flags ? EOPNOTSUPP : describe_gid(context, number, &found);

        if (!refused)
                copy_gid(entry, &found, size);
        return refused;
}

VERB ssize_t _ibv_query_gid_table(struct ibv_context *context, struct ibv_gid_entry *entries, size_t most,
                                  uint32_t flags, size_t size)
{
        size_t count = 0;

        if (flags)
                return -EOPNOTSUPP;
        if (opened_is_lost(context))
                return -EIO;
        for (uint32_t i = 0; i < PORT_GIDS; i++) {
                struct ibv_gid_entry found = {.gid_index = i};

                if (describe_gid(context, PORT_NUMBER, &found))
                        continue;
                if (count == most)
                        return -EINVAL;
                copy_gid((char *)entries + count++ * size, &found, size);
        }
        return (ssize_t)count;
}

/* For drivers and their tools: only in private nodes. */
int ibv_query_gid_type(struct ibv_context *context, uint8_t number, unsigned int index, unsigned int *type);
int ibv_query_gid_type(struct ibv_context *context, uint8_t number, unsigned int index, unsigned int *type)
{
        union ibv_gid gid;
        int refused = find_gid(context, number, index, &gid);

        if (refused && refused != ENODATA)
                return minus_one(refused);
        *type = SYSFS_ROCE_V2;
        return 0;
}

/* --- partitions */

VERB int ibv_query_pkey(struct ibv_context *context, uint8_t number, int index, __be16 *pkey)
{
        (void)context;
        if (number != PORT_NUMBER || index)
                return minus_one(EINVAL);
        *pkey = htobe16(PARTITION);
        return 0;
}

VERB int ibv_get_pkey_index(struct ibv_context *context, uint8_t number, __be16 pkey)
{
        (void)context;
        if (number != PORT_NUMBER || pkey != htobe16(PARTITION))
                return minus_one(EINVAL);
        return 0;
}
