/* One of two processes whose queue pairs do everything at once: player.h.
 *
 *      far torture FILE SIDE SECONDS SEED
 *      far peer FILE SIDE
 *      far rest FILE SIDE
 *      far last FILE SIDE SIZE sleeping|polling own|shared
 *
 * They tell each other what they have to know in FILE, which both map, whatever network they have.
 *
 * peer: an end that sends to one that has no receive. It prints what becomes of its requests and
 * the event that it gets.
 *
 * last: side 0 sends messages of SIZE bytes to side 1, which kills itself as soon as it has the
 * last one. Its receives are in a queue of its own, or in a shared one. All of side 0's requests
 * have to succeed.
 *
 * rest: both write to each other's memory, and wait for what they get by watching that. Then they
 * do nothing any more.
 */
#include "player.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>

/* The file. */
static struct {
        struct shared shared;
        union ibv_gid gids[2];
} * board;

static int own_side;

static struct ibv_context *open_device(void)
{
        struct ibv_device **list = ibv_get_device_list(NULL);
        struct ibv_context *context;

        CHECK(list && list[0]);
        context = ibv_open_device(list[0]);
        CHECK(context);
        ibv_free_device_list(list);
        CHECK(ibv_query_gid(context, 1, 0, &board->gids[own_side]) == 0);
        return context;
}

/* The other one has said its number, after its GID. */
static void go_on(struct ibv_qp *qp)
{
        (void)qp;
}

static struct ibv_qp_attr attributes_of(int side)
{
        struct ibv_qp_attr set = usual_attributes(atomic_load(&shared->ends[!side].number));

        set.ah_attr.grh.dgid = board->gids[!side];
        set.timeout = 20;
        return set;
}

static void map_board(const char *path)
{
        int file = open(path, O_RDWR);

        CHECK(file >= 0);
        board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        CHECK(board != MAP_FAILED);
        shared = &board->shared;
        close(file);
}

/* --- a peer that goes away */

static void send_in_vain(void)
{
        struct ibv_qp_init_attr wanted = {
            .qp_type = IBV_QPT_RC, .cap = {.max_send_wr = 4, .max_send_sge = 1}, .sq_sig_all = 1};
        struct ibv_send_wr wr = {.opcode = IBV_WR_SEND}, *bad;
        struct ibv_context *context = open_device();
        struct ibv_async_event event;
        struct ibv_pd *pd = ibv_alloc_pd(context);
        struct ibv_wc wcs[2];
        struct ibv_qp *qp;
        int got = 0;

        CHECK(pd);
        wanted.send_cq = wanted.recv_cq = ibv_create_cq(context, 16, NULL, NULL, 0);
        CHECK(wanted.send_cq && (qp = ibv_create_qp(pd, &wanted)));
        atomic_store(&shared->ends[own_side].number, qp->qp_num);
        while (!atomic_load(&shared->ends[!own_side].number))
                sched_yield();
        become_ready(qp, attributes_of(own_side));
        for (int i = 0; i < 2; i++)
                CHECK(ibv_post_send(qp, &wr, &bad) == 0);
        printf("sent\n");
        fflush(stdout);
        while (got < 2) {
                got += ibv_poll_cq(wanted.send_cq, 2 - got, wcs + got);
                usleep(1000);
        }
        /* GIDs may go as well. */
        do {
                CHECK(ibv_get_async_event(context, &event) == 0);
                ibv_ack_async_event(&event);
        } while (event.event_type != IBV_EVENT_QP_FATAL);
        printf("%s, %s, %s\n", ibv_wc_status_str(wcs[0].status), ibv_wc_status_str(wcs[1].status),
               ibv_event_type_str(event.event_type));
}

/* --- a peer that ends with the last message */

enum { MESSAGES = 8 };

static struct ibv_qp *make_one(bool sleeps, bool shared_receives, struct ibv_pd **pd)
{
        struct ibv_qp_init_attr wanted = {
            .qp_type = IBV_QPT_RC,
            .cap = {.max_send_wr = MESSAGES, .max_recv_wr = MESSAGES, .max_send_sge = 1, .max_recv_sge = 1},
            .sq_sig_all = 1};
        struct ibv_srq_init_attr of_all = {.attr = {.max_wr = MESSAGES, .max_sge = 1}};
        struct ibv_context *context = open_device();
        struct ibv_comp_channel *channel = sleeps ? ibv_create_comp_channel(context) : NULL;
        struct ibv_qp *qp;

        CHECK((*pd = ibv_alloc_pd(context)));
        CHECK((wanted.send_cq = wanted.recv_cq = ibv_create_cq(context, 4 * MESSAGES, NULL, channel, 0)));
        CHECK(!shared_receives || (wanted.srq = ibv_create_srq(*pd, &of_all)));
        CHECK((qp = ibv_create_qp(*pd, &wanted)));
        CHECK(!sleeps || ibv_req_notify_cq(qp->send_cq, 0) == 0);
        return qp;
}

