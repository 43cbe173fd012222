/* Queue pairs of type UD without a router: `rules` sends to the process itself, and to a peer whose
 * side of the rings is here; `hostile` has the peer write anything; `threads` sends from several.
 */
#include "../../dataplane/verbs/datagrams.h"
#include "../../dataplane/verbs/groups.h"
#include "../../dataplane/verbs/monotonic.h"
#include "../../dataplane/verbs/progress.h"
#include "queue_bed.h"

#include <endian.h>

enum { SIZE = 100000, QUEUES = 4, KEY = 77, HEADER = 40, PEER_FIRST = 50000, SLOT = 9, OWN_BELL = 70 };

static struct ibv_context *context;
static struct ibv_pd *pd;
static struct ibv_cq *cq;
static struct ibv_qp *qps[QUEUES];
static unsigned char *memory;
static struct ibv_mr *region;
static union ibv_gid here = {.raw = {[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1}};
static union ibv_gid there = {.raw = {[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 2}};
static union ibv_gid group = {.raw = {0xff, 0x0e, [15] = 7}};
static struct ibv_ah *own_ah, *peer_ah, *group_ah;

/* --- a router, and a peer */

static struct {
        uint32_t count, wanted, request;
} sought;

static uint32_t epoch = 1;

static void seek(const union ibv_gid *from, const union ibv_gid *to, uint32_t number, uint32_t wanted,
                 uint32_t request)
{
        (void)number;
        CHECK(!memcmp(from, &here, 16) && (!memcmp(to, &there, 16) || !memcmp(to, &group, 16)));
        sought.count++;
        sought.wanted = wanted;
        sought.request = request;
}

static void join(const struct queue_pair *queue, const union ibv_gid *to, bool on)
{
        (void)queue;
        (void)to;
        (void)on;
}

static uint32_t epoch_now(void)
{
        return epoch;
}

static void ring_peer(struct datagram_peer *peer, struct waiters *waiters)
{
        (void)peer;
        (void)waiters;
}

static void end_peer(struct datagram_peer *peer, uint32_t number)
{
        struct place place;

        CHECK(datagrams_end(peer, number, false, &place));
}

static const struct datagram_router router = {
    .seek = seek, .join = join, .epoch = epoch_now, .ring = ring_peer, .end = end_peer};

static struct rings rings;
static struct record_sender sends;      /* of the peer */
static struct record_receiver receives; /* of the peer */

/* A peer with its own range of numbers. */
static struct datagram_peer *add_peer(uint32_t first, uint32_t number, const struct rings *made)
{
        struct datagram_slot slot = {.from = here,
                                     .to = there,
                                     .first = first,
                                     .count = 100,
                                     .number = number,
                                     .epoch = epoch,
                                     .place = &nowhere,
                                     .bell = OWN_BELL,
                                     .out = made->views[0],
                                     .in = made->views[1]};
        struct datagram_peer *peer = peer_up(&slot);

        CHECK(peer && atomic_load(&datagram_peers[peer->index]) == peer);
        return peer;
}

static struct datagram_peer *come_up_at(uint32_t number, bool remote)
{
        rings = new_rings(remote);
        record_send_from(&sends, rings.views[1]);
        record_receive_from(&receives, rings.views[0]);
        return add_peer(PEER_FIRST, number, &rings);
}

static struct datagram_peer *come_up(uint32_t number)
{
        return come_up_at(number, false);
}

static void go_down(uint32_t number)
{
        struct datagram_peer *peer = peer_with(number, epoch);
        struct place place;

        CHECK(peer && datagrams_end(peer, number, false, &place) && !peer_with(number, epoch));
        CHECK(!datagrams_end(peer, number, false, &place));
        free_rings(&rings);
}

static void say(struct record_sender *sender, uint32_t from, uint32_t to, uint32_t key, const void *bytes,
                uint32_t length)
{
        struct iovec vec = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = length};
        struct cursor cursor = {.vec = &vec};
        struct record record = {.operation = RECORD_DATAGRAM,
                                .length = length,
                                .rkey = key,
                                .address = (uint64_t)from << 32 | to};

        CHECK(record_put(sender, &record, &cursor) == RECORD_OK);
        record_publish(sender);
}

static void peer_says(uint32_t from, uint32_t to, uint32_t key, const void *bytes, uint32_t length)
{
        say(&sends, from, to, key, bytes, length);
}

/* --- this side */

static struct ibv_ah *handle(const union ibv_gid *to)
{
        struct ibv_ah_attr wanted = {.is_global = 1, .port_num = 1, .grh.dgid = *to};
        struct ibv_ah *made = ibv_create_ah(pd, &wanted);

