/* Queue pairs of type UC, shared receive queues and address handles, without a router. Side 0 has
 * what is tested, side 1 sends to it. */
#include "queue_bed.h"

#include <endian.h>

enum { SIZE = 300000, PAIRS = 4 };

static struct ibv_context *context;
static struct rings rings[PAIRS];
static struct ibv_pd *pd;
static struct ibv_cq *cqs[2];
static struct ibv_srq *srq;
static struct ibv_qp *qps[2][PAIRS];
static unsigned char *memory[2];
static struct ibv_mr *regions[2];

/* --- pairing */

static int asked;
static struct queue_pair *asking;

static void ask(struct queue_pair *queue)
{
        struct rings *made = &rings[asked / 2];

        if (asked++ % 2 == 0) {
                asking = queue;
                *made = new_rings(false);
                return;
        }
        queue_pair_up(asking, made->views[0], made->views[1], &nowhere, false);
        queue_pair_up(queue, made->views[1], made->views[0], &nowhere, false);
}

static void leave(struct queue_pair *queue)
{
        (void)queue;
}

static const struct queue_pairer pairer = {
    .ask = ask, .ask_again = ask_again, .listen = listen_to_nobody, .ring = ring, .leave = leave};

/* --- a bed */

static int make_ready(struct ibv_qp *qp, struct ibv_qp_attr attributes)
{
        bool reliable = qp->qp_type == IBV_QPT_RC;
        int only = IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;

        CHECK(modify(qp, IBV_QPS_INIT, attributes, INIT_MASK) == 0);
        CHECK(modify(qp, IBV_QPS_RTR, attributes, reliable ? RTR_MASK : RTR_MASK & ~only) == 0);
        return modify(qp, IBV_QPS_RTS, attributes, reliable ? RTS_MASK : IBV_QP_STATE | IBV_QP_SQ_PSN);
}

/* So many pairs, of which those of side 0 have a shared receive queue if `receives` is not 0. */
static void start(enum ibv_qp_type type, int pairs, uint32_t receives, uint8_t rnr_retry)
{
        struct ibv_srq_init_attr shared = {.attr = {.max_wr = receives, .max_sge = 4}};

        asked = 0;
        CHECK((pd = ibv_alloc_pd(context)));
        srq = NULL;
        if (receives)
                CHECK((srq = ibv_create_srq(pd, &shared)));
        for (int side = 0; side < 2; side++) {
                struct ibv_qp_init_attr wanted = {
                    .cap = {.max_send_wr = 16, .max_recv_wr = 16, .max_send_sge = 4, .max_recv_sge = 4},
                    .qp_type = type,
                    .sq_sig_all = 1,
                    .srq = side ? NULL : srq};

                CHECK((cqs[side] = ibv_create_cq(context, 2 * LIMIT, NULL, NULL, 0)));
                wanted.send_cq = wanted.recv_cq = cqs[side];
                CHECK((memory[side] = calloc(1, SIZE)));
                CHECK((regions[side] = ibv_reg_mr(pd, memory[side], SIZE, ALL_ACCESS)));
                for (int i = 0; i < pairs; i++)
                        CHECK((qps[side][i] = ibv_create_qp(pd, &wanted)));
        }
        for (int i = 0; i < pairs; i++)
                for (int side = 0; side < 2; side++) {
                        struct ibv_qp_attr attributes = usual_attributes(qps[1 - side][i]->qp_num);

                        attributes.rnr_retry = rnr_retry;
                        CHECK(make_ready(qps[side][i], attributes) == 0);
                }
}

static void end_all(int pairs)
{
        for (int side = 0; side < 2; side++) {
                for (int i = 0; i < pairs; i++)
                        if (qps[side][i])
                                CHECK(ibv_destroy_qp(qps[side][i]) == 0);
                CHECK(ibv_destroy_cq(cqs[side]) == 0 && ibv_dereg_mr(regions[side]) == 0);
                free(memory[side]);
        }
        CHECK(!srq || ibv_destroy_srq(srq) == 0);
        CHECK(ibv_dealloc_pd(pd) == 0);
        for (int i = 0; i < asked / 2; i++)
                free_rings(&rings[i]);
}

static struct ibv_sge piece(int side, uint32_t offset, uint32_t length)
{
        return (struct ibv_sge){
            .addr = (uintptr_t)memory[side] + offset, .length = length, .lkey = regions[side]->lkey};
}

