/* Queue pairs through the functions that programs call, two of them in one process, without a
 * router and without threads.
 *
 *      queue_pairs
 *
 * Each operation in each size of ring, byte for byte; each error that one side can make, with what
 * both sides hear of it; and the order and the limits that programs rely on.
 */
#include "../../dataplane/verbs/monotonic.h"
#include "queue_bed.h"

enum { SIZE = 300000, GAP = 64 };

static struct ibv_context *context;
static bool remote;
static struct rings rings;
static int left; /* calls of leave() */

/* --- pairing */

static struct queue_pair *asking[2];

static void ask(struct queue_pair *queue)
{
        if (!asking[0]) {
                asking[0] = queue;
                return;
        }
        asking[1] = queue;
        rings = new_rings(remote);
        queue_pair_up(asking[0], rings.views[0], rings.views[1], &nowhere, direct_reacher != NULL);
        /* Relays accept nothing before the other side is ready. */
        CHECK(!remote || !atomic_load(&rings.views[0].ring->tail));
        queue_pair_up(asking[1], rings.views[1], rings.views[0], &nowhere, direct_reacher != NULL);
        asking[0] = asking[1] = NULL;
}

static void leave(struct queue_pair *queue)
{
        left++;
        if (asking[0] == queue)
                asking[0] = NULL;
}

static const struct queue_pairer pairer = {
    .ask = ask, .ask_again = ask_again, .listen = listen_to_nobody, .ring = ring, .leave = leave};

/* --- two ends */

static struct end ends[2];
static unsigned char *memory[2]; /* SIZE bytes of each end */
static struct ibv_mr *regions[2];

static const struct ibv_qp_cap usual = {
    .max_send_wr = 16, .max_recv_wr = 16, .max_send_sge = 4, .max_recv_sge = 4, .max_inline_data = 100};

static void make_ends(bool signal_all)
{
        for (int i = 0; i < 2; i++) {
                make_end(&ends[i], context, usual, signal_all);
                CHECK((memory[i] = malloc(SIZE)));
                for (int j = 0; j < SIZE; j++)
                        memory[i][j] = (unsigned char)(j * 7 + i + j / 256);
                CHECK((regions[i] = ibv_reg_mr(ends[i].pd, memory[i], SIZE, ALL_ACCESS)));
        }
}

static void connect_with(struct ibv_qp_attr first, struct ibv_qp_attr second)
{
        first.dest_qp_num = ends[1].qp->qp_num;
        second.dest_qp_num = ends[0].qp->qp_num;
        become_ready(ends[0].qp, first);
        become_ready(ends[1].qp, second);
}

/* They don't try for long if the other one is gone. */
static void start(void)
{
        struct ibv_qp_attr attributes = usual_attributes(0);

        attributes.timeout = 1;
        make_ends(false);
        connect_with(attributes, attributes);
}

static void end_all(void)
{
        forget_wishes();
        for (int i = 0; i < 2; i++) {
                CHECK(ibv_dereg_mr(regions[i]) == 0);
                free(memory[i]);
                destroy_end(&ends[i]);
        }
        if (rings.views[0].ring)
                free_rings(&rings);
        rings.views[0].ring = NULL;
}

static struct ibv_sge piece(int end, uint32_t offset, uint32_t length)
{
        return (struct ibv_sge){
            .addr = (uintptr_t)memory[end] + offset, .length = length, .lkey = regions[end]->lkey};
}

static int post(int end, struct ibv_send_wr wr)
{
        struct ibv_send_wr *bad = NULL;
        int error = ibv_post_send(ends[end].qp, &wr, &bad);

        CHECK(!error == !bad);
        return error;
}

static int receive(int end, uint64_t id, struct ibv_sge *list, int count)
{
        struct ibv_recv_wr wr = {.wr_id = id, .sg_list = list, .num_sge = count}, *bad = NULL;
        int error = ibv_post_recv(ends[end].qp, &wr, &bad);

        CHECK(!error == !bad);
        return error;
}

/* The next completion of a kind, while both ends go on. */
static struct ibv_wc sent(int end)
{
        return wait_for(ends[end].sent, ends[1 - end].received);
}

static struct ibv_wc received(int end)
{
        return wait_for(ends[end].received, ends[1 - end].sent);
}

static void poll_all(void)
{
        for (int round = 0; round < 10; round++)
                for (int i = 0; i < 2; i++) {
                        const struct cq_driver *driver = atomic_load(&cq_of(ends[i].sent)->driver);

                        driver->poll(cq_of(ends[i].sent));
                        driver->poll(cq_of(ends[i].received));
                }
}

static void expect_nothing(void)
{
        poll_all();
        for (int i = 0; i < 2; i++)
                CHECK(!completions_are_there(&cq_of(ends[i].sent)->completions) &&
                      !completions_are_there(&cq_of(ends[i].received)->completions));
}

static void expect_event(enum ibv_event_type type, int end)
{
        struct ibv_async_event event;

        CHECK(ibv_get_async_event(context, &event) == 0);
        CHECK(event.event_type == type && event.element.qp == ends[end].qp);
        ibv_ack_async_event(&event);
}

/* --- operations */

static const uint32_t lengths[] = {0,     1,     7,     8,     9,     63,    64,    4000,
                                   16351, 16352, 16353, 65535, 65536, 65537, 200001};

static void check_send(void)
{
        start();
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
                uint32_t length = lengths[i], half = length / 3;
                struct ibv_sge from[2] = {piece(0, 5, half), piece(0, 90000, length - half)};
                struct ibv_sge to[3] = {piece(1, 0, 17), piece(1, 20, 0), piece(1, 40, SIZE - 40)};
                struct ibv_wc wc;

                memset(memory[1], 0xee, SIZE);
                CHECK(receive(1, 70 + i, to, 3) == 0);
                CHECK(post(0, (struct ibv_send_wr){.wr_id = i,
                                                   .sg_list = from,
                                                   .num_sge = 2,
                                                   .opcode = i % 2 ? IBV_WR_SEND : IBV_WR_SEND_WITH_IMM,
                                                   .send_flags = IBV_SEND_SIGNALED,
                                                   .imm_data = 0x1234}) == 0);
                wc = received(1);
                CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == 70 + i && wc.opcode == IBV_WC_RECV);
                CHECK(wc.byte_len == length && wc.qp_num == ends[1].qp->qp_num);
                CHECK(wc.src_qp == ends[0].qp->qp_num);
                CHECK(wc.wc_flags == (i % 2 ? 0 : IBV_WC_WITH_IMM) && (i % 2 || wc.imm_data == 0x1234));
                wc = sent(0);
                CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == i && wc.opcode == IBV_WC_SEND);
                for (uint32_t j = 0; j < length; j++)
                        CHECK(memory[1][j < 17 ? j : j + 23] ==
                              memory[0][j < half ? 5 + j : 90000 + j - half]);
                CHECK(memory[1][length < 17 ? length : 17] == 0xee && memory[1][39] == 0xee);
                CHECK(length < 17 || memory[1][length + 23] == 0xee);
        }
        expect_nothing();
        end_all();
}

static struct ibv_send_wr one_sided(enum ibv_wr_opcode opcode, struct ibv_sge *list, uint32_t offset)
{
        struct ibv_send_wr wr = {.wr_id = 9,
                                 .sg_list = list,
                                 .num_sge = 1,
                                 .opcode = opcode,
                                 .send_flags = IBV_SEND_SIGNALED,
                                 .imm_data = 77};

        if (opcode == IBV_WR_ATOMIC_CMP_AND_SWP || opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
                wr.wr.atomic.remote_addr = (uintptr_t)memory[1] + offset;
                wr.wr.atomic.rkey = regions[1]->rkey;
        } else {
                wr.wr.rdma.remote_addr = (uintptr_t)memory[1] + offset;
                wr.wr.rdma.rkey = regions[1]->rkey;
        }
        return wr;
}