        CHECK(made);
        return made;
}

static void make_queue(int i, struct ibv_srq *srq)
{
        struct ibv_qp_init_attr wanted = {
            .cap = {.max_send_wr = 64, .max_recv_wr = 64, .max_send_sge = 4, .max_recv_sge = 4},
            .qp_type = IBV_QPT_UD,
            .sq_sig_all = 1,
            .srq = srq,
            .send_cq = cq,
            .recv_cq = cq};
        struct ibv_qp_attr attributes = {.port_num = 1, .qkey = KEY};

        CHECK((qps[i] = ibv_create_qp(pd, &wanted)));
        CHECK(modify(qps[i], IBV_QPS_INIT, attributes,
                     IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY) == 0);
        CHECK(modify(qps[i], IBV_QPS_RTR, attributes, IBV_QP_STATE) == 0);
        CHECK(modify(qps[i], IBV_QPS_RTS, attributes, IBV_QP_STATE | IBV_QP_SQ_PSN) == 0);
}

static void start(void)
{
        CHECK((pd = ibv_alloc_pd(context)));
        CHECK((cq = ibv_create_cq(context, 4096, NULL, NULL, 0)));
        CHECK((memory = calloc(1, SIZE)));
        CHECK((region = ibv_reg_mr(pd, memory, SIZE, ALL_ACCESS)));
        for (int i = 0; i < QUEUES; i++)
                make_queue(i, NULL);
        own_ah = handle(&here);
        peer_ah = handle(&there);
        group_ah = handle(&group);
        datagram_router = &router;
}

static void end_all(void)
{
        CHECK(!ibv_destroy_ah(own_ah) && !ibv_destroy_ah(peer_ah) && !ibv_destroy_ah(group_ah));
        for (int i = 0; i < QUEUES; i++)
                CHECK(ibv_destroy_qp(qps[i]) == 0);
        CHECK(!ibv_destroy_cq(cq) && !ibv_dereg_mr(region) && !ibv_dealloc_pd(pd));
        free(memory);
}

static struct ibv_sge piece(uint32_t offset, uint32_t length)
{
        return (struct ibv_sge){.addr = (uintptr_t)memory + offset, .length = length, .lkey = region->lkey};
}

static int send_with(struct ibv_qp *qp, struct ibv_ah *ah, uint32_t to, uint32_t key, struct ibv_sge sge)
{
        struct ibv_send_wr wr = {.wr_id = 1,
                                 .opcode = IBV_WR_SEND_WITH_IMM,
                                 .sg_list = &sge,
                                 .num_sge = 1,
                                 .imm_data = 5},
                           *bad;

        wr.wr.ud.ah = ah;
        wr.wr.ud.remote_qpn = to;
        wr.wr.ud.remote_qkey = key;
        return ibv_post_send(qp, &wr, &bad);
}

static void receive(struct ibv_qp *qp, uint64_t id, struct ibv_sge sge)
{
        struct ibv_recv_wr wr = {.wr_id = id, .sg_list = &sge, .num_sge = 1}, *bad;

        CHECK(ibv_post_recv(qp, &wr, &bad) == 0);
}

/* The next completion is one of these. */
static struct ibv_wc expect(enum ibv_wc_opcode opcode, enum ibv_wc_status status)
{
        struct ibv_wc wc = wait_for(cq, NULL);