static int post(struct ibv_qp *qp, enum ibv_wr_opcode opcode, struct ibv_sge sge, uint32_t to)
{
        struct ibv_send_wr wr = {.opcode = opcode, .sg_list = &sge, .num_sge = 1, .imm_data = to}, *bad;
        int other = qp == qps[0][0] ? 1 : 0;

        wr.wr.rdma.remote_addr = (uintptr_t)memory[other] + to;
        wr.wr.rdma.rkey = regions[other]->rkey;
        return ibv_post_send(qp, &wr, &bad);
}

static int receive(struct ibv_qp *qp, uint64_t id, struct ibv_sge sge)
{
        struct ibv_recv_wr wr = {.wr_id = id, .sg_list = &sge, .num_sge = 1}, *bad;

        return ibv_post_recv(qp, &wr, &bad);
}

static int share(uint64_t id, struct ibv_sge sge)
{
        struct ibv_recv_wr wr = {.wr_id = id, .sg_list = &sge, .num_sge = 1}, *bad;

        return ibv_post_srq_recv(srq, &wr, &bad);
}

static struct ibv_wc next(int side)
{
        return wait_for(cqs[side], cqs[1 - side]);
}

static struct ibv_wc expect(int side, enum ibv_wc_status status, enum ibv_wc_opcode opcode)
{
        struct ibv_wc wc = next(side);

        CHECK(wc.status == status && (status || wc.opcode == opcode));
        return wc;
}

static void drive(int side)
{
        atomic_load(&cq_of(cqs[side])->driver)->poll(cq_of(cqs[side]));
}

static void expect_nothing(void)
{
        for (int round = 0; round < 10; round++)
                for (int side = 0; side < 2; side++) {
                        drive(side);
                        CHECK(!completions_are_there(&cq_of(cqs[side])->completions));
                }
}

static bool has_event(void)
{
        return atomic_load(&opened_of(context)->events.mutex.word) || opened_of(context)->events.first;
}

static void expect_event(enum ibv_event_type type)
{
        struct ibv_async_event event;

        CHECK(has_event() && ibv_get_async_event(context, &event) == 0 && event.event_type == type);
        ibv_ack_async_event(&event);
}

/* --- UC */

static void fill(uint32_t length, unsigned char with)
{
        for (uint32_t i = 0; i < length; i++)
                memory[1][i] = (unsigned char)(i * 3 + with);
        memset(memory[0], 0, SIZE);
}

static void check_arrived(uint32_t at, uint32_t length)
{
        CHECK(memcmp(memory[0] + at, memory[1], length) == 0);
        CHECK(at + length == SIZE || !memory[0][at + length]);
}

static void check_messages(void)
{
        static const uint32_t lengths[] = {0, 1, 8, 4096, 65000, 70000, 200000};

        start(IBV_QPT_UC, 1, 0, 0);
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
                fill(lengths[i], (unsigned char)i);
                CHECK(receive(qps[0][0], i, piece(0, 100, SIZE - 100)) == 0);
                CHECK(post(qps[1][0], IBV_WR_SEND_WITH_IMM, piece(1, 0, lengths[i]), 7) == 0);
                expect(1, IBV_WC_SUCCESS, IBV_WC_SEND);
                struct ibv_wc wc = expect(0, IBV_WC_SUCCESS, IBV_WC_RECV);
                CHECK(wc.byte_len == lengths[i] && wc.wr_id == i && wc.imm_data == 7);
                check_arrived(100, lengths[i]);
                fill(lengths[i], (unsigned char)(i + 1));
                CHECK(post(qps[1][0], IBV_WR_RDMA_WRITE, piece(1, 0, lengths[i]), 8) == 0);
                expect(1, IBV_WC_SUCCESS, IBV_WC_RDMA_WRITE);
                expect_nothing();
                check_arrived(8, lengths[i]);
        }
        CHECK(post(qps[1][0], IBV_WR_RDMA_READ, piece(1, 0, 8), 0) == EINVAL);
        CHECK(post(qps[1][0], IBV_WR_ATOMIC_FETCH_AND_ADD, piece(1, 0, 8), 0) == EINVAL);
        end_all(1);
}

/* What can't be executed is lost, the receive is for the next message, and receives are still
 * counted: more messages are lost than there are receives. */