/* Wait for completions, all of which are successes. */
static void take_all(struct ibv_cq *cq)
{
        time_t end = time(NULL) + PATIENCE;
        struct ibv_cq *rung;
        struct ibv_wc wc;
        void *of_program;
        int more;

        for (int taken = 0; taken < MESSAGES; taken += more) {
                CHECK((more = ibv_poll_cq(cq, 1, &wc)) >= 0 && time(NULL) < end);
                CHECK(!more || wc.status == IBV_WC_SUCCESS);
                if (more || !cq->channel)
                        continue;
                CHECK(ibv_get_cq_event(cq->channel, &rung, &of_program) == 0);
                ibv_ack_cq_events(cq, 1);
                CHECK(ibv_req_notify_cq(cq, 0) == 0);
                more = ibv_poll_cq(cq, 1, &wc);
                CHECK(more >= 0 && (!more || wc.status == IBV_WC_SUCCESS));
        }
}

static void exchange_last(uint32_t size, bool sleeps, bool shared_receives)
{
        struct ibv_pd *pd;
        struct ibv_qp *qp = make_one(sleeps, shared_receives && own_side, &pd);
        unsigned char *bytes = calloc(1, size);
        struct ibv_mr *region = ibv_reg_mr(pd, bytes, size, IBV_ACCESS_LOCAL_WRITE);
        struct ibv_sge list = {.addr = (uintptr_t)bytes, .length = size};
        struct ibv_recv_wr receive = {.sg_list = &list, .num_sge = 1}, *bad_receive;
        struct ibv_send_wr send = {.opcode = IBV_WR_SEND, .sg_list = &list, .num_sge = 1}, *bad;

        CHECK(bytes && region);
        list.lkey = region->lkey;
        atomic_store(&shared->ends[own_side].number, qp->qp_num);
        while (!atomic_load(&shared->ends[!own_side].number))
                usleep(1000);
        become_ready(qp, attributes_of(own_side));
        for (int i = 0; own_side && i < MESSAGES; i++)
                CHECK((qp->srq ? ibv_post_srq_recv(qp->srq, &receive, &bad_receive)
                               : ibv_post_recv(qp, &receive, &bad_receive)) == 0);
        for (int i = 0; !own_side && i < MESSAGES; i++)
                CHECK(ibv_post_send(qp, &send, &bad) == 0);
        take_all(qp->send_cq);
        if (own_side)
                raise(SIGKILL);
}

/* --- ends that have nothing to do */

enum { ROUNDS = 200 };

/* Write numbers in turn with the other end. */
static void write_in_turn(struct ibv_qp *qp, struct ibv_mr *region, volatile uint64_t *words)
{
        struct ibv_sge from = {.addr = (uintptr_t)words, .length = 8, .lkey = region->lkey};
        struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE,
                                 .sg_list = &from,
                                 .num_sge = 1,
                                 .wr.rdma = {shared->ends[!own_side].area + 8, shared->ends[!own_side].key}},
                           *bad;
        time_t end = time(NULL) + PATIENCE;
        struct ibv_wc wc;

        for (uint64_t i = 1; i <= ROUNDS; i++) {
                while (own_side && words[1] != i)
                        CHECK(time(NULL) < end);
                words[0] = i;
                CHECK(ibv_post_send(qp, &wr, &bad) == 0);
                while (!ibv_poll_cq(qp->send_cq, 1, &wc))
                        CHECK(time(NULL) < end);
                CHECK(wc.status == IBV_WC_SUCCESS);
                while (!own_side && words[1] != i)
                        CHECK(time(NULL) < end);
        }
}

static void rest(void)
{
        static uint64_t words[2];
        struct ibv_qp_init_attr wanted = {
            .qp_type = IBV_QPT_RC, .cap = {.max_send_wr = 4, .max_send_sge = 1}, .sq_sig_all = 1};
        struct ibv_context *context = open_device();
        struct ibv_pd *pd = ibv_alloc_pd(context);
        struct ibv_mr *region;
        struct ibv_qp *qp;

        CHECK(pd && (region = ibv_reg_mr(pd, words, sizeof words, ALL_ACCESS)));
        wanted.send_cq = wanted.recv_cq = ibv_create_cq(context, 16, NULL, NULL, 0);
        CHECK(wanted.send_cq && (qp = ibv_create_qp(pd, &wanted)));
        shared->ends[own_side].area = (uintptr_t)words;
        shared->ends[own_side].key = region->rkey;
        atomic_store(&shared->ends[own_side].number, qp->qp_num);
        while (!atomic_load(&shared->ends[!own_side].number))
                sched_yield();
        become_ready(qp, attributes_of(own_side));
        write_in_turn(qp, region, words);
        printf("rests\n");
        fflush(stdout);
        pause();
}

int main(int count, char **arguments)
{
        CHECK(count >= 4);
        map_board(arguments[2]);
        own_side = atoi(arguments[3]);
        if (strcmp(arguments[1], "peer") == 0) {
                send_in_vain();
                return 0;
        }
        if (strcmp(arguments[1], "rest") == 0)
                rest();
        if (strcmp(arguments[1], "last") == 0) {
                CHECK(count == 7);
                exchange_last((uint32_t)atoi(arguments[4]), strcmp(arguments[5], "sleeping") == 0,
                              strcmp(arguments[6], "shared") == 0);
                return 0;
        }
        CHECK(count == 6);
        end_of_test = time(NULL) + atoi(arguments[4]);
        seed = strtoull(arguments[5], NULL, 10);
        play(own_side ? &own_side : NULL);
        return 0;
}