        CHECK(wc.status == status && (status || wc.opcode == opcode));
        return wc;
}

static void expect_nothing(void)
{
        struct ibv_wc wc;

        for (int i = 0; i < 20; i++)
                CHECK(!ibv_poll_cq(cq, 1, &wc));
}

/* The process has sent itself a message, which has come to `at`. */
static void check_message(struct ibv_wc wc, int from, int to, uint32_t at, uint32_t source, uint32_t length,
                          const union ibv_gid *destination)
{
        struct ibv_grh header;

        memcpy(&header, memory + at, sizeof header);
        CHECK(wc.qp_num == qps[to]->qp_num && wc.src_qp == qps[from]->qp_num &&
              wc.byte_len == HEADER + length);
        CHECK(wc.wc_flags == (IBV_WC_GRH | IBV_WC_WITH_IMM) && wc.imm_data == 5);
        CHECK(be32toh(header.version_tclass_flow) >> 28 == 6 && header.next_hdr == 0x1b);
        CHECK(!memcmp(&header.sgid, &here, 16) && !memcmp(&header.dgid, destination, 16));
        CHECK(!memcmp(memory + at + HEADER, memory + source, length) && !memory[at + HEADER + length]);
}

static void check_own(void)
{
        static const uint32_t lengths[] = {0, 1, 7, 8, 1000, 4095, 4096};

        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
                for (uint32_t j = 0; j < 5000; j++)
                        memory[j] = (unsigned char)(j * 7 + i);
                memset(memory + 10000, 0, 5000);
                receive(qps[1], i, piece(10000, 5000));
                CHECK(send_with(qps[0], own_ah, qps[1]->qp_num, KEY, piece(0, lengths[i])) == 0);
                expect(IBV_WC_SEND, IBV_WC_SUCCESS);
                struct ibv_wc wc = expect(IBV_WC_RECV, IBV_WC_SUCCESS);
                CHECK(wc.wr_id == i);
                check_message(wc, 0, 1, 10000, 0, lengths[i], &here);
        }
        /* The Q_Key of the sender itself. */
        receive(qps[1], 1, piece(10000, 5000));
        CHECK(send_with(qps[0], own_ah, qps[1]->qp_num, 0x80000000, piece(0, 10)) == 0);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        expect(IBV_WC_RECV, IBV_WC_SUCCESS);
        CHECK(send_with(qps[0], NULL, qps[1]->qp_num, KEY, piece(0, 10)) == EINVAL);
}

/* Lost, without an error: another Q_Key, nobody with the number, longer than the MTU, too small a
 * receive, which the next one gets. */
static void check_losses(void)
{
        receive(qps[1], 3, piece(10000, 100));
        CHECK(send_with(qps[0], own_ah, qps[1]->qp_num, KEY + 1, piece(0, 10)) == 0);
        CHECK(send_with(qps[0], own_ah, qps[1]->qp_num + 100, KEY, piece(0, 10)) == 0);
        CHECK(send_with(qps[0], own_ah, qps[1]->qp_num, KEY, piece(0, 4097)) == 0);
        CHECK(send_with(qps[0], own_ah, qps[1]->qp_num, KEY, piece(0, 61)) == 0);
        for (int i = 0; i < 4; i++)
                expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        expect_nothing();
        CHECK(send_with(qps[0], own_ah, qps[1]->qp_num, KEY, piece(0, 60)) == 0);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        CHECK(expect(IBV_WC_RECV, IBV_WC_SUCCESS).wr_id == 3);
        /* A message waits for a receive for a moment. */
        CHECK(send_with(qps[0], own_ah, qps[1]->qp_num, KEY, piece(0, 60)) == 0);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        expect_nothing();
        CHECK(datagrams_are_held());
        receive(qps[1], 4, piece(10000, 100));
        /* Whoever posts it has taken the message: the program may be about to sleep. */
        CHECK(completions_are_there(&cq_of(cq)->completions));
        CHECK(expect(IBV_WC_RECV, IBV_WC_SUCCESS).wr_id == 4);
        /* No longer: and not those behind it. */
        for (int i = 0; i < 10; i++) {
                CHECK(send_with(qps[0], own_ah, qps[1]->qp_num, KEY, piece(0, 60)) == 0);
                expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        }
        CHECK(send_with(qps[0], own_ah, qps[2]->qp_num, KEY, piece(0, 60)) == 0);
        receive(qps[2], 6, piece(10000, 100));
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        CHECK(expect(IBV_WC_RECV, IBV_WC_SUCCESS).wr_id == 6);
        receive(qps[1], 5, piece(10000, 100));
        expect_nothing();
        CHECK(send_with(qps[0], own_ah, qps[1]->qp_num, KEY, piece(0, 60)) == 0);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        CHECK(expect(IBV_WC_RECV, IBV_WC_SUCCESS).wr_id == 5);
}

static void check_errors(void)
{
        struct ibv_sge bad = piece(0, 10);

        bad.lkey++;
        receive(qps[3], 8, piece(0, 100));
        CHECK(send_with(qps[3], own_ah, qps[1]->qp_num, KEY, bad) == 0);
        expect(IBV_WC_SEND, IBV_WC_LOC_PROT_ERR);
        CHECK(expect(IBV_WC_RECV, IBV_WC_WR_FLUSH_ERR).wr_id == 8);
        CHECK(send_with(qps[3], own_ah, qps[1]->qp_num, KEY, piece(0, 10)) == 0);
        expect(IBV_WC_SEND, IBV_WC_WR_FLUSH_ERR);
        CHECK(ibv_destroy_qp(qps[3]) == 0);
        make_queue(3, NULL);
        bad = piece(0, 100);
        bad.lkey++;
        receive(qps[3], 9, bad);
        CHECK(send_with(qps[0], own_ah, qps[3]->qp_num, KEY, piece(0, 10)) == 0);
        for (int i = 0; i < 2; i++) {
                struct ibv_wc wc = wait_for(cq, NULL);

                CHECK(wc.status == (wc.wr_id == 9 ? IBV_WC_LOC_PROT_ERR : IBV_WC_SUCCESS));
        }
        CHECK(ibv_destroy_qp(qps[3]) == 0);
        make_queue(3, NULL);
}