static void check_write_and_read(void)
{
        start();
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
                uint32_t length = lengths[i];
                struct ibv_sge from = piece(0, 11, length), back = piece(0, 11, length);
                struct ibv_wc wc;

                for (uint32_t j = 0; j < length; j++)
                        memory[0][11 + j] = (unsigned char)(j * 11 + i);
                memory[1][GAP + 2] = memory[1][GAP + 3 + length] = 0xdd;
                CHECK(post(0, one_sided(IBV_WR_RDMA_WRITE, &from, GAP + 3)) == 0);
                wc = sent(0);
                CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_RDMA_WRITE);
                for (uint32_t j = 0; j < length; j++)
                        CHECK(memory[1][GAP + 3 + j] == (unsigned char)(j * 11 + i));
                CHECK(memory[1][GAP + 2] == 0xdd && memory[1][GAP + 3 + length] == 0xdd);

                memset(memory[0], 0, SIZE);
                CHECK(post(0, one_sided(IBV_WR_RDMA_READ, &back, GAP + 3)) == 0);
                wc = sent(0);
                CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_RDMA_READ && wc.byte_len == length);
                for (uint32_t j = 0; j < length; j++)
                        CHECK(memory[0][11 + j] == (unsigned char)(j * 11 + i));
                CHECK(!memory[0][10] && !memory[0][11 + length]);

                CHECK(receive(1, 40, NULL, 0) == 0);
                CHECK(post(0, one_sided(IBV_WR_RDMA_WRITE_WITH_IMM, &from, GAP + 3)) == 0);
                wc = received(1);
                CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM);
                CHECK(wc.imm_data == 77 && wc.byte_len == length && wc.wr_id == 40);
                CHECK(sent(0).status == IBV_WC_SUCCESS);
        }
        expect_nothing();
        end_all();
}

static void check_atomics(void)
{
        struct ibv_sge back;
        struct ibv_send_wr wr;
        uint64_t *word, *result;

        start();
        word = (uint64_t *)(void *)(memory[1] + 800);
        result = (uint64_t *)(void *)(memory[0] + 16);
        back = piece(0, 16, 8);
        *word = 40;
        wr = one_sided(IBV_WR_ATOMIC_FETCH_AND_ADD, &back, 800);
        wr.wr.atomic.compare_add = 2;
        CHECK(post(0, wr) == 0 && sent(0).opcode == IBV_WC_FETCH_ADD && *result == 40 && *word == 42);
        wr = one_sided(IBV_WR_ATOMIC_CMP_AND_SWP, &back, 800);
        wr.wr.atomic.compare_add = 42;
        wr.wr.atomic.swap = 7;
        CHECK(post(0, wr) == 0 && sent(0).opcode == IBV_WC_COMP_SWAP && *result == 42 && *word == 7);
        CHECK(post(0, wr) == 0 && sent(0).status == IBV_WC_SUCCESS && *result == 7 && *word == 7);
        back.length = 4;
        CHECK(post(0, wr) == EINVAL);
        end_all();
}

/* Inline data may be overwritten at once, and needs no key. */
static void check_inline(void)
{
        struct ibv_sge from[2], to;
        struct ibv_send_wr wr;
        unsigned char bytes[101];

        start();
        memset(bytes, 0x61, sizeof bytes);
        from[0] = (struct ibv_sge){.addr = (uintptr_t)bytes, .length = 60};
        from[1] = (struct ibv_sge){.addr = (uintptr_t)bytes + 60, .length = 40};
        wr = one_sided(IBV_WR_SEND, from, 0);
        wr.num_sge = 2;
        wr.send_flags |= IBV_SEND_INLINE;
        /* There is no receive yet, so it waits. */
        CHECK(post(0, wr) == 0);
        memset(bytes, 0x62, sizeof bytes);
        to = piece(1, 0, 100);
        expect_nothing();
        CHECK(receive(1, 1, &to, 1) == 0 && received(1).byte_len == 100 && sent(0).status == IBV_WC_SUCCESS);
        for (int i = 0; i < 100; i++)
                CHECK(memory[1][i] == 0x61);
        from[1].length++;
        wr = one_sided(IBV_WR_SEND, from, 0);
        wr.num_sge = 2;
        wr.send_flags |= IBV_SEND_INLINE;
        CHECK(post(0, wr) == EINVAL);
        from[1].length--;
        wr.opcode = IBV_WR_RDMA_READ;
        CHECK(post(0, wr) == EINVAL);
        end_all();
}

/* --- order, limits and time */

/* Requests that are not signalled complete silently; a full queue refuses. */
static void check_signals(void)
{
        struct ibv_sge from;
        struct ibv_send_wr wr;

        start();
        from = piece(0, 0, 8);
        wr = one_sided(IBV_WR_RDMA_WRITE, &from, 0);
        wr.send_flags = 0;
        for (uint32_t i = 0; i < usual.max_send_wr; i++)
                CHECK(post(0, wr) == 0);
        CHECK(post(0, wr) == ENOMEM);
        expect_nothing();
        wr.send_flags = IBV_SEND_SIGNALED;
        CHECK(post(0, wr) == 0 && sent(0).wr_id == 9);
        wr.num_sge = (int)usual.max_send_sge + 1;
        CHECK(post(0, wr) == EINVAL);
        wr.num_sge = -1;
        CHECK(post(0, wr) == EINVAL);
        wr.num_sge = 1;
        wr.opcode = IBV_WR_TSO;
        CHECK(post(0, wr) == EOPNOTSUPP);
        wr.opcode = (enum ibv_wr_opcode)1000;
        CHECK(post(0, wr) == EOPNOTSUPP);
        wr.opcode = IBV_WR_SEND;
        wr.send_flags = IBV_SEND_IP_CSUM;
        CHECK(post(0, wr) == EINVAL);
        for (uint32_t i = 0; i < usual.max_recv_wr; i++)
                CHECK(receive(0, i, NULL, 0) == 0);
        CHECK(receive(0, 0, NULL, 0) == ENOMEM && receive(0, 0, NULL, -1) == EINVAL);
        end_all();
        make_ends(true);
        connect_with(usual_attributes(0), usual_attributes(0));
        from = piece(0, 0, 8);
        wr = one_sided(IBV_WR_RDMA_WRITE, &from, 0);
        wr.send_flags = 0;
        CHECK(post(0, wr) == 0 && sent(0).wr_id == 9);
        end_all();
}

/* A fenced request waits for the READs before it; others don't. */
static void check_fence(void)
{
        struct ibv_sge to, from;
        struct ibv_send_wr wr;

        for (int fenced_one = 0; fenced_one < 2; fenced_one++) {
                start();
                to = piece(0, 0, 8);
                from = piece(0, 0, 8);
                memcpy(memory[1] + 8, "read  it", 8);
                memcpy(memory[0], "too soon", 8);
                wr = one_sided(IBV_WR_RDMA_READ, &to, 8);
                CHECK(post(0, wr) == 0);
                wr = one_sided(IBV_WR_RDMA_WRITE, &from, 800);
                wr.send_flags |= fenced_one ? IBV_SEND_FENCE : 0;
                CHECK(post(0, wr) == 0);
                CHECK(sent(0).opcode == IBV_WC_RDMA_READ && sent(0).opcode == IBV_WC_RDMA_WRITE);
                CHECK(memcmp(memory[1] + 800, fenced_one ? "read  it" : "too soon", 8) == 0);
                end_all();
        }
}

/* READs of which each fills the share of answers, more of them than may be open at one time, and
 * the same in the other direction at the same time. */