static void check_losses(void)
{
        struct ibv_sge sge;
        struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE, .sg_list = &sge, .num_sge = 1}, *bad;

        start(IBV_QPT_UC, 1, 0, 0);
        for (int i = 0; i < 50; i++) {
                fill(200000, (unsigned char)i);
                CHECK(receive(qps[0][0], (uint64_t)i, piece(0, 0, 100)) == 0);
                CHECK(post(qps[1][0], IBV_WR_SEND, piece(1, 0, i % 2 ? 200000 : 101), 0) == 0);
                expect(1, IBV_WC_SUCCESS, IBV_WC_SEND);
                sge = piece(1, 0, i % 2 ? 200000 : 1);
                wr.opcode = i % 3 ? IBV_WR_RDMA_WRITE : IBV_WR_RDMA_WRITE_WITH_IMM;
                wr.wr.rdma.remote_addr = (uintptr_t)memory[0] + SIZE - sge.length + 1;
                wr.wr.rdma.rkey = regions[0]->rkey;
                CHECK(ibv_post_send(qps[1][0], &wr, &bad) == 0);
                expect(1, IBV_WC_SUCCESS, IBV_WC_RDMA_WRITE);
                expect_nothing();
                CHECK(!memory[0][0] && !memory[0][SIZE - 1]);
                CHECK(post(qps[1][0], IBV_WR_SEND, piece(1, 0, 100), 0) == 0);
                expect(1, IBV_WC_SUCCESS, IBV_WC_SEND);
                CHECK(expect(0, IBV_WC_SUCCESS, IBV_WC_RECV).wr_id == (uint64_t)i);
                check_arrived(0, 100);
        }
        CHECK(!has_event());
        end_all(1);
}

/* Without a receive, or without another side, a request is lost after a while, and those behind it
 * at once. What comes after a receive is there arrives. */
static void check_nobody(void)
{
        start(IBV_QPT_UC, 1, 0, 0);
        for (int i = 0; i < 10; i++)
                CHECK(post(qps[1][0], IBV_WR_SEND, piece(1, 0, 100), 0) == 0);
        for (int i = 0; i < 10; i++)
                expect(1, IBV_WC_SUCCESS, IBV_WC_SEND);
        expect_nothing();
        fill(100, 9);
        CHECK(receive(qps[0][0], 5, piece(0, 0, 100)) == 0);
        expect_nothing();
        CHECK(post(qps[1][0], IBV_WR_SEND, piece(1, 0, 100), 0) == 0);
        expect(1, IBV_WC_SUCCESS, IBV_WC_SEND);
        CHECK(expect(0, IBV_WC_SUCCESS, IBV_WC_RECV).wr_id == 5);
        check_arrived(0, 100);
        CHECK(ibv_destroy_qp(qps[0][0]) == 0);
        qps[0][0] = NULL;
        for (int i = 0; i < 16; i++)
                CHECK(post(qps[1][0], i % 2 ? IBV_WR_SEND : IBV_WR_RDMA_WRITE, piece(1, 0, 100), 0) == 0);
        for (int i = 0; i < 16; i++)
                CHECK(next(1).status == IBV_WC_SUCCESS);
        CHECK(!has_event());
        end_all(1);

        start(IBV_QPT_UC, 0, 0, 0);
        struct ibv_qp_init_attr wanted = {
            .cap = {.max_send_wr = 4, .max_send_sge = 1}, .qp_type = IBV_QPT_UC, .sq_sig_all = 1};
        wanted.send_cq = wanted.recv_cq = cqs[1];
        CHECK((qps[1][0] = ibv_create_qp(pd, &wanted)));
        CHECK(make_ready(qps[1][0], usual_attributes(12345)) == 0);
        for (int i = 0; i < 4; i++)
                CHECK(post(qps[1][0], IBV_WR_SEND, piece(1, 0, 100), 0) == 0);
        for (int i = 0; i < 4; i++)
                CHECK(wait_for(cqs[1], NULL).status == IBV_WC_SUCCESS);
        CHECK(ibv_destroy_qp(qps[1][0]) == 0);
        qps[1][0] = NULL;
        free_rings(&rings[0]);
        end_all(0);
}

/* --- shared receive queues */

