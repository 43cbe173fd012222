/* Operations in memory of the other side, two queue pairs in one process: `direct.h`.
 *
 *      direct
 *
 * Each operation that can be is executed without a record, byte for byte, and without the other
 * side; and each that the other side would refuse is refused as if there were only records.
 */
#include "queue_bed.h"

enum { SIZE = 64 * PAGE, MIDDLE = 20 * PAGE + 40 };

static struct ibv_context *context;
static struct rings rings;
static struct end ends[2];
static unsigned char *memory[2];
static struct ibv_mr *regions[2];
static int remote_access = ALL_ACCESS;
static bool known = true; /* direct memory, to both */

/* --- pairing */

static struct queue_pair *asking;

static void ask(struct queue_pair *queue)
{
        if (!asking) {
                asking = queue;
                return;
        }
        rings = new_rings(false);
        queue_pair_up(asking, rings.views[0], rings.views[1], &nowhere, known);
        queue_pair_up(queue, rings.views[1], rings.views[0], &nowhere, known);
        asking = NULL;
}

static void leave(struct queue_pair *queue)
{
        (void)queue;
}

static const struct queue_pairer pairer = {
    .ask = ask, .ask_again = ask_again, .listen = listen_to_nobody, .ring = ring, .leave = leave};

/* --- two ends */

static const struct ibv_qp_cap usual = {
    .max_send_wr = 16, .max_recv_wr = 16, .max_send_sge = 4, .max_recv_sge = 4, .max_inline_data = 100};

static void start(void)
{
        struct ibv_qp_attr attributes[2];

        for (int i = 0; i < 2; i++) {
                make_end(&ends[i], context, usual, true);
                memory[i] = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                CHECK(memory[i] != MAP_FAILED);
                CHECK((regions[i] = ibv_reg_mr(ends[i].pd, memory[i], SIZE, i ? remote_access : ALL_ACCESS)));
        }
        for (int i = 0; i < 2; i++)
                attributes[i] = usual_attributes(ends[1 - i].qp->qp_num);
        for (int i = 0; i < 2; i++)
                become_ready(ends[i].qp, attributes[i]);
}

static void end_all(void)
{
        forget_wishes();
        for (int i = 0; i < 2; i++) {
                if (regions[i])
                        CHECK(ibv_dereg_mr(regions[i]) == 0);
                destroy_end(&ends[i]);
                CHECK(munmap(memory[i], SIZE) == 0);
        }
        free_rings(&rings);
        CHECK(extents_settle());
}

static struct ibv_wc sent(void)
{
        return wait_for(ends[0].sent, ends[1].received);
}

/* A completion of end 0, while the other end does nothing. */
static struct ibv_wc sent_alone(void)
{
        return wait_for(ends[0].sent, NULL);
}

static struct ibv_send_wr operation(enum ibv_wr_opcode opcode, struct ibv_sge *list, int count,
                                    uint32_t offset)
{
        struct ibv_send_wr wr = {.sg_list = list, .num_sge = count, .opcode = opcode};

        if (opcode == IBV_WR_ATOMIC_CMP_AND_SWP || opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
                wr.wr.atomic.remote_addr = (uintptr_t)memory[1] + offset;
                wr.wr.atomic.rkey = regions[1]->rkey;
        } else {
                wr.wr.rdma.remote_addr = (uintptr_t)memory[1] + offset;
                wr.wr.rdma.rkey = regions[1]->rkey;
        }
        return wr;
}

static void post(struct ibv_send_wr wr)
{
        struct ibv_send_wr *bad;

        CHECK(ibv_post_send(ends[0].qp, &wr, &bad) == 0);
}

static struct ibv_sge piece(uint32_t offset, uint32_t length)
{
        return (struct ibv_sge){
            .addr = (uintptr_t)memory[0] + offset, .length = length, .lkey = regions[0]->lkey};
}

static uint64_t records_put(void)
{
        return queue_of(ends[0].qp)->sender.tail;
}

/* Do one by a record, and get what it takes to do without. */
static void warm_up(enum ibv_wr_opcode opcode)
{
        struct ibv_sge list = piece(0, 8);
        uint64_t before = records_put();

        post(operation(opcode, &list, 1, 0));
        CHECK(sent().status == IBV_WC_SUCCESS && records_put() > before);
        for (int i = 0; i < 100 && !queue_of(ends[0].qp)->direct.segments; i++) {
                reach_files(NULL);
                post(operation(opcode, &list, 1, 0));
                CHECK(sent().status == IBV_WC_SUCCESS);
        }
        CHECK(queue_of(ends[0].qp)->direct.segments);
        post(operation(opcode, &list, 1, 0));
        CHECK(sent().status == IBV_WC_SUCCESS);
}