static void check_many_reads(void)
{
        struct ibv_sge to[2];

        start();
        memset(memory[0], 1, SIZE / 2);
        memset(memory[1], 2, SIZE / 2);
        for (int i = 0; i < 16; i++)
                for (int end = 0; end < 2; end++) {
                        struct ibv_send_wr wr;

                        to[end] = piece(end, SIZE / 2, 140000);
                        wr = one_sided(IBV_WR_RDMA_READ, &to[end], 0);
                        wr.wr.rdma.remote_addr = (uintptr_t)memory[1 - end];
                        wr.wr.rdma.rkey = regions[1 - end]->rkey;
                        CHECK(post(end, wr) == 0);
                }
        for (int i = 0; i < 16; i++)
                CHECK(sent(0).status == IBV_WC_SUCCESS && sent(1).status == IBV_WC_SUCCESS);
        for (int j = 0; j < 140000; j++)
                CHECK(memory[0][SIZE / 2 + j] == 2 && memory[1][SIZE / 2 + j] == 1);
        expect_nothing();
        end_all();
}

/* More messages than there are receives, and more than the ring holds. */
static void check_receives(void)
{
        struct ibv_sge from, to;
        struct ibv_send_wr wr;
        uint64_t got = 0;

        start();
        from = piece(0, 0, 50000);
        to = piece(1, 0, SIZE);
        wr = one_sided(IBV_WR_SEND, &from, 0);
        for (uint64_t i = 0; i < 16; i++) {
                wr.wr_id = i;
                CHECK(post(0, wr) == 0);
        }
        expect_nothing();
        for (uint64_t i = 0; i < 16; i += i % 3 + 1) {
                for (uint64_t j = i; j < i + i % 3 + 1 && j < 16; j++)
                        CHECK(receive(1, j, &to, 1) == 0);
                for (; got < i + i % 3 + 1 && got < 16; got++)
                        CHECK(received(1).wr_id == got && sent(0).wr_id == got);
                expect_nothing();
        }
        CHECK(got == 16);
        end_all();
}

/* No receive in time: an error, but only then. */
static void check_no_receive(void)
{
        struct ibv_qp_attr few = usual_attributes(0);
        struct ibv_sge from;
        struct ibv_send_wr wr;
        struct ibv_wc wc;

        few.rnr_retry = 0;
        make_ends(false);
        connect_with(few, usual_attributes(0));
        from = piece(0, 0, 50);
        wr = one_sided(IBV_WR_SEND, &from, 0);
        CHECK(receive(1, 1, NULL, 0) == 0 && receive(1, 1, NULL, 0) == 0);
        from.length = 0;
        CHECK(post(0, wr) == 0 && post(0, wr) == 0);
        CHECK(sent(0).status == IBV_WC_SUCCESS && sent(0).status == IBV_WC_SUCCESS);
        CHECK(received(1).status == IBV_WC_SUCCESS && received(1).status == IBV_WC_SUCCESS);
        wr.wr_id = 5;
        CHECK(post(0, wr) == 0 && post(0, wr) == 0);
        wc = sent(0);
        CHECK(wc.status == IBV_WC_RNR_RETRY_EXC_ERR && wc.wr_id == 5);
        CHECK(sent(0).status == IBV_WC_WR_FLUSH_ERR && ends[0].qp->state == IBV_QPS_ERR);
        end_all();
}

/* --- what goes wrong */

/* After an error: the rest is flushed, and so is what is posted later. */
static void expect_flush(int end)
{
        struct ibv_sge none = piece(end, 0, 8);

        CHECK(ends[end].qp->state == IBV_QPS_ERR);
        CHECK(post(end, (struct ibv_send_wr){
                            .wr_id = 3, .opcode = IBV_WR_SEND, .sg_list = &none, .num_sge = 1}) == 0);
        CHECK(sent(end).status == IBV_WC_WR_FLUSH_ERR);
        CHECK(receive(end, 6, &none, 1) == 0);
        CHECK(received(end).status == IBV_WC_WR_FLUSH_ERR);
}

/* What end 1 does not allow; nothing is written, and both ends fail. */
static void check_refusals(void)
{
        enum { KEY, BOUND, LOWER, READ_ONLY, DOMAIN, QUEUE_ACCESS, UNALIGNED, NO_READS, CASES };

        for (int what = 0; what < CASES; what++) {
                struct ibv_qp_attr second = usual_attributes(0);
                struct ibv_mr *read_only = NULL;
                struct ibv_pd *other = NULL;
                enum ibv_wr_opcode opcode = IBV_WR_RDMA_WRITE;
                struct ibv_send_wr wr;
                struct ibv_sge from;
                struct ibv_wc wc;
                bool invalid = what == UNALIGNED || what == NO_READS;

                if (what == QUEUE_ACCESS)
                        second.qp_access_flags &= ~(unsigned int)IBV_ACCESS_REMOTE_WRITE;
                if (what == NO_READS)
                        second.max_dest_rd_atomic = 0;
                if (invalid)
                        opcode = what == NO_READS ? IBV_WR_RDMA_READ : IBV_WR_ATOMIC_FETCH_AND_ADD;
                make_ends(false);
                connect_with(usual_attributes(0), second);
                memset(memory[1], 0x33, SIZE);
                from = piece(0, 0, what == UNALIGNED ? 8 : 100000);
                CHECK(receive(1, 80, NULL, 0) == 0);
                CHECK(post(0, one_sided(IBV_WR_RDMA_READ, &from, 0)) == 0 || what == NO_READS);
                wr = one_sided(opcode, &from, what == UNALIGNED ? 4 : 0);
                wr.wr_id = 10;
                if (what == KEY)
                        wr.wr.rdma.rkey += 1 << KEY_GENERATION_BITS;
                if (what == BOUND)
                        wr.wr.rdma.remote_addr += SIZE - 100000 + 1;
                if (what == LOWER)
                        wr.wr.rdma.remote_addr -= 1;
                if (what == READ_ONLY) {
                        CHECK((read_only = ibv_reg_mr(ends[1].pd, memory[1], SIZE, IBV_ACCESS_REMOTE_READ)));
                        wr.wr.rdma.rkey = read_only->rkey;
                }
                if (what == DOMAIN) {
                        CHECK((other = ibv_alloc_pd(context)));
                        CHECK((read_only = ibv_reg_mr(other, memory[1], SIZE, ALL_ACCESS)));
                        wr.wr.rdma.rkey = read_only->rkey;
                }
                CHECK(post(0, wr) == 0 && post(0, one_sided(IBV_WR_RDMA_WRITE, &from, 0)) == 0);
                if (what != NO_READS)
                        CHECK(sent(0).status == IBV_WC_SUCCESS);
                wc = sent(0);
                CHECK(wc.status == (invalid ? IBV_WC_REM_INV_REQ_ERR : IBV_WC_REM_ACCESS_ERR));
                CHECK(wc.wr_id == (what == NO_READS ? 9 : 10));
                CHECK(sent(0).status == IBV_WC_WR_FLUSH_ERR);
                if (what == NO_READS)
                        CHECK(sent(0).status == IBV_WC_WR_FLUSH_ERR);
                wc = received(1);
                CHECK(wc.status == IBV_WC_WR_FLUSH_ERR && wc.wr_id == 80);
                expect_event(invalid ? IBV_EVENT_QP_REQ_ERR : IBV_EVENT_QP_ACCESS_ERR, 1);
                expect_flush(0);
                expect_flush(1);
                expect_nothing();
                for (int j = 0; j < SIZE; j++)
                        CHECK(memory[1][j] == 0x33);
                if (read_only)
                        CHECK(ibv_dereg_mr(read_only) == 0);
                if (other)
                        CHECK(ibv_dealloc_pd(other) == 0);
                end_all();
        }
}

/* A message that is longer than its receive, or a receive whose memory is not there. */
static void check_bad_receive(void)
{
        for (int gone = 0; gone < 2; gone++) {
                struct ibv_sge from, to;

                start();
                from = piece(0, 0, 70000);
                to = piece(1, 0, gone ? 70000 : 69999);
                to.lkey += gone << KEY_GENERATION_BITS;
                CHECK(receive(1, 80, &to, 1) == 0 && receive(1, 81, &to, 1) == 0);
                CHECK(post(0, one_sided(IBV_WR_SEND, &from, 0)) == 0);
                CHECK(received(1).status == (gone ? IBV_WC_LOC_PROT_ERR : IBV_WC_LOC_LEN_ERR));
                CHECK(received(1).status == IBV_WC_WR_FLUSH_ERR);
                CHECK(sent(0).status == (gone ? IBV_WC_REM_OP_ERR : IBV_WC_REM_INV_REQ_ERR));
                expect_event(IBV_EVENT_QP_REQ_ERR, 1);
                expect_flush(0);
                expect_flush(1);
                end_all();
        }
}