static void check_sharing(void)
{
        struct ibv_srq_attr attributes;

        start(IBV_QPT_RC, 2, 6, 7);
        CHECK(ibv_query_srq(srq, &attributes) == 0 && attributes.max_wr == 6 && attributes.max_sge == 4);
        CHECK(receive(qps[0][0], 1, piece(0, 0, 1)) == EINVAL);
        for (uint32_t i = 0; i < 6; i++)
                CHECK(share(i, piece(0, i * 1000, 1000)) == 0);
        CHECK(share(6, piece(0, 0, 1)) == ENOMEM);
        attributes = (struct ibv_srq_attr){.srq_limit = 4};
        CHECK(ibv_modify_srq(srq, &attributes, IBV_SRQ_LIMIT) == 0 && !has_event());
        for (uint32_t i = 0; i < 6; i++) {
                fill(1000, (unsigned char)i);
                CHECK(post(qps[1][i % 2], IBV_WR_SEND, piece(1, 0, 1000), 0) == 0);
                expect(1, IBV_WC_SUCCESS, IBV_WC_SEND);
                struct ibv_wc wc = expect(0, IBV_WC_SUCCESS, IBV_WC_RECV);
                CHECK(wc.wr_id == i && wc.qp_num == qps[0][i % 2]->qp_num);
                check_arrived(i * 1000, 1000);
                if (i == 2)
                        expect_event(IBV_EVENT_SRQ_LIMIT_REACHED);
        }
        CHECK(!has_event());
        CHECK(ibv_query_srq(srq, &attributes) == 0 && attributes.srq_limit == 0);
        CHECK(ibv_destroy_srq(srq) == EBUSY);
        for (uint32_t i = 0; i < 6; i++)
                CHECK(share(10 + i, piece(0, 0, 1000)) == 0);
        attributes = (struct ibv_srq_attr){.max_wr = 5};
        CHECK(ibv_modify_srq(srq, &attributes, IBV_SRQ_MAX_WR) == EINVAL);
        attributes.max_wr = 7;
        CHECK(ibv_modify_srq(srq, &attributes, IBV_SRQ_MAX_WR) == 0);
        CHECK(share(16, piece(0, 0, 1000)) == 0 && share(17, piece(0, 0, 1000)) == ENOMEM);
        attributes.srq_limit = 8;
        CHECK(ibv_modify_srq(srq, &attributes, IBV_SRQ_LIMIT) == EINVAL);
        for (uint32_t i = 0; i < 7; i++) {
                CHECK(post(qps[1][1], IBV_WR_RDMA_WRITE_WITH_IMM, piece(1, 0, 10), 2000) == 0);
                expect(1, IBV_WC_SUCCESS, IBV_WC_RDMA_WRITE);
                CHECK(expect(0, IBV_WC_SUCCESS, IBV_WC_RECV_RDMA_WITH_IMM).wr_id == 10 + i);
        }
        end_all(2);
}

/* A message that finds the last receive taken waits for another one. Meanwhile answers behind it
 * are taken: whoever waits for them may be who posts it. */
static void check_waiting(void)
{
        start(IBV_QPT_RC, 2, 4, 7);
        CHECK(share(0, piece(0, 0, 1000)) == 0);
        drive(0);
        drive(1);
        fill(1000, 1);
        CHECK(post(qps[1][0], IBV_WR_SEND, piece(1, 0, 1000), 0) == 0);
        CHECK(post(qps[1][1], IBV_WR_SEND, piece(1, 0, 1000), 0) == 0);
        CHECK(expect(0, IBV_WC_SUCCESS, IBV_WC_RECV).wr_id == 0);
        expect(1, IBV_WC_SUCCESS, IBV_WC_SEND);
        expect_nothing();
        for (int i = 0; i < 2; i++) {
                struct ibv_sge sge = piece(0, 4000, 200000);
                struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_READ, .sg_list = &sge, .num_sge = 1}, *bad;

                wr.wr.rdma.remote_addr = (uintptr_t)memory[1];
                wr.wr.rdma.rkey = regions[1]->rkey;
                for (int j = 0; j < 5; j++)
                        CHECK(ibv_post_send(qps[0][i], &wr, &bad) == 0);
                for (int j = 0; j < 5; j++) {
                        expect(0, IBV_WC_SUCCESS, IBV_WC_RDMA_READ);
                        CHECK(memcmp(memory[0] + 4000, memory[1], 200000) == 0);
                }
        }
        expect_nothing();
        CHECK(share(1, piece(0, 2000, 1000)) == 0);
        CHECK(expect(0, IBV_WC_SUCCESS, IBV_WC_RECV).wr_id == 1);
        expect(1, IBV_WC_SUCCESS, IBV_WC_SEND);
        check_arrived(2000, 1000);
        /* Those that are sent when no receive is left wait on their side. */
        for (int i = 0; i < 6; i++)
                CHECK(post(qps[1][i % 2], IBV_WR_SEND, piece(1, 0, 10), 0) == 0);
        expect_nothing();
        for (uint32_t i = 0; i < 6; i++) {
                CHECK(share(10 + i, piece(0, 0, 1000)) == 0);
                CHECK(expect(0, IBV_WC_SUCCESS, IBV_WC_RECV).wr_id == 10 + i);
                expect(1, IBV_WC_SUCCESS, IBV_WC_SEND);
        }
        end_all(2);
}

