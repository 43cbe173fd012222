/* Two ends as NCCL's transport for InfiniBand makes them: no libibverbs is linked, and all is found
 * as NCCL finds it. It opens the library by name, looks up functions in named versions, and must
 * have those of version 1.1; those of later versions, and a driver's of its own, are optional. Then
 * it looks at the device and its files, and connects queue pairs that write with immediate data.
 *
 *      nccl BOARD SIDE     two processes, each in a container; BOARD is a file that both share
 *
 * It prints the names that it has not found.
 */
#include "../dataplane/check.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* The header has macros of these names. */
#undef ibv_query_port
#undef ibv_reg_mr

enum { BYTES = 1 << 20, ROUNDS = 50, DEPTH = 8 };

static struct {
        int (*fork_init)(void);
        struct ibv_device **(*get_device_list)(int *);
        void (*free_device_list)(struct ibv_device **);
        const char *(*get_device_name)(struct ibv_device *);
        struct ibv_context *(*open_device)(struct ibv_device *);
        int (*close_device)(struct ibv_context *);
        int (*get_async_event)(struct ibv_context *, struct ibv_async_event *);
        void (*ack_async_event)(struct ibv_async_event *);
        int (*query_device)(struct ibv_context *, struct ibv_device_attr *);
        int (*query_port)(struct ibv_context *, uint8_t, struct ibv_port_attr *);
        int (*query_gid)(struct ibv_context *, uint8_t, int, union ibv_gid *);
        int (*query_qp)(struct ibv_qp *, struct ibv_qp_attr *, int, struct ibv_qp_init_attr *);
        struct ibv_pd *(*alloc_pd)(struct ibv_context *);
        int (*dealloc_pd)(struct ibv_pd *);
        struct ibv_mr *(*reg_mr)(struct ibv_pd *, void *, size_t, int);
        struct ibv_mr *(*reg_mr_iova2)(struct ibv_pd *, void *, size_t, uint64_t, unsigned int);
        struct ibv_mr *(*reg_dmabuf_mr)(struct ibv_pd *, uint64_t, size_t, uint64_t, int, int);
        int (*dereg_mr)(struct ibv_mr *);
        struct ibv_cq *(*create_cq)(struct ibv_context *, int, void *, struct ibv_comp_channel *, int);
        int (*destroy_cq)(struct ibv_cq *);
        struct ibv_qp *(*create_qp)(struct ibv_pd *, struct ibv_qp_init_attr *);
        int (*modify_qp)(struct ibv_qp *, struct ibv_qp_attr *, int);
        int (*destroy_qp)(struct ibv_qp *);
        const char *(*event_type_str)(enum ibv_event_type);
        int (*query_ece)(struct ibv_qp *, struct ibv_ece *);
        int (*set_ece)(struct ibv_qp *, struct ibv_ece *);
} verbs;

static const struct {
        const char *name, *version;
        void *to;
} wanted[] = {
    {"ibv_fork_init", "IBVERBS_1.1", &verbs.fork_init},
    {"ibv_get_device_list", "IBVERBS_1.1", &verbs.get_device_list},
    {"ibv_free_device_list", "IBVERBS_1.1", &verbs.free_device_list},
    {"ibv_get_device_name", "IBVERBS_1.1", &verbs.get_device_name},
    {"ibv_open_device", "IBVERBS_1.1", &verbs.open_device},
    {"ibv_close_device", "IBVERBS_1.1", &verbs.close_device},
    {"ibv_get_async_event", "IBVERBS_1.1", &verbs.get_async_event},
    {"ibv_ack_async_event", "IBVERBS_1.1", &verbs.ack_async_event},
    {"ibv_query_device", "IBVERBS_1.1", &verbs.query_device},
    {"ibv_query_port", "IBVERBS_1.1", &verbs.query_port},
    {"ibv_query_gid", "IBVERBS_1.1", &verbs.query_gid},
    {"ibv_query_qp", "IBVERBS_1.1", &verbs.query_qp},
    {"ibv_alloc_pd", "IBVERBS_1.1", &verbs.alloc_pd},
    {"ibv_dealloc_pd", "IBVERBS_1.1", &verbs.dealloc_pd},
    {"ibv_reg_mr", "IBVERBS_1.1", &verbs.reg_mr},
    {"ibv_dereg_mr", "IBVERBS_1.1", &verbs.dereg_mr},
    {"ibv_create_cq", "IBVERBS_1.1", &verbs.create_cq},
    {"ibv_destroy_cq", "IBVERBS_1.1", &verbs.destroy_cq},
    {"ibv_create_qp", "IBVERBS_1.1", &verbs.create_qp},
    {"ibv_modify_qp", "IBVERBS_1.1", &verbs.modify_qp},
    {"ibv_destroy_qp", "IBVERBS_1.1", &verbs.destroy_qp},
    {"ibv_event_type_str", "IBVERBS_1.1", &verbs.event_type_str},
    {"ibv_reg_mr_iova2", "IBVERBS_1.8", &verbs.reg_mr_iova2},
    {"ibv_query_ece", "IBVERBS_1.10", &verbs.query_ece},
    {"ibv_set_ece", "IBVERBS_1.10", &verbs.set_ece},
    {"ibv_reg_dmabuf_mr", "IBVERBS_1.12", &verbs.reg_dmabuf_mr},
};

