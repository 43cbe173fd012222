/* Requests by WRITE over UC, answers by SEND over UD, as in "Using RDMA efficiently for key-value
 * services" (Kalia, Kaminsky and Andersen, 2014).
 *
 * `server COUNT`: prints the number of its UD queue pair, its region's key and address, and those
 * of as many UC queue pairs; reads the numbers of each client's queue pairs, UC and UD; then
 * answers until its standard input ends. `client ROUNDS`: reads what the server has printed for it,
 * prints its own numbers, and does so many rounds when it reads another line.
 */
#include "../dataplane/check.h"

#include <fcntl.h>
#include <infiniband/verbs.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { MOST = 64, KEY = 3, RECEIVES = 4, ROOM = 64, WINDOW = 128 };

struct request {
        _Atomic uint64_t number; /* 1, 2, and so on */
        uint64_t value;
};

static struct ibv_context *context;
static struct ibv_pd *pd;
static struct ibv_cq *cq;
static struct ibv_mr *region;
static struct ibv_qp *ud, *uc[MOST];
static union ibv_gid gid;
static struct ibv_ah *ah;

/* The server's: one for each client. The client's: the request, and receives. */
static union {
        struct request requests[MOST];
        unsigned char bytes[RECEIVES * ROOM + 64];
} memory;

static struct ibv_qp *make(enum ibv_qp_type type)
{
        struct ibv_qp_init_attr wanted = {.cap = {.max_send_wr = WINDOW,
                                                  .max_recv_wr = RECEIVES,
                                                  .max_send_sge = 1,
                                                  .max_recv_sge = 1,
                                                  .max_inline_data = ROOM},
                                          .send_cq = cq,
                                          .recv_cq = cq,
                                          .qp_type = type};
        struct ibv_qp *made = ibv_create_qp(pd, &wanted);

        CHECK(made);
        return made;
}

static void start(void)
{
        struct ibv_device **list = ibv_get_device_list(NULL);
        struct ibv_qp_attr set = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = KEY};
        struct ibv_ah_attr to = {.is_global = 1, .port_num = 1};

        CHECK(list && list[0] && (context = ibv_open_device(list[0])) && (pd = ibv_alloc_pd(context)));
        CHECK((cq = ibv_create_cq(context, 4096, NULL, NULL, 0)));
        CHECK((region =
                   ibv_reg_mr(pd, &memory, sizeof memory, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE)));
        ud = make(IBV_QPT_UD);
        CHECK(!ibv_modify_qp(ud, &set, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY));
        set.qp_state = IBV_QPS_RTR;
        CHECK(!ibv_modify_qp(ud, &set, IBV_QP_STATE));
        set.qp_state = IBV_QPS_RTS;
        CHECK(!ibv_modify_qp(ud, &set, IBV_QP_STATE | IBV_QP_SQ_PSN));
        CHECK(!ibv_query_gid(context, 1, 0, &gid));
        to.grh.dgid = gid;
        CHECK((ah = ibv_create_ah(pd, &to)));
}