static void check_shared(void)
{
        struct ibv_srq_init_attr wanted = {.attr = {.max_wr = 4, .max_sge = 1}};
        struct ibv_srq *srq = ibv_create_srq(pd, &wanted);
        struct ibv_sge sge = piece(10000, 100);
        struct ibv_recv_wr wr = {.wr_id = 12, .sg_list = &sge, .num_sge = 1}, *bad;

        CHECK(srq && ibv_destroy_qp(qps[3]) == 0);
        make_queue(3, srq);
        CHECK(send_with(qps[0], own_ah, qps[3]->qp_num, KEY, piece(0, 10)) == 0);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        expect_nothing();
        CHECK(ibv_post_srq_recv(srq, &wr, &bad) == 0);
        /* Nobody had to poll. */
        CHECK(completions_are_there(&cq_of(cq)->completions));
        CHECK(expect(IBV_WC_RECV, IBV_WC_SUCCESS).wr_id == 12);
        CHECK(ibv_destroy_qp(qps[3]) == 0 && ibv_destroy_srq(srq) == 0);
        make_queue(3, NULL);
}

/* --- with a peer */

static void pause_for(long ms)
{
        const struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};

        nanosleep(&time, NULL);
}

/* What has come to the peer. */
static void expect_record(uint32_t from, uint32_t to, uint32_t length)
{
        CHECK(record_next(&receives) == RECORD_OK && receives.now.operation == RECORD_DATAGRAM);
        CHECK(receives.now.length == length && receives.now.rkey == KEY && receives.now.immediate == 5);
        CHECK(receives.now.address == ((uint64_t)from << 32 | to));
        record_done(&receives);
}

static void check_seeking(void)
{
        uint32_t count = sought.count;

        CHECK(send_with(qps[0], peer_ah, PEER_FIRST + 3, KEY, piece(0, 10)) == 0);
        CHECK(sought.count == count + 1 && sought.wanted == PEER_FIRST + 3);
        CHECK(send_with(qps[0], peer_ah, PEER_FIRST + 4, KEY, piece(0, 10)) == 0);
        expect_nothing();
        /* It has not opened its queue pair yet. */
        peer_refused(sought.request, true);
        pause_for(20);
        expect_nothing();
        CHECK(sought.count == count + 2);
        come_up(SLOT);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        expect_record(qps[0]->qp_num, PEER_FIRST + 3, 10);
        expect_record(qps[0]->qp_num, PEER_FIRST + 4, 10);
        CHECK(sought.count == count + 2);
        go_down(SLOT);
        /* Nobody has it, then nobody says anything. */
        CHECK(send_with(qps[0], peer_ah, PEER_FIRST + 3, KEY, piece(0, 10)) == 0);
        peer_refused(sought.request, false);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        CHECK(send_with(qps[0], peer_ah, PEER_FIRST + 3, KEY, piece(0, 10)) == 0);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        CHECK(send_with(qps[0], peer_ah, PEER_FIRST + 5, KEY, piece(0, 10)) == 0);
        expect_nothing();
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
}