/* --- */

static void check_write_and_read(void)
{
        static const uint32_t lengths[] = {1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 4096, 65536, 100001};
        uint64_t before;

        start();
        warm_up(IBV_WR_RDMA_WRITE);
        before = records_put();
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
                uint32_t length = lengths[i], third = length / 3;
                struct ibv_sge list[3] = {piece(3, third), piece(100000, third),
                                          piece(120001, length - 2 * third)};

                for (uint32_t j = 0; j < SIZE; j++)
                        memory[0][j] = (unsigned char)(j * 7 + j / 256 + i);
                memset(memory[1], 0xee, SIZE);
                post(operation(IBV_WR_RDMA_WRITE, list, 3, MIDDLE));
                /* It is there without the other side, and before the completion is taken. */
                for (uint32_t j = 0; j < length; j++)
                        CHECK(memory[1][MIDDLE + j] == memory[0][j < third       ? 3 + j
                                                                 : j < 2 * third ? 100000 + j - third
                                                                                 : 120001 + j - 2 * third]);
                CHECK(memory[1][MIDDLE - 1] == 0xee && memory[1][MIDDLE + length] == 0xee);
                CHECK(sent_alone().status == IBV_WC_SUCCESS);
                memset(memory[0], 0, SIZE);
                post(operation(IBV_WR_RDMA_READ, list, 3, MIDDLE));
                CHECK(sent_alone().status == IBV_WC_SUCCESS);
                CHECK(memory[0][3 + third - (third > 0)] ==
                      (third ? memory[1][MIDDLE + third - 1] : memory[0][3]));
                CHECK(memory[0][120001 + length - 2 * third - 1] == memory[1][MIDDLE + length - 1]);
        }
        CHECK(records_put() == before);
        end_all();
}

static void check_atomics(void)
{
        struct ibv_sge list;
        struct ibv_send_wr wr;
        uint64_t *word, *result, before;

        start();
        warm_up(IBV_WR_RDMA_READ);
        before = records_put();
        word = (uint64_t *)(void *)(memory[1] + MIDDLE);
        result = (uint64_t *)(void *)memory[0];
        list = piece(0, 8);
        *word = 5;
        wr = operation(IBV_WR_ATOMIC_FETCH_AND_ADD, &list, 1, MIDDLE);
        wr.wr.atomic.compare_add = 3;
        post(wr);
        CHECK(sent_alone().status == IBV_WC_SUCCESS && *word == 8 && *result == 5);
        wr = operation(IBV_WR_ATOMIC_CMP_AND_SWP, &list, 1, MIDDLE);
        wr.wr.atomic.compare_add = 7;
        wr.wr.atomic.swap = 1;
        post(wr);
        CHECK(sent_alone().status == IBV_WC_SUCCESS && *word == 8 && *result == 8);
        wr.wr.atomic.compare_add = 8;
        *result = 0;
        post(wr);
        CHECK(sent_alone().status == IBV_WC_SUCCESS && *word == 1 && *result == 8);
        CHECK(records_put() == before);
        end_all();
}

/* What is put before has to be executed before. */
static void check_order(void)
{
        struct ibv_sge list, to;
        struct ibv_recv_wr receive = {.sg_list = &to, .num_sge = 1}, *bad;

        start();
        list = piece(0, 64);
        warm_up(IBV_WR_RDMA_WRITE);
        to = (struct ibv_sge){.addr = (uintptr_t)memory[1], .length = 64, .lkey = regions[1]->lkey};
        CHECK(ibv_post_recv(ends[1].qp, &receive, &bad) == 0);
        memory[0][0] = 1;
        memory[1][MIDDLE] = 0;
        post(operation(IBV_WR_SEND, &list, 1, 0));
        post(operation(IBV_WR_RDMA_WRITE, &list, 1, MIDDLE));
        CHECK(memory[1][MIDDLE] == 0);
        CHECK(sent().status == IBV_WC_SUCCESS && sent().status == IBV_WC_SUCCESS);
        CHECK(memory[1][MIDDLE] == 1 && wait_for(ends[1].received, NULL).status == IBV_WC_SUCCESS);
        end_all();
}