/* What the two processes tell each other. */
static struct board {
        struct {
                _Atomic uint32_t qpn, key, done;
                _Atomic uint64_t address;
                union ibv_gid gid;
        } sides[2];
} * board;

static int side;
static struct ibv_cq *cq;
static struct ibv_qp *qp;
static struct ibv_mr *region;
static unsigned char *memory;

static void *open_library(const char *name, const char *other)
{
        void *opened = dlopen(name, RTLD_NOW);

        return opened ? opened : dlopen(other, RTLD_NOW);
}

static void look_up(void)
{
        void *library = open_library("libibverbs.so", "libibverbs.so.1"), *driver;

        CHECK(library);
        for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
                void *found = dlvsym(library, wanted[i].name, wanted[i].version);

                if (!found)
                        printf("%s %s\n", wanted[i].name, wanted[i].version);
                memcpy(wanted[i].to, &found, sizeof found);
        }
        /* Without the driver, or with one that doesn't know the device, it uses verbs alone. */
        driver = open_library("libmlx5.so", "libmlx5.so.1");
        if (driver) {
                void *found = dlvsym(driver, "mlx5dv_is_supported", "MLX5_1.8");
                bool (*is_supported)(struct ibv_device *) = NULL;
                struct ibv_device **list = verbs.get_device_list(NULL);

                CHECK(list && list[0]);
                memcpy(&is_supported, &found, sizeof found);
                CHECK(!is_supported || !is_supported(list[0]));
                verbs.free_device_list(list);
        }
}

static void read_file(const char *name, const char *file, const char *expected)
{
        char path[200], text[100] = {0};
        int from;

        snprintf(path, sizeof path, "/sys/class/infiniband/%s/%s", name, file);
        from = open(path, O_RDONLY);
        CHECK(from >= 0 && read(from, text, sizeof text - 1) > 0 && close(from) == 0);
        CHECK(strncmp(text, expected, strlen(expected)) == 0);
}

static struct ibv_context *open_device(void)
{
        struct ibv_port_attr port = {0};
        struct ibv_device_attr device = {0};
        struct ibv_context *context;
        struct ibv_device **list;
        char path[200], real[PATH_MAX];
        int count = 0;

        CHECK(verbs.fork_init() == 0);
        list = verbs.get_device_list(&count);
        CHECK(list && count == 1 && strcmp(verbs.get_device_name(list[0]), "freeflow0") == 0);
        context = verbs.open_device(list[0]);
        CHECK(context && verbs.query_device(context, &device) == 0 && device.phys_port_cnt == 1);
        CHECK(device.max_qp > 0 && verbs.query_port(context, 1, &port) == 0);
        CHECK(port.state == IBV_PORT_ACTIVE && port.link_layer == IBV_LINK_LAYER_ETHERNET);
        CHECK(port.gid_tbl_len > 0);
        snprintf(path, sizeof path, "/sys/class/infiniband/%s/device", verbs.get_device_name(list[0]));
        /* A device that is on no bus is one by itself. */
        CHECK(realpath(path, real) || errno == ENOENT);
        read_file("freeflow0", "ports/1/gid_attrs/types/0", "RoCE v2");
        CHECK(verbs.query_gid(context, 1, 0, &board->sides[side].gid) == 0);
        CHECK(verbs.event_type_str(IBV_EVENT_QP_FATAL));
        verbs.free_device_list(list);
        return context;
}