/* Keys of the requester's own: a request fails in its turn, those before it do not. */
static void check_own_keys(void)
{
        static const enum ibv_wr_opcode opcodes[] = {IBV_WR_SEND, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ,
                                                     IBV_WR_ATOMIC_FETCH_AND_ADD};

        for (size_t i = 0; i < sizeof opcodes / sizeof *opcodes; i++)
                for (uint32_t length = 8; length <= 200000; length += 199992) {
                        struct ibv_sge from, wrong;
                        struct ibv_send_wr wr;
                        struct ibv_wc wc;

                        start();
                        from = wrong = piece(0, 0, length);
                        wrong.lkey++;
                        CHECK(receive(1, 80, NULL, 0) == 0);
                        CHECK(post(0, one_sided(IBV_WR_RDMA_WRITE, &from, 0)) == 0);
                        wr = one_sided(opcodes[i], &wrong, 0);
                        wr.wr_id = 10;
                        CHECK(post(0, wr) == 0 && post(0, one_sided(IBV_WR_RDMA_WRITE, &from, 0)) == 0);
                        wc = sent(0);
                        CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == 9);
                        wc = sent(0);
                        CHECK(wc.status == IBV_WC_LOC_PROT_ERR && wc.wr_id == 10);
                        CHECK(sent(0).status == IBV_WC_WR_FLUSH_ERR);
                        expect_flush(0);
                        /* The other side hears nothing until it has something to do. */
                        poll_all();
                        CHECK(ends[1].qp->state == IBV_QPS_RTS);
                        from = piece(1, 0, 8);
                        CHECK(post(1, one_sided(IBV_WR_SEND, &from, 0)) == 0);
                        CHECK(sent(1).status == IBV_WC_RETRY_EXC_ERR);
                        end_all();
                }
}

/* The other side is destroyed: silently if nothing is open, otherwise the oldest request fails. */
static void check_other_gone(void)
{
        for (int open = 0; open < 3; open++) {
                struct ibv_sge from;

                start();
                from = piece(0, 0, 8);
                CHECK(post(0, one_sided(IBV_WR_RDMA_WRITE, &from, 0)) == 0 &&
                      sent(0).status == IBV_WC_SUCCESS);
                if (open)
                        CHECK(post(0, one_sided(IBV_WR_SEND, &from, 0)) == 0);
                if (open == 2)
                        CHECK(post(0, one_sided(IBV_WR_SEND, &from, 0)) == 0);
                CHECK(modify(ends[1].qp, IBV_QPS_RESET, usual_attributes(0), IBV_QP_STATE) == 0);
                if (!open) {
                        expect_nothing();
                        CHECK(ends[0].qp->state == IBV_QPS_RTS);
                        CHECK(post(0, one_sided(IBV_WR_RDMA_WRITE, &from, 0)) == 0);
                }
                CHECK(sent(0).status == IBV_WC_RETRY_EXC_ERR);
                if (open == 2)
                        CHECK(sent(0).status == IBV_WC_WR_FLUSH_ERR);
                expect_flush(0);
                expect_nothing();
                end_all();
        }
}

/* What had come when the program leaves the other side was executed, as by a device; what is not
 * allowed was not. The rest fails when a device would give up, not before. */
static void check_executes_before_leaving(void)
{
        enum { RESET, ERROR, DESTROY, WAYS };

        for (int way = 0; way < WAYS; way++) {
                struct ibv_qp_attr attributes = usual_attributes(0);
                struct ibv_sge from, to;
                struct ibv_send_wr wrong;
                uint64_t begin;

                attributes.timeout = 10;
                make_ends(false);
                connect_with(attributes, attributes);
                from = piece(0, 0, 100000);
                to = piece(1, 0, 100000);
                wrong = one_sided(IBV_WR_RDMA_WRITE, &from, 0);
                wrong.wr.rdma.rkey += 1 << KEY_GENERATION_BITS;
                CHECK(receive(1, 20, &to, 1) == 0);
                if (remote)
                        from.length = 20000;
                CHECK(post(0, one_sided(IBV_WR_SEND, &from, 0)) == 0);
                from.length = 1000;
                CHECK(post(0, one_sided(IBV_WR_RDMA_READ, &from, 0)) == 0);
                CHECK(post(0, wrong) == 0 && post(0, wrong) == 0);
                CHECK(queue_of(ends[0].qp)->sends.next == queue_of(ends[0].qp)->sends.tail);
                if (way == DESTROY) {
                        CHECK(ibv_destroy_qp(ends[1].qp) == 0);
                        ends[1].qp = NULL;
                } else {
                        CHECK(modify(ends[1].qp, way == RESET ? IBV_QPS_RESET : IBV_QPS_ERR, attributes,
                                     IBV_QP_STATE) == 0);
                }
                begin = monotonic();
                CHECK(wait_for(ends[0].sent, NULL).status == IBV_WC_SUCCESS);
                CHECK(wait_for(ends[0].sent, NULL).status == IBV_WC_SUCCESS);
                CHECK(wait_for(ends[0].sent, NULL).status == IBV_WC_RETRY_EXC_ERR);
                CHECK(monotonic() - begin >= (UINT64_C(4096) << 10) * 8);
                CHECK(wait_for(ends[0].sent, NULL).status == IBV_WC_WR_FLUSH_ERR);
                end_all();
        }
}

static int asked; /* by a hostile other side */

static void put_by_hand(struct record record)
{
        struct record_sender *sender = &queue_of(ends[0].qp)->sender;

        CHECK(record_put(sender, &record, NULL) == RECORD_OK && record_publish(sender));
}

static void put_ask(void)
{
        enum { MOST = 1000 };

        CHECK(asked++ < MOST);
        put_by_hand((struct record){.operation = RECORD_ASK, .rkey = 1});
}

/* The hostile side takes each answer, and asks again at once: for that it has room, though the
 * message is still in the ring, if it says so itself. */
static void ask_once_more(struct queue_pair *queue, struct waiters *waiters)
{
        struct queue_pair *hostile = queue_of(ends[0].qp);

        (void)waiters;
        if (queue == hostile)
                return;
        for (; record_next(&hostile->receiver) == RECORD_OK; record_done(&hostile->receiver))
                if (hostile->receiver.now.operation == RECORD_DIRECT) {
                        atomic_store(&hostile->sender.view.ring->head, hostile->sender.tail);
                        put_ask();
                }
}

/* The program can leave another side that puts more behind a message without a receive, as soon as
 * what it has put before is taken. */
static void check_leaves_hostile(void)
{
        static const struct queue_pairer endless = {.ask = ask,
                                                    .ask_again = ask_again,
                                                    .listen = listen_to_nobody,
                                                    .ring = ask_once_more,
                                                    .leave = leave};
        enum { RESET, ERROR, DESTROY, WAYS };

        for (int way = 0; way < WAYS; way++) {
                start();
                asked = 0;
                put_by_hand((struct record){.operation = RECORD_SEND, .flags = RECORD_FIRST | RECORD_LAST});
                put_ask();
                queue_pairer = &endless;
                if (way == DESTROY) {
                        CHECK(ibv_destroy_qp(ends[1].qp) == 0);
                        ends[1].qp = NULL;
                } else {
                        CHECK(modify(ends[1].qp, way == RESET ? IBV_QPS_RESET : IBV_QPS_ERR,
                                     usual_attributes(0), IBV_QP_STATE) == 0);
                }
                queue_pairer = &pairer;
                CHECK(asked > 1);
                end_all();
        }
}