static void check_arrivals(void)
{
        unsigned char bytes[RECORD_DATAGRAM_BYTES] = {1, 2, 3};
        struct ibv_grh header;

        come_up(SLOT);
        receive(qps[1], 1, piece(10000, 5000));
        peer_says(PEER_FIRST - 1, qps[1]->qp_num, KEY, bytes, 3);
        peer_says(PEER_FIRST + 100, qps[1]->qp_num, KEY, bytes, 3);
        peer_says(PEER_FIRST, qps[1]->qp_num, KEY, bytes, DATAGRAM_MESSAGE + 1);
        peer_says(PEER_FIRST, DATAGRAM_GROUP, KEY, bytes, 15);
        peer_says(PEER_FIRST, DATAGRAM_GROUP, KEY, bytes, 16);
        peer_says(PEER_FIRST, qps[1]->qp_num, KEY - 1, bytes, 3);
        expect_nothing();
        peer_says(PEER_FIRST + 99, qps[1]->qp_num, KEY, bytes, 3);
        struct ibv_wc wc = expect(IBV_WC_RECV, IBV_WC_SUCCESS);
        CHECK(wc.src_qp == PEER_FIRST + 99 && wc.byte_len == 43 && !memcmp(memory + 10040, bytes, 3));
        memcpy(&header, memory + 10000, sizeof header);
        CHECK(!memcmp(&header.sgid, &there, 16) && !memcmp(&header.dgid, &here, 16));
        CHECK(atomic_load(&rings.views[1].ring->head) == sends.tail);
        /* What came before the end is taken, what comes after it is nobody's. */
        receive(qps[1], 2, piece(10000, 5000));
        peer_says(PEER_FIRST, qps[1]->qp_num, KEY, bytes, 3);
        go_down(SLOT);
        CHECK(expect(IBV_WC_RECV, IBV_WC_SUCCESS).wr_id == 2);
}

/* A peer that takes nothing delays its senders once. */
static void check_flood(void)
{
        uint64_t begin;

        come_up(SLOT);
        for (int i = 0; i < 2000; i++) {
                CHECK(send_with(qps[0], peer_ah, PEER_FIRST, KEY, piece(0, 4096)) == 0);
                expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        }
        begin = monotonic();
        for (int i = 0; i < 100; i++) {
                CHECK(send_with(qps[0], peer_ah, PEER_FIRST, KEY, piece(0, 4096)) == 0);
                expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        }
        CHECK(monotonic() - begin < 2000000000);
        while (record_next(&receives) == RECORD_OK)
                record_done(&receives);
        CHECK(send_with(qps[0], peer_ah, PEER_FIRST, KEY, piece(0, 7)) == 0);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        expect_record(qps[0]->qp_num, PEER_FIRST, 7);
        go_down(SLOT);
}

/* Somebody who sleeps until there is room hears of it. */
static void check_room(void)
{
        struct datagram_peer *peer = come_up(SLOT);
        struct queue_pair *queue = queue_of(qps[0]);
        struct ibv_wc wc;

        do
                CHECK(send_with(qps[0], peer_ah, PEER_FIRST, KEY, piece(0, 4096)) == 0);
        while (ibv_poll_cq(cq, 1, &wc));
        CHECK(!wait_has_begun(&rings.views[0].ring->senders, OWN_BELL) && !atomic_load(&peer->crowded));
        progress_make(queue, NULL, true);
        CHECK(wait_has_begun(&rings.views[0].ring->senders, OWN_BELL) && atomic_load(&peer->crowded));
        CHECK(atomic_load(&queue->open) == 1);
        while (record_next(&receives) == RECORD_OK)
                record_done(&receives);
        progress_make(queue, NULL, true);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        expect_record(qps[0]->qp_num, PEER_FIRST, 4096);
        go_down(SLOT);
}

/* A slot that another process has asked for may be one too many, unless this one waits for it. */
static void check_unasked(void)
{
        const uint32_t first = PEER_FIRST + 1000;
        const struct datagram_slot slot = {
            .from = here, .to = there, .first = first, .count = 100, .unasked = true};

        CHECK(!peer_may_come(&slot, 0) && peer_may_come(&slot, 1));
        CHECK(send_with(qps[0], peer_ah, first + 3, KEY, piece(0, 10)) == 0);
        CHECK(peer_may_come(&slot, 0));
        rings = new_rings(false);
        record_receive_from(&receives, rings.views[0]);
        add_peer(first, SLOT, &rings);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        expect_record(qps[0]->qp_num, first + 3, 10);
        go_down(SLOT);
}

/* The other side returns a slot: what is sent is lost for a second, and then it is asked again. */
static void check_returned(bool remote)
{
        const uint64_t second = 1000000000;
        struct datagram_peer *peer = come_up_at(SLOT, remote);
        uint32_t count = sought.count;
        uint64_t from = monotonic();
        struct place place;

        if (remote) {
                atomic_store(&rings.views[0].ring->ready, 0);
                atomic_store(&rings.views[1].ring->over, 1);
                datagrams_check();
        } else {
                CHECK(datagrams_end(peer, SLOT, true, &place));
        }
        CHECK(!peer_with(SLOT, epoch));
        free_rings(&rings);
        while (sought.count == count) {
                CHECK(send_with(qps[0], peer_ah, PEER_FIRST + 3, KEY, piece(0, 10)) == 0);
                expect(IBV_WC_SEND, IBV_WC_SUCCESS);
                usleep(10000);
        }
        CHECK(monotonic() - from >= second && sought.count == count + 1 && sought.wanted == PEER_FIRST + 3);
        come_up(SLOT);
        CHECK(send_with(qps[0], peer_ah, PEER_FIRST + 3, KEY, piece(0, 10)) == 0);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        expect_record(qps[0]->qp_num, PEER_FIRST + 3, 10);
        go_down(SLOT);
}