/* How an operation ends that the other side has to refuse. */
static void expect_refused(enum ibv_wr_opcode opcode, uint32_t offset, uint32_t length)
{
        struct ibv_sge list = piece(0, length);

        memory[0][0] = memory[0][length - 1] = 0x77;
        post(operation(opcode, &list, 1, offset));
        CHECK(sent().status == IBV_WC_REM_ACCESS_ERR);
        CHECK(memory[1][offset < SIZE ? offset : 0] != 0x77);
}

static void drop_events(void)
{
        struct ibv_async_event event;

        CHECK(ibv_get_async_event(context, &event) == 0);
        ibv_ack_async_event(&event);
}

static void check_refused(void)
{
        for (int way = 0; way < 6; way++) {
                struct ibv_qp_attr attributes = {.qp_access_flags = IBV_ACCESS_REMOTE_READ};
                uint32_t offset = MIDDLE;

                if (way == 1)
                        remote_access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ;
                start();
                warm_up(IBV_WR_RDMA_READ);
                if (way == 0) { /* given up */
                        struct ibv_mr kept = *regions[1];

                        CHECK(ibv_dereg_mr(regions[1]) == 0);
                        regions[1] = &kept;
                        expect_refused(IBV_WR_RDMA_WRITE, offset, 64);
                        regions[1] = NULL;
                } else if (way == 1) { /* only to be read */
                        expect_refused(IBV_WR_RDMA_WRITE, offset, 64);
                } else if (way == 2) { /* behind its end */
                        expect_refused(IBV_WR_RDMA_WRITE, SIZE - 32, 64);
                } else if (way == 3) { /* before it */
                        expect_refused(IBV_WR_RDMA_WRITE, (uint32_t)-8, 64);
                } else if (way == 4) { /* the queue pair does not allow it any more */
                        CHECK(ibv_modify_qp(ends[1].qp, &attributes, IBV_QP_ACCESS_FLAGS) == 0);
                        expect_refused(IBV_WR_RDMA_WRITE, offset, 64);
                } else { /* registered anew, without the right */
                        CHECK(ibv_rereg_mr(regions[1], IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0,
                                           IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ) == 0);
                        expect_refused(IBV_WR_RDMA_WRITE, offset, 64);
                }
                drop_events();
                remote_access = ALL_ACCESS;
                end_all();
        }
}

static void poll_all(void)
{
        struct ibv_wc wc;

        for (int i = 0; i < 20; i++)
                for (int side = 0; side < 2; side++) {
                        CHECK(ibv_poll_cq(ends[side].sent, 1, &wc) == 0);
                        CHECK(ibv_poll_cq(ends[side].received, 1, &wc) == 0);
                }
}

/* Who asks for a key learns nothing that an operation by it has not told. */
static void check_guess(void)
{
        struct queue_pair *queue;

        start();
        queue = queue_of(ends[0].qp);
        mutex_take(&queue->sending);
        queue->direct.wanted = regions[1]->rkey;
        queue_publish(queue);
        mutex_release(&queue->sending);
        poll_all();
        CHECK(!queue->direct.asked && !wished.count && queue->direct.without[0] == regions[1]->rkey);
        end_all();
}

/* A queue pair that has ended, or allows less, can't be used any more by who has mapped memory. */
static void check_ended(void)
{
        enum { CHANGES = 3, REFUSES = CHANGES, LEFT, WAYS };

        struct ibv_qp_attr changes[] = {{.qp_state = IBV_QPS_ERR},
                                        {.qp_state = IBV_QPS_RESET},
                                        {.qp_access_flags = IBV_ACCESS_REMOTE_READ}};
        const int masks[] = {IBV_QP_STATE, IBV_QP_STATE, IBV_QP_ACCESS_FLAGS};

        for (int way = 0; way < WAYS; way++) {
                volatile unsigned char *mapped;

                start();
                warm_up(IBV_WR_RDMA_WRITE);
                mapped = queue_of(ends[0].qp)->direct.segments->first;
                memory[1][0] = 1;
                CHECK(*mapped == 1);
                if (way < CHANGES) {
                        CHECK(ibv_modify_qp(ends[1].qp, &changes[way], masks[way]) == 0);
                } else if (way == REFUSES) { /* it fails by itself */
                        expect_refused(IBV_WR_RDMA_WRITE, SIZE - 32, 64);
                        drop_events();
                } else { /* the other side has left it */
                        CHECK(ibv_modify_qp(ends[0].qp, &changes[0], masks[0]) == 0);
                        poll_all();
                }
                while (!extents_settle())
                        ;
                *mapped = 2;
                CHECK(memory[1][0] == 1);
                end_all();
        }
}