/* What the other side had asked for before it went is executed. */
static void check_executes_before_close(void)
{
        struct ibv_sge from;

        start();
        from = piece(1, 0, 8);
        memcpy(memory[1], "from one", 8);
        CHECK(post(1, (struct ibv_send_wr){.opcode = IBV_WR_RDMA_WRITE,
                                           .sg_list = &from,
                                           .num_sge = 1,
                                           .wr.rdma = {(uintptr_t)memory[0] + 80, regions[0]->rkey}}) == 0);
        CHECK(modify(ends[1].qp, IBV_QPS_RESET, usual_attributes(0), IBV_QP_STATE) == 0);
        poll_all();
        CHECK(memcmp(memory[0] + 80, "from one", 8) == 0);
        end_all();
}

/* The same if a router or a relay says that it is gone. Then requests that are open fail, or the
 * next one, and the program has an event. */
static void check_executes_before_loss(void)
{
        enum { ROUTER, BROKEN, OVER, WAYS };

        for (int turn = 0; turn < 2 * WAYS; turn++) {
                int way = turn / 2;
                bool open = turn % 2;
                struct ibv_sge from;

                start();
                from = piece(1, 0, 8);
                memcpy(memory[1], "from one", 8);
                if (open)
                        CHECK(post(0, (struct ibv_send_wr){.opcode = IBV_WR_SEND}) == 0);
                CHECK(post(1, (struct ibv_send_wr){
                                  .opcode = IBV_WR_RDMA_WRITE,
                                  .sg_list = &from,
                                  .num_sge = 1,
                                  .wr.rdma = {(uintptr_t)memory[0] + 80, regions[0]->rkey}}) == 0);
                if (way == ROUTER)
                        queue_lose(queue_of(ends[0].qp));
                else if (way == BROKEN)
                        atomic_store(&rings.views[1].ring->broken, 1);
                else
                        atomic_store(&rings.views[1].ring->over, 1);
                poll_all();
                CHECK(memcmp(memory[0] + 80, "from one", 8) == 0);
                if (!open) {
                        CHECK(ends[0].qp->state == IBV_QPS_RTS);
                        from = piece(0, 0, 8);
                        CHECK(post(0, one_sided(IBV_WR_RDMA_WRITE, &from, 0)) == 0);
                }
                CHECK(sent(0).status == IBV_WC_RETRY_EXC_ERR);
                expect_event(IBV_EVENT_QP_FATAL, 0);
                CHECK(ends[0].qp->state == IBV_QPS_ERR);
                end_all();
        }
}

/* Numbers of requests and of receives begin anew after 2^32: as if a quarter of that many had been
 * executed in between, eight times. */
static void check_numbers(void)
{
        enum { TURNS = 8 };
        const uint32_t many = UINT32_C(1) << 30;

        start();
        for (int turn = 0; turn < TURNS; turn++) {
                struct queue_pair *one = queue_of(ends[0].qp), *other = queue_of(ends[1].qp);
                struct ibv_sge from = piece(0, 0, 8), to = piece(1, 8, 8);
                struct ibv_sge answer = piece(0, 200, 8);

                CHECK(receive(1, 20, &to, 1) == 0);
                poll_all();
                CHECK(post(0, one_sided(IBV_WR_SEND, &from, 0)) == 0);
                CHECK(post(0, one_sided(IBV_WR_RDMA_WRITE, &from, 100)) == 0);
                /* Neither is executed. */
                CHECK(direct_reacher ||
                      !atomic_load(&cq_of(ends[0].sent)->driver)->poll(cq_of(ends[0].sent)));
                CHECK(received(1).status == IBV_WC_SUCCESS);
                CHECK(sent(0).status == IBV_WC_SUCCESS && sent(0).status == IBV_WC_SUCCESS);
                if (turn == TURNS - 1)
                        CHECK(post(0, one_sided(IBV_WR_RDMA_READ, &answer, 100)) == 0 &&
                              sent(0).status == IBV_WC_SUCCESS);
                one->sender.psn += many;
                other->receiver.psn += many;
                /* In a remote arena it tells. */
                other->done += remote ? many : 0;
                other->done_told += remote ? many : 0;
                one->executed += remote ? many : 0;
                one->spent += many;
                one->credit += many;
                other->credit_told += many;
                other->lost += many;
                other->consumed += many;
        }
        end_all();
}

/* Reset, and connected again: nothing of before is left. */
static void check_again(void)
{
        start();
        for (int round = 0; round < 3; round++) {
                struct ibv_sge from = piece(0, 0, 100), to = piece(1, 100, 100);

                CHECK(receive(1, 20, &to, 1) == 0 && receive(1, 21, &to, 1) == 0);
                CHECK(post(0, one_sided(IBV_WR_SEND, &from, 0)) == 0);
                CHECK(received(1).wr_id == 20 && sent(0).status == IBV_WC_SUCCESS);
                for (int i = 0; i < 2; i++)
                        CHECK(modify(ends[i].qp, round == 1 ? IBV_QPS_ERR : IBV_QPS_RESET,
                                     usual_attributes(0), IBV_QP_STATE) == 0);
                if (round == 1) {
                        CHECK(received(1).status == IBV_WC_WR_FLUSH_ERR);
                        for (int i = 0; i < 2; i++)
                                CHECK(modify(ends[i].qp, IBV_QPS_RESET, usual_attributes(0), IBV_QP_STATE) ==
                                      0);
                }
                expect_nothing();
                CHECK(receive(1, 20, &to, 1) == EINVAL);
                CHECK(post(0, one_sided(IBV_WR_SEND, &from, 0)) == EINVAL);
                free_rings(&rings);
                connect_with(usual_attributes(0), usual_attributes(0));
        }
        end_all();
}

/* It waits to be paired again only if the other side has never been there: not if that takes back
 * what it has said, after it has taken or put something. */
static void check_down(void)
{
        for (int used = 0; used < 3; used++) {
                struct queue_pair *queue;
                struct ibv_sge from, to;

                make_ends(false);
                queue = queue_of(ends[0].qp);
                if (used) {
                        connect_with(usual_attributes(0), usual_attributes(0));
                        from = piece(2 - used, 0, 100);
                        to = piece(used - 1, 100, 100);
                        CHECK(receive(used - 1, 20, &to, 1) == 0);
                        CHECK(post(2 - used, one_sided(IBV_WR_SEND, &from, 0)) == 0);
                        CHECK(received(used - 1).wr_id == 20);
                        CHECK(sent(2 - used).status == IBV_WC_SUCCESS);
                        atomic_store(&rings.views[0].ring->ready, 0);
                } else {
                        become_ready(ends[0].qp, usual_attributes(77));
                        rings = new_rings(remote);
                        CHECK(queue_pair_up(asking[0], rings.views[0], rings.views[1], &nowhere,
                                            direct_reacher != NULL));
                        asking[0] = NULL;
                }
                CHECK(queue_pair_down(queue) == !used);
                CHECK(queue_paired(queue) == (used ? QUEUE_PAIRED : QUEUE_ASKED));
                end_all();
        }
}

/* Nobody pairs it: its requests wait, and fail in time. */
static void check_alone(void)
{
        struct ibv_qp_attr attributes = usual_attributes(77);
        struct ibv_sge from;
        int before;

        make_ends(false);
        attributes.timeout = 1;
        attributes.retry_cnt = 0;
        become_ready(ends[0].qp, attributes);
        from = piece(0, 0, 8);
        before = left;
        CHECK(post(0, one_sided(IBV_WR_SEND, &from, 0)) == 0);
        CHECK(wait_for(ends[0].sent, NULL).status == IBV_WC_RETRY_EXC_ERR);
        CHECK(ends[0].qp->state == IBV_QPS_ERR);
        end_all();
        CHECK(left == before + 1);
}

