/* One of two processes on two hosts. Side 0 writes large pieces into memory of side 1, which the
 * relays may move.
 *
 *      moved_writes bytes|flush|drain|deregister ADDRESS SIDE ROUNDS SEED
 *
 * They tell each other what they have to know over TCP: side 1 listens there.
 *
 * bytes: side 1 watches the last byte of what comes next, and compares all of its memory with what
 * has to be there as soon as it has changed. A small write behind it must not be seen before.
 *
 * flush: with writes under way the queue pair of side 0 goes to the state ERR or RESET, or is
 * destroyed. Each request completes, and what side 0 puts into its memory afterwards does not come.
 *
 * drain: with writes under way the queue pair of side 0 is drained, and goes on. None is lost.
 *
 * deregister: side 1 deregisters its memory with writes under way. Nothing comes there afterwards,
 * and side 0 is told.
 */
#include <arpa/inet.h>
#include <infiniband/verbs.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
        AREA = 4 << 20,
        LARGE = 1 << 20,
        WARM = 4, /* writes, after which both ends know each other's memory */
        REQUESTS = 8,
        PATIENCE = 120, /* s */
        OLD = 0xEE,
        PORT = 7171,
};

#define CHECK(condition)                                                                                     \
        do {                                                                                                 \
                if (!(condition)) {                                                                          \
                        fprintf(stderr, "side %d, round %d, line %d: %s\n", side, number_of_round, __LINE__, \
                                #condition);                                                                 \
                        exit(1);                                                                             \
                }                                                                                            \
        } while (0)

/* What one end tells the other. */
struct end {
        uint32_t number, key;
        uint64_t area;
        union ibv_gid gid;
};

static struct end own, peer;
static int talk; /* the connection */
static int side, number_of_round;
static time_t end_of_test;
static uint64_t dice;
static struct ibv_context *context;
static struct ibv_pd *domain;
static struct ibv_cq *completions;
static unsigned char *area; /* AREA bytes */
static struct ibv_mr *region;
static struct ibv_qp *queue;

static uint64_t roll(void)
{
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        return dice;
}

/* Both are here, and know of each other. */
static void meet(void)
{
        CHECK(write(talk, &own, sizeof own) == sizeof own);
        CHECK(recv(talk, &peer, sizeof peer, MSG_WAITALL) == sizeof peer);
}

static void connect_by_tcp(const char *address)
{
        struct sockaddr_in where = {
            .sin_family = AF_INET, .sin_port = htons(PORT), .sin_addr.s_addr = inet_addr(address)};
        int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;

        CHECK(listener >= 0 && setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0);
        if (side) {
                CHECK(bind(listener, (void *)&where, sizeof where) == 0 && listen(listener, 1) == 0);
                CHECK((talk = accept(listener, NULL, NULL)) >= 0);
                return;
        }
        while ((talk = socket(AF_INET, SOCK_STREAM, 0)) >= 0 &&
               connect(talk, (void *)&where, sizeof where) < 0) {
                CHECK(time(NULL) < end_of_test);
                close(talk);
                usleep(20000);
        }
        CHECK(talk >= 0);
}

static void begin(const char *address)
{
        struct ibv_device **list = ibv_get_device_list(NULL);

        connect_by_tcp(address);
        CHECK(list && list[0]);
        area = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(area != MAP_FAILED);
        CHECK((context = ibv_open_device(list[0])) && (domain = ibv_alloc_pd(context)));
        ibv_free_device_list(list);
        CHECK((completions = ibv_create_cq(context, 4 * REQUESTS, NULL, NULL, 0)));
}

static void modify(enum ibv_qp_state state, int mask)
{
        struct ibv_qp_attr set = {.qp_state = state,
                                  .path_mtu = IBV_MTU_4096,
                                  .dest_qp_num = peer.number,
                                  .qp_access_flags = IBV_ACCESS_REMOTE_WRITE,
                                  .ah_attr = {.is_global = 1, .port_num = 1, .grh.hop_limit = 64},
                                  .max_rd_atomic = 1,
                                  .max_dest_rd_atomic = 1,
                                  .min_rnr_timer = 12,
                                  .port_num = 1,
                                  .timeout = 20,
                                  .retry_cnt = 7,
                                  .rnr_retry = 7,
                                  .en_sqd_async_notify = 1};

        set.ah_attr.grh.dgid = peer.gid;
        CHECK(ibv_modify_qp(queue, &set, IBV_QP_STATE | mask) == 0);
}

/* A new queue pair, and a new key for the memory. */
static void connect_both(void)
{
        struct ibv_qp_init_attr wanted = {.qp_type = IBV_QPT_RC,
                                          .send_cq = completions,
                                          .recv_cq = completions,
                                          .cap = {.max_send_wr = 2 * REQUESTS, .max_send_sge = 1},
                                          .sq_sig_all = 1};

        CHECK((region = ibv_reg_mr(domain, area, AREA, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE)));
        CHECK((queue = ibv_create_qp(domain, &wanted)));
        CHECK(ibv_query_gid(context, 1, 0, &own.gid) == 0);
        own.number = queue->qp_num;
        own.key = region->rkey;
        own.area = (uintptr_t)area;
        meet();
        modify(IBV_QPS_INIT, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
        modify(IBV_QPS_RTR, IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
        modify(IBV_QPS_RTS, IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                                IBV_QP_MAX_QP_RD_ATOMIC);
        meet();
}

static void end_both(void)
{
        CHECK(!queue || ibv_destroy_qp(queue) == 0);
        CHECK(!region || ibv_dereg_mr(region) == 0);
        queue = NULL;
        region = NULL;
        meet();
}

static void write_bytes(uint64_t from, uint64_t to, uint32_t length)
{
        struct ibv_sge list = {.addr = (uintptr_t)area + from, .length = length, .lkey = region->lkey};
        struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE,
                                 .sg_list = &list,
                                 .num_sge = 1,
                                 .wr.rdma = {peer.area + to, peer.key}},
                           *bad;

        CHECK(ibv_post_send(queue, &wr, &bad) == 0);
}

static enum ibv_wc_status take_one(void)
{
        struct ibv_wc wc;
        int got;

        while (!(got = ibv_poll_cq(completions, 1, &wc))) {
                CHECK(time(NULL) < end_of_test);
                sched_yield();
        }
        CHECK(got == 1);
        return wc.status;
}

static void warm_up(void)
{
        for (int i = 0; !side && i < WARM; i++) {
                write_bytes(0, 0, LARGE);
                CHECK(take_one() == IBV_WC_SUCCESS);
        }
        meet();
}

/* --- bytes */

static void compare(unsigned char *model, int rounds)
{
        volatile uint64_t *flag = (volatile uint64_t *)area;
        uint32_t most = AREA - 4096;

        for (int round = 1; round <= rounds; round++) {
                uint32_t length = (uint32_t)(roll() % 3 ? 65536 + roll() % (2 * LARGE) : 1 + roll() % 70000);
                uint64_t from = 4096 + roll() % (most - length), to = 4096 + roll() % (most - length),
                         seed = roll();
                unsigned char last = (unsigned char)(model[to + length - 1] + 1);

                number_of_round = round;
                for (uint32_t i = 0; i < length; i++)
                        model[to + i] = (unsigned char)(seed >> i % 57);
                model[to + length - 1] = last;
                if (!side) {
                        memcpy(area + from, model + to, length);
                        *flag = (uint64_t)round;
                        write_bytes(from, to, length);
                        write_bytes(0, 0, 8);
                        CHECK(take_one() == IBV_WC_SUCCESS && take_one() == IBV_WC_SUCCESS);
                } else {
                        const volatile unsigned char *watched = area + to + length - 1;
                        bool early = false;

                        while (*watched != last) {
                                CHECK(time(NULL) < end_of_test && !early);
                                early = *flag == (uint64_t)round && *watched != last;
                        }
                        atomic_thread_fence(memory_order_acquire);
                        CHECK(memcmp(area + 4096, model + 4096, most) == 0);
                        while (*flag != (uint64_t)round)
                                CHECK(time(NULL) < end_of_test);
                }
                meet();
        }
}

/* --- flush */

static void stop_writing(int how)
{
        bool flushed = false;

        for (int i = 0; i < REQUESTS; i++)
                write_bytes(0, 0, 2 * LARGE);
        usleep((unsigned int)(roll() % 3000));
        if (how == 0) {
                modify(IBV_QPS_ERR, 0);
                for (int i = 0; i < REQUESTS; i++) {
                        enum ibv_wc_status status = take_one();

                        CHECK(status == IBV_WC_WR_FLUSH_ERR || (status == IBV_WC_SUCCESS && !flushed));
                        flushed |= status == IBV_WC_WR_FLUSH_ERR;
                }
        } else if (how == 1) {
                modify(IBV_QPS_RESET, 0);
        } else {
                CHECK(ibv_destroy_qp(queue) == 0);
                queue = NULL;
        }
        memset(area, OLD, AREA);
}

static void flush(int rounds)
{
        for (number_of_round = 1; number_of_round <= rounds; number_of_round++) {
                struct ibv_wc wc;

                memset(area, number_of_round, AREA);
                connect_both();
                warm_up();
                if (!side)
                        stop_writing(number_of_round % 3);
                meet();
                usleep(50000);
                CHECK(!side || !memchr(area, OLD, AREA));
                meet();
                end_both();
                while (ibv_poll_cq(completions, 1, &wc) > 0)
                        ;
        }
}

/* --- drain */

static void drain_once(void)
{
        struct ibv_async_event event;
        struct ibv_wc wc;
        int done = 0;

        for (int i = 0; i < REQUESTS; i++)
                write_bytes(0, 0, 2 * LARGE);
        usleep((unsigned int)(roll() % 3000));
        modify(IBV_QPS_SQD, IBV_QP_EN_SQD_ASYNC_NOTIFY);
        do {
                while (ibv_poll_cq(completions, 1, &wc) == 1) {
                        CHECK(wc.status == IBV_WC_SUCCESS);
                        done++;
                }
                CHECK(ibv_get_async_event(context, &event) == 0);
                ibv_ack_async_event(&event);
        } while (event.event_type != IBV_EVENT_SQ_DRAINED);
        while (ibv_poll_cq(completions, 1, &wc) == 1)
                done++;
        usleep(20000);
        CHECK(ibv_poll_cq(completions, 1, &wc) == 0);
        /* From here on the memory is the program's, as far as nothing is under way. */
        memset(area, number_of_round + 100, AREA);
        modify(IBV_QPS_RTS, 0);
        for (; done < REQUESTS; done++)
                CHECK(take_one() == IBV_WC_SUCCESS);
        write_bytes(0, 0, 2 * LARGE);
        CHECK(take_one() == IBV_WC_SUCCESS);
}

static void drain(int rounds)
{
        for (number_of_round = 1; number_of_round <= rounds; number_of_round++) {
                memset(area, number_of_round, AREA);
                connect_both();
                warm_up();
                if (!side)
                        drain_once();
                meet();
                for (size_t i = 0; side && i < 2 * LARGE; i++)
                        CHECK(area[i] == number_of_round + 100);
                end_both();
        }
}

/* --- deregister */

static void deregister(int rounds)
{
        for (number_of_round = 1; number_of_round <= rounds; number_of_round++) {
                enum ibv_wc_status status = IBV_WC_SUCCESS;

                memset(area, OLD, AREA);
                connect_both();
                warm_up();
                while (!side && status == IBV_WC_SUCCESS) {
                        write_bytes(0, 0, 2 * LARGE);
                        status = take_one();
                }
                CHECK(side || status == IBV_WC_REM_ACCESS_ERR);
                if (side) {
                        usleep((unsigned int)(roll() % 20000));
                        CHECK(ibv_dereg_mr(region) == 0);
                        region = NULL;
                        memset(area, number_of_round, AREA);
                        usleep(50000);
                        CHECK(!memchr(area, OLD, AREA));
                }
                meet();
                end_both();
        }
}

int main(int count, char **arguments)
{
        const char *mode = arguments[1];
        int rounds;

        CHECK(count == 6);
        side = atoi(arguments[3]);
        rounds = atoi(arguments[4]);
        dice = strtoull(arguments[5], NULL, 10) | 1;
        end_of_test = time(NULL) + PATIENCE;
        begin(arguments[2]);
        if (strcmp(mode, "bytes") == 0) {
                unsigned char *model = calloc(1, AREA);

                CHECK(model);
                connect_both();
                warm_up();
                compare(model, rounds);
                end_both();
                free(model);
        } else if (strcmp(mode, "flush") == 0) {
                flush(rounds);
        } else if (strcmp(mode, "drain") == 0) {
                drain(rounds);
        } else {
                CHECK(strcmp(mode, "deregister") == 0);
                deregister(rounds);
        }
        return 0;
}