/* It doesn't wait longer than the sender wants. */
static void check_no_receive(void)
{
        start(IBV_QPT_RC, 2, 4, 1);
        CHECK(share(0, piece(0, 0, 1000)) == 0);
        drive(0);
        drive(1);
        CHECK(post(qps[1][0], IBV_WR_SEND, piece(1, 0, 1000), 0) == 0);
        CHECK(post(qps[1][1], IBV_WR_SEND, piece(1, 0, 1000), 0) == 0);
        expect(0, IBV_WC_SUCCESS, IBV_WC_RECV);
        expect(1, IBV_WC_SUCCESS, IBV_WC_SEND);
        expect(1, IBV_WC_RNR_RETRY_EXC_ERR, 0);
        end_all(2);
}

static void check_errors(void)
{
        struct ibv_qp_attr attributes = {.qp_state = IBV_QPS_ERR};

        start(IBV_QPT_RC, 2, 4, 7);
        CHECK(share(3, piece(0, 0, 1000)) == 0);
        CHECK(ibv_modify_qp(qps[0][0], &attributes, IBV_QP_STATE) == 0);
        expect_event(IBV_EVENT_QP_LAST_WQE_REACHED);
        expect_nothing();
        CHECK(post(qps[1][1], IBV_WR_SEND, piece(1, 0, 1000), 0) == 0);
        CHECK(expect(0, IBV_WC_SUCCESS, IBV_WC_RECV).wr_id == 3);
        expect(1, IBV_WC_SUCCESS, IBV_WC_SEND);
        CHECK(share(4, piece(0, 0, 10)) == 0);
        CHECK(post(qps[1][1], IBV_WR_SEND, piece(1, 0, 11), 0) == 0);
        expect(0, IBV_WC_LOC_LEN_ERR, 0);
        expect(1, IBV_WC_REM_INV_REQ_ERR, 0);
        expect_event(IBV_EVENT_QP_REQ_ERR);
        expect_event(IBV_EVENT_QP_LAST_WQE_REACHED);
        CHECK(!has_event());
        end_all(2);
}

static void check_kinds(void)
{
        struct ibv_srq_init_attr_ex wanted = {.attr = {.max_wr = 4, .max_sge = 1},
                                              .comp_mask = IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD,
                                              .srq_type = IBV_SRQT_XRC};
        struct ibv_srq *made;

        CHECK((pd = ibv_alloc_pd(context)));
        wanted.pd = pd;
        CHECK(!ibv_create_srq_ex(context, &wanted) && errno == EOPNOTSUPP);
        CHECK(!ibv_open_xrcd(context, &(struct ibv_xrcd_init_attr){0}) && errno == EOPNOTSUPP);
        wanted.srq_type = IBV_SRQT_BASIC;
        CHECK((made = ibv_create_srq_ex(context, &wanted)));
        CHECK(ibv_dealloc_pd(pd) == EBUSY);
        CHECK(ibv_destroy_srq(made) == 0);
        wanted.attr.max_wr = MOST_REQUESTS + 1;
        CHECK(!ibv_create_srq_ex(context, &wanted) && errno == EINVAL);
        CHECK(ibv_dealloc_pd(pd) == 0);
}

/* Threads that send through several queue pairs, while another one posts receives one by one: each
 * message arrives once, in the order of its queue pair, and nobody waits for ever. */

static _Atomic bool over;