/* A queue that is to be drained completes what it has begun, and says so. */
static void check_drain(void)
{
        struct ibv_qp_attr notify = usual_attributes(0);
        struct ibv_sge from;

        start();
        notify.en_sqd_async_notify = 1;
        from = piece(0, 0, 200000);
        CHECK(post(0, one_sided(IBV_WR_RDMA_WRITE, &from, 0)) == 0);
        CHECK(modify(ends[0].qp, IBV_QPS_SQD, notify, IBV_QP_STATE | IBV_QP_EN_SQD_ASYNC_NOTIFY) == 0);
        CHECK(post(0, one_sided(IBV_WR_RDMA_READ, &from, 0)) == 0);
        CHECK(sent(0).opcode == IBV_WC_RDMA_WRITE);
        expect_nothing();
        expect_event(IBV_EVENT_SQ_DRAINED, 0);
        CHECK(modify(ends[0].qp, IBV_QPS_RTS, notify, IBV_QP_STATE) == 0);
        CHECK(sent(0).opcode == IBV_WC_RDMA_READ);
        end_all();
}

/* --- memory windows, and regions */

static struct ibv_send_wr bind(struct ibv_mw *window, uint32_t key, uint64_t offset, uint64_t length)
{
        return (struct ibv_send_wr){.opcode = IBV_WR_BIND_MW,
                                    .wr_id = 60,
                                    .send_flags = IBV_SEND_SIGNALED,
                                    .bind_mw = {.mw = window,
                                                .rkey = key,
                                                .bind_info = {.mr = regions[1],
                                                              .addr = (uintptr_t)memory[1] + offset,
                                                              .length = length,
                                                              .mw_access_flags = IBV_ACCESS_REMOTE_WRITE}}};
}

static void check_windows(void)
{
        struct ibv_mw *window;
        struct ibv_send_wr wr;
        struct ibv_sge from;
        struct ibv_wc wc;
        uint32_t key;

        for (int last = 0; last < 3; last++) {
                start();
                CHECK(ibv_dereg_mr(regions[1]) == 0);
                CHECK(
                    (regions[1] = ibv_reg_mr(ends[1].pd, memory[1], SIZE, ALL_ACCESS | IBV_ACCESS_MW_BIND)));
                CHECK((window = ibv_alloc_mw(ends[1].pd, IBV_MW_TYPE_2)));
                key = ibv_inc_rkey(window->rkey);
                CHECK(post(1, bind(window, key, 1000, 100)) == 0);
                wc = sent(1);
                CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_BIND_MW && wc.wr_id == 60);
                CHECK(ibv_dereg_mr(regions[1]) == EBUSY);
                from = piece(0, 0, 100);
                wr = one_sided(IBV_WR_RDMA_WRITE, &from, 1000);
                wr.wr.rdma.rkey = key;
                CHECK(post(0, wr) == 0 && sent(0).status == IBV_WC_SUCCESS);
                CHECK(memcmp(memory[1] + 1000, memory[0], 100) == 0);
                if (last == 0) {
                        /* Made invalid by the other side. */
                        CHECK(receive(1, 1, NULL, 0) == 0);
                        from.length = 0;
                        CHECK(post(0, (struct ibv_send_wr){.opcode = IBV_WR_SEND_WITH_INV,
                                                           .invalidate_rkey = key,
                                                           .send_flags = IBV_SEND_SIGNALED}) == 0);
                        wc = received(1);
                        CHECK(wc.wc_flags == IBV_WC_WITH_INV && wc.invalidated_rkey == key);
                        CHECK(sent(0).status == IBV_WC_SUCCESS);
                        from.length = 100;
                } else if (last == 1) {
                        CHECK(post(1, (struct ibv_send_wr){.opcode = IBV_WR_LOCAL_INV,
                                                           .invalidate_rkey = key,
                                                           .send_flags = IBV_SEND_SIGNALED}) == 0);
                        CHECK(sent(1).opcode == IBV_WC_LOCAL_INV);
                } else {
                        /* It can't be bound while it is bound. */
                        CHECK(post(1, bind(window, ibv_inc_rkey(key), 0, 100)) == 0);
                        CHECK(sent(1).status == IBV_WC_MW_BIND_ERR && ends[1].qp->state == IBV_QPS_ERR);
                }
                CHECK(post(0, wr) == 0);
                CHECK(sent(0).status == (last == 2 ? IBV_WC_RETRY_EXC_ERR : IBV_WC_REM_ACCESS_ERR));
                if (last < 2)
                        expect_event(IBV_EVENT_QP_ACCESS_ERR, 1);
                CHECK(ibv_dealloc_mw(window) == 0);
                end_all();
        }
}

/* Bind a window of type 1, for whatever queue pair of its domain. */
static void bind_again(struct ibv_mw *window, uint64_t offset, uint64_t length)
{
        struct ibv_mw_bind wanted = {.wr_id = 61,
                                     .send_flags = IBV_SEND_SIGNALED,
                                     .bind_info = bind(window, 0, offset, length).bind_mw.bind_info};
        uint32_t before = window->rkey;
        struct ibv_wc wc;

        CHECK(ibv_bind_mw(ends[1].qp, window, &wanted) == 0 && window->rkey != before);
        wc = sent(1);
        CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_BIND_MW && wc.wr_id == 61);
}

/* A window of type 1 is bound again while it is bound; only its last key leads anywhere, and nobody
 * but its owner can make that invalid. */
static void check_windows_of_type_1(void)
{
        struct ibv_mw_bind zero_based;
        struct ibv_mw *window;
        struct ibv_send_wr wr;
        struct ibv_sge from;
        uint32_t old;

        for (int last = 0; last < 3; last++) {
                start();
                CHECK(ibv_dereg_mr(regions[1]) == 0);
                CHECK(
                    (regions[1] = ibv_reg_mr(ends[1].pd, memory[1], SIZE, ALL_ACCESS | IBV_ACCESS_MW_BIND)));
                CHECK((window = ibv_alloc_mw(ends[1].pd, IBV_MW_TYPE_1)));
                zero_based = (struct ibv_mw_bind){.bind_info = bind(window, 0, 0, 8).bind_mw.bind_info};
                zero_based.bind_info.mw_access_flags |= IBV_ACCESS_ZERO_BASED;
                CHECK(ibv_bind_mw(ends[1].qp, window, &zero_based) == EINVAL);
                CHECK(post(1, bind(window, ibv_inc_rkey(window->rkey), 0, 8)) == EINVAL);
                bind_again(window, 1000, 100);
                old = window->rkey;
                bind_again(window, 2000, 100);
                CHECK(ibv_dereg_mr(regions[1]) == EBUSY);
                from = piece(0, 0, 100);
                wr = one_sided(IBV_WR_RDMA_WRITE, &from, 2000);
                wr.wr.rdma.rkey = window->rkey;
                CHECK(post(0, wr) == 0 && sent(0).status == IBV_WC_SUCCESS);
                CHECK(memcmp(memory[1] + 2000, memory[0], 100) == 0);
                if (last == 0) {
                        bind_again(window, 0, 0);
                        wr.wr.rdma.rkey = window->rkey;
                } else if (last == 1) {
                        wr = one_sided(IBV_WR_RDMA_WRITE, &from, 1000);
                        wr.wr.rdma.rkey = old;
                } else {
                        CHECK(receive(1, 1, NULL, 0) == 0);
                        wr = (struct ibv_send_wr){.opcode = IBV_WR_SEND_WITH_INV,
                                                  .invalidate_rkey = window->rkey,
                                                  .send_flags = IBV_SEND_SIGNALED};
                }
                CHECK(post(0, wr) == 0);
                CHECK(sent(0).status == (last == 2 ? IBV_WC_REM_OP_ERR : IBV_WC_REM_ACCESS_ERR));
                expect_event(last == 2 ? IBV_EVENT_QP_REQ_ERR : IBV_EVENT_QP_ACCESS_ERR, 1);
                CHECK(ibv_dealloc_mw(window) == 0);
                end_all();
        }
}

