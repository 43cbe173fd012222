/* A process that sends and receives datagrams as it is told by its standard input. It prints the
 * number of its queue pair, and then an answer to each line:
 *
 *      send NUMBER COUNT   send so many datagrams to a queue pair of this container: "sent"
 *      await COUNT         wait until so many have come, asleep: "got COUNT", or fewer after a while
 *      join, leave         a multicast group: "done"
 *      cast COUNT          send to the group: "sent"
 */
#include "../dataplane/check.h"

#include <infiniband/verbs.h>
#include <poll.h>
#include <stdlib.h>

enum { RECEIVES = 512, ROOM = 256, LENGTH = 100, KEY = 5, PATIENCE = 10000 /* ms */ };

static struct ibv_context *context;
static struct ibv_comp_channel *channel;
static struct ibv_cq *sent, *received;
static struct ibv_qp *qp;
static struct ibv_mr *region;
static struct ibv_ah *ah, *group_ah;
static unsigned char memory[(RECEIVES + 1) * ROOM];
static union ibv_gid group = {.raw = {0xff, 0x0e, [10] = 0xff, [11] = 0xff, [12] = 239, [15] = 1}};

static struct ibv_sge place(uint64_t i, uint32_t length)
{
        return (struct ibv_sge){.addr = (uintptr_t)memory + i * ROOM, .length = length, .lkey = region->lkey};
}

static void post_receive(uint64_t i)
{
        struct ibv_sge sge = place(i, ROOM);
        struct ibv_recv_wr wr = {.wr_id = i, .sg_list = &sge, .num_sge = 1}, *bad;

        CHECK(ibv_post_recv(qp, &wr, &bad) == 0);
}

static struct ibv_ah *handle(struct ibv_pd *pd, const union ibv_gid *gid)
{
        struct ibv_ah_attr wanted = {.is_global = 1, .port_num = 1, .grh.dgid = *gid};
        struct ibv_ah *made = ibv_create_ah(pd, &wanted);

        CHECK(made);
        return made;
}

static void start(void)
{
        struct ibv_device **list = ibv_get_device_list(NULL);
        struct ibv_qp_init_attr wanted = {
            .cap = {.max_send_wr = 16, .max_recv_wr = RECEIVES, .max_send_sge = 1, .max_recv_sge = 1},
            .qp_type = IBV_QPT_UD};
        struct ibv_qp_attr set = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = KEY};
        union ibv_gid gid;
        struct ibv_pd *pd;

        CHECK(list && list[0] && (context = ibv_open_device(list[0])));
        CHECK((pd = ibv_alloc_pd(context)) && (channel = ibv_create_comp_channel(context)));
        CHECK((sent = ibv_create_cq(context, 64, NULL, NULL, 0)));
        CHECK((received = ibv_create_cq(context, RECEIVES, NULL, channel, 0)));
        wanted.send_cq = sent;
        wanted.recv_cq = received;
        CHECK((qp = ibv_create_qp(pd, &wanted)));
        CHECK((region = ibv_reg_mr(pd, memory, sizeof memory, IBV_ACCESS_LOCAL_WRITE)));
        CHECK(ibv_modify_qp(qp, &set, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY) == 0);
        for (uint64_t i = 0; i < RECEIVES; i++)
                post_receive(i);
        set.qp_state = IBV_QPS_RTR;
        CHECK(ibv_modify_qp(qp, &set, IBV_QP_STATE) == 0);
        set.qp_state = IBV_QPS_RTS;
        CHECK(ibv_modify_qp(qp, &set, IBV_QP_STATE | IBV_QP_SQ_PSN) == 0);
        CHECK(ibv_query_gid(context, 1, 0, &gid) == 0);
        ah = handle(pd, &gid);
        group_ah = handle(pd, &group);
}

static void send_some(struct ibv_ah *to, uint32_t number, int count)
{
        struct ibv_sge sge = place(RECEIVES, LENGTH);
        struct ibv_send_wr wr = {.opcode = IBV_WR_SEND,
                                 .sg_list = &sge,
                                 .num_sge = 1,
                                 .send_flags = IBV_SEND_SIGNALED},
                           *bad;
        struct ibv_wc wc;

        memset(memory + (size_t)RECEIVES * ROOM, 7, LENGTH);
        wr.wr.ud.ah = to;
        wr.wr.ud.remote_qpn = number;
        wr.wr.ud.remote_qkey = KEY;
        for (int i = 0; i < count; i++) {
                CHECK(ibv_post_send(qp, &wr, &bad) == 0);
                while (!ibv_poll_cq(sent, 1, &wc))
                        ;
                CHECK(wc.status == IBV_WC_SUCCESS);
        }
        printf("sent\n");
}

static int take(void)
{
        struct ibv_wc wc;
        int count = 0;

        while (ibv_poll_cq(received, 1, &wc)) {
                const unsigned char *message = memory + wc.wr_id * ROOM + sizeof(struct ibv_grh);

                CHECK(wc.status == IBV_WC_SUCCESS && wc.byte_len == sizeof(struct ibv_grh) + LENGTH);
                CHECK(message[0] == 7 && message[LENGTH - 1] == 7);
                post_receive(wc.wr_id);
                count++;
        }
        return count;
}

static void await_some(int wanted)
{
        struct pollfd source = {.fd = channel->fd, .events = POLLIN};
        int got = 0;

        while (got < wanted) {
                struct ibv_cq *cq;
                void *unused;

                CHECK(ibv_req_notify_cq(received, 0) == 0);
                got += take();
                if (got >= wanted)
                        break;
                if (poll(&source, 1, PATIENCE) <= 0)
                        break;
                CHECK(ibv_get_cq_event(channel, &cq, &unused) == 0);
                ibv_ack_cq_events(cq, 1);
        }
        printf("got %d\n", got);
}

int main(void)
{
        char line[100];
        unsigned int number;
        int count;

        start();
        printf("%u\n", qp->qp_num);
        fflush(stdout);
        while (fgets(line, sizeof line, stdin)) {
                if (sscanf(line, "send %u %d", &number, &count) == 2) {
                        send_some(ah, number, count);
                } else if (sscanf(line, "cast %d", &count) == 1) {
                        send_some(group_ah, 0xffffff, count);
                } else if (sscanf(line, "await %d", &count) == 1) {
                        await_some(count);
                } else {
                        CHECK((line[0] == 'j' ? ibv_attach_mcast : ibv_detach_mcast)(qp, &group, 0) == 0);
                        printf("done\n");
                }
                fflush(stdout);
        }
        return 0;
}