/* More peers than a poll looks at: all are heard, those that say something again as well. */
static void check_crowd(void)
{
        enum { PEERS = 50, ROUNDS = 3 };
        static struct rings made[PEERS];
        static struct record_sender senders[PEERS];
        bool heard[PEERS] = {false};

        for (uint32_t i = 0; i < PEERS; i++) {
                made[i] = new_rings(false);
                record_send_from(&senders[i], made[i].views[1]);
                add_peer(PEER_FIRST + 100 * i, SLOT + i, &made[i]);
        }
        for (int round = 0; round < ROUNDS; round++) {
                for (uint32_t i = 0; i < PEERS; i++) {
                        receive(qps[1], i, piece(10000, 100));
                        say(&senders[i], PEER_FIRST + 100 * i, qps[1]->qp_num, KEY, memory, 3);
                }
                for (uint32_t i = 0; i < PEERS; i++) {
                        uint32_t from = expect(IBV_WC_RECV, IBV_WC_SUCCESS).src_qp - PEER_FIRST;

                        CHECK(from < 100 * PEERS && !heard[from / 100]);
                        heard[from / 100] = true;
                }
                expect_nothing();
                memset(heard, 0, sizeof heard);
        }
        datagrams_arm();
        for (uint32_t i = 0; i < PEERS; i++) {
                struct datagram_peer *peer = peer_with(SLOT + i, epoch);
                struct place place;

                CHECK(wait_has_begun(&made[i].views[1].ring->receivers, OWN_BELL));
                CHECK(peer && datagrams_end(peer, SLOT + i, false, &place));
                free_rings(&made[i]);
        }
}

/* A peer of another host: nothing is put before it is ready, and when its rings say that it is gone
 * another one is asked for, though what it has sent is taken. */
static void check_remote(void)
{
        struct queue_pair *queue = queue_of(qps[0]);
        struct datagram_peer *peer;
        struct rings before;
        uint32_t count = sought.count;

        for (int way = 0; way < 2; way++) {
                peer = come_up_at(SLOT, true);
                CHECK(datagrams_meet(1));
                CHECK(send_with(qps[0], peer_ah, PEER_FIRST, KEY, piece(0, 7)) == 0);
                CHECK(atomic_load(&queue->open) == 1 && record_next(&receives) == RECORD_WAIT);
                atomic_store(&rings.views[0].ring->ready, 1);
                expect(IBV_WC_SEND, IBV_WC_SUCCESS);
                expect_record(qps[0]->qp_num, PEER_FIRST, 7);
                receive(qps[1], 2, piece(10000, 5000));
                peer_says(PEER_FIRST, qps[1]->qp_num, KEY, memory, 3);
                atomic_store(way ? &rings.views[1].ring->over : &rings.views[1].ring->broken, 1);
                CHECK(send_with(qps[0], peer_ah, PEER_FIRST, KEY, piece(0, 9)) == 0);
                CHECK(sought.count == ++count && atomic_load(&queue->open) == 1);
                datagrams_check();
                CHECK(peer_state(peer) == PEER_FREE);
                CHECK(expect(IBV_WC_RECV, IBV_WC_SUCCESS).wr_id == 2);
                before = rings;
                come_up(SLOT + 1);
                free_rings(&before);
                expect(IBV_WC_SEND, IBV_WC_SUCCESS);
                expect_record(qps[0]->qp_num, PEER_FIRST, 9);
                datagrams_check();
                go_down(SLOT + 1);
        }
}

/* Two sides that poll on one core know of it. */
static void check_core(void)
{
        come_up(SLOT);
        CHECK(!datagrams_meet(5) && atomic_load(&rings.views[1].ring->receiver_cpu) == 5);
        atomic_store(&rings.views[0].ring->receiver_cpu, 4);
        CHECK(!datagrams_meet(5) && datagrams_meet(4));
        go_down(SLOT);
}