static void check_regions(void)
{
        struct ibv_pd *pd, *other;
        struct ibv_mr *mr;
        unsigned char *pages = mmap(NULL, 3 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        uint32_t key;

        CHECK((pd = ibv_alloc_pd(context)) && (other = ibv_alloc_pd(context)));
        CHECK(munmap(pages + 2 * PAGE, PAGE) == 0);
        CHECK(!ibv_reg_mr(pd, pages, 3 * PAGE, 0) && errno == EFAULT);
        CHECK(!ibv_reg_mr(pd, pages, 2 * PAGE, IBV_ACCESS_LOCAL_WRITE) && errno == EFAULT);
        CHECK(!ibv_reg_mr(pd, pages, 0, 0) && errno == EINVAL);
        CHECK(!ibv_reg_mr(pd, pages, SIZE_MAX, 0) && errno == EINVAL);
        CHECK(!ibv_reg_mr(pd, pages, PAGE, IBV_ACCESS_REMOTE_WRITE) && errno == EINVAL);
        CHECK(!ibv_reg_mr(pd, pages, PAGE, 1 << 12) && errno == EINVAL);
        CHECK(!ibv_reg_mr(pd, NULL, SIZE_MAX, IBV_ACCESS_ON_DEMAND) && errno == EOPNOTSUPP);
        CHECK((mr = ibv_reg_mr(pd, pages, 2 * PAGE, IBV_ACCESS_RELAXED_ORDERING)) && mr->lkey == mr->rkey);
        CHECK(mr->addr == pages && mr->length == 2 * PAGE && mr->pd == pd && mr->context == context);
        CHECK(ibv_dealloc_pd(pd) == EBUSY);
        key = mr->rkey;
        CHECK(ibv_rereg_mr(mr, 0, NULL, NULL, 0, 0) == IBV_REREG_MR_ERR_INPUT && mr->rkey == key);
        CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, IBV_ACCESS_LOCAL_WRITE) ==
              IBV_REREG_MR_ERR_INPUT);
        CHECK(mr->rkey == key);
        CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_PD | IBV_REREG_MR_CHANGE_TRANSLATION, other, pages, 9,
                           0) == 0);
        CHECK(mr->pd == other && mr->length == 9 && mr->rkey == key);
        CHECK(ibv_dealloc_pd(pd) == 0 && ibv_dealloc_pd(other) == EBUSY);
        CHECK(ibv_dereg_mr(mr) == 0 && ibv_dealloc_pd(other) == 0);
        munmap(pages, 2 * PAGE);
}

/* An address of the program's choice, or from 0 on. */
static void check_addresses(void)
{
        for (int zero = 0; zero < 2; zero++) {
                struct ibv_sge from;
                struct ibv_send_wr wr;
                struct ibv_mr *mr;

                start();
                mr = zero ? ibv_reg_mr(ends[1].pd, memory[1] + 100, 1000, ALL_ACCESS | IBV_ACCESS_ZERO_BASED)
                          : ibv_reg_mr_iova(ends[1].pd, memory[1] + 100, 1000, UINT64_C(1) << 60, ALL_ACCESS);
                CHECK(mr);
                from = piece(0, 0, 10);
                wr = one_sided(IBV_WR_RDMA_WRITE, &from, 0);
                wr.wr.rdma.rkey = mr->rkey;
                wr.wr.rdma.remote_addr = (zero ? 0 : UINT64_C(1) << 60) + 5;
                CHECK(post(0, wr) == 0 && sent(0).status == IBV_WC_SUCCESS);
                CHECK(memcmp(memory[1] + 105, memory[0], 10) == 0);
                CHECK(ibv_dereg_mr(mr) == 0);
                end_all();
        }
}

/* --- attributes */

static void check_attributes(void)
{
        struct ibv_qp_attr set = usual_attributes(5), got;
        struct ibv_qp_init_attr init;
        struct ibv_qp *qp;
        struct ibv_qp_init_attr wanted = {.qp_type = IBV_QPT_RC, .cap = usual};

        make_ends(false);
        qp = ends[0].qp;
        CHECK(modify(qp, IBV_QPS_INIT, set, INIT_MASK & ~IBV_QP_PORT) == EINVAL);
        CHECK(modify(qp, IBV_QPS_INIT, set, INIT_MASK | IBV_QP_QKEY) == EINVAL);
        CHECK(modify(qp, IBV_QPS_RTR, set, RTR_MASK) == EINVAL &&
              modify(qp, IBV_QPS_ERR, set, IBV_QP_STATE) == EINVAL);
        set.port_num = 2;
        CHECK(modify(qp, IBV_QPS_INIT, set, INIT_MASK) == EINVAL);
        set = usual_attributes(5);
        CHECK(modify(qp, IBV_QPS_INIT, set, INIT_MASK) == 0 && qp->state == IBV_QPS_INIT);
        CHECK(modify(qp, IBV_QPS_RTS, set, RTS_MASK) == EINVAL);
#define REFUSES(state, mask, change)                                                                         \
        do {                                                                                                 \
                struct ibv_qp_attr wrong = set;                                                              \
                wrong.change;                                                                                \
                CHECK(modify(qp, state, wrong, mask) == EINVAL);                                             \
        } while (0)
        REFUSES(IBV_QPS_RTR, RTR_MASK, ah_attr.is_global = 0);
        REFUSES(IBV_QPS_RTR, RTR_MASK, ah_attr.port_num = 2);
        REFUSES(IBV_QPS_RTR, RTR_MASK, ah_attr.grh.sgid_index = 3);
        REFUSES(IBV_QPS_RTR, RTR_MASK, path_mtu = 0);
        REFUSES(IBV_QPS_RTR, RTR_MASK, max_dest_rd_atomic = MOST_READS + 1);
        REFUSES(IBV_QPS_RTR, RTR_MASK, min_rnr_timer = 32);
        REFUSES(IBV_QPS_RTR, RTR_MASK, dest_qp_num = 1 << 24);
        REFUSES(IBV_QPS_RTR, RTR_MASK | IBV_QP_CUR_STATE, cur_qp_state = IBV_QPS_RTS);
        CHECK(modify(qp, IBV_QPS_RTR, set, RTR_MASK) == 0);
        REFUSES(IBV_QPS_RTS, RTS_MASK, rnr_retry = 8);
        REFUSES(IBV_QPS_RTS, RTS_MASK, timeout = 32);
        CHECK(modify(qp, IBV_QPS_RTS, set, RTS_MASK) == 0);
        set.qp_access_flags = IBV_ACCESS_REMOTE_READ;
        CHECK(ibv_modify_qp(qp, &set, IBV_QP_ACCESS_FLAGS) == 0);
        CHECK(ibv_query_qp(qp, &got, -1, &init) == 0);
        CHECK(got.qp_state == IBV_QPS_RTS && got.cur_qp_state == IBV_QPS_RTS && got.dest_qp_num == 5);
        CHECK(got.qp_access_flags == IBV_ACCESS_REMOTE_READ && got.rnr_retry == 7 &&
              got.cap.max_send_wr == 16);
        CHECK(init.send_cq == ends[0].sent && init.cap.max_recv_sge == 4 && init.qp_type == IBV_QPT_RC);
        CHECK(modify(qp, IBV_QPS_ERR, set, IBV_QP_STATE) == 0 &&
              modify(qp, IBV_QPS_ERR, set, IBV_QP_STATE) == 0);
        CHECK(modify(qp, IBV_QPS_INIT, set, INIT_MASK) == EINVAL);
        CHECK(modify(qp, IBV_QPS_RESET, set, IBV_QP_STATE) == 0);
        CHECK(ibv_destroy_cq(ends[0].sent) == EBUSY && ibv_dealloc_pd(ends[0].pd) == EBUSY);

        wanted.send_cq = wanted.recv_cq = ends[0].sent;
        wanted.qp_type = IBV_QPT_RAW_PACKET;
        CHECK(!ibv_create_qp(ends[0].pd, &wanted) && errno == EOPNOTSUPP);
        wanted.qp_type = IBV_QPT_RC;
        wanted.cap.max_send_sge = MOST_PIECES + 1;
        CHECK(!ibv_create_qp(ends[0].pd, &wanted) && errno == EINVAL);
        wanted.cap = (struct ibv_qp_cap){0};
        CHECK((qp = ibv_create_qp(ends[0].pd, &wanted)) && qp->qp_num != ends[0].qp->qp_num);
        CHECK(ibv_destroy_qp(qp) == 0);
        end_all();
}