static unsigned char *stopped_at;

/* It is stopped there for longer than the other side waits, which withdraws its memory because of
 * another queue pair. */
static void withdraw_meanwhile(int signal)
{
        struct extent_set told = queue_of(ends[1].qp)->known;

        (void)signal;
        CHECK(mprotect(stopped_at, PAGE, PROT_READ | PROT_WRITE) == 0);
        extents_withdraw(&told);
}

static void stop_at(uint32_t offset)
{
        const struct sigaction action = {.sa_handler = withdraw_meanwhile};

        stopped_at = memory[0] + offset;
        CHECK(sigaction(SIGSEGV, &action, NULL) == 0 && mprotect(stopped_at, PAGE, PROT_NONE) == 0);
}

/* Who stands still in the middle of an operation, so that the other side takes its memory away,
 * writes all of it nevertheless, and does no atomic operation twice. */
static void check_stopped(void)
{
        struct ibv_sge list;
        struct ibv_send_wr wr;
        uint64_t *word, before;

        start();
        warm_up(IBV_WR_RDMA_WRITE);
        before = records_put();
        list = piece(0, 30 * PAGE);
        for (uint32_t i = 0; i < list.length; i++)
                memory[0][i] = (unsigned char)(i * 7 + i / 256);
        stop_at(15 * PAGE);
        post(operation(IBV_WR_RDMA_WRITE, &list, 1, MIDDLE));
        CHECK(sent().status == IBV_WC_SUCCESS && records_put() > before);
        CHECK(memcmp(memory[0], memory[1] + MIDDLE, list.length) == 0);
        end_all();

        start();
        warm_up(IBV_WR_RDMA_READ);
        word = (uint64_t *)(void *)(memory[1] + MIDDLE);
        *word = 5;
        list = piece(15 * PAGE, 8);
        wr = operation(IBV_WR_ATOMIC_FETCH_AND_ADD, &list, 1, MIDDLE);
        wr.wr.atomic.compare_add = 3;
        stop_at(15 * PAGE);
        post(wr);
        CHECK(sent().status == IBV_WC_RETRY_EXC_ERR && *word == 8);
        CHECK(signal(SIGSEGV, SIG_DFL) == withdraw_meanwhile);
        end_all();
}

/* A queue pair that only reads can't be used to map what may be written. */
static void check_less_allowed(void)
{
        struct ibv_qp_attr attributes = {.qp_access_flags = IBV_ACCESS_REMOTE_READ};
        struct ibv_sge list;
        struct queue_pair *queue;

        start();
        queue = queue_of(ends[0].qp);
        CHECK(ibv_modify_qp(ends[1].qp, &attributes, IBV_QP_ACCESS_FLAGS) == 0);
        list = piece(0, 8);
        for (int i = 0; i < 3; i++) {
                post(operation(IBV_WR_RDMA_READ, &list, 1, MIDDLE));
                CHECK(sent().status == IBV_WC_SUCCESS);
        }
        poll_all();
        CHECK(!queue->direct.segments && !wished.count && queue->direct.without[0] == regions[1]->rkey);
        end_all();
}

/* Nothing of it is told to a peer that does not know it, or on a network that does not allow it. */
static void check_unknown(void)
{
        struct ibv_sge list;

        known = false;
        start();
        for (int i = 0; i < 3; i++) {
                uint64_t before = records_put();

                list = piece(0, 8);
                post(operation(IBV_WR_RDMA_WRITE, &list, 1, MIDDLE));
                CHECK(sent().status == IBV_WC_SUCCESS);
                CHECK(records_put() - before == sizeof(struct record) + list.length);
        }
        end_all();
        known = true;
}

int main(void)
{
        queue_pairer = &pairer;
        context = open_device();
        use_direct_memory(true);
        check_write_and_read();
        check_atomics();
        check_order();
        check_refused();
        check_guess();
        check_less_allowed();
        check_unknown();
        check_ended();
        check_stopped();
        CHECK(ibv_close_device(context) == 0);
        return 0;
}