static void check_groups(void)
{
        unsigned char bytes[20];
        uint32_t count = sought.count;

        come_up(SLOT);
        CHECK(ibv_attach_mcast(qps[1], &there, 0) == EINVAL && ibv_detach_mcast(qps[1], &group, 0) == EINVAL);
        for (int i = 1; i < 3; i++) {
                CHECK(ibv_attach_mcast(qps[i], &group, 0) == 0);
                receive(qps[i], (uint64_t)i, piece(10000 * (uint32_t)i, 100));
        }
        memset(memory, 0, SIZE);
        memset(memory, 3, 20);
        CHECK(send_with(qps[0], group_ah, DATAGRAM_GROUP, KEY, piece(0, 20)) == 0);
        CHECK(sought.count == count + 1 && sought.wanted == DATAGRAM_GROUP);
        expect_nothing();
        group_change(&here, &group, SLOT, true);
        group_change(&here, &group, SLOT + 1, true);
        group_answered(sought.request);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        for (int i = 0; i < 2; i++) {
                struct ibv_wc wc = expect(IBV_WC_RECV, IBV_WC_SUCCESS);

                check_message(wc, 0, (int)wc.wr_id, 10000 * (uint32_t)wc.wr_id, 0, 20, &group);
        }
        expect_record(qps[0]->qp_num, DATAGRAM_GROUP, 36);
        memcpy(bytes, &group, 16);
        CHECK(ibv_detach_mcast(qps[1], &group, 0) == 0);
        receive(qps[2], 2, piece(20000, 100));
        receive(qps[1], 1, piece(10000, 100));
        peer_says(PEER_FIRST + 1, DATAGRAM_GROUP, KEY, bytes, 20);
        CHECK(expect(IBV_WC_RECV, IBV_WC_SUCCESS).wr_id == 2);
        expect_nothing();
        group_change(&here, &group, SLOT, false);
        CHECK(ibv_detach_mcast(qps[2], &group, 0) == 0);
        CHECK(send_with(qps[0], group_ah, DATAGRAM_GROUP, KEY, piece(0, 20)) == 0);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        CHECK(record_next(&receives) == RECORD_WAIT);
        go_down(SLOT);
}

/* Another router: what its predecessor gave goes on until it gives something else. */
static void check_router(void)
{
        uint32_t count;
        struct rings before;

        come_up(SLOT);
        before = rings;
        count = sought.count;
        epoch++;
        for (int i = 0; i < 3; i++) {
                CHECK(send_with(qps[0], peer_ah, PEER_FIRST, KEY, piece(0, 7)) == 0);
                expect(IBV_WC_SEND, IBV_WC_SUCCESS);
                expect_record(qps[0]->qp_num, PEER_FIRST, 7);
        }
        CHECK(sought.count == count + 1 && !peer_with(SLOT, epoch));
        struct datagram_slot slot = {.from = here, .to = there, .first = PEER_FIRST};
        struct datagram_peer *peer = peer_before(&slot);
        struct place place;
        CHECK(peer && datagrams_end(peer, SLOT, false, &place));
        free_rings(&before);
        come_up(SLOT);
        CHECK(send_with(qps[0], peer_ah, PEER_FIRST, KEY, piece(0, 7)) == 0);
        expect(IBV_WC_SEND, IBV_WC_SUCCESS);
        expect_record(qps[0]->qp_num, PEER_FIRST, 7);
        go_down(SLOT);
}

/* --- anything may be in a ring */

static void write_anything(uint64_t *state)
{
        unsigned char *at = (unsigned char *)rings.views[1].ring + RING_HEADER;
        struct ring *words = rings.views[1].ring;

        for (uint64_t i = 0; i < 1 + any(state, 64); i++)
                at[any(state, SMALL_SIZE)] = (unsigned char)any(state, 256);
        if (any(state, 4) == 0)
                atomic_store(&words->tail,
                             any(state, 3) ? any(state, 2 * RING_SIZE) : any(state, UINT64_MAX));
        if (any(state, 4) == 0)
                atomic_store(&rings.views[0].ring->head, any(state, UINT64_MAX));
        if (any(state, 8) == 0)
                atomic_store(&words->base, any(state, UINT64_MAX));
}