static void *send_some(void *count)
{
        uint32_t posted[PAIRS] = {0}, open[PAIRS] = {0}, total = *(uint32_t *)count, done = 0;
        struct ibv_wc wc;

        while (done < total * PAIRS) {
                for (uint32_t i = 0; i < PAIRS; i++)
                        if (posted[i] < total && open[i] < 8) {
                                uint32_t at = (i * 8 + posted[i] % 8) * 8, words[2] = {i, posted[i]};

                                memcpy(memory[1] + at, words, sizeof words);
                                CHECK(post(qps[1][i], IBV_WR_SEND, piece(1, at, 8), 0) == 0);
                                posted[i]++;
                                open[i]++;
                        }
                while (ibv_poll_cq(cqs[1], 1, &wc)) {
                        CHECK(wc.status == IBV_WC_SUCCESS);
                        for (uint32_t i = 0; i < PAIRS; i++)
                                open[i] -= qps[1][i]->qp_num == wc.qp_num;
                        done++;
                }
        }
        while (!atomic_load(&over))
                drive(1);
        return NULL;
}

static void check_race(void)
{
        uint32_t total = 3000, seen[PAIRS] = {0}, words[2];
        pthread_t sender;

        start(IBV_QPT_RC, PAIRS, 3, 7);
        atomic_store(&over, false);
        CHECK(pthread_create(&sender, NULL, send_some, &total) == 0);
        for (uint32_t i = 0; i < total * PAIRS; i++) {
                struct ibv_wc wc;

                CHECK(share(i, piece(0, 0, 8)) == 0);
                wc = wait_for(cqs[0], NULL);
                CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == i);
                memcpy(words, memory[0], sizeof words);
                CHECK(words[0] < PAIRS && words[1] == seen[words[0]]++);
                CHECK(wc.qp_num == qps[0][words[0]]->qp_num);
        }
        atomic_store(&over, true);
        CHECK(pthread_join(sender, NULL) == 0);
        end_all(PAIRS);
}

/* --- address handles */

static void check_addresses(void)
{
        struct ibv_ah_attr wanted = {.is_global = 1, .port_num = 1, .grh.dgid.raw = {[15] = 9}};
        struct ibv_grh header = {.version_tclass_flow = htobe32(6U << 28 | 0x12U << 20 | 0x34567),
                                 .hop_limit = 64,
                                 .sgid.raw = {[10] = 0xff, [11] = 0xff, [12] = 10, [15] = 5},
                                 .dgid.raw = {[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1}};
        struct ibv_wc wc = {.wc_flags = IBV_WC_GRH, .sl = 3};
        struct ibv_ah_attr made;
        struct ibv_ah *ah;

        CHECK((pd = ibv_alloc_pd(context)));
        CHECK((ah = ibv_create_ah(pd, &wanted)) && ibv_dealloc_pd(pd) == EBUSY && ibv_destroy_ah(ah) == 0);
        wanted.is_global = 0;
        CHECK(!ibv_create_ah(pd, &wanted) && errno == EINVAL);
        wanted = (struct ibv_ah_attr){.is_global = 1, .port_num = 2, .grh.dgid.raw = {1}};
        CHECK(!ibv_create_ah(pd, &wanted) && errno == EINVAL);
        wanted = (struct ibv_ah_attr){.is_global = 1, .port_num = 1};
        CHECK(!ibv_create_ah(pd, &wanted) && errno == EINVAL);
        wanted =
            (struct ibv_ah_attr){.is_global = 1, .port_num = 1, .grh = {.sgid_index = 5, .dgid.raw = {1}}};
        CHECK(!ibv_create_ah(pd, &wanted) && errno == EINVAL);
        CHECK(ibv_init_ah_from_wc(context, 1, &wc, &header, &made) == 0);
        CHECK(made.is_global && made.grh.flow_label == 0x34567 && made.grh.traffic_class == 0x12);
        CHECK(made.grh.hop_limit == 64 && made.sl == 3 && made.port_num == 1 && !made.grh.sgid_index);
        CHECK(memcmp(&made.grh.dgid, &header.sgid, 16) == 0);
        CHECK((ah = ibv_create_ah_from_wc(pd, &wc, &header, 1)) && ibv_destroy_ah(ah) == 0);
        header.dgid.raw[15] = 2;
        CHECK(ibv_init_ah_from_wc(context, 1, &wc, &header, &made) != 0);
        CHECK(ibv_dealloc_pd(pd) == 0);
}

int main(void)
{
        context = open_device();
        queue_pairer = &pairer;
        check_messages();
        check_losses();
        check_nobody();
        check_sharing();
        check_waiting();
        check_no_receive();
        check_errors();
        check_kinds();
        check_race();
        check_addresses();
        CHECK(ibv_close_device(context) == 0);
        return 0;
}