static void make_queue_pair(struct ibv_context *context, struct ibv_pd *pd)
{
        struct ibv_qp_init_attr attributes = {
            .qp_type = IBV_QPT_RC,
            .cap = {.max_send_wr = 2 * DEPTH, .max_recv_wr = DEPTH, .max_send_sge = 1, .max_recv_sge = 1}};
        struct ibv_qp_attr set = {.qp_state = IBV_QPS_INIT,
                                  .port_num = 1,
                                  .qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC};
        struct ibv_ece ece = {0};

        cq = verbs.create_cq(context, 4 * DEPTH, NULL, NULL, 0);
        CHECK(cq);
        attributes.send_cq = attributes.recv_cq = cq;
        qp = verbs.create_qp(pd, &attributes);
        CHECK(qp);
        CHECK(verbs.modify_qp(qp, &set,
                              IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) == 0);
        /* Enhancements are not negotiated if this fails so. */
        CHECK(verbs.query_ece(qp, &ece) == EOPNOTSUPP);
        memory = aligned_alloc(4096, BYTES);
        CHECK(memory);
        memset(memory, 0, BYTES);
        region = verbs.reg_mr_iova2(pd, memory, BYTES, (uintptr_t)memory,
                                    IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE |
                                        IBV_ACCESS_REMOTE_READ | IBV_ACCESS_RELAXED_ORDERING);
        CHECK(region);
        /* Memory of graphics cards is not used directly if this fails so. */
        CHECK(!verbs.reg_dmabuf_mr(pd, 0, 0, 0, -1, 0) && (errno == EOPNOTSUPP || errno == EPROTONOSUPPORT));
}

static void connect_to_peer(void)
{
        struct ibv_qp_attr set = {.qp_state = IBV_QPS_RTR,
                                  .path_mtu = IBV_MTU_4096,
                                  .max_dest_rd_atomic = 1,
                                  .min_rnr_timer = 12,
                                  .ah_attr = {.is_global = 1, .port_num = 1, .grh = {.hop_limit = 255}}};

        atomic_store(&board->sides[side].address, (uintptr_t)memory);
        atomic_store(&board->sides[side].key, region->rkey);
        atomic_store(&board->sides[side].qpn, qp->qp_num);
        while (!atomic_load(&board->sides[!side].qpn))
                usleep(1000);
        set.dest_qp_num = board->sides[!side].qpn;
        set.ah_attr.grh.dgid = board->sides[!side].gid;
        CHECK(verbs.modify_qp(qp, &set,
                              IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER) == 0);
        set.qp_state = IBV_QPS_RTS;
        set.timeout = 20;
        set.retry_cnt = set.rnr_retry = 7;
        set.max_rd_atomic = 1;
        CHECK(verbs.modify_qp(qp, &set,
                              IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                                  IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC) == 0);
}

static struct ibv_wc take_one(void)
{
        struct ibv_wc wc;

        while (!ibv_poll_cq(cq, 1, &wc))
                ;
        CHECK(wc.status == IBV_WC_SUCCESS);
        return wc;
}

/* Data by a write that is not signalled, then its size as immediate data of an empty one. */
static void send_round(uint32_t round)
{
        struct ibv_sge sge = {.addr = (uintptr_t)memory, .length = BYTES, .lkey = region->lkey};
        struct ibv_send_wr last = {.opcode = IBV_WR_RDMA_WRITE_WITH_IMM,
                                   .send_flags = IBV_SEND_SIGNALED,
                                   .imm_data = htonl(round)},
                           first = {.next = &last,
                                    .opcode = IBV_WR_RDMA_WRITE,
                                    .sg_list = &sge,
                                    .num_sge = 1},
                           *bad;

        first.wr.rdma.remote_addr = last.wr.rdma.remote_addr = board->sides[!side].address;
        first.wr.rdma.rkey = last.wr.rdma.rkey = board->sides[!side].key;
        memset(memory, (int)round, BYTES);
        CHECK(ibv_post_send(qp, &first, &bad) == 0);
        CHECK(take_one().opcode == IBV_WC_RDMA_WRITE);
        while (atomic_load(&board->sides[!side].done) != round)
                usleep(100);
}

static void receive_round(uint32_t round)
{
        struct ibv_recv_wr wr = {0}, *bad;
        struct ibv_wc wc;

        CHECK(ibv_post_recv(qp, &wr, &bad) == 0);
        wc = take_one();
        CHECK(wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM && ntohl(wc.imm_data) == round);
        CHECK(memory[0] == round && memory[BYTES - 1] == round);
        atomic_store(&board->sides[side].done, round);
}

int main(int argc, char **argv)
{
        struct ibv_context *context;
        struct ibv_pd *pd;
        int file;

        CHECK(argc == 3);
        file = open(argv[1], O_RDWR);
        CHECK(file >= 0);
        board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        CHECK(board != MAP_FAILED);
        side = atoi(argv[2]);
        look_up();
        context = open_device();
        CHECK((pd = verbs.alloc_pd(context)));
        make_queue_pair(context, pd);
        connect_to_peer();
        for (uint32_t round = 1; round <= ROUNDS; round++)
                (side ? receive_round : send_round)(round);
        CHECK(verbs.destroy_qp(qp) == 0 && verbs.destroy_cq(cq) == 0 && verbs.dereg_mr(region) == 0);
        CHECK(verbs.dealloc_pd(pd) == 0 && verbs.close_device(context) == 0);
        return 0;
}