static void connect_to(struct ibv_qp *qp, uint32_t number)
{
        struct ibv_qp_attr set = {.qp_state = IBV_QPS_INIT,
                                  .port_num = 1,
                                  .qp_access_flags = IBV_ACCESS_REMOTE_WRITE,
                                  .path_mtu = IBV_MTU_1024,
                                  .dest_qp_num = number,
                                  .ah_attr = {.is_global = 1, .port_num = 1, .grh.dgid = gid}};

        CHECK(!ibv_modify_qp(qp, &set, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
        set.qp_state = IBV_QPS_RTR;
        CHECK(!ibv_modify_qp(qp, &set,
                             IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN));
        set.qp_state = IBV_QPS_RTS;
        CHECK(!ibv_modify_qp(qp, &set, IBV_QP_STATE | IBV_QP_SQ_PSN));
}

/* Post a request whose bytes are copied. */
static void post(struct ibv_qp *qp, struct ibv_send_wr wr, void *bytes, uint32_t length)
{
        struct ibv_sge sge = {.addr = (uintptr_t)bytes, .length = length};
        struct ibv_send_wr *bad;

        wr.sg_list = &sge;
        wr.num_sge = 1;
        wr.send_flags = IBV_SEND_INLINE;
        CHECK(ibv_post_send(qp, &wr, &bad) == 0);
}

static void expect_no_failure(void)
{
        struct ibv_wc wc;

        while (ibv_poll_cq(cq, 1, &wc))
                CHECK(wc.status == IBV_WC_SUCCESS);
}

static void serve(int count)
{
        uint32_t ends[MOST], numbers[MOST];
        uint64_t answered[MOST] = {0};
        char byte;

        for (int i = 0; i < count; i++) {
                uc[i] = make(IBV_QPT_UC);
                printf("%u %u %llu %u\n", ud->qp_num, region->rkey,
                       (unsigned long long)(uintptr_t)&memory.requests[i], uc[i]->qp_num);
        }
        fflush(stdout);
        for (int i = 0; i < count; i++) {
                CHECK(scanf("%u %u", &ends[i], &numbers[i]) == 2);
                connect_to(uc[i], ends[i]);
        }
        printf("ready\n");
        fflush(stdout);
        CHECK(fcntl(0, F_SETFL, O_NONBLOCK) == 0);
        for (uint64_t turn = 0; turn % 64 || read(0, &byte, 1) != 0; turn++) {
                expect_no_failure();
                for (int i = 0; i < count; i++) {
                        uint64_t number = atomic_load(&memory.requests[i].number), value;
                        struct ibv_send_wr wr = {.opcode = IBV_WR_SEND};

                        if (number == answered[i])
                                continue;
                        CHECK(number == ++answered[i]);
                        value = memory.requests[i].value * 3 + number;
                        wr.wr.ud.ah = ah;
                        wr.wr.ud.remote_qpn = numbers[i];
                        wr.wr.ud.remote_qkey = KEY;
                        post(ud, wr, &value, sizeof value);
                }
                sched_yield();
        }
}

static unsigned char *place(uint64_t i)
{
        return memory.bytes + 64 + i * ROOM;
}

static void receive(uint64_t i)
{
        struct ibv_sge sge = {.addr = (uintptr_t)place(i), .length = ROOM, .lkey = region->lkey};
        struct ibv_recv_wr wr = {.wr_id = i, .sg_list = &sge, .num_sge = 1}, *bad;

        CHECK(ibv_post_recv(ud, &wr, &bad) == 0);
}

static void ask(int rounds)
{
        unsigned int server, rkey, end;
        unsigned long long address;
        char line[16];

        uc[0] = make(IBV_QPT_UC);
        for (uint64_t i = 0; i < RECEIVES; i++)
                receive(i);
        CHECK(scanf("%u %u %llu %u", &server, &rkey, &address, &end) == 4);
        connect_to(uc[0], end);
        printf("%u %u\n", uc[0]->qp_num, ud->qp_num);
        fflush(stdout);
        /* The rest of that line, and another one. */
        CHECK(fgets(line, sizeof line, stdin) && fgets(line, sizeof line, stdin));
        for (uint64_t i = 1; i <= (uint64_t)rounds; i++) {
                uint64_t parts[2] = {i, i * i}, answer;
                struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE};
                struct ibv_wc wc;

                /* The number comes last: whoever sees it sees the value. */
                for (int part = 1; part >= 0; part--) {
                        wr.wr.rdma.rkey = rkey;
                        wr.wr.rdma.remote_addr = address + (uint64_t)part * 8;
                        post(uc[0], wr, &parts[part], 8);
                }
                while (!ibv_poll_cq(cq, 1, &wc))
                        sched_yield();
                CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_RECV && wc.src_qp == server);
                memcpy(&answer, place(wc.wr_id) + sizeof(struct ibv_grh), sizeof answer);
                CHECK(answer == i * i * 3 + i);
                receive(wc.wr_id);
        }
        printf("done\n");
}

int main(int count, char **arguments)
{
        CHECK(count == 3);
        start();
        if (arguments[1][0] == 's')
                serve(atoi(arguments[2]));
        else
                ask(atoi(arguments[2]));
        return 0;
}