/* What is there already: nobody polls for it. */
static struct ibv_wc taken(struct ibv_cq *cq)
{
        struct completions *completions = &cq_of(cq)->completions;
        struct ibv_wc wc;

        CHECK(completions_take(completions, 1, &wc) == 1);
        return wc;
}

static void make_loop(void)
{
        struct ibv_qp_attr set = usual_attributes(0);

        make_ends(true);
        set.dest_qp_num = ends[0].qp->qp_num;
        CHECK(ibv_query_gid(context, 1, 0, &set.ah_attr.grh.dgid) == 0);
        become_ready(ends[0].qp, set);
}

static void check_loop_answers(void)
{
        struct ibv_sge from = piece(0, 0, 8), to = piece(0, 8, 8), whole = piece(0, 0, SIZE);
        struct ibv_send_wr wr = {.sg_list = &from,
                                 .num_sge = 1,
                                 .opcode = IBV_WR_RDMA_WRITE,
                                 .wr.rdma = {to.addr, regions[0]->rkey}};
        struct ibv_wc wc;

        CHECK(post(0, wr) == 0 && taken(ends[0].sent).status == IBV_WC_SUCCESS);
        CHECK(memcmp(memory[0], memory[0] + 8, 8) == 0);
        wr.opcode = IBV_WR_RDMA_READ;
        wr.sg_list = &whole;
        wr.wr.rdma.remote_addr = whole.addr;
        CHECK(post(0, wr) == 0 && taken(ends[0].sent).status == IBV_WC_SUCCESS);
        wr = (struct ibv_send_wr){.sg_list = &to,
                                  .num_sge = 1,
                                  .opcode = IBV_WR_ATOMIC_FETCH_AND_ADD,
                                  .wr.atomic = {from.addr, 5, 0, regions[0]->rkey}};
        memset(memory[0], 0, 16);
        CHECK(post(0, wr) == 0 && post(0, wr) == 0);
        CHECK(taken(ends[0].sent).status == IBV_WC_SUCCESS && taken(ends[0].sent).opcode == IBV_WC_FETCH_ADD);
        CHECK(*(uint64_t *)(void *)memory[0] == 10 && *(uint64_t *)(void *)(memory[0] + 8) == 5);

        /* A message that comes before its receive, and one after. */
        wr = (struct ibv_send_wr){.sg_list = &from, .num_sge = 1, .opcode = IBV_WR_SEND};
        CHECK(post(0, wr) == 0 && !completions_are_there(&cq_of(ends[0].sent)->completions));
        CHECK(receive(0, 1, &to, 1) == 0);
        CHECK(taken(ends[0].sent).status == IBV_WC_SUCCESS && taken(ends[0].received).wr_id == 1);
        CHECK(receive(0, 2, &to, 1) == 0 && post(0, wr) == 0);
        CHECK(taken(ends[0].sent).status == IBV_WC_SUCCESS && (wc = taken(ends[0].received)).wr_id == 2);
        CHECK(wc.byte_len == 8 && *(uint64_t *)(void *)(memory[0] + 8) == 10);
}

/* A queue pair that is connected with itself has done what it can when a post returns. */
static void check_loop(void)
{
        struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_READ};
        struct ibv_sge from;
        struct ibv_qp_attr reset = {.qp_state = IBV_QPS_RESET};

        if (remote)
                return;
        make_loop();
        check_loop_answers();
        from = piece(0, 0, 8);
        wr.sg_list = &from;
        wr.num_sge = 1;
        wr.wr.rdma.rkey = regions[0]->rkey;
        CHECK(post(0, wr) == 0 && taken(ends[0].sent).status == IBV_WC_REM_ACCESS_ERR);
        CHECK(ends[0].qp->state == IBV_QPS_ERR && post(0, wr) == 0);
        CHECK(taken(ends[0].sent).status == IBV_WC_WR_FLUSH_ERR);
        expect_event(IBV_EVENT_QP_ACCESS_ERR, 0);

        /* Later it may be connected with another one, and with itself again. */
        CHECK(ibv_modify_qp(ends[0].qp, &reset, IBV_QP_STATE) == 0);
        connect_with(usual_attributes(0), usual_attributes(0));
        from = piece(0, 0, 100);
        wr.opcode = IBV_WR_RDMA_WRITE;
        wr.wr.rdma = (__typeof__(wr.wr.rdma)){(uintptr_t)memory[1], regions[1]->rkey};
        CHECK(post(0, wr) == 0);
        CHECK(wait_for(ends[0].sent, ends[1].sent).status == IBV_WC_SUCCESS);
        end_all();
        make_loop();
        check_loop_answers();
        end_all();
}

/* Objects of a parent domain are those of its domain. */
static void check_parent_domains(void)
{
        struct ibv_td_init_attr nothing = {0};
        struct ibv_parent_domain_init_attr wanted = {0};
        unsigned char byte[8];
        struct ibv_pd *parent;
        struct ibv_mr *mr;
        struct ibv_td *td;
        struct ibv_sge from, to;
        struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE, .sg_list = &from, .num_sge = 1};

        remote = false;
        start();
        CHECK((td = ibv_alloc_td(context, &nothing)));
        wanted.td = td;
        CHECK(!ibv_alloc_parent_domain(context, &wanted) && errno == EINVAL);
        wanted.pd = ends[0].pd;
        wanted.comp_mask = IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS;
        CHECK(!ibv_alloc_parent_domain(context, &wanted) && errno == EOPNOTSUPP);
        wanted.comp_mask = 0;
        CHECK((parent = ibv_alloc_parent_domain(context, &wanted)) && parent != ends[0].pd);
        CHECK((mr = ibv_reg_mr(parent, byte, sizeof byte, 0)) && ibv_dealloc_pd(parent) == EBUSY);
        from = (struct ibv_sge){.addr = (uintptr_t)byte, .length = sizeof byte, .lkey = mr->lkey};
        to = piece(1, 0, sizeof byte);
        wr.wr.rdma.remote_addr = to.addr;
        wr.wr.rdma.rkey = regions[1]->rkey;
        wr.send_flags = IBV_SEND_SIGNALED;
        memset(byte, 7, sizeof byte);
        CHECK(post(0, wr) == 0 && sent(0).status == IBV_WC_SUCCESS && memory[1][7] == 7);
        CHECK(ibv_dereg_mr(mr) == 0 && ibv_dealloc_pd(parent) == 0 && ibv_dealloc_td(td) == 0);
        end_all();
}

int main(void)
{
        static void (*const checks[])(void) = {
            check_send,           check_write_and_read,
            check_atomics,        check_inline,
            check_signals,        check_fence,
            check_many_reads,     check_receives,
            check_no_receive,     check_refusals,
            check_bad_receive,    check_own_keys,
            check_other_gone,     check_executes_before_close,
            check_again,          check_executes_before_leaving,
            check_down,           check_drain,
            check_windows,        check_windows_of_type_1,
            check_addresses,      check_executes_before_loss,
            check_leaves_hostile, check_loop,
            check_numbers,
        };

        queue_pairer = &pairer;
        context = open_device();
        for (size_t i = 0; i < sizeof checks / sizeof *checks; i++)
                for (int way = 0; way < 3; way++) {
                        remote = way == 1;
                        use_direct_memory(way == 2);
                        checks[i]();
                }
        use_direct_memory(false);
        CHECK(reached_files);
        check_attributes();
        check_alone();
        check_regions();
        check_parent_domains();
        CHECK(ibv_close_device(context) == 0);
        return 0;
}