static void check_hostile(unsigned int seconds)
{
        time_t end = time(NULL) + (time_t)seconds;
        uint64_t state = seed;
        struct ibv_wc wc;

        while (time(NULL) < end) {
                unsigned char bytes[RECORD_DATAGRAM_BYTES] = {0};

                come_up(SLOT);
                memset(memory + 50000, 9, 100);
                CHECK(ibv_attach_mcast(qps[2], &group, 0) == 0);
                memcpy(bytes, &group, 16);
                for (int i = 0; i < 50; i++) {
                        receive(qps[any(&state, 2) + 1], 2, piece(10000, (uint32_t)any(&state, 5000)));
                        for (int j = 0; j < 3 && atomic_load(&rings.views[1].ring->head) == sends.tail; j++)
                                peer_says(PEER_FIRST + (uint32_t)any(&state, 120),
                                          any(&state, 3) ? qps[any(&state, 3)]->qp_num : DATAGRAM_GROUP, KEY,
                                          bytes, (uint32_t)any(&state, sizeof bytes + 1));
                        if (i % 5 == 0)
                                write_anything(&state);
                        CHECK(send_with(qps[0], peer_ah, PEER_FIRST, KEY,
                                        piece(0, (uint32_t)any(&state, 5000))) == 0);
                        while (ibv_poll_cq(cq, 1, &wc))
                                CHECK(wc.status == IBV_WC_SUCCESS && wc.byte_len <= 5000);
                }
                go_down(SLOT);
                CHECK(memory[49999] == 0 && memory[50000] == 9);
                for (int i = 1; i < 3; i++) {
                        CHECK(ibv_destroy_qp(qps[i]) == 0);
                        make_queue(i, NULL);
                }
                while (ibv_poll_cq(cq, 1, &wc))
                        ;
        }
        check_own();
}

/* --- threads */

static _Atomic bool over;

static void *send_all_the_time(void *number)
{
        uint64_t state = seed + *(unsigned int *)number;
        uint32_t at = 1000 * *(unsigned int *)number;
        struct ibv_qp *qp = qps[*(unsigned int *)number];

        while (!atomic_load(&over)) {
                bool to_peer = any(&state, 3) == 0;
                uint32_t to = to_peer ? PEER_FIRST : qps[any(&state, QUEUES)]->qp_num;
                int error = send_with(qp, to_peer ? peer_ah : own_ah, to, KEY, piece(at, 8));
                struct ibv_wc wc;

                CHECK(!error || error == ENOMEM);
                while (ibv_poll_cq(cq, 1, &wc)) {
                        CHECK(wc.status == IBV_WC_SUCCESS);
                        if (wc.opcode != IBV_WC_RECV)
                                continue;
                        CHECK(wc.byte_len == HEADER + 8);
                        for (int i = 0; i < QUEUES; i++)
                                if (qps[i]->qp_num == wc.qp_num)
                                        receive(qps[i], 2, piece(20000 + 5000 * (uint32_t)i, 5000));
                }
        }
        return NULL;
}

static void check_threads(unsigned int seconds)
{
        pthread_t threads[QUEUES];
        unsigned int numbers[QUEUES];
        time_t end = time(NULL) + (time_t)seconds;
        uint64_t bytes = 7, state = seed;

        come_up(SLOT);
        for (unsigned int i = 0; i < QUEUES; i++) {
                for (int j = 0; j < 8; j++)
                        receive(qps[i], 2, piece(20000 + 5000 * i, 5000));
                numbers[i] = i;
                CHECK(pthread_create(&threads[i], NULL, send_all_the_time, &numbers[i]) == 0);
        }
        while (time(NULL) < end) {
                if (atomic_load(&rings.views[1].ring->head) == sends.tail)
                        peer_says(PEER_FIRST, qps[any(&state, QUEUES)]->qp_num, KEY, &bytes, 8);
                while (record_next(&receives) == RECORD_OK)
                        record_done(&receives);
        }
        atomic_store(&over, true);
        for (int i = 0; i < QUEUES; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
        go_down(SLOT);
}

int main(int count, char **arguments)
{
        context = open_device();
        start();
        CHECK(count == 2 || count == 4);
        seed = count == 4 ? strtoull(arguments[3], NULL, 10) : 1;
        if (!strcmp(arguments[1], "hostile")) {
                check_hostile((unsigned int)atoi(arguments[2]));
        } else if (!strcmp(arguments[1], "threads")) {
                check_threads((unsigned int)atoi(arguments[2]));
        } else {
                check_own();
                check_losses();
                check_errors();
                check_shared();
                check_seeking();
                check_unasked();
                check_returned(false);
                check_returned(true);
                check_arrivals();
                check_flood();
                check_room();
                check_core();
                check_remote();
                check_crowd();
                check_groups();
                check_router();
        }
        end_all();
        CHECK(ibv_close_device(context) == 0);
        return 0;
}
